"""Trials on Ray: their resources, and how Tune runs them, in one process or with workers of Ray Train.

A trial with workers reserves no CPU for itself: waiting trials would else hold the CPUs that their workers
wait for, and the search would hang.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from ray import tune
from ray.exceptions import RayError
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback

from flexgs import pool
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.ray_torch import Torch
from flexgs.scene.load import load_capture
from flexgs.urls import describe
from ray_jobs.callback import Failures
from ray_jobs.cluster import Cluster, share_memory
from ray_jobs.failures import MachineGoneError, NotStartedError, cause_of
from tuning.space import Params
from tuning.trial import NUMBER, Search, begun, run_trial, train_base

DEATHS = 2
"""How often a trial is started again, from its last checkpoint, after a process of it died."""


@dataclass(frozen=True)
class Room:
    """The resources of a trial."""

    gpus: float
    """GPUs per worker, which may be a fraction; 0 to train on the CPU."""
    threads: int = 1
    """Threads of the CPU rasterizer."""
    workers: int = 1
    """Worker processes."""
    beside: int = 1
    """Worker processes of all trials on a machine at a time."""

    def device(self) -> str:
        """Return the device to train on, and set this process's threads and memory for images."""
        share_memory(self.beside)
        if self.gpus:
            return "cuda"
        torch.set_num_threads(1)
        pool.set_num_threads(self.threads)
        return "cpu"


def room_for_trial(cluster: Cluster, workers: int, gpus: float) -> tuple[Room, int]:
    """Return the resources of a trial, and how many trials have room at a time; UserError if none has."""
    nodes = cluster.nodes(workers).values()
    room = Room(gpus if cluster.has_gpu else 0.0, workers=workers)
    if room.gpus and workers > 1 and gpus != 1:
        raise UserError(f"--gpus-per-trial {gpus:g}: expected 1 with --workers {workers}, each of which "
                        "needs a GPU of its own")
    if room.gpus:
        workers_of = [node.get("GPU", 0) // gpus if gpus < 1 else node.get("GPU", 0) / gpus for node in nodes]
    else:
        workers_of = [node.get("CPU", 0) for node in nodes]
    most = int(sum(workers_of)) // workers
    if most < 1:
        raise UserError(f"--workers {workers} --gpus-per-trial {gpus:g}: the cluster has no room for a "
                        "trial; expected less")
    return replace(room, beside=max(1, int(max(workers_of)))), most


def trainable(search: Search, room: Room) -> Callable:
    """Return the function that runs a trial, with its resources, for tune.Tuner."""
    run = tune.with_parameters(_direct if room.workers == 1 else _together, search=search, room=room)
    return tune.with_resources(run, {"cpu": 1, "gpu": room.gpus} if room.workers == 1
                               else {"memory": 64 << 20})


def train_first_base(search: Search, cluster: Cluster, room: Room) -> float:
    """Train stage 1 of trial 0 with all CPUs of a machine, not one as trials have; return the seconds."""
    cpus = max(1, int(max(node.get("CPU", 1) for node in cluster.nodes().values())))
    start = time.monotonic()
    remote = ray.remote(num_cpus=1 if room.gpus else cpus, num_gpus=1 if room.gpus else 0, max_retries=DEATHS)
    _wait([remote(_base).remote(search, replace(room, threads=cpus))])
    return time.monotonic() - start


def run_to_the_end(trials: Sequence[tuple[Search, Params, int]], room: Room) -> None:
    """Run trials (search, parameters, number) outside of Tune, in parallel, unless they are finished."""
    remote = ray.remote(num_cpus=1, num_gpus=room.gpus, max_retries=DEATHS)(_alone)
    _wait([remote.remote(search, params, number, room) for search, params, number in trials])


def _wait(tasks: Sequence[Any]) -> None:
    try:
        ray.get(list(tasks))
    except ray.exceptions.RayTaskError as e:
        raise UserError(describe(e)) if isinstance(e.cause, UserError) else e from None


def _base(search: Search, room: Room) -> None:
    with _copied(search) as mine:
        device = room.device()
        train_base(mine, mine.start, load_capture(mine.capture, mine.start), device)


def _alone(search: Search, params: Params, number: int, room: Room) -> None:
    with _noted(search, params, number) as mine:
        record = mine.record(params)
        if record.stopped:
            mine.save(replace(record, stopped=False))
        device = room.device()
        run_trial(mine, params, load_capture(mine.capture, mine.start), device, Group(), lambda figures: None)


def _direct(config: dict[str, Any], search: Search, room: Room) -> None:
    params, number = _parts(config)
    with _noted(search, params, number) as mine:
        device = room.device()
        run_trial(mine, params, load_capture(mine.capture, mine.start), device, Group(), tune.report)


def _together(config: dict[str, Any], search: Search, room: Room) -> None:
    params, number = _parts(config)
    train: Any = ray.train
    with _noted(search, params, number) as mine:
        trial = mine.trial(params)
        trainer = train.torch.TorchTrainer(
            _worker, train_loop_config={"params": params, "search": search, "room": room},
            torch_config=Torch(backend="nccl" if room.gpus else "gloo"),
            scaling_config=train.ScalingConfig(num_workers=room.workers, use_gpu=bool(room.gpus)),
            run_config=train.RunConfig(
                name=trial.folder.name, storage_path=search.store.place("tune/train"),
                storage_filesystem=search.store.files,
                failure_config=train.FailureConfig(max_failures=DEATHS, controller_failure_limit=0),
                callbacks=[TuneReportCallback(), Failures(trial, None)],
                logging_config=train.LoggingConfig(log_level="WARNING")),
        )
        try:
            trainer.fit()
        except TrainingFailedError as e:
            raise cause_of(e, trial) from None


def _worker(job: dict[str, Any]) -> None:
    try:
        with _copied(job["search"]) as mine:
            device = job["room"].device()
            run_trial(mine, job["params"], load_capture(mine.capture, mine.start), device, Group.current(),
                      ray.train.report)
    except UserError as e:
        raise UserError(str(e)) from None  # not all subclasses of UserError can be pickled


def _parts(config: dict[str, Any]) -> tuple[Params, int]:
    return {name: value for name, value in config.items() if name != NUMBER}, config[NUMBER]


@contextlib.contextmanager
def _copied(search: Search) -> Iterator[Search]:
    """Give this process a copy of its own of a search that is in an object store."""
    with tempfile.TemporaryDirectory(prefix="flexgs-") as folder:
        yield search.copied_to(Path(folder))


@contextlib.contextmanager
def _noted(search: Search, params: Params, number: int) -> Iterator[Search]:
    """Record that a trial has begun and, if its training fails, why.

    Yields this process's copy of the search. It is no failure of the trial if a process of it is gone: Tune
    has stopped the trial, or starts it again.
    """
    with _copied(search) as mine:
        record = begun(mine, params, number)
        try:
            if record.error:
                raise UserError(record.error)  # a trial that has failed is not tried again
            yield mine
        except (NotStartedError, MachineGoneError, RayError):
            raise
        except Exception as e:
            mine.save(replace(mine.record(params), error=describe(e)))
            raise
