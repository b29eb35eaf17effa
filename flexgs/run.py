"""One scene from training to cuts, in one folder; the same function under the command line, Ray Train and Ray
Tune.

    config.json  metrics.jsonl  results.json  model/  checkpoints/step_00002000/  cuts/  renders/

model/, cuts/, renders/ and results.json of a finished run change together (files.publish); a first model is
there before it is measured. Whoever writes into the folder owns it (files.only_one).
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from flexgs.config import Config, check_same_method, percent_name
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.evaluate import chosen, evaluate
from flexgs.files import (
    atomic_file,
    atomic_folder,
    make_folder,
    newest,
    publish,
    read_jsonl,
    staged,
    tidy,
    write_json,
)
from flexgs.formats import as_stored, read, save
from flexgs.image import lpips, quality
from flexgs.inputs import read_json, shown, typed
from flexgs.report.pictures import write_curve, write_grid
from flexgs.scene import Scene
from flexgs.scene.identity import OTHER_OUTPUT, check_same_capture
from flexgs.signals import held
from flexgs.splats import Splats
from flexgs.training.checkpoint import DamagedError, checkpoints
from flexgs.training.memory import expected_disk
from flexgs.training.trainer import Report, Trainer

RESULTS: dict[str, Any] = {"scene": str, "preset": str, "steps": int, "train_seconds": float,
                           "protocol": dict}
"""What a results.json has at least, beside ratios."""
PROTOCOL = ("train_views", "test_views", "width", "height", "points")
"""The numbers in a protocol that has the digest of a capture."""
FIGURES = ("psnr", "ssim", "splats", "mb")
"""What is measured at every ratio; other figures may be there, or be null."""


class Session(Protocol):
    """Where a run reports to and keeps its checkpoints."""

    def checkpoints(self) -> list[Path]:
        """The folders to go on from, the best first, on every worker: the next is for where one is
        damaged."""

    def progress(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics at a step; called on rank 0 only."""

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint: write(folder) fills an empty folder. Called on all workers; only rank 0
        writes."""

    def stop(self, reported: bool) -> bool:
        """Whether to keep a checkpoint and end now; asked on all workers after each step, with one answer for
        all. reported: whether the step has been reported."""


class StoppedError(Exception):
    """The session has ended the run early; the same run goes on from its checkpoint."""


class LocalSession:
    """Checkpoints in the run folder, progress to a callable. Where there is no checkpoint yet, the run begins
    with `start`."""

    def __init__(self, folder: Path, group: Group, on_progress: Callable[[int, dict[str, Any]], None],
                 start: Path | None = None):
        self.folder, self.group, self.progress, self.start = folder / "checkpoints", group, on_progress, start

    def checkpoints(self) -> list[Path]:
        return [*checkpoints(self.folder), *([self.start] if self.start else [])]

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self.group.rank == 0:
            name = f"step_{step:08d}"
            with atomic_folder(self.folder / name) as folder:
                write(folder)
            found = checkpoints(self.folder)
            # damaged, else the run had gone on from there
            newer = [path for path in found if path.name > name]
            for old in newer + [path for path in found if path.name <= name][2:]:
                shutil.rmtree(old)

    def stop(self, reported: bool) -> bool:
        return False


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results.json of a run, or None if it has none. UserError if it is damaged."""
    path = newest(folder, "results.json")
    if not path.exists():
        return None
    results = read_json(path, advice="remove it, and the same command evaluates again")
    for key, kind in RESULTS.items():
        typed(kind, results.get(key), f"{path}: {key}")
    for key in PROTOCOL if "digest" in results["protocol"] else ():
        typed(int, results["protocol"].get(key), f"{path}: {key} of the protocol")
    check_figures(results.get("ratios"), FIGURES, str(path))
    return results


def check_figures(ratios: Any, names: Sequence[str], where: str) -> None:
    """UserError, which names the file, unless ratios are figures of these names at some ratios: {"0.05":
    {"psnr": 20.5}}."""
    rows: dict[str, dict[str, float | None]] = typed(dict[str, dict[str, float | None]], ratios,
                                                     f"{where}: ratios")
    if not rows:
        raise UserError(f"{where}: found no ratios, expected at least one")
    for ratio, row in rows.items():
        with contextlib.suppress(ValueError):
            if 0 < float(ratio) <= 1:
                for name in names:
                    typed(float, row.get(name), f"{where}: {name} at ratio {ratio}")
                continue
        raise UserError(f"{where}: found the ratio {shown(ratio)}, expected one above 0 and at most 1")
    if len({float(ratio) for ratio in rows}) < len(rows):
        raise UserError(f"{where}: found one ratio under two names, expected each once")


