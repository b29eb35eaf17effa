"""The workers of a run of Ray Train meet on the network interface that Ray uses on each machine."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from flexgs.torch_library import store_on_loopback


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
