"""Adaptive density control of 3DGS (Kerbl et al. 2023, section 5): clone, split, prune, opacity reset; under
a cap.

Every decision depends on statistics that are the same on all workers and on generators keyed by the step, so
replicas stay equal without talking to each other.
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
    """Watches the renders of stage 1 and changes the number of Gaussians."""

    def __init__(self, options: BaseConfig, length: int, scene_scale: float, seed: int, n: int,
                 device: torch.device):
        self.options, self.length, self.scene_scale, self.seed = options, length, scene_scale, seed
        self.gradient = torch.zeros(n, dtype=torch.float64, device=device)
        """Sum over views of the norm of the gradient of the screen position, in normalised device units;
        float64, so that the order of the views, and with it the number of workers, does not decide who
        grows."""
        self.seen = torch.zeros(n, device=device)
        """Number of views that each Gaussian was visible in."""

    @torch.no_grad()
    def observe(self, out: RenderOutput, camera: Camera, scale: float) -> None:
        """Take the gradient of out.means2d after backward; scale undoes the factor that the view's loss
        carried."""
        if out.means2d.grad is None:
            return
        half = torch.tensor([camera.width / 2, camera.height / 2], device=out.means2d.device)
        self.gradient += (out.means2d.grad * half * scale).norm(dim=1)
        self.seen += (out.radii > 0).all(dim=1)

    def refine(self, splats: Splats, optimizer: Optimizer, before: int, step: int, group: Group) -> Splats:
        """Whatever is due between the views before and step; returns the splats to go on with."""
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
        return _replace(splats, optimizer, ~remove, new)

    def _reset_opacities(self, splats: Splats, optimizer: Optimizer) -> None:
        """Opacities to at most 0.01 and their moments to zero."""
        splats.opacities.data.clamp_(max=math.log(0.01 / 0.99))
        state = optimizer.state[splats.opacities]
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()

    def tensors(self) -> dict[str, Tensor]:
        return {"densify.gradient": self.gradient, "densify.seen": self.seen}


def crosses(before: int, step: int, every: int) -> bool:
    """Whether a multiple of every lies in (before, step]."""
    return step // every > before // every


def halves(splats: Splats, random: torch.Generator) -> Splats:
    """Two samples from each Gaussian, 1.6 times smaller."""
    rotation = rotation_matrices(splats.quats)
    parts = []
    for _ in range(2):
        noise = torch.randn(splats.means.shape, generator=random).to(splats.means)
        part = splats.clone()
        part.means += (rotation @ (splats.scales.exp() * noise)[:, :, None])[:, :, 0]
        part.scales -= math.log(1.6)
        parts.append(part)
    return cat(parts)


def _replace(splats: Splats, optimizer: Optimizer, keep: Tensor, new: Splats) -> Splats:
    """The kept Gaussians followed by new ones, in the optimizer too."""
    return splats.changed(**{name: optimizer.replace_rows(f"splats.{name}", keep, getattr(new, name))
                             for name, _ in splats.items()})


def reorder(splats: Splats, optimizer: Optimizer, order: Tensor) -> Splats:
    """The Gaussians in the given order, with their moments."""
    return _replace(splats, optimizer, order, splats.detach()[:0])
