"""One scene from training to evaluated cuts, in one run folder; shared by all ways to train.

    config.json  metrics.jsonl  results.json  model/  checkpoints/step_00002000/  cuts/  renders/

The command line, Ray Train and Ray Tune all call run(). model/, cuts/, renders/ and results.json of a
finished run are replaced together (files.publish); the first model is published before its evaluation. Only
one process at a time owns the folder (files.only_one).
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flexgs.callbacks import Callback, Callbacks
from flexgs.config import Config, check_same_method, percent_name
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.evaluate import DECIMATE, chosen, cut_as, evaluate
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
"""The least keys of results.json beside ratios, and their types."""
PROTOCOL = ("train_views", "test_views", "width", "height", "points")
"""The numbers that a protocol must have if it has the digest of a capture."""
FIGURES = ("psnr", "ssim", "splats", "mb")
"""The figures that each ratio must have; further figures may be there, or be null."""


class Session(Protocol):
    """The connection of a run to what started it: progress reports and checkpoints."""

    def checkpoints(self) -> Iterator[Path]:
        """Yield the checkpoint folders to resume from, best first, on every worker; some may be damaged."""

    def progress(self, step: int, metrics: dict[str, Any]) -> None:
        """Report the metrics at a step; called on rank 0 only."""

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint that write(folder) writes; called on all workers, but only rank 0 writes."""

    def stop(self, reported: bool) -> bool:
        """Whether to keep a checkpoint and stop now: the same answer on all workers, asked after each step.

        reported: whether the metrics of this step have been reported.
        """


class StoppedError(Exception):
    """The session has stopped the run early; running it again continues from its checkpoint."""


class LocalSession:
    """A session with checkpoints in the run folder, or at first in `start`, and progress to a callable."""

    def __init__(self, folder: Path, group: Group,
                 on_progress: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
                 start: Path | None = None):
        self.folder, self.group, self.progress, self.start = folder / "checkpoints", group, on_progress, start
        self.sending: str | None = None
        """The name of a checkpoint that another thread reads, and that therefore stays."""

    def checkpoints(self) -> Iterator[Path]:
        """Yield the checkpoints, the newest first, then `start`."""
        yield from checkpoints(self.folder)
        if self.start:
            yield self.start

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a checkpoint, and remove all older ones but one, and but `sending`."""
        if self.group.rank == 0:
            name = f"step_{step:08d}"
            with atomic_folder(self.folder / name) as folder:
                write(folder)
            found = checkpoints(self.folder)
            # a newer checkpoint is damaged, or the run would have resumed from it
            newer = [path for path in found if path.name > name]
            for old in newer + [path for path in found if path.name <= name][2:]:
                if old.name != self.sending:
                    shutil.rmtree(old)

    def stop(self, reported: bool) -> bool:
        """Return False: a local run stops for signals only."""
        return False


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return the results.json of a run, or None if it has none; UserError if it is damaged."""
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
    """Raise UserError unless `ratios` has these figures at each ratio: {"0.05": {"psnr": 20.5}}."""
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
    """Return the capture's folder as the run in or around `folder` recorded it; UserError if it is gone."""
    results = read_results(folder) or read_results(folder.parent) or {}
    if not isinstance(where := results.get("capture"), str):
        raise UserError(f"{folder}: does not say where its capture is; give it with --scene")
    if not os.path.isdir(where):  # unlike Path.is_dir, False for an impossible name too
        raise UserError(f"{folder}: its capture was in {where}, which is not there; give it with --scene")
    return Path(where)


