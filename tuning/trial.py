"""One trial: settings trained from a stage 1 that trials share, and measured several times in stage 2.

    trials/<name>/  trial.json  checkpoints/ until it is finished  model/ then  mlflow.json
    stage1/<name>/seed_0/stage1/done/

The folder is named after the parameters, so a trial with equal parameters continues or reuses what is there.
The search knows of its trials only by trial.json.
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
"""The key of the trial's number among the parameters that Tune passes to it."""
RUNGS = 4
"""A trial is measured after 1, 2 and 4 quarters of stage 2; at the first two it may be stopped."""
MEASURED_AT = (1, 2, RUNGS)


@dataclass
class Record:
    """The contents of trial.json."""

    params: dict[str, Any]
    number: int
    """The trial's number; trial 0 has the settings that the search started from."""
    rungs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of figures(), by the quarters of stage 2 after which they were measured: "1", "2" and "4"."""
    seconds: float = 0.0
    """Wall-clock time of stage 2."""
    stopped: bool = False
    """Whether the trial was stopped early, since others were better after as many views."""
    error: str | None = None
    """Why the trial failed, in one line; None if it has not."""

    @property
    def status(self) -> str:
        """How the trial ended: failed, finished or stopped; else interrupted."""
        if self.error:
            return "failed"
        return "finished" if str(RUNGS) in self.rungs else "stopped" if self.stopped else "interrupted"

    @property
    def last(self) -> dict[str, Any]:
        """The last result of figures(): {"psnr_auc", "mb", "ratios"}; empty if nothing was measured."""
        return self.rungs[max(self.rungs, key=int)] if self.rungs else {}

    @property
    def figures(self) -> dict[str, float]:
        """The last figures, named like objectives: psnr_auc, mb, psnr/ratio_0.05; empty without any."""
        return flat(self.last) if self.rungs else {}

    def save(self, folder: Path) -> None:
        """Write trial.json."""
        write_json(folder / "trial.json", self.__dict__)

    @staticmethod
    def load(folder: Path) -> "Record":
        """Read trial.json; UserError if it is missing or damaged."""
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
    """The settings of trial 0, measured on the test views that trials are chosen by."""
    only: tuple[str, ...] = ()
    """The settings that are searched, or groups of them; empty: all of tuning/space.py."""

    def trial_folder(self, params: Params) -> Path:
        """Return the folder of the trial with these parameters."""
        return self.folder / "trials" / _digest(params)

    def records(self) -> list[Record]:
        """Return the records of all trials that were begun, by number."""
        found = [Record.load(file.parent) for file in (self.folder / "trials").glob("*/trial.json")]
        return sorted(found, key=lambda record: record.number)


def begun(search: Search, params: Params, number: int) -> Record:
    """Return the record of these parameters; a new one, with this number, if they have not been tried."""
    folder = search.trial_folder(params)
    if not (folder / "trial.json").exists():
        Record(dict(params), number).save(folder)
    return Record.load(folder)


def run_trial(search: Search, params: Params, scene: Scene, device: str, group: Group,
              report: Callable[[dict[str, Any]], None]) -> None:
    """Train and measure a trial that was begun, or continue it; report all figures, also earlier ones."""
    config, folder = applied(params, search.start), search.trial_folder(params)
    record = Record.load(folder)
    if record.status == "interrupted":
        trainer = _trainer(search, config, scene, folder, device, group)
        session = LocalSession(folder, group)
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
    if group.rank == 0:  # also if the trial was killed just before this line
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def figures(model: ElasticModel, scene: Scene, config: Config, group: Group | None = None) -> dict[str, Any]:
    """Measure a model on the test views of the settings, without LPIPS.

    Returns:
        {"psnr_auc": dB, "mb": megabytes of the elastic model, "ratios": psnr, ssim, ... by ratio}.
    """
    quick = replace(config.evaluation, lpips=(), format="ply")
    ratios = evaluate(model, scene, quick, config.background, group)["ratios"]
    tensors = [*(t for _, t in model.splats.items()), *model.transform.state_dict().values()]
    size = sum(t.nbytes for t in tensors)
    return {"psnr_auc": psnr_auc(ratios), "mb": round(size / 1e6, 3), "ratios": ratios}


def train_base(search: Search, config: Config, scene: Scene, device: str) -> Path:
    """Return the checkpoint of these settings' stage 1; the first trial that needs it trains it."""
    folder = base_folder(search, config)
    with only_one(folder, wait=True):
        train_stage1(scene, config, folder, device)
    return folder / f"seed_{config.seed}" / "stage1" / "done"


def base_folder(search: Search, config: Config) -> Path:
    """Return the folder of stage 1, named after the settings that stage 1 depends on."""
    return search.folder / "stage1" / _digest([replace(config, seed=0).stage1(), config.steps, config.batch])


def _trainer(search: Search, config: Config, scene: Scene, folder: Path, device: str,
             group: Group) -> Trainer:
    """Return a trainer at the trial's last checkpoint or, without one, at the end of stage 1."""
    base = None
    if not group.gather(checkpoints(folder / "checkpoints"))[0]:
        base = group.gather(train_base(search, config, scene, device) if group.rank == 0 else None)[0]
    trainer = Trainer(config, scene, group, device)
    resume(trainer, LocalSession(folder, group, start=base))
    return trainer


def flat(measured: dict[str, Any]) -> dict[str, float]:
    """Return a result of figures() with the names of objectives: psnr_auc, mb, psnr/ratio_0.05."""
    return {key: value for key, value in measured.items() if key != "ratios"} | {
        f"{key}/{metric_name(float(ratio))}": row[key]
        for ratio, row in measured["ratios"].items() for key in ("psnr", "ssim")}


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()
