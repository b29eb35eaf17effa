"""One scene on Ray: starting its workers, and the function that each worker executes.

The state of a run is in its folder. Checkpoints, metrics.jsonl and results.json are written there as without
Ray, so `flexgs train` and this job continue each other's runs, and a kill at any moment leaves whole
checkpoints; Ray keeps none of its own. One worker is a plain task of Ray, several are a run of Ray Train,
whose processes beside the workers take 0.6 GB and some seconds.

A file named `stop` in the run folder makes the workers write a checkpoint at their next report and end. So a
scene gets another number of workers, or leaves a machine, without losing a view. Ray Train's elastic
num_workers=(min, max) is not used: a run would take all free devices even while other scenes wait, and each
change of size would fall back to the last checkpoint.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, UserCallback, WorkerGroupError
from ray.util.placement_group import NODE_ID_LABEL_KEY, PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flexgs import pool, ray_library
from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.ray_torch import Torch
from flexgs.run import LocalSession, StoppedError, run
from flexgs.scene.load import load_capture
from flexgs.store import Store
from flexgs.urls import describe, public
from ray_jobs.cluster import worker

RESULTS = ("config.json", "model", "cuts", "renders", "results.json")
"""What a finished run has besides its history; results.json is pushed last, when the rest is there."""
STOP = "stop"
"""The file in a run folder that ends its workers early."""
PUSH_SECONDS = 10.0
"""Time between two messages of the workers to an object store, which all workers wait for."""


class SceneFailedError(Exception):
    """Training a scene failed for a reason other than the user's input; the message is one line."""


class MachineGoneError(Exception):
    """The machine of a scene's workers has left the cluster."""


@dataclass(frozen=True)
class SceneJob:
    """A scene to train, where its run goes, and the resources of its workers."""

    capture: Path
    store: Store
    """The run folder, which the caller owns (files.only_one)."""
    config: Config
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

    @property
    def folder(self) -> Path:
        """The run folder, or its local copy."""
        return self.store.folder

    @property
    def name(self) -> str:
        """The name of the scene."""
        return self.folder.name


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
    except UserError:
        raise
    except MachineGoneError:
        return None
    except ControllerError as e:
        if isinstance(e.controller_failure, UserError):
            raise e.controller_failure from None
        if isinstance(e.controller_failure, ray_library.no_room_error() | MachineGoneError):
            return None
        raise _failed(job, e, {describe(e.controller_failure)}) from None
    except WorkerGroupError as e:
        raise _failed(job, e, {describe(error) for error in e.worker_failures.values()}) from None
    except Exception as e:
        raise _failed(job, e, {describe(e)}) from None


def _with_ray_train(job: SceneJob) -> dict[str, Any] | None:
    train: Any = ray.train  # its annotations are those of Ray Train V1
    trainer = train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=Torch(backend="nccl" if job.gpu else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=job.workers, use_gpu=job.gpu, resources_per_worker=worker(job.cpus, job.gpu),
            label_selector={NODE_ID_LABEL_KEY: job.machine} if job.machine else None),
        run_config=train.RunConfig(
            name=job.name, storage_path=str(Path(job.store.place()).parent),
            storage_filesystem=job.store.files, callbacks=[Failures(job)],
            failure_config=train.FailureConfig(max_failures=job.max_failures, controller_failure_limit=0),
            logging_config=train.LoggingConfig(log_level="WARNING")))
    return trainer.fit().return_value


def _as_task(job: SceneJob) -> dict[str, Any] | None:
    where = PlacementGroupSchedulingStrategy(job.room) if job.room else None
    task = ray.remote(train_worker).options(num_cpus=job.cpus, num_gpus=int(job.gpu), max_retries=0,
                                            scheduling_strategy=where)
    failures, left = Failures(job), job.max_failures
    while True:
        try:
            return ray.get(task.remote({"job": job}))
        except RayError as e:
            error = e.cause if isinstance(e, RayTaskError) else e
            failures.after_exception(None, {0: error})
            if not left:
                raise error from None
            left -= 1


def _failed(job: SceneJob, error: Exception, lines: set[str]) -> SceneFailedError:
    """Make an error of one line that names the last checkpoint, and write the stack trace to error.txt."""
    details, last = job.folder / "error.txt", "no checkpoint yet"
    with contextlib.suppress(OSError):  # if the storage fails, `lines` say so already
        details.write_text(public("".join(traceback.format_exception(error))))
        if step := job.store.latest_step():
            last = f"last checkpoint: {job.store.place(f'checkpoints/step_{step:08d}')}"
    return SceneFailedError(f"{'; '.join(sorted(lines))}; {last}; details in {details}")


