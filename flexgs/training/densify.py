"""Adaptive density control of 3DGS (Kerbl et al. 2023, section 5) under a cap on the number of Gaussians.

Decisions depend only on statistics that are summed over the workers and on generators keyed by the step, so
the workers' replicas stay equal without further communication.
"""

import math

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.config import BaseConfig
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.raster.contract import RenderOutput
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
    def observe(self, out: RenderOutput, camera: Camera, scale: float) -> None:
        """Add one view's gradient of out.means2d after backward; scale undoes the factor on its loss."""
        if out.means2d.grad is None:
            return
        half = torch.tensor([camera.width / 2, camera.height / 2], device=out.means2d.device)
        self.gradient += (out.means2d.grad * half * scale).norm(dim=1)
        self.seen += (out.radii > 0).all(dim=1)

    def refine(self, splats: Splats, optimizer: Optimizer, before: int, step: int, group: Group) -> Splats:
        """Do what is due after the views from `before` to `step`; returns the new Gaussians."""
        o = self.options
        reset_every = max(1, round(o.reset_every * self.length))
        if (o.refine_start * self.length < step <= o.refine_stop * self.length
            and crosses(before, step, o.refine_every)):
            group.sum_([self.gradient, self.seen])
            splats = self._grow_and_prune(splats, optimizer, step, prune_large=step > reset_every)
            self.gradient = self.gradient.new_zeros(len(splats))
            self.seen = self.seen.new_zeros(len(splats))
        if crosses(before, step, reset_every) and step < o.refine_stop * self.length:
            self._reset_opacities(splats, optimizer)
        return splats

    @torch.no_grad()
    def _grow_and_prune(self, splats: Splats, optimizer: Optimizer, step: int, prune_large: bool) -> Splats:
        o = self.options
        mean = self.gradient / self.seen.clamp(min=1)
        grow = mean > o.grow_grad2d
        room = max(0, o.max_splats - len(splats))
        if int(grow.sum()) > room:
            best = torch.argsort(mean, descending=True, stable=True)[:room]
            grow = torch.zeros_like(grow).index_fill_(0, best, True)
        size = splats.scales.exp().max(dim=1).values
        large = size > o.grow_scale3d * self.scene_scale
        clone, split = grow & ~large, grow & large
        remove = split | (torch.sigmoid(splats.opacities) < o.prune_opa)
        if prune_large:
            remove |= size > o.prune_scale3d * self.scene_scale
        if bool((remove & ~split).all()):
            raise UserError(f"view {step}: every Gaussian is fainter than --base.prune-opa "
                            f"{o.prune_opa:g} or larger than --base.prune-scale3d {o.prune_scale3d:g}, and "
                            "none is left; lower the first or raise the second")
        new = cat([splats.detach()[clone & ~remove],
                   halves(splats.detach()[split], generator(self.seed, "split", step))])
        return replace_rows(splats, optimizer, ~remove, new)

    def _reset_opacities(self, splats: Splats, optimizer: Optimizer) -> None:
        """Lower opacities to at most 0.01 and set their Adam moments to zero."""
        splats.opacities.data.clamp_(max=math.log(0.01 / 0.99))
        state = optimizer.state[splats.opacities]
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics that a checkpoint holds."""
        return {"densify.gradient": self.gradient, "densify.seen": self.seen}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the statistics of a checkpoint."""
        self.gradient, self.seen = tensors["densify.gradient"], tensors["densify.seen"]

    @staticmethod
    def layout() -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Return the names, types and shapes of what tensors() returns."""
        return {"densify.gradient": ("float64", ("Gaussians",)), "densify.seen": ("float32", ("Gaussians",))}


def crosses(before: int, step: int, every: int) -> bool:
    """Return whether a multiple of `every` lies in (before, step]."""
    return step // every > before // every


def halves(splats: Splats, random: torch.Generator) -> Splats:
    """Split each Gaussian into two, drawn from it and 1.6 times smaller, as 3DGS does."""
    rotation = rotation_matrices(splats.quats)
    parts = []
    for _ in range(2):
        noise = torch.randn(splats.means.shape, generator=random).to(splats.means)
        part = splats.clone()
        part.means += (rotation @ (splats.scales.exp() * noise)[:, :, None])[:, :, 0]
        part.scales -= math.log(1.6)
        parts.append(part)
    return cat(parts)


def replace_rows(splats: Splats, optimizer: Optimizer, keep: Tensor, new: Splats) -> Splats:
    """Return the kept Gaussians followed by new ones, and do the same to the optimizer's moments."""
    return splats.changed(**{name: optimizer.replace_rows(f"splats.{name}", keep, getattr(new, name))
                             for name, _ in splats.items()})


def reorder(splats: Splats, optimizer: Optimizer, order: Tensor) -> Splats:
    """Return the Gaussians in the given order [M], with their Adam moments."""
    return replace_rows(splats, optimizer, order, splats.detach()[:0])
