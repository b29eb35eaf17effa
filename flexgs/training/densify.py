"""Adaptive density control of 3DGS (Kerbl et al. 2023, section 5) under a cap on the number of Gaussians.

Decisions depend only on the statistics of all Gaussians over all views and on generators keyed by the step,
so they are the same for any number of workers, whether those hold replicas or shards.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.config import BaseConfig
from flexgs.distributed import Shard
from flexgs.errors import UserError
from flexgs.raster.contract import Projection
from flexgs.seeds import generator
from flexgs.splats import Splats, cat, rotation_matrices
from flexgs.training.optim import Optimizer


class Densifier:
    """Clones, splits and prunes Gaussians by the gradients of stage 1, and resets their opacities."""

    def __init__(self, options: BaseConfig, length: int, scene_scale: float, seed: int, n: int,
                 device: torch.device):
        """Make one for n Gaussians, in a stage 1 of `length` views."""
        self.options, self.length, self.scene_scale, self.seed = options, length, scene_scale, seed
        self.gradient = torch.zeros(n, dtype=torch.float64, device=device)
        """[N] sum over views of the norm of the screen position's gradient, in normalised device coordinates.

        In float64 the order of summation, and so the number of workers, does not decide which Gaussians grow.
        """
        self.seen = torch.zeros(n, device=device)
        """[N] number of views in which each Gaussian was visible."""

    def regulariser(self, splats: Splats) -> float:
        """Return 0: 3DGS trains for the images alone."""
        return 0.0

    @torch.no_grad()
    def observe(self, seen: Projection, camera: Camera, scale: float) -> None:
        """Add one view's gradient of seen.means2d after backward; scale undoes the factor on its loss."""
        if seen.means2d.grad is None:
            return
        half = torch.tensor([camera.width / 2, camera.height / 2], device=seen.means2d.device)
        self.gradient += (seen.means2d.grad * half * scale).norm(dim=1)
        self.seen += (seen.radii > 0).all(dim=1)

    def refine(self, splats: Splats, optimizer: Optimizer, before: int, step: int, shard: Shard) -> Splats:
        """Do what is due after the views from `before` to `step`; returns the new Gaussians."""
        o = self.options
        reset_every = max(1, round(o.reset_every * self.length))
        if (o.refine_start * self.length < step <= o.refine_stop * self.length
            and crosses(before, step, o.refine_every)):
            shard.replicas.sum_([self.gradient, self.seen])
            splats = self._grow_and_prune(splats, optimizer, step, step > reset_every, shard)
            self.gradient = self.gradient.new_zeros(len(splats))
            self.seen = self.seen.new_zeros(len(splats))
        if crosses(before, step, reset_every) and step < o.refine_stop * self.length:
            self._reset_opacities(splats, optimizer)
        return splats

    @torch.no_grad()
    def _grow_and_prune(self, splats: Splats, optimizer: Optimizer, step: int, prune_large: bool,
                        shard: Shard) -> Splats:  # fmt: skip
        o = self.options
        mean = shard.whole(self.gradient / self.seen.clamp(min=1))
        grow = mean > o.grow_grad2d
        room = max(0, o.max_splats - len(mean))
        if int(grow.sum()) > room:
            best = torch.argsort(mean, descending=True, stable=True)[:room]
            grow = torch.zeros_like(grow).index_fill_(0, best, True)
        grow, size = shard.mine(grow), splats.scales.exp().max(dim=1).values
        large = size > o.grow_scale3d * self.scene_scale
        clone, split = grow & ~large, grow & large
        remove = split | (torch.sigmoid(splats.opacities) < o.prune_opa)
        if prune_large:
            remove |= size > o.prune_scale3d * self.scene_scale
        clone &= ~remove
        # The new order has those that stay, then the clones, then the first halves, then the second ones.
        fates = shard.whole(torch.stack([~remove, clone, split], 1))
        kept, clones, halved = fates.sum(0).tolist()
        if not kept + halved:
            raise UserError(f"view {step}: every Gaussian is fainter than --base.prune-opa "
                            f"{o.prune_opa:g} or larger than --base.prune-scale3d {o.prune_scale3d:g}, and "
                            "none is left; lower the first or raise the second")
        places, draw = shard.mine(fates.cumsum(0) - 1), generator(self.seed, "split", step)
        mine = places[split, 2]
        noise = [torch.randn(halved, 3, generator=draw).to(mine.device)[mine] for _ in range(2)]
        new = cat([splats.detach()[clone], halves(splats.detach()[split], noise)])
        first = mine + kept + clones
        move = shard.mover(torch.cat([places[~remove, 0], places[clone, 1] + kept, first, first + halved]),
                           kept + clones + 2 * halved)
        return replace_rows(splats, optimizer, ~remove, new, move)

    def _reset_opacities(self, splats: Splats, optimizer: Optimizer) -> None:
        """Lower opacities to at most 0.01 and set their Adam moments to zero."""
        splats.opacities.data.clamp_(max=math.log(0.01 / 0.99))
        state = optimizer.state[splats.opacities]
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics that a checkpoint holds."""
        return {"densify.gradient": self.gradient, "densify.seen": self.seen}

    def load(self, tensors: dict[str, Tensor], shard: Shard) -> None:
        """Take over the statistics of a checkpoint."""
        first = shard.replicas.rank == 0  # what replicas have is summed, and so was what was saved
        self.gradient, self.seen = tensors["densify.gradient"] * first, tensors["densify.seen"] * first

    @staticmethod
    def layout() -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Return the names, types and shapes of what tensors() returns."""
        return {"densify.gradient": ("float64", ("Gaussians",)), "densify.seen": ("float32", ("Gaussians",))}


def crosses(before: int, step: int, every: int) -> bool:
    """Return whether a multiple of `every` lies in (before, step]."""
    return step // every > before // every


def halves(splats: Splats, noise: Sequence[Tensor]) -> Splats:
    """Split each Gaussian into two, drawn from it and 1.6 times smaller, as 3DGS does.

    noise: [N, 3] normal random numbers for each half.
    """
    rotation = rotation_matrices(splats.quats)
    parts = []
    for offset in noise:
        part = splats.clone()
        part.means += (rotation @ (splats.scales.exp() * offset)[:, :, None])[:, :, 0]
        part.scales -= math.log(1.6)
        parts.append(part)
    return cat(parts)


def replace_rows(splats: Splats, optimizer: Optimizer, keep: Tensor, new: Splats,
                 move: Callable[[Tensor], Tensor], groups: str = "splats") -> Splats:
    """Return the kept Gaussians followed by new ones, moved, and do the same to the optimizer's moments.

    groups: the name of the optimizer's groups before the dot.
    """
    return splats.changed(**{name: optimizer.replace_rows(f"{groups}.{name}", keep, getattr(new, name), move)
                             for name, _ in splats.items()})


def reorder(splats: Splats, optimizer: Optimizer, order: Tensor, shard: Shard) -> Splats:
    """Return the Gaussians in the given order [M] of those of all workers, with their Adam moments."""
    rows, move = shard.sorter(order)
    return replace_rows(splats, optimizer, rows, splats.detach()[:0], move)