def train_worker(loop: Mapping[str, SceneJob]) -> dict[str, Any] | None:
    """Train a scene as one of its workers; return the contents of results.json, or None if it was stopped."""
    job, group = loop["job"], Group.current()
    os.environ["LOCAL_WORLD_SIZE"] = str(job.beside)  # by which the cache of images is limited
    device = ray.train.torch.get_device() if group.world > 1 else "cuda" if job.gpu else "cpu"
    if not job.gpu:
        torch.set_num_threads(1)  # the rasterizer's threads use all cores of the worker
        pool.set_num_threads(job.cpus)
    try:
        with tempfile.TemporaryDirectory(prefix="flexgs-") as copy:
            store = job.store.copied_to(Path(copy))
            if not store.folder.is_dir():
                raise UserError(f"{store.folder}: not there on {socket.gethostname()}; choose a "
                                "--storage that all machines share, or an object store")
            scene = load_capture(job.capture, job.config)
            store.pull("metrics.jsonl")
            with contextlib.closing(RaySession(store, group)) as session:
                results = run(job.config, scene, store.folder, group, session, str(device))
            if group.rank == 0:
                store.delete("results.json")  # an old one must not lie beside a new model
                store.push(*RESULTS)
            return results
    except StoppedError:
        return None
    except UserError as e:
        raise UserError(str(e)) from None  # not all subclasses of UserError can be pickled


class RaySession(LocalSession):
    """A LocalSession whose files go to the store, and which stops when the run folder or the machine says so.

    Training goes on while a checkpoint is sent to an object store.
    """

    def __init__(self, store: Store, group: Group):
        super().__init__(store.folder, group, lambda step, metrics: None)
        self.store = store
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._sent: Future[None] | None = None
        self._at = 0.0

    def checkpoints(self) -> list[Path]:
        """Pull the checkpoints that the first worker sees, and return their folders, the newest first."""
        # Another machine may see an older state of a shared folder, so all take the first worker's list.
        steps = self.group.gather(self.store.steps())[0]
        names = [f"checkpoints/step_{step:08d}" for step in steps]
        self.store.pull(*names)
        return [self.store.folder / name for name in names]

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a checkpoint, and begin to send it, once the one before has been sent."""
        self._wait()
        super().checkpoint(step, write)
        if self.group.rank == 0:
            self._sent = self._uploads.submit(self._send, f"step_{step:08d}")

    def stop(self, reported: bool) -> bool:
        """Whether to stop now: after a report, if there is the file `stop` or the machine is about to leave.

        An object store gets the history then, and is asked, at most every PUSH_SECONDS.
        """
        if not reported:
            return False
        stop = ray.get_runtime_context().get_node_id() in ray_library.draining_nodes()
        if self.group.rank == 0 and not (self.store.remote and time.monotonic() - self._at < PUSH_SECONDS):
            self.store.push("metrics.jsonl")
            stop, self._at = stop or self.store.exists(STOP), time.monotonic()
        return any(self.group.gather(stop))

    def close(self) -> None:
        """Send what has not been sent."""
        self._wait()
        self._uploads.shutdown()
        if self.group.rank == 0:
            self.store.push("metrics.jsonl")

    def _send(self, checkpoint: str) -> None:
        self.store.push("metrics.jsonl")  # a checkpoint without the lines up to it would leave a gap
        self.store.push_checkpoint(checkpoint)

    def _wait(self) -> None:
        if self._sent:
            self._sent.result()


class Failures(UserCallback):
    """Record worker failures in failures.jsonl, and end the run where starting again cannot help."""

    def __init__(self, job: SceneJob):
        self.store, self.machine = job.store, job.machine

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise a UserError of a worker, or MachineGoneError; Ray Train does not retry after these."""
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error  # Ray Train retries after an error of a worker, but not of a callback
        with (self.store.folder / "failures.jsonl").open("a") as lines:
            errors = {rank: describe(error) for rank, error in worker_exceptions.items()}
            lines.write(json.dumps({"time": round(time.time()), "errors": errors}) + "\n")
        self.store.push("failures.jsonl")
        if self.machine and not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self.machine):
            raise MachineGoneError(self.machine)  # Ray would wait for the machine
