"""Optuna's view of a search, made anew at each start from the records of the trials (trial.json).

The records, not Optuna's storage, are what a search remembers: they are whole after a kill at any moment, and
also serve the trials, the report and MLflow. Optuna's storage is a journal in the search's folder, which
optuna-dashboard shows.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from flexgs.config import Config
from flexgs.errors import UserError
from tuning.space import Own, space
from tuning.trial import NUMBER, Record, Search

PARETO = "pareto"
GOALS = {"psnr_auc": "max", "mb": "min"}
"""The objectives of pareto, each with its direction."""


def goal(objective: str) -> dict[str, Any]:
    """Return metric and mode of the objective, as arguments for Ray Tune."""
    return ({"metric": list(GOALS), "mode": list(GOALS.values())} if objective == PARETO
            else {"metric": objective, "mode": "max"})


def quality(objective: str) -> str:
    """Return the name of the objective's quality figure, which for pareto is psnr_auc."""
    return "psnr_auc" if objective == PARETO else objective


def directions(objective: str) -> list[StudyDirection]:
    """Return the directions of the objective for Optuna."""
    modes = GOALS.values() if objective == PARETO else ["max"]
    return [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for mode in modes]


@dataclass(frozen=True)
class Suggest:
    """A function that suggests parameters to a trial of Optuna, and returns our number of the trial."""

    start: Config
    size: bool
    only: tuple[str, ...]
    first: int
    """Our number of Optuna's trial 0, which counts from 0 at each start."""

    def __call__(self, trial: Any) -> dict[str, int]:
        """Suggest all parameters, and return the constant that Tune adds to them."""
        space(trial, self.start, self.size, self.only)
        return {NUMBER: self.first + trial.number}


def values(record: Record, objective: str) -> list[float]:
    """Return the last values of the objective, two for pareto."""
    return [record.figures[key] for key in (GOALS if objective == PARETO else [objective])]


def best(records: list[Record], objective: str) -> Record:
    """Return the finished trial of the highest objective (psnr_auc for pareto), the earliest if equal."""
    finished = [record for record in records if record.status == "finished"]
    return max(finished, key=lambda record: (values(record, objective)[0], -record.number))


def front(records: list[Record]) -> list[Record]:
    """Return the Pareto front of the finished trials in psnr_auc and size, by rising size."""
    finished = sorted((record for record in records if record.status == "finished"),
                      key=lambda record: (record.figures["mb"], -record.figures["psnr_auc"]))
    found: list[Record] = []
    for record in finished:
        if not found or record.figures["psnr_auc"] > found[-1].figures["psnr_auc"]:
            found.append(record)
    return found


def history(search: Search, objective: str, storage: BaseStorage | None = None) -> optuna.Study:
    """Make a study of the trials so far, to continue interrupted ones first, or to begin with trial 0.

    It is kept in storage, or else in memory. UserError if a trial does not fit the space, because the search
    began with other settings or another version.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    records, pareto = search.records(), objective == PARETO
    with warnings.catch_warnings():
        # group: sampling of parameters that not all trials have, which is experimental in Optuna
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=search.start.seed + len(records), n_startup_trials=5,
                                             multivariate=True, group=True, constant_liar=True)
    study = optuna.create_study(storage=storage, sampler=sampler,
                                study_name="search", directions=directions(objective))
    for record in records:
        if record.status != "interrupted":
            study.add_trial(frozen(record, search, objective))
    own = Own(search.start)
    space(own, search.start, pareto, search.only)
    for params in [record.params for record in records
                   if record.status == "interrupted"] if records else [own.params]:
        study.enqueue_trial(dict(params))
    return study


def frozen(record: Record, search: Search, objective: str) -> FrozenTrial:
    """Return a trial as Optuna keeps it; a stopped one counts with its last figures. See history()."""
    fixed = FixedTrial(dict(record.params))
    try:
        space(fixed, search.start, objective == PARETO, search.only)
    except ValueError as e:
        raise UserError(f"{search.trial(record.params).folder}: does not fit the space of this search ({e}); "
                        "choose another --experiment, or --no-resume") from None
    failed = record.status == "failed" or not all(map(math.isfinite, values(record, objective)))
    return create_trial(state=TrialState.FAIL if failed else TrialState.COMPLETE, params=dict(record.params),
                        distributions=fixed.distributions,
                        values=None if failed else values(record, objective))