def recorded_capture(folder: Path) -> Path:
    """Where the run in folder, or around a model folder, found its capture. UserError if it does not say, or
    that is gone."""
    results = read_results(folder) or read_results(folder.parent) or {}
    if not isinstance(where := results.get("capture"), str):
        raise UserError(f"{folder}: does not say where its capture is; give it with --scene")
    if not os.path.isdir(where):  # false too for what is no name of a folder
        raise UserError(f"{folder}: its capture was in {where}, which is not there; give it with --scene")
    return Path(where)


def finished(folder: Path, config: Config, scene: Scene) -> dict[str, Any] | None:
    """The results of a run that this configuration has nothing to add to, or None. UserError if they are of
    another method or another capture.

    A run that is only to be evaluated in another way, or whose SSIM was computed otherwise, is not finished:
    run() trains nothing and measures again.
    """
    results = read_results(folder)
    if results is None:
        return None
    theirs = Config.load(folder / "config.json")
    check_same_method(theirs, config, True, folder)
    check_same_capture(results["protocol"].get("digest"), scene.digest, folder, OTHER_OUTPUT)
    same_ssim = results["protocol"].get("ssim") == quality.PROTOCOL["ssim"]
    done = results["steps"] >= config.steps and theirs.evaluation == config.evaluation and same_ssim
    return results if done and newest(folder, "model").is_dir() else None


def resume(trainer: Trainer, session: Session) -> None:
    """Go on from the newest whole checkpoint, if there is any; a line says which are damaged. UserError if
    all are."""
    damaged: list[DamagedError] = []
    for checkpoint in session.checkpoints():
        try:
            trainer.load(checkpoint)
        except DamagedError as e:
            damaged.append(e)
            continue
        break
    else:
        if damaged:
            raise UserError(f"{damaged[0]}; no older one is whole: remove them, and the "
                            "same command begins anew")
    if damaged and trainer.group.rank == 0:
        print(f"flexgs: {damaged[0]}; going on from the views {trainer.step}", file=sys.stderr, flush=True)


def train(trainer: Trainer, session: Session, report: Report, until: int | None = None) -> None:
    """Trainer.fit, which Ctrl-C and SIGTERM end after a step, with a checkpoint; KeyboardInterrupt says
    so."""
    with held() as interrupted:
        trainer.fit(report, session.checkpoint, until,
                    lambda reported: session.stop(reported) or interrupted() is not None)
        if signal := interrupted():
            raise type(signal)(f"the checkpoint of {trainer.step:,} of "
                               f"{trainer.config.steps:,} views is kept; the same command "
                               "continues from there")


def check_before(config: Config, scene: Scene, splats: Splats, folder: Path) -> None:
    """UserError for what would end the run after its last view: no test view, LPIPS weights that are not
    there, a format that cannot be written here. A line if the disk may be too small."""
    options = config.evaluation
    chosen(scene.test, options.views)
    # those that are downloaded may be missing
    if options.lpips_weights or os.environ.get(lpips.WEIGHTS_VARIABLE):
        for net in options.lpips:
            lpips.load(net, options.lpips_weights, options.lpips_range)
    as_stored(splats[:64].detach(), options.format, scene.train)
    make_folder(folder / "checkpoints")
    need = expected_disk(config)
    if (free := shutil.disk_usage(folder).free) < need:
        print(f"flexgs: {folder}: {free / 1e9:.1f} GB of disk are free, and the run may take "
              f"{need / 1e9:.1f} GB; --base.max-splats lowers that", file=sys.stderr, flush=True)


