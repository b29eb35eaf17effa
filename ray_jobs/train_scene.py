"""One scene as a Ray Train run: starting its workers, and the function that each worker executes.

The state of a run is in its folder. Checkpoints, metrics.jsonl and results.json are written there as without
Ray, so `flexgs train` and this job continue each other's runs, and a kill at any moment leaves whole
checkpoints. Ray Train is told of each checkpoint.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.cloudpickle
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode, ControllerError, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig
from ray.util.placement_group import NODE_ID_LABEL_KEY

from flexgs import pool
from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.errors import UserError, cure
from flexgs.files import only_one
from flexgs.ray_library import no_room_error
from flexgs.run import LocalSession, StoppedError, run
from flexgs.scene.load import load_capture
from flexgs.torch_library import store_on_loopback
from flexgs.urls import public
from ray_jobs.store import Store

RESULTS = ("config.json", "model", "cuts", "renders", "results.json")
"""What a finished run has besides its history; results.json is pushed last, when the rest is there."""
STOP = "stop"
"""The file in a run folder that ends its workers early."""
START_TIMEOUTS = 2
"""How often Ray waits (20 s each, see cluster.py) for room on the machine before the scene is put back."""


class SceneFailedError(Exception):
    """Training a scene failed for a reason other than the user's input; the message is one line."""


class MachineGoneError(Exception):
    """The machine of a scene's workers has left the cluster."""


@dataclass(frozen=True)
class SceneJob:
    """A scene to train, where its run goes, and the resources of its workers."""

    capture: Path
    store: Store
    """The run folder."""
    config: Config
    workers: int = 1
    machine: str | None = None
    """Ray's id of the machine that the workers must be on; None for any machines."""
    cpus: int = 1
    """CPUs per worker; without a GPU, they become threads of the rasterizer."""
    gpu: bool = False
    """Whether each worker has a GPU."""
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
    try:
        with only_one(job.folder):
            return _fit(job)
    except UserError:
        raise
    except ControllerError as e:
        if isinstance(e.controller_failure, UserError):
            raise e.controller_failure from None
        if isinstance(e.controller_failure, no_room_error() | MachineGoneError):
            return None
        raise _failed(job, e, {describe(e.controller_failure)}) from None
    except WorkerGroupError as e:
        raise _failed(job, e, {describe(error) for error in e.worker_failures.values()}) from None
    except Exception as e:
        raise _failed(job, e, {describe(e)}) from None


def _failed(job: SceneJob, error: Exception, lines: set[str]) -> SceneFailedError:
    """Make an error of one line that names the last checkpoint, and write the stack trace to error.txt."""
    details, last = job.folder / "error.txt", "no checkpoint yet"
    with contextlib.suppress(OSError):  # if the storage fails, `lines` say so already
        details.write_text(public("".join(traceback.format_exception(error))))
        if step := job.store.latest_step():
            last = f"last checkpoint: {job.store.place(f'checkpoints/step_{step:08d}')}"
    return SceneFailedError(f"{'; '.join(sorted(lines))}; {last}; details in {details}")


def _fit(job: SceneJob) -> dict[str, Any] | None:
    # The snapshot is Ray Train's list of the checkpoints of an earlier start, which nothing here needs. Ray
    # Train refuses to start if it is damaged or names a checkpoint that `flexgs train` has replaced since.
    for old in ("error.txt", STOP, "checkpoint_manager_snapshot.json"):
        (job.folder / old).unlink(missing_ok=True)
        job.store.push(old)
    train: Any = ray.train  # its annotations are those of Ray Train V1
    trainer = train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"capture": str(job.capture), "store": job.store, "cpus": job.cpus,
                           "config": job.config.to_dict()},
        torch_config=Torch(backend="nccl" if job.gpu else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=job.workers, use_gpu=job.gpu,
            resources_per_worker={"CPU": job.cpus, **({"GPU": 1} if job.gpu else {})},
            label_selector={NODE_ID_LABEL_KEY: job.machine} if job.machine else None),
        run_config=train.RunConfig(
            name=job.name, storage_path=str(Path(job.store.place()).parent),
            storage_filesystem=job.store.files,
            failure_config=train.FailureConfig(max_failures=job.max_failures,
                                               controller_failure_limit=START_TIMEOUTS),
            callbacks=[Failures(job.store, job.machine)],
            logging_config=train.LoggingConfig(log_level="WARNING")),
    )
    return trainer.fit().return_value


