"""Group: the workers that train one scene together, and the messages that they send each other.

torch's DistributedDataParallel registers parameters once, but the number of Gaussians changes in training,
so gradients are summed explicitly. A group of one runs the same code and communicates nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist

# Default arguments of this module keep the process group of the moment of its import. The optimizer would
# import it at the first step: the group would then outlive its destruction, with threads of gloo that
# sometimes abort a process at its end.
import torch.distributed.nn.functional
from torch import Tensor

from flexgs.distributed.shared_memory import SharedMemory

SMALL = 100_000
"""Bytes up to which gloo sends a tensor as fast as shared memory does."""


class Group:
    """The workers of a model, of which this process is number `rank` of `world`; Group() is one alone."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self._memory: SharedMemory | Literal[False] | None = None  # None: not tried; False: not available

    @staticmethod
    def current() -> "Group":
        """Return the group that torch.distributed was initialized with, or a group of one."""
        return Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group()

    def my_indices(self, n: int) -> range:
        """Return the indices below n that this worker takes: every world-th one, from its rank on."""
        return range(self.rank, n, self.world)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over the workers, in place."""
        tensors = list(tensors)
        for t, total in zip(tensors, self.summed(tensors), strict=True):
            if total is not t:
                t.copy_(total)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor summed over the workers; tensors of one dtype are sent as one message."""
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
        """Return the sum over the workers of the concatenation of tensors of one dtype.

        Large CPU tensors are summed in shared memory if all workers are on one machine.
        """
        size = sum(t.nbytes for t in parts)
        if parts[0].device.type == "cpu" and size > SMALL:
            if self._memory is None or (self._memory and self._memory.size < size):
                room = -(-size * 5 // 4 // 64) * 64  # a quarter more, in multiples of 64 bytes
                self._memory = SharedMemory.open(self.rank, self.gather, room) or False
            if self._memory:
                return self._memory.sum(parts)
        flat = torch.cat([t.reshape(-1) for t in parts])
        dist.all_reduce(flat)
        return flat

    def swapped(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send the first send[0] rows to worker 0, the next send[1] to worker 1 and so on (all-to-all).

        Returns the rows received: receive[0] from worker 0, then receive[1] from worker 1 and so on.
        """
        if self.world == 1:
            return rows
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send)
        return out

    def gathered(self, mine: Tensor) -> list[Tensor]:
        """Return the tensors of all workers, which have one shape, in the order of ranks, to every worker."""
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine.contiguous())
        return parts

    def gather(self, value: object) -> list:
        """Return the values of all workers, in the order of ranks, to every worker."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def check_equal(self, named: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Raise a RuntimeError that names a tensor whose bits differ between the replicas, if any does."""
        if self.world == 1:
            return
        sums = {name: (tuple(t.shape), _checksum(t)) for name, t in named}
        for rank, theirs in enumerate(self.gather(sums)):
            for name, mine in sums.items():
                if theirs[name] != mine:
                    raise RuntimeError(f"step {step}: the workers' replicas differ: {name} is {mine} on rank "
                                       f"{self.rank} and {theirs[name]} on rank {rank}")


def _checksum(t: Tensor) -> int:
    """Return a sum of the bits that depends on their order."""
    bits = t.detach().contiguous().view(-1).view(torch.int32).to(torch.int64)
    return int((bits * (torch.arange(bits.numel(), device=bits.device) % 65521 + 1)).sum())
