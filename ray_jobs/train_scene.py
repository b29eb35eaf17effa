"""One scene on Ray Train: the training function of each worker, and the TorchTrainer that starts them.

The state of a run is in its folder. Checkpoints, metrics.jsonl and results.json are written there as without
Ray, so `flexgs train` and this job continue each other's runs, and a kill at any moment leaves whole
checkpoints. What Ray's documentation does with ray.train.report(), get_checkpoint() and CheckpointConfig is
therefore done by a StoreSession.

Ray Train's elastic num_workers=(min, max) is not used: a run would take all free devices even while other
scenes wait, and each change of size would fall back to the last checkpoint. A scene gets another number of
workers by the file `stop` (StoreSession) and another call of train_scene.
"""

import contextlib
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import NODE_ID_LABEL_KEY, PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flexgs import pool, ray_library
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.record import SceneRun, push_results
from flexgs.run import StoppedError, run
from flexgs.scene.load import load_capture
from flexgs.store_session import STOP, StoreSession
from ray_jobs.cluster import share_memory, worker
from ray_jobs.failures import MachineGoneError, NotStartedError, cause_of, note


@dataclass(frozen=True)
class SceneJob(SceneRun):
    """A scene to train, where its run goes, and the resources of its workers."""

    workers: int = 1
    machine: str | None = None
    """Ray's id of the machine that the workers must be on; None for any machines."""
    room: PlacementGroup | None = None
    """The CPUs and GPUs that Ray keeps for a single worker."""
    cpus: int = 1
    """CPUs per worker; without a GPU, they become threads of the rasterizer."""
    gpu: bool = False
    """Whether each worker has a GPU."""
    beside: int = 1
    """How many workers, also of other scenes, share the memory of a machine."""
    max_failures: int = 2
    """How often the workers are started again, from the last checkpoint, after one of them died."""


def train_loop_per_worker(config: Mapping[str, SceneJob]) -> dict[str, Any] | None:
    """Train a scene as one of its workers; return the contents of results.json, or None if it was stopped."""
    job, group = config["job"], Group.current()
    # 1. The device of this worker.
    share_memory(job.beside)
    device = "cuda" if job.gpu else "cpu"
    if group.world > 1:
        from ray.train.torch import get_device

        device = str(get_device())
    if not job.gpu:
        torch.set_num_threads(1)  # the rasterizer's threads use all cores of the worker
        pool.set_num_threads(job.cpus)
    try:
        with tempfile.TemporaryDirectory(prefix="flexgs-") as copy:
            # 2. The run folder: one that all machines share, or a copy of that in the object store.
            store = job.store.copied_to(Path(copy))
            if not store.folder.is_dir():
                raise UserError(f"{store.folder}: not there on {socket.gethostname()}; choose a "
                                "--storage that all machines share, or an object store")
            store.pull("metrics.jsonl")
            # 3. The data, and the training from the last checkpoint to the cuts.
            scene = load_capture(job.capture, job.config)
            with contextlib.closing(StoreSession(store, group, leaving)) as session:
                results = run(job.config, scene, store.folder, group, session, device)
            # 4. The results.
            if group.rank == 0:
                push_results(store)
            return results
    except StoppedError:
        return None
    except UserError as e:
        raise UserError(str(e)) from None  # not all subclasses of UserError can be pickled


def leaving() -> bool:
    """Whether the machine of this worker is about to leave the cluster."""
    return ray.get_runtime_context().get_node_id() in ray_library.draining_nodes()


def train_scene(job: SceneJob) -> dict[str, Any] | None:
    """Train or continue a scene on the connected cluster.

    Returns:
        The contents of results.json; None if the scene was stopped or its machine has no room or has gone, so
        that it must be started again.

    Raises:
        UserError: training failed for a reason that the user can mend.
        SceneFailedError: training failed for another reason.
    """
    # The snapshot is Ray Train's list of checkpoints, which flexgs does not use.
    for old in ("error.txt", STOP, "checkpoint_manager_snapshot.json"):
        (job.folder / old).unlink(missing_ok=True)
        job.store.push(old)
    try:
        return _with_ray_train(job) if job.workers > 1 else _as_task(job)
    except Exception as e:
        cause = cause_of(e, job.store)
    try:
        if isinstance(cause, NotStartedError):  # Ray Train itself starts again only what has begun
            note(job.store, job.machine, {0: cause})
            if job.max_failures:
                return train_scene(replace(job, max_failures=job.max_failures - 1))
        raise cause
    except MachineGoneError:
        return None


def _with_ray_train(job: SceneJob) -> dict[str, Any] | None:
    """Train with several workers."""
    # A scene of one worker needs none of these, which take 1.5 s.
    import ray.train.torch

    from flexgs.ray_torch import Torch
    from ray_jobs.callback import Failures

    train: Any = ray.train  # its annotations are those of Ray Train V1
    scaling_config = train.ScalingConfig(
        num_workers=job.workers,
        use_gpu=job.gpu,
        resources_per_worker=worker(job.cpus, job.gpu),
        label_selector={NODE_ID_LABEL_KEY: job.machine} if job.machine else None,
    )
    run_config = train.RunConfig(
        name=job.name,
        storage_path=str(Path(job.store.place()).parent),
        storage_filesystem=job.store.files,
        failure_config=train.FailureConfig(max_failures=job.max_failures, controller_failure_limit=0),
        callbacks=[Failures(job.store, job.machine)],
        logging_config=train.LoggingConfig(log_level="WARNING"),
    )
    trainer = train.torch.TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"job": job},
        torch_config=Torch(backend="nccl" if job.gpu else "gloo"),
        scaling_config=scaling_config,
        run_config=run_config,
    )
    return trainer.fit().return_value


def _as_task(job: SceneJob) -> dict[str, Any] | None:
    """Train with one worker as a plain task: the processes of Ray Train take 0.6 GB and some seconds."""
    where = PlacementGroupSchedulingStrategy(job.room) if job.room else None
    task = ray.remote(train_loop_per_worker).options(
        num_cpus=job.cpus, num_gpus=int(job.gpu), max_retries=0, scheduling_strategy=where)
    left = job.max_failures
    while True:
        try:
            return ray.get(task.remote({"job": job}))
        except RayError as e:
            error = e.cause if isinstance(e, RayTaskError) else e
            note(job.store, job.machine, {0: error})
            if not left:
                raise error from None
            left -= 1
