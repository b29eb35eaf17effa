"""GsNet, the network of FlexGS that learns which Gaussians stay, by a straight-through Gumbel-softmax."""

from typing import Any

import torch
from torch import Tensor, nn

from flexgs import config as cfg
from flexgs.config import count_at
from flexgs.model.selection import Selection
from flexgs.seeds import generator
from flexgs.splats import Splats

INPUTS = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "importance": 1}
"""Numbers that one Gaussian has of each attribute that GsNet may see."""


class GsNet(nn.Module):
    """The adaptive selector of FlexGS: logits (drop, keep) for every Gaussian at a ratio.

    The last layer is linear in the concatenated branches, so the margin keep - drop is a(Gaussian) +
    b(ratio): without noise the order does not depend on the ratio, and order() is all that inference needs.

    In all methods, rank [N] is the place of each Gaussian by global importance, 0 the most important. It
    teaches GsNet and may be one of its inputs.
    """

    centre: Tensor
    """[3] median of the means, in world coordinates."""
    spread: Tensor
    """[3] twice the mean distance of the means from their median, along each axis."""
    scale: Tensor
    """Median of the log-scales."""

    def __init__(self, options: cfg.GsNetConfig, splats: Splats, unit: float = 1.0):
        """Normalise inputs by these Gaussians; raw inputs are counted in `unit`, a length in world units."""
        super().__init__()
        self.options, self.unit = options, unit
        means, scales = splats.means.detach(), splats.scales.detach()
        centre = means.median(dim=0).values
        self.register_buffer("centre", centre)
        self.register_buffer("spread", (means - centre).abs().mean(dim=0) * 2 + 1e-8 * unit)
        self.register_buffer("scale", scales.median())
        sizes = [INPUTS[name] for name in options.inputs]
        width, self.parts = (64, [sum(sizes)]) if options.shape == "paper" else (32, sizes)
        self.attributes = nn.ModuleList(_branch(d, width) for d in self.parts)
        self.ratio = _branch(1, width)
        self.last = nn.Linear(width * (len(self.parts) + 1), 2)

    def logits(self, splats: Splats, rank: Tensor, ratio: float) -> Tensor:
        """Return the logits (drop, keep) [N, 2] of all Gaussians at a ratio."""
        x = torch.cat([self._input(name, splats, rank) for name in self.options.inputs], dim=1)
        parts = (x.detach() if self.options.detach else x).split(self.parts, dim=1)
        h = [net(part) for net, part in zip(self.attributes, parts, strict=True)]
        e = self.ratio(x.new_full((1, 1), ratio))
        return self.last(torch.cat([*h, e.expand(len(x), -1)], dim=1))

    def order(self, splats: Splats, rank: Tensor, seed: int) -> Tensor:
        """Return the permutation [N] by descending margin, which serves every ratio.

        order_noise adds logistic noise (the difference of two Gumbel draws) to the margin, as FlexGS's code
        does. That code draws anew for each cut; here one seeded draw serves all, so that cuts stay nested and
        repeatable.
        """
        with torch.no_grad():
            margin = _margin(self.logits(splats, rank, 1.0))
            if self.options.order_noise:
                uniform = torch.rand(len(margin), generator=generator(seed, "order"), dtype=torch.float64)
                margin = margin + torch.logit(uniform, eps=1e-12).to(margin)
            return torch.argsort(margin, descending=True, stable=True)

    def select(self, splats: Splats, ratio: float, rank: Tensor, progress: float,
               random: torch.Generator) -> Selection:
        """Select Gaussians to train at a ratio: drawn, or without noise the floor(ratio N) largest margins.

        Args:
            splats: all N Gaussians.
            ratio: fraction of them to keep.
            rank: [N] place of each by global importance.
            progress: how far stage 2 is, 0 to 1, which sets the temperature.
            random: generator of the Gumbel noise.
        """
        o, tau = self.options, self.temperature(progress)
        logits = self.logits(splats, rank, ratio)
        m = (straight_through(gumbel_softmax(logits, tau, random)) if o.noise
             else top(_margin(logits), ratio, tau))
        index = m.detach().nonzero()[:, 0]
        if len(index) == 0:  # nothing drawn: render the most important one, to have an image to learn from
            index = rank.argmin()[None]
        losses = {}
        if o.gi_weight:
            losses["gi"] = o.gi_weight * (m - importance_mask(rank, ratio)).abs().mean()
        # Without noise the number is exact, and the gradient would be that of its rounding.
        if o.sparsity_weight and o.noise:
            losses["sparsity"] = o.sparsity_weight * (ratio - m.mean()).abs()
        return Selection(index, m[index], losses)

    def temperature(self, progress: float) -> float:
        """Return the temperature of the Gumbel-softmax; progress says how far stage 2 is, 0 to 1."""
        o = self.options
        return o.temperature * (o.temperature_end / o.temperature) ** progress

    def groups(self, config: cfg.Config) -> list[dict[str, Any]]:
        """Return the parameter groups for Adam; see Transform.groups."""
        return [{"name": "selector", "params": list(self.parameters()), "lr": config.lr.gsnet,
                 "decay": 0.1}]

    def _input(self, name: str, splats: Splats, rank: Tensor) -> Tensor:
        """Return one attribute as the branches see it, [N, INPUTS[name]]."""
        raw = not self.options.normalise
        if name == "means":
            return splats.means / self.unit if raw else (splats.means - self.centre) / self.spread
        if name == "quats":
            quats = torch.nn.functional.normalize(splats.quats, dim=1)
            return quats if raw else torch.where(quats[:, :1] < 0, -quats, quats)  # q and -q rotate alike
        if name == "scales":
            return splats.scales.exp() / self.unit if raw else splats.scales - self.scale
        if name == "opacities":
            return (torch.sigmoid(splats.opacities) if raw else splats.opacities)[:, None]
        # The normal quantile tells apart the few most important ones best.
        return -torch.special.ndtri((rank + 0.5) / len(rank))[:, None].float()


