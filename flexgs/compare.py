"""`flexgs compare`: methods side by side on one capture, from the same stage 1, at the same counts, over the same views.

    stage1/  <method>/  <method>-5pct/ ...  compare.json

A method is a preset and any settings, for instance "default --deltas.knots 0.01 0.1". Stage 1, seed, background and
evaluation are common to all; what differs is stage 2. A method that keeps a share of the Gaussians only (order.keep below 1)
makes one model per ratio. Everything is resumed, what is finished is not repeated.
"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexgs.config import BASE_RATES, Config
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.files import atomic_folder, make_folder, write_json
from flexgs.run import LocalSession, finished, run
from flexgs.scene import Scene
from flexgs.training.trainer import Report, Trainer

COMMON = ("seed", "steps", "batch", "background", "report_every", "checkpoint_every", "check_every", "data", "base",
          "evaluation")


def method_config(method: str, common: Config) -> Config:
    """Stage 2 of the method, everything else of common; settings behind the preset's name have the last word."""
    from flexgs.cli import fill  # the command line knows how to read flags

    preset, *flags = shlex.split(method)
    config = dataclasses.replace(Config.from_preset(preset), **{name: getattr(common, name) for name in COMMON})
    config.rates = dataclasses.replace(config.rates, **{name: getattr(common.rates, name) for name in BASE_RATES})
    config = fill(Config, flags, f"--methods {preset}", config).check()
    if config.base.ply:
        raise UserError(f"--base.ply {config.base.ply}: expected none, methods start from a stage 1 of their own; "
                        "flexgs adapt takes a PLY")
    return config


def compare(scene: Scene, common: Config, methods: Sequence[str], folder: Path, device: str, report: Report) -> dict[str, Any]:
    """Train and measure every method.

    Returns {method: {"ratios": as in results.json, "seconds": of stage 2, a number, or by ratio}}.
    """
    configs = {method: method_config(method, common) for method in methods}
    make_folder(folder)
    stage1 = _stage1(scene, common, folder, device, report)
    rows: dict[str, Any] = {}
    for method, config in configs.items():
        if config.order.keep == 1:
            results = _cell(scene, config, folder / _name(method), stage1, device, report)
            rows[method] = {"ratios": results["ratios"], "seconds": results["stage2_seconds"]}
            continue
        rows[method] = {"ratios": {}, "seconds": {}}
        for ratio in (r for r in config.evaluation.ratios if r < 1):
            one = dataclasses.replace(config, order=dataclasses.replace(config.order, keep=ratio),
                                      evaluation=dataclasses.replace(config.evaluation, ratios=(1.0,)))
            results = _cell(scene, one, folder / f"{_name(method)}-{100 * ratio:g}pct", stage1, device, report)
            rows[method]["ratios"][f"{ratio:g}"] = results["ratios"]["1"]
            rows[method]["seconds"][f"{ratio:g}"] = results["stage2_seconds"]
    write_json(folder / "compare.json", {"scene": scene.name, "seed": common.seed, "steps": common.steps, "methods": rows})
    return rows


def _stage1(scene: Scene, common: Config, folder: Path, device: str, report: Report) -> Path:
    """The checkpoint that all methods start from."""
    done = folder / "stage1" / "done"
    if not done.exists():
        session = LocalSession(folder / "stage1", Group(), report)
        trainer = Trainer(common, scene, device=device)
        if (checkpoint := session.latest_checkpoint()) is not None:
            trainer.load(checkpoint)
        trainer.fit(report, session.checkpoint, until=trainer.base_steps)
        with atomic_folder(done) as out:
            trainer.save(out)
    return done


def _cell(scene: Scene, config: Config, folder: Path, stage1: Path, device: str, report: Report) -> dict[str, Any]:
    """One trained model; results.json with the seconds that its stage 2 took."""
    before = json.loads((stage1 / "state.json").read_text())["seconds"]
    session = LocalSession(folder, Group(), report, start=stage1)
    results = finished(folder, config) or run(config, scene, folder, Group(), session, device)
    return {**results, "stage2_seconds": round(results["train_seconds"] - before, 1)}


def _name(method: str) -> str:
    """A folder name: "default --deltas.knots 0.01 0.1" -> "default-deltas.knots-0.01-0.1"."""
    return "-".join(word.lstrip("-").replace("/", "_") for word in shlex.split(method))