def finished(folder: Path, config: Config, scene: Scene) -> dict[str, Any] | None:
    """Return the results of a run that this configuration has nothing to add to, or None.

    None too if only the evaluation differs, or SSIM was computed otherwise: run() then trains nothing and
    measures again. UserError if the results are of another method or capture.
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
    """Load the newest checkpoint that all workers find whole, if any; print which are damaged.

    UserError if all are.
    """
    damaged: list[str] = []
    for checkpoint in session.checkpoints():
        error = None
        try:
            trainer.load(checkpoint)
        except DamagedError as e:
            error = str(e)
        if not (errors := [e for e in trainer.group.gather(error) if e]):
            break
        damaged.append(errors[0])
    else:
        if damaged:
            raise UserError(f"{damaged[0]}; no older one is whole: remove them, and the "
                            "same command begins anew")
    if damaged and trainer.group.rank == 0:
        print(f"flexgs: {damaged[0]}; going on from the views {trainer.step}", file=sys.stderr, flush=True)


def train(trainer: Trainer, session: Session, report: Report, until: int | None = None,
          callbacks: Callback | None = None) -> None:
    """Train with Trainer.fit; Ctrl-C and SIGTERM end the training after a step, with a checkpoint.

    They are raised as KeyboardInterrupt. until: the view to stop at; default: the last one. callbacks: told
    of each step; report() tells them of the figures.
    """
    def stop(reported: bool) -> bool:
        if callbacks:
            callbacks.step(trainer.step)
        return session.stop(reported) or interrupted() is not None

    with held() as interrupted:
        trainer.fit(report, session.checkpoint, until, stop)
        if signal := interrupted():
            raise type(signal)(f"the checkpoint of {trainer.step:,} of "
                               f"{trainer.config.steps:,} views is kept; the same command "
                               "continues from there")


def check_before(config: Config, scene: Scene, splats: Splats, folder: Path) -> None:
    """Check, before training, everything that would fail only after the last view.

    UserError if there is no test view, LPIPS weights are missing, or cuts cannot be made or written here.
    Prints a line if the disk may be too small.
    """
    options = config.evaluation
    chosen(scene.test, options.views)
    # weights given as files must be there; the evaluation can do without those that are downloaded
    if options.lpips_weights or os.environ.get(lpips.WEIGHTS_VARIABLE):
        for net in options.lpips:
            lpips.load(net, options.lpips_weights, options.lpips_range)
    as_stored(splats[:64].detach(), options.format, scene.train)
    if options.cuts != "own":
        DECIMATE[options.cuts](splats[:64].detach(), min(len(splats), 32))
    make_folder(folder / "checkpoints")
    need = expected_disk(config)
    if (free := shutil.disk_usage(folder).free) < need:
        print(f"flexgs: {folder}: {free / 1e9:.1f} GB of disk are free, and the run may take "
              f"{need / 1e9:.1f} GB; --base.max-splats lowers that", file=sys.stderr, flush=True)


def run(config: Config, scene: Scene, folder: Path, group: Group, session: Session,
        device: str = "cpu", callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train a scene (or continue), evaluate it, write model, cuts and pictures, and return results.json.

    The caller owns the run folder (files.only_one). With several workers, all call this with their own group
    and session; rank 0 writes, and tells the callbacks. StoppedError if the session stops the run before its
    last view, KeyboardInterrupt after Ctrl-C or SIGTERM: a checkpoint is kept.
    """
    config.check()
    base = read(config.base.ply) if config.base.ply else None
    if group.rank == 0:
        tidy(make_folder(folder))  # a folder that cannot be written ends the run now, not after training
    start = time.perf_counter()
    trainer = Trainer(config, scene, group, device, base)
    resume(trainer, session)
    check_before(config, scene, trainer.splats, folder)
    if group.rank == 0:
        write_json(folder / "config.json", config.to_dict())
        _forget_after(folder / "metrics.jsonl", trainer.step)

    told = Callbacks(callbacks if group.rank == 0 else ())
    with told.told(trainer):
        return _trained_and_measured(trainer, folder, session, told, start)


def _trained_and_measured(trainer: Trainer, folder: Path, session: Session, callbacks: Callback,
                          start: float) -> dict[str, Any]:
    """Train to the last view, evaluate and write everything; start: time.perf_counter() of run()."""
    config, scene, group = trainer.config, trainer.scene, trainer.group

    def report(step: int, metrics: dict[str, Any]) -> None:
        if trainer.evaluated_now and step < config.steps:  # at the end, it is measured anyway
            quick = replace(config.evaluation, lpips=())
            measured = evaluate(trainer.model_so_far(), scene, quick if trainer.elastic else
                                replace(quick, ratios=(1.0,)), config.background, group)
            metrics = {**metrics, "ratios": measured["ratios"]}
        if group.rank > 0:
            return
        with (folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        session.progress(step, metrics)
        callbacks.report(step, metrics)

    train(trainer, session, report, callbacks=callbacks)
    if trainer.step < config.steps:
        raise StoppedError(f"{folder}: stopped at {trainer.step} of {config.steps} views")
    training_ended = time.perf_counter()
    model = trainer.model()
    # making the model sorts the Gaussians a last time, which is a part of the training
    train_seconds = trainer.seconds + time.perf_counter() - training_ended
    callbacks.trained(model)
    cut = cut_as(model, config.evaluation)
    if group.rank == 0:
        first = not newest(folder, "results.json").exists()
        model.save(_made(staged(folder) / "model"))
        for ratio in config.evaluation.ratios:
            save(cut.cut(ratio), _made(staged(folder) / "cuts") / cut_name(scene.name, ratio))
        if first:
            # a first model is kept even if its evaluation fails; a later one replaces it with its figures
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
        write_grid(cut, scene, config.evaluation.ratios, config.background, renders / "grid.png")
        write_curve({config.preset: results["ratios"]}, renders / "psnr_by_ratio.png")
        results["seconds"] = round(time.perf_counter() - start, 1)
        write_json(staged(folder) / "results.json", results)
        publish(folder)
        callbacks.measured(results, folder)
    return results


def cut_name(scene: str, ratio: float) -> str:
    """Name the file of a cut, sortable by ratio: berlin_005.00pct.ply."""
    whole, _, rest = percent_name(ratio).partition(".")
    return f"{scene}_{whole:0>3}.{rest:0<2}pct.ply"


def git_sha() -> str | None:
    """Return the commit of the running source, or outside a checkout $FLEXGS_GIT_SHA; None if unknown."""
    here, found = Path(__file__).parent, ""
    with contextlib.suppress(FileNotFoundError):  # git is not installed
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True,
                               text=True, check=False).stdout.strip()
    return found or os.environ.get("FLEXGS_GIT_SHA") or None


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after a step, which a resumed run writes again, and damaged lines.

    Damaged lines are reported unless there is just one, which a kill may have cut off. Anything else than a
    file at path, such as a link, becomes a file.
    """
    if not os.path.lexists(path):
        return
    rows = history(path)
    if (lost := len(path.read_bytes().splitlines()) - len(rows) if path.is_file() else 0) > 1:
        print(f"flexgs: {path}: {lost} lines are damaged and left out", file=sys.stderr, flush=True)
    with atomic_file(path) as out:
        out.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have an integer step."""
    return [row for row in read_jsonl(path, "step") if isinstance(row["step"], int)]
