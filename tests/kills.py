"""Kills and damage: what is left of a run folder, and whether the same command ends as if nothing had
happened.

    python -m tests.kills --kills 100 --damaged 40

A tiny capture is trained to 40 views and, in the same folder, to 80. Processes are killed with SIGKILL before
a random file operation (audit hooks of Python tell of each) or after a random time, and started again until
one gets through; the model, the cuts and the history are then those of a run without a kill, bit for bit, and
nothing else lies there. After each kill, a model and a results.json that are there are of the same training.
Then files of run folders are cut off, changed by a bit, removed or
replaced: the same command ends with the same model, or says in one line, with exit code 2, what is not whole.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexgs.files import read_jsonl

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.utime"}
SETTINGS = ["--preset", "smoke", "--data.factor", "1", "--base.max-splats", "300", "--base.refine-every",
            "10", "--checkpoint-every", "10", "--report-every", "10", "--evaluation.lpips",
            "--evaluation.ratios", "0.1", "1", "--evaluation.views", "even"]
STEPS = (40, 80)


class Hook:
    """Counts the file operations of this process below a folder, and calls `act` at each from the limit-th
    on."""

    def __init__(self) -> None:
        self.folder, self.count, self.limit = "", 0, 0
        self.act: Callable[[], None] = lambda: None
        sys.addaudithook(self)  # for ever: hooks cannot be removed

    def __call__(self, event: str, args: tuple) -> None:
        writes = event in CHANGES or (event == "open" and len(args) == 3 and args[2]
                                      and args[2] & (os.O_WRONLY | os.O_RDWR))
        if (self.folder and writes and str(args[0]).startswith(self.folder)
            and not str(args[0]).endswith(".lock")):
            self.count += 1
            if self.limit and self.count >= self.limit:
                self.act()

    def watch(self, folder: Path | None, limit: int = 0, act: Callable[[], None] = lambda: None) -> None:
        """From now on, below this folder; none: nothing more."""
        self.folder, self.count, self.limit, self.act = str(folder or ""), 0, limit, act


def state(run: Path) -> dict[str, str]:
    """What a finished run has to show, by file, as digests; results and history without their times."""
    found = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in sorted(run.glob("*/*")) if p.parent.name in ("model", "cuts") and p.suffix != ".json"}
    if (run / "results.json").exists():
        rows = json.loads((run / "results.json").read_text())["ratios"]
        found["results"] = str({ratio: (row["psnr"], row["ssim"], row["splats"]) for ratio,
                                row in rows.items()})
    found["history"] = str([row["step"] for row in read_jsonl(run / "metrics.jsonl", "step")])
    return found


def leftovers(run: Path) -> list[str]:
    """What lies in a run folder and has no business there."""
    return [str(p.relative_to(run)) for p in run.rglob("*") if p.name.startswith(".") and p.name != ".lock"]


def contradiction(run: Path, good: dict[int, dict[str, str]]) -> str:
    """What a kill has left that is of two trainings at once; empty if nothing is."""
    results, model = run / "results.json", run / "model" / "model.safetensors"
    if not results.exists() or not model.exists():
        return ""
    steps = json.loads(results.read_text())["steps"]
    same = hashlib.sha256(model.read_bytes()).hexdigest() == good[steps]["model/model.safetensors"]
    return "" if same else f"results of {steps} views beside another model"


@dataclass
class Ended:
    """How a process ended: its exit code, or minus the signal; what it said; the file operations and seconds
    it took."""

    code: int
    said: str
    operations: int
    seconds: float


class Command:
    """flexgs train, each time in a child of this process, which has imported everything."""

    def __init__(self, capture: Path, work: Path):
        from flexgs import cli
        from flexgs.run import run  # noqa: F401  (what the children need)

        self.cli, self.capture, self.work, self.hook = cli, capture, work, Hook()

    def __call__(self, output: Path, steps: int, operation: int = 0, seconds: float = 0.0) -> Ended:
        """Killed before that operation or after these seconds, if that comes before the end."""
        out, start = self.work / "output.txt", time.monotonic()
        if not (child := os.fork()):
            with out.open("w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            args = [str(self.capture), "--output", str(output), "--steps", str(steps), *SETTINGS]
            code = 1
            try:
                self.hook.watch(output, operation, lambda: os.kill(os.getpid(), signal.SIGKILL))
                code = self.cli.guard(lambda: self.cli.parse(self.cli.Train, args, "flexgs train")())
                print(f"operations {self.hook.count}")
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if seconds and time.monotonic() - start > seconds:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        said = out.read_text()
        count = int(said.rpartition("operations ")[2]) if "operations " in said else 0
        return Ended(os.waitstatus_to_exitcode(ended[1]), said, count, time.monotonic() - start)


def damage(run: Path, draw: random.Random) -> str:
    """Do something to a file of a run; what was done."""
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock"
                   and p.parent.name not in ("cuts", "renders"))
    path = draw.choice(files)
    raw = bytearray(path.read_bytes())
    how = draw.choice(["cut off", "a bit changed", "removed", "replaced", "emptied", "a folder"])
    if how == "a bit changed":
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    if how == "replaced":
        raw = bytearray(draw.choice([b"[1]\n", b"\xff\xfe", b"[" * 100_000, b"{}", bytes(1000)]))
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "removed":
        path.write_bytes(raw[:draw.randrange(len(raw)) if how == "cut off" else 0 if how == "emptied"
                             else len(raw)])
    return f"{path.relative_to(run)}: {how}"


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.kills")
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--damaged", type=int, default=40)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    from flexgs.demo.synthetic import write_synthetic

    draw, work, wrong = random.Random(asked.seed), Path(tempfile.mkdtemp()), 0
    train = Command(write_synthetic("studio", work / "studio", views=18, width=64, height=48), work)
    good, took, parts = {}, {}, work / "parts"
    for steps in STEPS:
        took[steps] = train(work / "whole", steps)
        assert took[steps].code == 0, took[steps].said
        good[steps] = state(work / "whole/studio")
        shutil.copytree(work / "whole", parts / str(steps))
    print({steps: (ended.operations, round(ended.seconds, 1)) for steps, ended in took.items()},
          "operations, seconds of a run")

    kills = rounds = 0
    while kills < asked.kills:
        rounds += 1
        run = work / f"run{rounds}"
        for steps in STEPS:
            while kills < asked.kills:
                by = draw.random() < 0.6
                ended = train(run, steps, *((draw.randint(1, took[steps].operations), 0.0) if by else
                                            (0, draw.uniform(0.0, took[steps].seconds))))
                if ended.code == 0:
                    break
                kills += 1
                if ended.code != -signal.SIGKILL or (what := contradiction(run / "studio", good)):
                    wrong += 1
                    print(f"round {rounds}, {steps} views: {ended.code} "
                          f"{what if ended.code < 0 else ended.said}")
            ended = train(run, steps)
            found, left = state(run / "studio"), leftovers(run / "studio")
            if ended.code or found != good[steps] or left:
                wrong += 1
                print(f"round {rounds}, {steps} views: {ended.code}, {ended.said[-300:]}, differs in "
                      f"{[k for k, v in good[steps].items() if found.get(k) != v]}, {left}")
        shutil.rmtree(run)
    print(f"{kills} kills in {rounds} runs: {wrong} wrong")

    went_on = refused = 0
    for i in range(asked.damaged):
        run, before = work / f"damaged{i}", wrong
        shutil.copytree(parts / "40", run)
        kind = ("interrupted", "trained", "finished")[i % 3]
        if kind != "finished":
            (run / "studio/results.json").unlink()
        if kind == "interrupted":
            shutil.rmtree(run / "studio/checkpoints/step_00000040")
            for name in ("model", "cuts", "renders"):
                shutil.rmtree(run / "studio" / name)
        what = damage(run / "studio", draw)
        ended = train(run, 40)
        lines = [line for line in ended.said.splitlines() if line.startswith("flexgs: ")]
        if ended.code == 0:
            went_on += 1
            found = state(run / "studio")
            if "metrics.jsonl" in what:  # what it has lost nobody has
                found["history"] = good[40]["history"]
            wrong += found != good[40] or bool(leftovers(run / "studio"))
        else:
            refused += 1
            wrong += ended.code != 2 or len(lines) != 1 or "Traceback" in ended.said
        print(f"{kind} run, {what}: {ended.code} "
              f"{lines[0][:150] if lines else ''}{'   WRONG' if wrong > before else ''}")
        shutil.rmtree(run)
    print(f"{asked.damaged} damaged: {went_on} went on to the same model, {refused} said in one "
          f"line what is not whole; {wrong} wrong in all")
    shutil.rmtree(work)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
