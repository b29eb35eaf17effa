"""What is patched in torch, in one place; tests/test_libraries.py says what no longer works without it."""

import socket
import sys
from typing import Any

import torch


def store_on_loopback() -> None:
    """Let torch's store, where the workers of a run on one machine meet, listen on the loopback interface.

    It listens on all interfaces unless it is given a socket, and no option of torch.distributed's
    initialisation gives it one.
    """
    sys.modules["torch.distributed.rendezvous"].TCPStore = _store  # type: ignore[attr-defined]


def _store(*, is_master: bool, **options: Any) -> torch.distributed.TCPStore:
    if is_master:
        options["master_listen_fd"] = socket.create_server((options["host_name"], options["port"])).detach()
    return torch.distributed.TCPStore(is_master=is_master, **options)
