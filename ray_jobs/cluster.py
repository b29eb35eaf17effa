"""Which machines there are, and how scenes share them."""

import contextlib
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import ray
import torch

from flexgs import ray_library, telemetry
from flexgs.errors import UserError
from flexgs.ray_address import find
from flexgs.signals import listen

MAX_WORKERS = 8
"""The most GPUs that a scene gets unless the user asks for more: the batch grows with them."""
ANYWHERE = ""
"""The name of the machine that stands for all."""
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
"""Whether `ray job submit` started this process; its working folder is a temporary copy then."""
ASK_SECONDS, FORGOTTEN_SECONDS = 60.0, 180.0
"""How often the autoscaler is asked again for the same, and when it forgets what a job that was killed had
asked for."""

Node = Mapping[str, float]


class Cluster:
    """The Ray cluster at address, else the one of $RAY_ADDRESS or `ray start`, else this machine, where Ray
    starts when needed.

    Use it in a with statement: what it has connected or started ends with it.
    """

    def __init__(self, address: str | None, gpu: bool = False):
        """gpu: there are GPUs, or the autoscaler adds them when it is asked; UserError where neither can
        be."""
        self.gpu = gpu
        self._ours = not ray.is_initialized()
        self._asked: Sequence[Node] = ()
        self._asked_at, self._name = 0.0, f"flexgs-{uuid.uuid4().hex}"
        if self._ours and (found := find(address)):
            _init(found.address)
            print(f"Ray: the cluster at {found.address}", flush=True)
        self._local = not ray.is_initialized()
        if gpu and self._local and not torch.cuda.is_available():
            raise UserError("--gpu: found none on this machine, expected --ray-address of a cluster "
                            "that has or adds them")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(())
        if self._ours:
            ray.shutdown()

    @property
    def has_gpu(self) -> bool:
        return self.gpu or bool(ray.cluster_resources().get("GPU") if ray.is_initialized()
                                else torch.cuda.is_available())

    def ask(self, bundles: Sequence[Node]) -> None:
        """Tell the autoscaler, if there is one, what is missing: resources that a machine must have, for each
        that waits.
        """
        if self._local or not ray.is_initialized():  # which an interrupted batch has ended
            return
        if list(bundles) != list(self._asked) or (bundles
                                                  and time.monotonic() - self._asked_at > ASK_SECONDS):
            ray_library.request_resources(self._name, bundles, FORGOTTEN_SECONDS)
            self._asked, self._asked_at = bundles, time.monotonic()

    def wait_for_gpus(self, enough: int, wanted: int | None = None) -> None:
        """With --gpu, until there are enough; the autoscaler is asked for all that are wanted."""
        said = -ASK_SECONDS
        while self.gpu and (there := sum(node.get("GPU", 0) for node in self.nodes().values())) < enough:
            self.ask([{"GPU": 1}] * (wanted or enough))
            if time.monotonic() - said > ASK_SECONDS:
                print(f"Ray: waits for the autoscaler: {there:.0f} GPUs, at least {enough} "
                      "needed; see ray status", flush=True)
                said = time.monotonic()
            time.sleep(1.0)

    def nodes(self, workers: int | None = None) -> dict[str, Node]:
        """The resources of each machine that is alive and is to stay, by Ray's id.

        Ray started for this has at least a CPU for each of so many workers.
        """
        if not ray.is_initialized():
            # nobody collects them here: it is up sooner without
            os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
            # CPUs are only counted: two may share one
            more = workers is not None and workers > (os.cpu_count() or 1)
            ray_library.listen_on_loopback()
            _init("local", num_cpus=workers if more else None, num_gpus=torch.cuda.device_count(),
                  object_store_memory=256 << 20, runtime_env=this_python())
            with contextlib.suppress(OSError):  # the token, which Ray writes for everybody to read
                (Path.home() / ".ray" / "auth_token").chmod(0o600)
            print("Ray: this machine", flush=True)
        leaving = ray_library.draining_nodes()  # told so by the cloud, or by `ray drain-node`
        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]
                and node["NodeID"] not in leaving}


