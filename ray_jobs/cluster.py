"""The machines of a Ray cluster, and how many workers and CPUs of them each scene may get."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from flexgs import ray_library, telemetry
from flexgs.errors import UserError
from flexgs.ray_address import find
from flexgs.signals import listen
from flexgs.urls import first_line

MAX_WORKERS = 8
"""The most GPUs that a scene gets by default."""
SAY_SECONDS = 30.0
"""Time between two messages that something is waited for."""

Node = Mapping[str, float]
"""The resources of a machine, as Ray names them: CPU, GPU, ..."""


class Cluster:
    """The Ray cluster of `find(address)`, or Ray on this machine, started when it is needed.

    As a context manager, it ends the connection or the Ray that it has started.
    """

    def __init__(self, address: str | None, gpu: bool = False, dashboard: bool = False):
        """Connect to the cluster if there is one.

        Args:
            address: host:port, local, or None; see flexgs.ray_address.find.
            gpu: train on GPUs, which the autoscaler adds if the cluster has none yet.
            dashboard: a Ray that is started here has its dashboard, which takes as long as Ray itself.

        Raises:
            UserError: no cluster answers at a named address, or gpu on a single machine without one.
        """
        self.gpu, self._dashboard = gpu, dashboard
        self._ours = not ray.is_initialized()
        # Kept as long as this: the processes of a Ray end with the thread that has started them.
        self._starter = ThreadPoolExecutor(1, "ray")
        self._starting: Future[None] | None = None
        if self._ours and (found := find(address)):
            _init(found.address)
            print(f"Ray: the cluster at {found.address}", flush=True)
        if gpu and not ray.is_initialized() and not torch.cuda.is_available():
            raise UserError("--gpu: found none on this machine, expected --ray-address of a cluster "
                            "that has or adds them")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._starting:
            wait([self._starting])
        if self._ours:
            ray.shutdown()

    @property
    def has_gpu(self) -> bool:
        """Whether scenes train on GPUs."""
        connected = ray.is_initialized() and not self._starting
        return self.gpu or bool(ray.cluster_resources().get("GPU") if connected
                                else torch.cuda.is_available())

    def start(self, workers: int = 1) -> None:
        """Begin to start Ray on this machine, beside what this process does, unless a cluster is connected.

        It has at least a CPU for each of `workers`: Ray only counts CPUs, so workers may share one.
        """
        if not ray.is_initialized() and not self._starting:
            self._starting = self._starter.submit(_start_here, workers, self._dashboard)

    def nodes(self, workers: int = 1) -> dict[str, Node]:
        """Return the resources of each machine that is alive and not about to leave, by Ray's id.

        Starts Ray on this machine if no cluster is connected; see start().
        """
        self.start(workers)
        if self._starting:
            self._starting.result()
            self._starting = None
            listen()
            print("Ray: this machine", flush=True)
        leaving = ray_library.draining_nodes()  # announced by the cloud or by `ray drain-node`
        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]
                and node["NodeID"] not in leaving}

    def wait_for_gpus(self, enough: int) -> None:
        """With --gpu, wait until the cluster has `enough` GPUs; its autoscaler adds machines for them."""
        if self.gpu and sum(node.get("GPU", 0) for node in self.nodes().values()) < enough:
            asked = placement_group([{"GPU": 1}] * enough)
            while not asked.wait(SAY_SECONDS):
                print(f"Ray: waits for the autoscaler: at least {enough} GPUs are needed; see ray status",
                      flush=True)
            remove_placement_group(asked)


def _start_here(workers: int, dashboard: bool) -> None:
    """Start Ray on this machine, listening on loopback alone."""
    # Ray starts faster without metrics, which nobody collects on this machine.
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are all that this machine is to do
    ray_library.listen_on_loopback()
    more = workers > (os.cpu_count() or 1)
    with contextlib.nullcontext() if dashboard else ray_library.without_dashboard():
        _init("local", num_cpus=workers if more else None, num_gpus=torch.cuda.device_count(),
              include_dashboard=dashboard, object_store_memory=256 << 20, runtime_env=this_python())
    with contextlib.suppress(OSError):  # Ray writes the token so that other users can read it
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def worker(cpus: int, gpu: bool) -> dict[str, float]:
    """Return the resources of a worker, as Ray names them."""
    return {"CPU": cpus, **({"GPU": 1} if gpu else {})}


def share_memory(workers: int) -> None:
    """Let this process take no more memory for images than one of so many workers on this machine may."""
    os.environ["LOCAL_WORLD_SIZE"] = str(workers)


def this_python() -> dict[str, str]:
    """Return a runtime_env that quotes the path of Python, empty if the path needs no quotes.

    Ray passes the path to a shell as it is, which splits it at blanks.
    """
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def _init(address: str, **options: Any) -> None:
    telemetry.turn_off()
    # Workers see that their machine leaves; Ray Train's watcher would be a further process per scene.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # The end of a scene waits for the next health check.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A scene is started where there is room: if there is none after 20 s, somebody else was faster.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        listen()
    except ConnectionError as e:
        raise UserError(f"{address}: something answers there, but not a Ray cluster of this version "
                        f"({e}); expected host:port of one, or --ray-address local") from None
    except Exception as e:  # Ray has many, after 30 s, for a machine that is too busy
        raise UserError(f"Ray cannot be started ({first_line(e)}): try again when the machine has less to "
                        "do; flexgs train needs no Ray") from e


class Workers(NamedTuple):
    """The least and the greatest number of workers that the user allows for a scene."""

    least: int
    most: int

    @staticmethod
    def parse(text: str, batch: int) -> "Workers":
        """Read "4" or "1:4"; UserError unless a number in the range divides the views of a step."""
        try:
            least, most = (int(part) for part in (text.split(":") if ":" in text else (text, text)))
        except ValueError:
            least, most = 0, 0
        if not 1 <= least <= most:
            raise UserError(f"--workers {text}: expected a number of at least 1, or a range such as 1:4")
        if not any(batch % workers == 0 for workers in range(least, most + 1)):
            raise UserError(f"--workers {text}: found --batch {batch}, whose views so many cannot share "
                            f"equally; expected a batch such as --batch {least}, which changes the result "
                            "(docs/distributed.md)")
        return Workers(least, most)


@dataclass(frozen=True)
class Allocation:
    """The workers that each scene may get, and the resources of a worker."""

    sizes: tuple[int, ...]
    """The numbers of workers that a scene may have, rising."""
    cpus: int
    """CPUs per worker."""
    gpu: bool
    """Whether each worker has a GPU."""
    spread: bool
    """Whether a scene's workers may be on several machines, because no machine has room for the fewest."""

    def room(self, nodes: Mapping[str, Node]) -> dict[str, int]:
        """Return how many workers each machine has room for."""
        return {name: int(min(node.get("CPU", 0) // self.cpus,
                              node.get("GPU", 0) if self.gpu else node.get("CPU", 0)))
                for name, node in nodes.items()}

    def reserve(self) -> PlacementGroup:
        """Ask Ray to keep the room of a scene's fewest workers; it waits in Ray's queue until that is free.

        An autoscaler adds machines for it.
        """
        return placement_group([worker(self.cpus, self.gpu)] * self.sizes[0],
                               strategy="PACK" if self.spread else "STRICT_PACK")

    def __str__(self) -> str:
        least, most = self.sizes[0], self.sizes[-1]
        workers = f"{least} worker{'s' * (least > 1)}" if least == most else f"{least} to {most} workers"
        cpus = f"{self.cpus} CPU{'s' * (self.cpus > 1)}"
        return f"each with {workers} of {cpus}{' and a GPU' if self.gpu else ''}"


