"""One trial: a configuration, trained from the stage 1 that it shares with others, and measured on the way.

    trials/<name>/  trial.json  checkpoints/ until it is finished  model/ then  mlflow.json
    stage1/<name>/seed_0/stage1/done/

The folder is named after the parameters: whoever asks for the same gets what is there already, or continues
it. trial.json is all that the search remembers of it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexgs import old_names
from flexgs.compare import train_stage1
from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.evaluate import evaluate
from flexgs.files import atomic_folder, only_one, write_json
from flexgs.inputs import read_json, shown, typed
from flexgs.model.elastic import ElasticModel
from flexgs.report.table import psnr_auc
from flexgs.run import LocalSession, check_figures, resume, train
from flexgs.scene import Scene
from flexgs.tracking import metric_name
from flexgs.training.checkpoint import checkpoints
from flexgs.training.trainer import Trainer
from tuning.space import Params, applied

NUMBER = "number"
"""Of the trial, among the parameters that Tune hands around."""
RUNGS = 4
"""A trial is measured after 1, 2 and 4 quarters of stage 2; at the first two it may be stopped."""
MEASURED_AT = (1, 2, RUNGS)


@dataclass
class Record:
    """trial.json."""

    params: dict[str, Any]
    number: int
    """0: what the search started from."""
    rungs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By quarters of stage 2: what was measured there on the views that the search may see."""
    seconds: float = 0.0
    """Of training stage 2, over all workers' wall clock."""
    stopped: bool = False
    """Others were better after as many views."""
    error: str | None = None

    @property
    def status(self) -> str:
        if self.error:
            return "failed"
        return "finished" if str(RUNGS) in self.rungs else "stopped" if self.stopped else "interrupted"

    @property
    def last(self) -> dict[str, Any]:
        """What was measured last: {"psnr_auc", "mb", "ratios"}; empty if nothing was."""
        return self.rungs[max(self.rungs, key=int)] if self.rungs else {}

    @property
    def figures(self) -> dict[str, float]:
        """The same, named as objectives are: psnr_auc, mb, psnr/ratio_0.05."""
        return flat(self.last) if self.rungs else {}

    def save(self, folder: Path) -> None:
        write_json(folder / "trial.json", self.__dict__)

    @staticmethod
    def load(folder: Path) -> "Record":
        path = folder / "trial.json"
        record: Record = read_json(path, Record, "remove its folder, and the search begins this trial anew")
        for quarters, measured in record.rungs.items():
            if quarters not in map(str, MEASURED_AT):
                raise UserError(f"{path}: found what was measured after {shown(quarters)} quarters, expected "
                                f"{', '.join(map(str, MEASURED_AT))}")
            for name in ("psnr_auc", "mb"):
                typed(float, measured.get(name), f"{path}: {name} after {quarters} quarters")
            check_figures(measured.get("ratios"), ("psnr", "ssim"), str(path))
        record.params = {old_names.setting(name): value for name, value in record.params.items()}
        return record


@dataclass(frozen=True)
class Search:
    """What all trials of a search have in common."""

    capture: Path
    folder: Path
    start: Config
    """Trial 0, with the views to choose by."""

    def trial_folder(self, params: Params) -> Path:
        return self.folder / "trials" / _digest(params)

    def records(self) -> list[Record]:
        """Of all trials that were begun, in their order."""
        found = [Record.load(file.parent) for file in (self.folder / "trials").glob("*/trial.json")]
        return sorted(found, key=lambda record: record.number)


def begun(search: Search, params: Params, number: int) -> Record:
    """The record of these parameters, a new one if they have not been tried; an earlier one keeps its
    number."""
    folder = search.trial_folder(params)
    if not (folder / "trial.json").exists():
        Record(dict(params), number).save(folder)
    return Record.load(folder)


def run_trial(search: Search, params: Params, scene: Scene, device: str, group: Group,
              report: Callable[[dict[str, Any]], None]) -> None:
    """Train and measure what was begun, or go on where it was interrupted; report all that was measured."""
    config, folder = applied(params, search.start), search.trial_folder(params)
    record = Record.load(folder)
    if record.status == "interrupted":
        trainer = _trainer(search, config, scene, folder, device, group)
        session = LocalSession(folder, group, lambda step, metrics: None)
        before = trainer.seconds
        for rung in MEASURED_AT:
            if str(rung) not in record.rungs:
                until = trainer.base_steps + (config.steps - trainer.base_steps) * rung // RUNGS
                train(trainer, session, lambda step, metrics: None, until)
                record.seconds, before = record.seconds + trainer.seconds - before, trainer.seconds
                model = trainer.model()
                record.rungs[str(rung)] = figures(model, scene, config, group)
                if group.rank == 0:
                    if rung == RUNGS:
                        with atomic_folder(folder / "model") as out:
                            model.save(out)
                    record.save(folder)
            report({"rung": rung, **flat(record.rungs[str(rung)])})
    else:
        for quarters, measured in record.rungs.items():
            report({"rung": int(quarters), **flat(measured)})
    if group.rank == 0:  # also of one that was interrupted here
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def figures(model: ElasticModel, scene: Scene, config: Config, group: Group | None = None) -> dict[str, Any]:
    """Quality over the views that config names, {"psnr_auc", "mb", "ratios"}; mb is what the elastic model
    takes."""
    quick = replace(config.evaluation, lpips=(), format="ply")
    ratios = evaluate(model, scene, quick, config.background, group)["ratios"]
    size = sum(t.nbytes
               for t in [*(t for _, t in model.splats.items()), *model.transform.state_dict().values()])
    return {"psnr_auc": psnr_auc(ratios), "mb": round(size / 1e6, 3), "ratios": ratios}


def train_base(search: Search, config: Config, scene: Scene, device: str) -> Path:
    """The checkpoint of stage 1 that these settings share with others, trained if nobody has yet; who comes
    second waits."""
    folder = base_folder(search, config)
    with only_one(folder, wait=True):
        train_stage1(scene, config, folder, device, lambda step, metrics: None)
    return folder / f"seed_{config.seed}" / "stage1" / "done"


def base_folder(search: Search, config: Config) -> Path:
    """Named after the settings that stage 1 depends on."""
    return search.folder / "stage1" / _digest([replace(config, seed=0).stage1(), config.steps, config.batch])


def _trainer(search: Search, config: Config, scene: Scene, folder: Path, device: str,
             group: Group) -> Trainer:
    """At the trial's own last checkpoint, or at the end of stage 1."""
    base = None
    if not group.gather(checkpoints(folder / "checkpoints"))[0]:
        base = group.gather(train_base(search, config, scene, device) if group.rank == 0 else None)[0]
    trainer = Trainer(config, scene, group, device)
    resume(trainer, LocalSession(folder, group, lambda step, metrics: None, start=base))
    return trainer


def flat(measured: dict[str, Any]) -> dict[str, float]:
    """figures() by the names of objectives: psnr_auc, mb, psnr/ratio_0.05."""
    return {key: value for key, value in measured.items() if key != "ratios"} | {
        f"{key}/{metric_name(float(ratio))}": row[key] for ratio,
        row in measured["ratios"].items() for key in ("psnr", "ssim")}


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()