def this_python() -> dict[str, str]:
    """The runtime_env with which a Ray on this machine starts its workers: Ray gives the path of Python to a
    shell as it is, which takes a blank in it for its end. Empty where the path needs no quotes."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def _init(address: str, **options: Any) -> None:
    telemetry.turn_off()
    # a process per scene; Cluster.nodes() sees it as well
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # each checkpoint waits for the next poll
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # the machine is there, and has room: or it has gone
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        listen()
    except ConnectionError as e:
        raise UserError(f"{address}: something answers there, but not a Ray cluster of this version "
                        f"({e}); expected host:port of one, or --ray-address local") from None


class Workers(NamedTuple):
    """How many workers the user lets a scene have."""

    least: int
    most: int

    @staticmethod
    def parse(text: str, batch: int | None) -> "Workers":
        """Of "4" or "1:4"; UserError unless a number in it can share the views of a batch."""
        try:
            least, most = (int(part) for part in (text.split(":") if ":" in text else (text, text)))
        except ValueError:
            least, most = 0, 0
        if not 1 <= least <= most:
            raise UserError(f"--workers {text}: expected a number of at least 1, or a range such as 1:4")
        if batch and not any(batch % workers == 0 for workers in range(least, most + 1)):
            raise UserError(f"--workers {text}: found --batch {batch}, which none of them divides; "
                            "expected a divisor of it")
        return Workers(least, most)


@dataclass(frozen=True)
class Allocation:
    """What a scene may get of the cluster."""

    sizes: tuple[int, ...]
    """The numbers of workers that it may have, rising."""
    cpus: int
    """Per worker."""
    gpu: bool
    """Whether each worker has a GPU."""
    spread: bool
    """Whether the workers of a scene may be on several machines, because none is large enough for them."""

    def machines(self, nodes: Mapping[str, Node]) -> dict[str, int]:
        """How many workers each machine has room for; one that stands for all where scenes are spread."""
        room = {name: int(min(node.get("CPU", 0) // self.cpus,
                              node.get("GPU", 0) if self.gpu else node.get("CPU", 0)))
                for name, node in nodes.items()}
        return {ANYWHERE: sum(room.values())} if self.spread else room

    def bundles(self, scenes: int) -> list[Node]:
        """What so many scenes need at least."""
        return [{"CPU": self.cpus, **({"GPU": 1} if self.gpu else {})}] * (scenes * self.sizes[0])

    def __str__(self) -> str:
        least, most = self.sizes[0], self.sizes[-1]
        workers = f"{least} worker{'s' * (least > 1)}" if least == most else f"{least} to {most} workers"
        return (f"each with {workers} of {self.cpus} "
                f"CPU{'s' * (self.cpus > 1)}{' and a GPU' if self.gpu else ''}")


def allocate(nodes: Mapping[str, Node], scenes: int, workers: Workers | None = None,
             batch: int | None = None) -> Allocation:
    """What each of the scenes may get. A device is a GPU, or a CPU where the cluster has no GPU.

    By default a scene gets from one to MAX_WORKERS GPUs of one machine, each a worker; CPUs become threads of
    its one worker. UserError if the cluster is too small for the workers asked for, which Ray would wait for.
    """
    gpu = any(node.get("GPU", 0) >= 1 for node in nodes.values())
    kind = "GPU" if gpu else "CPU"
    devices = {name: int(node.get(kind, 0)) for name, node in nodes.items()}
    total, largest = sum(devices.values()), max(devices.values(), default=0)
    least, most = workers or (1, MAX_WORKERS if gpu else 1)
    asked = [size for size in range(least, most + 1) if not batch or batch % size == 0]
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
        room = allocation.machines(nodes)
        if cpus == 1 or (sum(room.values()) >= wanted and max(room.values()) >= sizes[0]):
            break
        cpus -= 1  # machines differ: fewer CPUs each, so that all fit
    if max(room.values()) < sizes[0]:
        raise UserError(f"found room for {sum(room.values())} workers of one CPU and one GPU, "
                        f"{max(room.values())} on the largest machine, expected {sizes[0]}")
    return allocation