def gumbel_softmax(logits: Tensor, tau: float, random: torch.Generator) -> Tensor:
    """Draw softmax((logits + Gumbel noise) / tau) for logits [N, C] (FlexGS supplementary, eq. 1-3)."""
    uniform = torch.rand(logits.shape, generator=random,
                         device=random.device).to(logits).clamp(1e-20, 1 - 1e-7)
    return torch.softmax((logits - (-uniform.log()).log()) / tau, dim=-1)


def straight_through(soft: Tensor) -> Tensor:
    """Round a soft sample [N, C] to 0 or 1 for its last class, [N], with the gradient of the soft one.

    FlexGS supplementary, eq. 5, has its stop-gradient on the wrong term, which would leave no gradient; this
    is hard + soft - stop_gradient(soft).
    """
    keep = soft[:, -1]
    hard = (soft.argmax(dim=-1) == soft.shape[1] - 1).to(keep)
    # Exactly 0 or 1: otherwise the sign of a rounding error would be the gradient of |m - teacher|.
    return hard + (keep - keep.detach())


def top(margin: Tensor, ratio: float, tau: float) -> Tensor:
    """Return 1 for the floor(ratio N) largest margins [N], else 0, with the gradient of a sigmoid.

    The sigmoid is that of (margin - smallest kept margin) / tau. This is our alternative without noise to
    FlexGS supplementary, eq. 1-5: training selects what is deployed.
    """
    kept = torch.argsort(margin.detach(), descending=True, stable=True)[:count_at(ratio, len(margin))]
    soft = torch.sigmoid((margin - margin.detach()[kept[-1:]]) / tau)
    return torch.zeros_like(margin).index_fill(0, kept, 1.0) + (soft - soft.detach())


def importance_mask(rank: Tensor, ratio: float) -> Tensor:
    """Return 1.0 for the floor(ratio N) most important by rank [N], else 0.0: what GsNet is taught."""
    return (rank < count_at(ratio, len(rank))).float()


def _margin(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def _branch(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