def allocate(nodes: Mapping[str, Node], scenes: int, workers: Workers | None = None,
             batch: int = 1) -> Allocation:
    """Choose the workers that each scene may get, and the CPUs of each worker.

    By default a scene has from one to MAX_WORKERS workers on one machine, with a GPU each, that share the
    views of a step; without GPUs it has one worker, whose CPUs become threads.

    Args:
        nodes: the resources of each machine.
        scenes: the number of scenes to train.
        workers: the range that the user asks for.
        batch: the views of a step, which the number of workers must divide.

    Raises:
        UserError: the cluster is too small for the workers asked for; Ray would wait for ever.
    """
    gpu = any(node.get("GPU", 0) >= 1 for node in nodes.values())
    kind = "GPU" if gpu else "CPU"
    devices = {name: int(node.get(kind, 0)) for name, node in nodes.items()}
    total, largest = sum(devices.values()), max(devices.values(), default=0)
    least, most = workers or (1, MAX_WORKERS if gpu else 1)
    asked = [size for size in range(least, most + 1) if batch % size == 0]
    if asked[0] > total:
        raise UserError(f"--workers {least}{f':{most}' * (most > least)}: found {total} "
                        f"{kind}s on {len(nodes)} machine{'s' * (len(nodes) > 1)}, expected at most "
                        f"{total} or a larger cluster"
                        + ("; --gpu waits for those that an autoscaler adds" if not gpu else ""))
    sizes = tuple(size for size in asked if size <= max(asked[0], largest))
    wanted = total if gpu else min(total, scenes * sizes[-1]) // sizes[0] * sizes[0]
    cpus = max(1, int(sum(node.get("CPU", 0) for name, node in nodes.items() if devices[name])) // wanted)
    spread = sizes[0] > largest
    while True:
        allocation = Allocation(sizes, cpus, gpu, spread)
        room = allocation.room(nodes)
        found = sum(room.values()) if spread else max(room.values())
        if cpus == 1 or (sum(room.values()) >= wanted and found >= sizes[0]):
            break
        cpus -= 1  # Machines differ in size: with fewer CPUs each, all workers find room.
    if found < sizes[0]:
        raise UserError(f"found room for {sum(room.values())} workers of one CPU and one GPU, "
                        f"{max(room.values())} on the largest machine, expected {sizes[0]}")
    return allocation
