"""What Optuna knows: the trials so far, from their own files. Nothing else is kept between two starts of a
search."""

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
"""What pareto weighs against each other."""


def goal(objective: str) -> dict[str, Any]:
    """metric and mode, as Ray Tune calls them."""
    return ({"metric": list(GOALS), "mode": list(GOALS.values())} if objective == PARETO
            else {"metric": objective, "mode": "max"})


def quality(objective: str) -> str:
    """What a trial is good by; of pareto, the half that is not bytes."""
    return "psnr_auc" if objective == PARETO else objective


def directions(objective: str) -> list[StudyDirection]:
    """The same for Optuna."""
    modes = GOALS.values() if objective == PARETO else ["max"]
    return [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for mode in modes]


@dataclass(frozen=True)
class Suggest:
    """The space, as a function of Optuna's trial, and a number for the trial."""

    start: Config
    size: bool
    first: int
    """The number of Optuna's trial 0."""

    def __call__(self, trial: Any) -> dict[str, int]:
        space(trial, self.start, self.size)
        return {NUMBER: self.first + trial.number}


def values(record: Record, objective: str) -> list[float]:
    """What was measured last."""
    return [record.figures[key] for key in (GOALS if objective == PARETO else [objective])]


def best(records: list[Record], objective: str) -> Record:
    """The finished trial of the highest objective, of pareto's the highest quality; the earliest of equal
    ones."""
    finished = [record for record in records if record.status == "finished"]
    return max(finished, key=lambda record: (values(record, objective)[0], -record.number))


def front(records: list[Record]) -> list[Record]:
    """The finished trials that no other beats in quality and bytes both, by rising bytes."""
    finished = sorted((record for record in records if record.status == "finished"),
                      key=lambda record: (record.figures["mb"], -record.figures["psnr_auc"]))
    found: list[Record] = []
    for record in finished:
        if not found or record.figures["psnr_auc"] > found[-1].figures["psnr_auc"]:
            found.append(record)
    return found


def history(search: Search, objective: str, storage: BaseStorage | None = None) -> optuna.Study:
    """A study that has the trials so far, and asks for the interrupted ones first; for trial 0 if it is a new
    search. It is kept in storage, or else in memory.

    UserError if a trial does not fit the space, because the search began with other settings or another
    version.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    records, pareto = search.records(), objective == PARETO
    with warnings.catch_warnings():
        # group: what conditional parameters need
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=search.start.seed + len(records), n_startup_trials=5,
                                             multivariate=True, group=True, constant_liar=True)
    study = optuna.create_study(storage=storage, sampler=sampler,
                                study_name="search", directions=directions(objective))
    for record in records:
        if record.status != "interrupted":
            study.add_trial(frozen(record, search, objective))
    own = Own(search.start)
    space(own, search.start, pareto)
    for params in [record.params for record in records
                   if record.status == "interrupted"] if records else [own.params]:
        study.enqueue_trial(dict(params))
    return study


def frozen(record: Record, search: Search, objective: str) -> FrozenTrial:
    """The trial as Optuna keeps it. A stopped one counts with what it had reached, which is less than it
    might have."""
    fixed = FixedTrial(dict(record.params))
    try:
        space(fixed, search.start, objective == PARETO)
    except ValueError as e:
        raise UserError(f"{search.trial_folder(record.params)}: does not fit the space of this search ({e}); "
                        "choose another --experiment, or --no-resume") from None
    failed = record.status == "failed" or not all(map(math.isfinite, values(record, objective)))
    return create_trial(state=TrialState.FAIL if failed else TrialState.COMPLETE, params=dict(record.params),
                        distributions=fixed.distributions,
                        values=None if failed else values(record, objective))
