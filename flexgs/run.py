"""One scene from training to cuts, in one folder; the same function under the command line, Ray Train and Ray Tune.

    config.json  metrics.jsonl  results.json  model/  checkpoints/step_00002000/  cuts/  renders/
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from flexgs.config import Config, check_same_method
from flexgs.deploy.export import read_ply, write_ply
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.evaluate.metrics import evaluate
from flexgs.evaluate.pictures import write_curve, write_grid
from flexgs.files import atomic_file, atomic_folder, make_folder, write_json
from flexgs.scene import Scene
from flexgs.training.checkpoint import latest_checkpoint
from flexgs.training.trainer import Trainer


class Session(Protocol):
    """Where a run reports to and keeps its checkpoints."""

    def latest_checkpoint(self) -> Path | None:
        """The folder of the newest complete checkpoint, on every worker."""

    def progress(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics at a step; called on rank 0 only."""

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint: write(folder) fills an empty folder. Called on all workers; only rank 0 writes."""

    def stop(self) -> bool:
        """Whether to keep a checkpoint and end now; asked on all workers after each report, with one answer for all."""


class StoppedError(Exception):
    """The session has ended the run early; the same run goes on from its checkpoint."""


class LocalSession:
    """Checkpoints in the run folder, progress to a callable. Where there is no checkpoint yet, the run begins with `start`."""

    def __init__(self, folder: Path, group: Group, on_progress: Callable[[int, dict[str, Any]], None],
                 start: Path | None = None):
        self.checkpoints, self.group, self.progress, self.start = folder / "checkpoints", group, on_progress, start

    def latest_checkpoint(self) -> Path | None:
        return latest_checkpoint(self.checkpoints) or self.start

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self.group.rank == 0:
            with atomic_folder(self.checkpoints / f"step_{step:08d}") as folder:
                write(folder)
            for old in sorted(self.checkpoints.glob("step_*"))[:-2]:
                shutil.rmtree(old)

    def stop(self) -> bool:
        return False


def finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The results of a run that this configuration has nothing to add to, or None. UserError if they are of another method.

    A run that is only to be evaluated in another way is not finished: run() trains nothing and measures again.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not readable ({e}); remove it to evaluate again") from None
    theirs = Config.load(folder / "config.json")
    check_same_method(theirs, config, True, folder)
    return results if results["steps"] >= config.steps and theirs.evaluation == config.evaluation else None


def run(config: Config, scene: Scene, folder: Path, group: Group, session: Session, device: str = "cpu") -> dict[str, Any]:
    """Train scene (or continue), evaluate it, write model, cuts and pictures into folder; returns results.json.

    StoppedError if the session stops it before its last view.
    """
    config.check()
    base = read_ply(config.base.ply) if config.base.ply else None
    if group.rank == 0:
        make_folder(folder)  # before the work, not after it
    start = time.perf_counter()
    trainer = Trainer(config, scene, group, device, base)
    checkpoint = session.latest_checkpoint()
    if checkpoint is not None:
        trainer.load(checkpoint)
    if group.rank == 0:
        write_json(folder / "config.json", config.to_dict())
        _forget_after(folder / "metrics.jsonl", trainer.step)

    def report(step: int, metrics: dict[str, Any]) -> None:
        with (folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        session.progress(step, metrics)

    trainer.fit(report if group.rank == 0 else lambda step, metrics: None, session.checkpoint, stop=session.stop)
    if trainer.step < config.steps:
        raise StoppedError(f"{folder}: stopped at {trainer.step} of {config.steps} views")
    training_ended = time.perf_counter()
    model = trainer.model()
    train_seconds = trainer.seconds + time.perf_counter() - training_ended  # the final order is a part of the training
    measured = evaluate(model, scene, config.evaluation, config.background, group)
    results = {
        "scene": scene.name, "capture": str(scene.root.absolute()), "preset": config.preset, "seed": config.seed,
        "steps": config.steps, "git_sha": git_sha(), "time": round(time.time(), 3),
        "train_seconds": round(train_seconds, 1), "seconds": 0.0, "splats": len(model.splats),
        "protocol": {**scene.protocol, **measured["protocol"]}, "ratios": measured["ratios"],
    }
    if group.rank == 0:
        with atomic_folder(folder / "model") as out:
            model.save(out)
        with atomic_folder(folder / "cuts") as out:
            for ratio in config.evaluation.ratios:
                write_ply(model.cut(ratio), out / cut_name(scene.name, ratio))
        with atomic_folder(folder / "renders") as out:
            write_grid(model, scene, config.evaluation.ratios, config.background, out / "grid.png")
            write_curve({config.preset: results["ratios"]}, out / "psnr_by_ratio.png")
        results["seconds"] = round(time.perf_counter() - start, 1)
        write_json(folder / "results.json", results)  # last: its presence says that the run is finished
    return results


def cut_name(scene: str, ratio: float) -> str:
    """berlin_005.00pct.ply: sorts by ratio."""
    return f"{scene}_{100 * ratio:06.2f}pct.ply"


def git_sha() -> str | None:
    """The commit of the source that is running; outside a checkout (submitted job, image) $FLEXGS_GIT_SHA, or None."""
    here, found = Path(__file__).parent, ""
    with contextlib.suppress(FileNotFoundError):  # no git
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True,
                               check=False).stdout.strip()
    return found or os.environ.get("FLEXGS_GIT_SHA") or None


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines that a resumed run is going to write again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        with atomic_file(path) as out:
            out.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line that a kill left half-written
