"""All that is private in Ray 2.60, in one place: each function says what it is for and what replaces it.

pyproject.toml pins Ray's minor version; tests/test_libraries.py says what no longer works after another.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def started_address() -> str | None:
    """host:port of the cluster that `ray start` started on this machine, if it says so; it may have gone.

    ray.init("auto") also joins a cluster that another script started.
    """
    from ray._private.utils import read_ray_address

    return read_ray_address()


def listen_on_loopback() -> None:
    """Let a Ray that starts here listen on the loopback interface alone, as it does on laptops.

    Ray reads the environment when it is imported. Without this it listens on all interfaces, and only its
    token keeps others out.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"


@contextmanager
def without_dashboard() -> Iterator[None]:
    """Let a Ray that is started in the block be as Ray is installed without its dashboard, seconds faster.

    With include_dashboard=False alone, ray.init() still starts a process that only reports usage and waits
    for it, and starts the whole of the dashboard's agent.
    """
    from ray._private import services, utils

    start, missing = services.start_api_server, utils.get_dashboard_dependency_error
    services.start_api_server = lambda *args, **kwargs: ("", None)
    utils.get_dashboard_dependency_error = lambda: ImportError("the dashboard was not asked for")
    try:
        yield
    finally:
        services.start_api_server, utils.get_dashboard_dependency_error = start, missing


def draining_nodes() -> Mapping[str, int]:
    """The ids of the machines that are to leave: the cloud or `ray drain-node` has said so.

    ray.nodes() does not tell them from others.
    """
    from ray._private.state import state

    return state.get_draining_nodes()


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """What nobody uses of each machine, by its id.

    ray.available_resources() only knows the sum over the machines.
    """
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


def no_room_error() -> type[Exception]:
    """What Ray Train raises when the workers of a run have no room within the time that they are given."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return WorkerGroupStartupTimeoutError


def start_error() -> type[Exception]:
    """What Ray Train raises when a worker dies, or its machine, before it has begun."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    return WorkerGroupStartupFailedError