def train_worker(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train a scene as one of its workers; return the contents of results.json, or None if it was stopped."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the rasterizer's threads use all cores of the worker
        pool.set_num_threads(job["cpus"])
    try:
        with tempfile.TemporaryDirectory(prefix="flexgs-") as copy:
            store: Store = job["store"].copied_to(Path(copy))
            if not store.folder.is_dir():
                raise UserError(f"{store.folder}: not there on {socket.gethostname()}; choose a "
                                "--storage that all machines share, or an object store")
            config, group = Config.from_dict(job["config"]), Group.current()
            scene = load_capture(Path(job["capture"]), config)
            store.pull("metrics.jsonl")
            results = run(config, scene, store.folder, group, RaySession(store, group), str(device))
            if group.rank == 0:
                store.delete("results.json")  # an old one must not lie beside a new model
                store.push(*RESULTS)
            return results
    except StoppedError:
        return None
    except UserError as e:
        raise UserError(str(e)) from None  # not all subclasses of UserError can be pickled


class RaySession(LocalSession):
    """A LocalSession that pushes its files to the store and reports each checkpoint to Ray Train."""

    def __init__(self, store: Store, group: Group):
        super().__init__(store.folder, group, lambda step, metrics: store.push("metrics.jsonl"))
        self.store = store

    def checkpoints(self) -> list[Path]:
        """Pull the checkpoints that the first worker sees, and return their folders, the newest first."""
        # Another machine may see an older state of a shared folder, so all take the first worker's list.
        steps = self.group.gather(self.store.steps())[0]
        names = [f"checkpoints/step_{step:08d}" for step in steps]
        self.store.pull(*names)
        return [self.store.folder / name for name in names]

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a checkpoint, push it, and report it to Ray Train."""
        super().checkpoint(step, write)
        kept, name = None, f"step_{step:08d}"
        if self.group.rank == 0:
            self.store.push_checkpoint(name)
            kept = Checkpoint(self.store.place(f"checkpoints/{name}"), self.store.files)
        ray.train.report({"step": step}, checkpoint=kept,
                         checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    def stop(self, reported: bool) -> bool:
        """Whether to stop now: after a report, if the run folder has the file `stop`."""
        return reported and self.group.gather(self.group.rank == 0 and self.store.exists(STOP))[0]


class Failures(UserCallback):
    """Record worker failures in failures.jsonl, and end the run where starting again cannot help."""

    def __init__(self, store: Store, machine: str | None):
        self.store, self.machine = store, machine

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise a UserError of a worker, or MachineGoneError; Ray Train does not retry after these."""
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error  # Ray Train retries after an error of a worker, but not of a callback
        with (self.store.folder / "failures.jsonl").open("a") as lines:
            errors = {rank: describe(error) for rank, error in worker_exceptions.items()}
            lines.write(json.dumps({"time": round(time.time()), "errors": errors}) + "\n")
        self.store.push("failures.jsonl")
        if self.machine and not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self.machine):
            raise MachineGoneError(self.machine)  # Ray Train would wait for the machine


class Torch(TorchConfig):
    """Ray Train's TorchConfig, with gloo and NCCL on the network interface that Ray uses on each machine.

    By default gloo takes the interface of the host name, which /etc/hosts often maps to loopback, where no
    other machine answers.
    """

    @property
    def backend_cls(self) -> type:
        """The backend that chooses the interface before torch.distributed starts."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_use_interface)
        super().on_start(worker_group, backend_config)


def _use_interface() -> None:
    """Make gloo and NCCL use the network interface of Ray's address, unless the user has chosen one."""
    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == here for address in addresses):
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)
    if here == "127.0.0.1":
        store_on_loopback()


def describe(error: BaseException) -> str:
    """Return one line: the error's class, its first line and, if memory or disk ran out, what to do."""
    for inner in ("health_check_failure", "cause"):  # the error that Ray has wrapped
        error = getattr(error, inner, None) or error
    text = public(str(error)).strip()
    line = f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}".rstrip(": ")
    return f"{line} ({advice})" if (advice := cure(error)) else line
