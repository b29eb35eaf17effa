"""Group: the workers that train one scene together, each with a full replica.

torch's DistributedDataParallel registers parameters once, but the number of Gaussians changes while training, so gradients are
summed by hand. A group of one runs the same code and communicates nothing.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """rank of world workers that share one model; Group() is a world of one."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    @staticmethod
    def current() -> "Group":
        """The group that torch.distributed was initialised with, or a world of one."""
        return Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group()

    def share(self, n: int) -> range:
        """The indices out of range(n) that this worker takes: every world-th."""
        return range(self.rank, n, self.world)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over the workers, in place, as one flat message per dtype."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        for parts in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in parts])
            dist.all_reduce(flat)
            for t, piece in zip(parts, flat.split([t.numel() for t in parts]), strict=True):
                t.copy_(piece.view_as(t))

    def gather(self, value: object) -> list:
        """The value of each worker, in the order of ranks, on every worker."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def check_equal(self, named: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Raise RuntimeError naming the first tensor in which the replicas differ (compares bytes, not closeness)."""
        if self.world == 1:
            return
        sums = {name: (tuple(t.shape), _checksum(t)) for name, t in named}
        for rank, theirs in enumerate(self.gather(sums)):
            for name, mine in sums.items():
                if theirs[name] != mine:
                    raise RuntimeError(f"step {step}: the workers' replicas differ: {name} is {mine} on rank "
                                       f"{self.rank} and {theirs[name]} on rank {rank}")


def _checksum(t: Tensor) -> int:
    """Order-dependent sum of the bits."""
    bits = t.detach().contiguous().view(-1).view(torch.int32).to(torch.int64)
    return int((bits * (torch.arange(bits.numel(), device=bits.device) % 65521 + 1)).sum())
