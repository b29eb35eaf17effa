"""Which machines there are, and how scenes share them."""

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ray
import torch
from ray._private.utils import read_ray_address

from flexgs.errors import UserError

MAX_WORKERS = 8
"""The most GPUs that a scene gets unless the user asks for more: the batch grows with them."""
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
"""Whether `ray job submit` started this process; its working folder is a temporary copy then."""

Node = Mapping[str, float]


class Cluster:
    """The Ray cluster at address, else the one of $RAY_ADDRESS or `ray start`, else this machine, where Ray starts when needed.

    Use it in a with statement: what it has connected or started ends with it.
    """

    def __init__(self, address: str | None):
        self._ours = not ray.is_initialized()
        if self._ours and (found := _find(address)):
            _init(found)
            print(f"Ray: the cluster at {found}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            ray.shutdown()

    @property
    def has_gpu(self) -> bool:
        return bool(ray.cluster_resources().get("GPU")) if ray.is_initialized() else torch.cuda.is_available()

    def nodes(self, workers: int | None = None) -> list[Node]:
        """The resources of each machine. Ray started for this has at least a CPU for each of so many workers."""
        if not ray.is_initialized():
            # Nobody preempts this machine and nobody collects Ray's metrics: it is up sooner without either.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
            more = workers is not None and workers > (os.cpu_count() or 1)  # CPUs are only counted: two may share one
            _init("local", num_cpus=workers if more else None, num_gpus=torch.cuda.device_count(),
                  object_store_memory=256 << 20)
            print("Ray: this machine", flush=True)
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _init(address: str, **options: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # each checkpoint waits for the next poll
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)


@dataclass(frozen=True)
class Share:
    """What a scene gets of the cluster."""

    slots: int
    """Scenes side by side."""
    workers: int
    """Per scene."""
    cpus: int
    """Per worker."""
    gpu: bool
    """Whether each worker has a GPU."""

    def __str__(self) -> str:
        each = f"{self.cpus} CPU{'s' * (self.cpus > 1)}{' and a GPU' if self.gpu else ''}"
        return f"{self.slots} at a time, each with {self.workers} worker{'s' * (self.workers > 1)} of {each}"


def share_out(nodes: Sequence[Node], scenes: int, workers: int | None = None, batch: int | None = None) -> Share:
    """One device per scene while there are as many scenes as devices; else the scenes share the devices.

    A device is a GPU, or a CPU where the cluster has no GPU: several GPUs for a scene become its workers, several CPUs
    threads of its one worker. UserError if the cluster is too small for the workers asked for, which Ray would wait for.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    devices = gpus or sum(int(node.get("CPU", 0)) for node in nodes)
    kind = "GPU" if gpus else "CPU"
    if workers is not None and workers > devices:
        raise UserError(f"--workers {workers}: found {devices} {kind}s on {len(nodes)} machines, expected at most {devices}")
    if workers is None:
        workers = min(MAX_WORKERS, max(1, devices // scenes)) if gpus else 1
        while batch and batch % workers:
            workers -= 1

    def room(cpus: int) -> int:
        """How many workers of so many CPUs fit on the machines."""
        return sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else devices)) for node in nodes)

    wanted = devices if gpus else min(scenes, devices // workers) * workers
    cpus = max(1, sum(int(node.get("CPU", 0)) for node in nodes if not gpus or node.get("GPU")) // wanted)
    while cpus > 1 and room(cpus) < wanted:  # machines differ: fewer CPUs each, so that all fit
        cpus -= 1
    slots = min(scenes, room(cpus) // workers)
    if slots < 1:
        raise UserError(f"found room for {room(cpus)} workers of one CPU and one GPU, expected {workers}")
    return Share(slots, workers, cpus, bool(gpus))


def _find(address: str | None) -> str | None:
    """host:port of a cluster that answers, None for this machine. (Ray tries for minutes to reach one that has gone, and its
    own "auto" joins any cluster that runs here, another script's too.)"""
    sources = {"--ray-address": address, "RAY_ADDRESS": os.environ.get("RAY_ADDRESS"), "ray start": read_ray_address()}
    for source, value in sources.items():
        if value == "local":
            return None
        if not value or value == "auto":
            continue
        host, _, port = value.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return value
        except (OSError, ValueError) as e:
            if source != "ray start":
                raise UserError(f"{source} {value}: no Ray cluster answers ({e}); expected host:port of one that runs, "
                                "or local") from None
            print(f"Ray: the cluster that was started here at {value} has gone", flush=True)
    if address == "auto":
        raise UserError("--ray-address auto: found no cluster started here; run ray start, or use local")
    return None
