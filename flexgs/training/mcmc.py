"""3D Gaussian Splatting as Markov Chain Monte Carlo (Kheradmand et al. 2024, arXiv 2404.09591).

Gaussians are samples of a distribution: transparent ones move to where opaque ones are, a few more are drawn
there in each round until there are max_splats, and noise moves those that are nearly transparent. Random
numbers are keyed by the step, so the workers' replicas stay equal without communication.
"""

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.config import BaseConfig
from flexgs.distributed import Shard
from flexgs.errors import UserError
from flexgs.origin import unit_of
from flexgs.raster.contract import Projection
from flexgs.seeds import generator
from flexgs.splats import Splats, rotation_matrices
from flexgs.training.densify import crosses, replace_rows
from flexgs.training.optim import Optimizer

GROWTH = 0.05
"""Most new Gaussians of a round, as a fraction of those there are."""
SHARPNESS = 100.0
"""k of the noise: how suddenly it ends for Gaussians that are more opaque than prune_opa."""
MOST_OPAQUE = 1 - 1e-6
"""Opacity above which relocation counts a Gaussian as no more opaque, or the sum of relocated() cancels."""
TERMS = 100
"""Most terms of that sum; for opacities up to MOST_OPAQUE, later ones are below 1e-40."""


class Mcmc:
    """Relocates, adds and disturbs Gaussians in stage 1."""

    def __init__(self, options: BaseConfig, length: int, scene_scale: float, seed: int, n: int,
                 device: torch.device):
        """Make one for a stage 1 of `length` views; it keeps nothing about the n Gaussians."""
        self.options, self.length, self.seed, self.unit = options, length, seed, unit_of(scene_scale)

    def regulariser(self, splats: Splats) -> Tensor:
        """Compute the loss that lets Gaussians vanish which are not needed, as means."""
        return (self.options.opacity_reg * torch.sigmoid(splats.opacities).mean()
                + self.options.scale_reg * splats.scales.exp().mean() / self.unit)

    def observe(self, seen: Projection, camera: Camera, scale: float) -> None:
        """Learn nothing from a view: which Gaussians move depends on their opacities only."""

    @torch.no_grad()
    def refine(self, splats: Splats, optimizer: Optimizer, before: int, step: int, shard: Shard) -> Splats:
        """Do what is due after the views from `before` to `step`; returns the new Gaussians."""
        o = self.options
        if (o.refine_start * self.length < step <= o.refine_stop * self.length
            and crosses(before, step, o.refine_every)):
            splats = self._relocate_and_grow(splats, optimizer, step, shard)
        rate = optimizer.rate("splats.means", step / self.length) / self.unit
        self._disturb(splats, o.noise_lr * rate, step)
        return splats

    def _relocate_and_grow(self, splats: Splats, optimizer: Optimizer, step: int, shard: Shard) -> Splats:
        """Draw as many Gaussians as are dead or to be added, by opacity, and put copies of them in place."""
        o = self.options
        opacity = torch.sigmoid(splats.opacities.detach().double())
        dead = opacity <= o.prune_opa
        living = (~dead).nonzero()[:, 0]
        if not len(living):
            raise UserError(f"view {step}: every Gaussian is fainter than --base.prune-opa {o.prune_opa:g}, "
                            "and none is left; lower it or --base.opacity-reg")
        more = int(dead.sum()) + min(int(GROWTH * len(splats)), max(0, o.max_splats - len(splats)))
        chances = opacity[living].cumsum(0).cpu()
        draws = torch.rand(more, generator=generator(self.seed, "relocate", step), dtype=torch.float64)
        drawn = torch.searchsorted(chances, draws * chances[-1], right=True).clamp(max=len(living) - 1)
        copies = 1 + torch.bincount(living[drawn.to(living.device)], minlength=len(splats))
        changed = (copies > 1).nonzero()[:, 0]
        new, factor = relocated(opacity[changed], copies[changed])
        part = splats.detach()[changed]
        part = part.changed(opacities=torch.logit(new.clamp(min=o.prune_opa)).to(part.opacities.dtype),
                            scales=part.scales + factor.log()[:, None].to(part.scales.dtype))
        rows = torch.repeat_interleave(torch.arange(len(changed), device=opacity.device), copies[changed])
        stays = ~dead & (copies == 1)
        places = torch.arange(int(stays.sum()) + len(rows), device=rows.device)
        return replace_rows(splats, optimizer, stays, part[rows], shard.mover(places, len(places)))

    def _disturb(self, splats: Splats, rate: float, step: int) -> None:
        """Add noise of the covariance's shape to the means of nearly transparent Gaussians."""
        opacity = torch.sigmoid(splats.opacities)
        noise = torch.randn(splats.means.shape, generator=generator(self.seed, "noise", step))
        amount = rate * torch.sigmoid(SHARPNESS * (self.options.prune_opa - opacity))
        noise = noise.to(splats.means) * amount[:, None]
        axes = rotation_matrices(splats.quats) * splats.scales.exp()[:, None, :]
        splats.means += (axes @ (axes.mT @ noise[:, :, None]))[:, :, 0] / self.unit

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: there is no state between two steps."""
        return {}

    def load(self, tensors: dict[str, Tensor], shard: Shard) -> None:
        """Take over nothing."""

    @staticmethod
    def layout() -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Return the names, types and shapes of what tensors() returns."""
        return {}


def relocated(opacity: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Compute how N copies of a Gaussian in its place render most as it does.

    Their opacity is o_new = 1 - (1 - o)^(1/N), so that the centre is as opaque, and their size is such that
    the integral of what they cover together along a line is the same. The paper's double sum over i and k is
    the sum over k = 1..N of C(N, k) (-1)^(k-1) o_new^k / sqrt(k), since C(0, k) + .. + C(N-1, k) = C(N, k+1).

    Args:
        opacity: [M] float64, o.
        copies: [M] int64, N, at least 1.

    Returns:
        The opacity of the copies [M], and the factor on their standard deviations [M].
    """
    opacity = opacity.clamp(max=MOST_OPAQUE)
    new = -torch.expm1(torch.log1p(-opacity) / copies)
    term, total = -torch.ones_like(new), torch.zeros_like(new)
    for k in range(1, min(TERMS, int(copies.max()) if len(copies) else 0) + 1):
        term = -term * new * (copies - k + 1).clamp(min=0) / k
        total += term / k**0.5
    return new, opacity / total
