"""One trial: settings trained from a stage 1 that trials share, and measured several times in stage 2.

    trials/<name>/  trial.json  checkpoints/ until it is finished  model/ then  mlflow.json
    stage1/<name>/seed_0/stage1/done/

The folder is named after the parameters, so a trial with equal parameters continues or reuses what is there.
The search knows of its trials only by trial.json. With an object store, each process has a copy of the
search's folder: it pulls a record before it reads it, and pushes what it has written.
"""

import contextlib
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
from flexgs.run import check_figures, resume, train
from flexgs.scene import Scene
from flexgs.store import DESCRIPTION, Store
from flexgs.store_session import StoreSession
from flexgs.tracking import metric_name
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
    store: Store
    """The folder of the search."""
    start: Config
    """The settings of trial 0, measured on the test views that trials are chosen by."""
    only: tuple[str, ...] = ()
    """The settings that are searched, or groups of them; empty: all of tuning/space.py."""

    @property
    def folder(self) -> Path:
        """The folder of the search, or the local copy of it."""
        return self.store.folder

    def copied_to(self, folder: Path) -> "Search":
        """Return the search for a process whose copy of an object store is in this folder."""
        return replace(self, store=self.store.copied_to(folder))

    def trial(self, params: Params) -> Store:
        """Return the folder of the trial with these parameters."""
        return self.store / "trials" / _digest(params)

    def record(self, params: Params) -> Record:
        """Return the record of a trial that was begun."""
        trial = self.trial(params)
        trial.pull("trial.json")
        return Record.load(trial.folder)

    def records(self) -> list[Record]:
        """Return the records of all trials that were begun, by number."""
        names = self.store.find("trials/*/trial.json")
        self.store.pull(*names)
        found = [Record.load((self.folder / name).parent) for name in names]
        return sorted(found, key=lambda record: record.number)

    def save(self, record: Record) -> None:
        """Write a record to its trial's folder."""
        trial = self.trial(record.params)
        record.save(trial.folder)
        trial.push("trial.json")

    def drop(self, params: Params, name: str) -> None:
        """Delete a folder of a trial."""
        trial = self.trial(params)
        shutil.rmtree(trial.folder / name, ignore_errors=True)
        trial.push(name)


def begun(search: Search, params: Params, number: int) -> Record:
    """Return the record of these parameters; a new one, with this number, if they have not been tried."""
    if not search.trial(params).exists("trial.json"):
        search.save(Record(dict(params), number))
    return search.record(params)


def run_trial(search: Search, params: Params, scene: Scene, device: str, group: Group,
              report: Callable[[dict[str, Any]], None]) -> None:
    """Train and measure a trial that was begun, or continue it; report all figures, also earlier ones."""
    config, record, trial = applied(params, search.start), search.record(params), search.trial(params)
    if record.status == "interrupted":
        with contextlib.closing(StoreSession(trial, group)) as session:
            trainer = _trainer(search, config, scene, session, device)
            _measure(search, record, trainer, session, report)
    else:
        for quarters, measured in record.rungs.items():
            report({"rung": int(quarters), **flat(measured)})
    if group.rank == 0:  # also if the trial was killed just before this line
        search.drop(params, "checkpoints")


def _measure(search: Search, record: Record, trainer: Trainer, session: StoreSession,
             report: Callable[[dict[str, Any]], None]) -> None:
    """Train to each quarter at which trials are measured, and record and report the figures there."""
    config, scene, group, trial = trainer.config, trainer.scene, trainer.group, search.trial(record.params)
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
                    with atomic_folder(trial.folder / "model") as out:
                        model.save(out)
                    trial.push("model")
                search.save(record)
        report({"rung": rung, **flat(record.rungs[str(rung)])})


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
    base = base_folder(search, config)
    stage1 = base / f"seed_{config.seed}" / "stage1"
    with only_one(base.folder, wait=True), contextlib.closing(StoreSession(stage1, Group())) as session:
        if stage1.exists(f"done/{DESCRIPTION}"):
            stage1.pull("done")
        train_stage1(scene, config, base.folder, device, open_session=lambda folder, start: session)
        if stage1.exists(f"done/{DESCRIPTION}"):  # also if another machine has trained it meanwhile
            stage1.pull("done")
        else:
            stage1.push("done")
    return stage1.folder / "done"


def base_folder(search: Search, config: Config) -> Store:
    """Return the folder of stage 1, named after the settings that stage 1 depends on."""
    return search.store / "stage1" / _digest([replace(config, seed=0).stage1(), config.steps, config.batch])


def _trainer(search: Search, config: Config, scene: Scene, session: StoreSession, device: str) -> Trainer:
    """Return a trainer at the trial's last checkpoint or, without one, at the end of stage 1."""
    group = session.group
    if not group.gather(session.store.steps())[0]:
        if group.rank == 0:
            train_base(search, config, scene, device)
        group.gather(None)  # it is there for all
        session.start = train_base(search, config, scene, device)
    trainer = Trainer(config, scene, group, device)
    resume(trainer, session)
    return trainer


def flat(measured: dict[str, Any]) -> dict[str, float]:
    """Return a result of figures() with the names of objectives: psnr_auc, mb, psnr/ratio_0.05."""
    return {key: value for key, value in measured.items() if key != "ratios"} | {
        f"{key}/{metric_name(float(ratio))}": row[key]
        for ratio, row in measured["ratios"].items() for key in ("psnr", "ssim")}


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()
