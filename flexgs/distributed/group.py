"""Group: the workers that train one scene together, each with a full replica.

torch's DistributedDataParallel registers parameters once, but the number of Gaussians changes while training,
so gradients are summed by hand. A group of one runs the same code and communicates nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist

# Its default arguments keep the group of the moment it is imported. The optimiser imports it at the first
# step, and the group would outlive its destruction with gloo's threads, one of which now and then aborted a
# process that was ending.
import torch.distributed.nn.functional
from torch import Tensor

from flexgs.distributed.shared_memory import SharedMemory

SMALL = 100_000  # bytes; what is smaller travels as fast through gloo


class Group:
    """rank of world workers that share one model; Group() is a world of one."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self._memory: SharedMemory | Literal[False] | None = None  # False: found not to work here

    @staticmethod
    def current() -> "Group":
        """The group that torch.distributed was initialised with, or a world of one."""
        return Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group()

    def my_indices(self, n: int) -> range:
        """The indices out of range(n) that this worker takes: every world-th."""
        return range(self.rank, n, self.world)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over the workers, in place."""
        tensors = list(tensors)
        for t, total in zip(tensors, self.summed(tensors), strict=True):
            if total is not t:
                t.copy_(total)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor added up over the workers, as one flat message per dtype; a world of one gives back
        what it was given."""
        if self.world == 1:
            return list(tensors)
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, t in enumerate(tensors):
            by_dtype.setdefault(t.dtype, []).append(i)
        totals = list(tensors)
        for places in by_dtype.values():
            parts = [tensors[i] for i in places]
            pieces = self._sum_flat(parts).split([t.numel() for t in parts])
            for i, piece in zip(places, pieces, strict=True):
                totals[i] = piece.view(tensors[i].shape)
        return totals

    def _sum_flat(self, parts: Sequence[Tensor]) -> Tensor:
        """The flat sum over the workers of tensors of one dtype: through memory on one machine's CPUs, else
        by a message."""
        size = sum(t.nbytes for t in parts)
        if parts[0].device.type == "cpu" and size > SMALL:
            if self._memory is None or (self._memory and self._memory.size < size):
                self._memory = SharedMemory.open(self.rank, self.gather,
                                                 -(-size * 5 // 4 // 64) * 64) or False
            if self._memory:
                return self._memory.sum(parts)
        flat = torch.cat([t.reshape(-1) for t in parts])
        dist.all_reduce(flat)
        return flat

    def gather(self, value: object) -> list:
        """The value of each worker, in the order of ranks, on every worker."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def check_equal(self, named: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Raise RuntimeError naming the first tensor in which the replicas differ (compares bytes, not
        closeness)."""
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
