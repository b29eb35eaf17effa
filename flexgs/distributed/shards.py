"""Shard: the Gaussians that one worker holds, and how workers that hold different ones render together.

Every worker projects its own Gaussians for the views of all workers, sends each worker those that are visible
in its view, and rasterizes its own view from what it receives; gradients go back the same way. Parameters,
Adam's moments and the statistics of densification stay with the worker that holds the Gaussian. Grendel-GS
(Zhao et al. 2024) does the same with pixels in the place of views.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexgs.distributed.group import Group
from flexgs.raster.contract import Projection


class Shard:
    """The places r, r + W, r + 2W, ... of the n Gaussians in their order, for worker r of W.

    So a cut, which is the first k of all, is the first `count(k)` of every worker, about as many on each.
    Workers with replicas of the model all hold one shard, which has everything.
    """

    def __init__(self, group: Group | None = None, n: int = 0, sharded: bool = False):
        """Make the shard of this worker; sharded: the workers of the group hold parts, not replicas."""
        group = group or Group()
        self.owners, self.replicas = (group, Group()) if sharded else (Group(), group)
        """The workers that hold the other Gaussians, and those that hold the same ones."""
        self.n = n
        """How many Gaussians there are, on all workers together."""

    def count(self, k: int) -> int:
        """Return how many of the first k places are this worker's."""
        return len(self.owners.my_indices(k))

    def mine(self, whole: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Return this worker's rows of a tensor of all Gaussians.

        Args:
            whole: a row for each place; or, with counts, blocks of rows for so many of the first places.
            counts: the numbers of rows of the blocks; none of them: all workers hold the whole tensor.
        """
        counts = [len(whole)] if counts is None else counts
        if self.owners.world == 1 or not counts:
            return whole
        return torch.cat([block[self.owners.rank::self.owners.world] for block in whole.split(list(counts))])

    def whole(self, mine: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Return the tensor of which every worker has `mine`, to every worker; see mine()."""
        counts = [self.n] if counts is None else counts
        if self.owners.world == 1 or not counts:
            return mine
        blocks = []
        for count, block in zip(counts, mine.split([self.count(count) for count in counts]), strict=True):
            room = -(-count // self.owners.world)
            filled = torch.cat([block, block.new_zeros(room - len(block), *block.shape[1:])])
            blocks.append(torch.stack(self.owners.gathered(filled), 1).flatten(0, 1)[:count])
        return torch.cat(blocks)

    def mover(self, places: Tensor, n: int) -> Callable[[Tensor], Tensor]:
        """Give this worker's Gaussians new places among n, which are from now on how many there are.

        Args:
            places: [M] the place of each of this worker's rows; on all workers together 0 to n - 1.
            n: number of places.

        Returns:
            A function of [M, ...] rows, which all workers call together: the rows of this worker's places.
        """
        self.n, world = n, self.owners.world
        if world == 1:
            return lambda rows: torch.empty_like(rows).index_copy_(0, places, rows)
        to = places % world
        order, (send, receive) = to.argsort(stable=True), self._sizes(to.bincount(minlength=world))
        slots = self.owners.swapped(places[order] // world, send, receive)

        def move(rows: Tensor) -> Tensor:
            rows = self.owners.swapped(rows[order], send, receive)
            return torch.empty_like(rows).index_copy_(0, slots, rows)

        return move

    def sorter(self, order: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Put the Gaussians of all workers in an order [M], which may leave some out.

        Returns:
            This worker's rows of those that stay, and the function that moves them as mover() does.
        """
        if self.owners.world == 1:
            self.n = len(order)
            return order, lambda rows: rows
        places = torch.full((self.n,), -1, device=order.device)
        places[order] = torch.arange(len(order), device=order.device)
        places = self.mine(places)
        rows = (places >= 0).nonzero()[:, 0]
        return rows, self.mover(places[rows], len(order))

    def exchanged(self, projections: Sequence[Projection]) -> Projection:
        """Return all Gaussians that this worker's view sees, in their order, differentiable.

        projections: this worker's Gaussians in the view of each worker. All workers call this together, and
        all of them go through its backward pass.
        """
        if self.owners.world == 1:
            return projections[0]
        seen = [(p.radii > 0).all(dim=1).nonzero()[:, 0] for p in projections]
        device = seen[0].device
        send, receive = self._sizes(torch.tensor([len(rows) for rows in seen], device=device))
        values = torch.cat([torch.cat([p.means2d, p.conics, p.opacities[:, None], p.colors], 1)
                            .index_select(0, rows) for p, rows in zip(projections, seen, strict=True)])
        bits = torch.cat([torch.cat([p.depths.detach().view(torch.int32)[rows, None], p.radii[rows],
                                     (rows[:, None] * self.owners.world + self.owners.rank).int()], 1)
                          for p, rows in zip(projections, seen, strict=True)])
        values = _Swap.apply(values, self.owners, send, receive)
        bits = self.owners.swapped(bits, send, receive)
        order = bits[:, 3].argsort()  # of equal depths the first comes first, as where one worker has all
        values, bits = values.index_select(0, order), bits[order]
        means2d, conics, opacities, colors = values.split([2, 3, 1, 3], dim=1)
        return Projection(means2d, conics, opacities[:, 0], colors,
                          bits[:, 0].contiguous().view(torch.float32), bits[:, 1:3].contiguous())

    def _sizes(self, send: Tensor) -> tuple[list[int], list[int]]:
        """Return how many rows go to each worker, and how many come from each."""
        ones = [1] * self.owners.world
        return send.tolist(), self.owners.swapped(send, ones, ones).tolist()


class _Swap(torch.autograd.Function):
    """Group.swapped; the gradients of rows go back to the workers that they came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return group.swapped(rows, send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.group.swapped(gradient, ctx.receive, ctx.send), None, None, None