def run(config: Config, scene: Scene, folder: Path, group: Group, session: Session,
        device: str = "cpu") -> dict[str, Any]:
    """Train scene (or continue), evaluate it, write model, cuts and pictures into folder; returns
    results.json.

    StoppedError if the session stops it before its last view; KeyboardInterrupt for Ctrl-C, with a
    checkpoint.
    """
    config.check()
    base = read(config.base.ply) if config.base.ply else None
    if group.rank == 0:
        tidy(make_folder(folder))  # before the work, not after it
    start = time.perf_counter()
    trainer = Trainer(config, scene, group, device, base)
    resume(trainer, session)
    check_before(config, scene, trainer.splats, folder)
    if group.rank == 0:
        write_json(folder / "config.json", config.to_dict())
        _forget_after(folder / "metrics.jsonl", trainer.step)

    def report(step: int, metrics: dict[str, Any]) -> None:
        with (folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        session.progress(step, metrics)

    train(trainer, session, report if group.rank == 0 else lambda step, metrics: None)
    if trainer.step < config.steps:
        raise StoppedError(f"{folder}: stopped at {trainer.step} of {config.steps} views")
    training_ended = time.perf_counter()
    model = trainer.model()
    # the final order is a part of the training
    train_seconds = trainer.seconds + time.perf_counter() - training_ended
    if group.rank == 0:
        first = not newest(folder, "results.json").exists()
        model.save(_made(staged(folder) / "model"))
        for ratio in config.evaluation.ratios:
            save(model.cut(ratio), _made(staged(folder) / "cuts") / cut_name(scene.name, ratio))
        if first:
            # a model is more than its figures; one that has figures is replaced when the new ones are there
            publish(folder)
    measured = evaluate(model, scene, config.evaluation, config.background, group)
    results = {
        "scene": scene.name, "capture": str(scene.root.absolute()), "preset": config.preset,
        "seed": config.seed, "steps": config.steps, "git_sha": git_sha(), "time": round(time.time(), 3),
        "train_seconds": round(train_seconds, 1), "seconds": 0.0, "splats": len(model.splats),
        "protocol": {**scene.protocol, **measured["protocol"]}, "ratios": measured["ratios"],
    }
    if group.rank == 0:
        renders = _made(staged(folder) / "renders")
        write_grid(model, scene, config.evaluation.ratios, config.background, renders / "grid.png")
        write_curve({config.preset: results["ratios"]}, renders / "psnr_by_ratio.png")
        results["seconds"] = round(time.perf_counter() - start, 1)
        write_json(staged(folder) / "results.json", results)
        publish(folder)
    return results


def cut_name(scene: str, ratio: float) -> str:
    """berlin_005.00pct.ply: sorts by ratio, and has as many digits as it needs."""
    whole, _, rest = percent_name(ratio).partition(".")
    return f"{scene}_{whole:0>3}.{rest:0<2}pct.ply"


def git_sha() -> str | None:
    """The commit of the source that is running; outside a checkout (submitted job, image) $FLEXGS_GIT_SHA, or
    None."""
    here, found = Path(__file__).parent, ""
    with contextlib.suppress(FileNotFoundError):  # no git
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True,
                               text=True, check=False).stdout.strip()
    return found or os.environ.get("FLEXGS_GIT_SHA") or None


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines that a resumed run is going to write again, and those that are none; says so if it was
    not a kill that has cut off the last one. What is no file, or a link to one, becomes a file."""
    if not os.path.lexists(path):
        return
    rows = history(path)
    if (lost := len(path.read_bytes().splitlines()) - len(rows) if path.is_file() else 0) > 1:
        print(f"flexgs: {path}: {lost} lines are damaged and left out", file=sys.stderr, flush=True)
    with atomic_file(path) as out:
        out.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def history(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: rows with a number as their step."""
    return [row for row in read_jsonl(path, "step") if isinstance(row["step"], int)]


def progress_line(scene: str, step: int, m: dict[str, Any]) -> str:
    """One line a person can follow."""
    eta = m["eta_seconds"]
    return (f"{scene:14} stage {m['stage']}  {step:>6}/{m['steps']}  {m['views_per_second']:6.1f} views/s  "
            f"ETA {int(eta // 60):3}:{int(eta % 60):02}  {m['splats']:>9,} Gaussians  {m['psnr']:5.2f} dB "
            f"on a training view  {m['memory_mb'] / 1000:.1f} GB")


def print_progress(scene: str, step: int, metrics: dict[str, Any]) -> None:
    print(progress_line(scene, step, metrics), flush=True)
