"""FlexGS's GsNet: a network that learns which Gaussians stay, through a straight-through Gumbel-softmax."""

from typing import Any

import torch
from torch import Tensor, nn

from flexgs import config as cfg
from flexgs.config import count_at
from flexgs.model.selection import Selection
from flexgs.seeds import generator
from flexgs.splats import Splats

INPUTS = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "importance": 1}


class GsNet(nn.Module):
    """FlexGS's adaptive selector: logits (drop, keep) per Gaussian and ratio, sampled by a straight-through
    Gumbel-softmax.

    The last layer is linear in the concatenated branches, so the margin keep - drop is a(Gaussian) +
    b(ratio): without noise the order does not depend on the ratio, and order() is all that inference needs.

    Everywhere, rank [N] is each Gaussian's place by global importance, 0 the most important: an input, and
    the teacher.
    """

    centre: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(self, options: cfg.GsNetConfig, splats: Splats, unit: float = 1.0):
        """unit: the length in world units that raw inputs are counted in."""
        super().__init__()
        self.options, self.unit = options, unit
        means, scales = splats.means.detach(), splats.scales.detach()
        self.register_buffer("centre", means.median(dim=0).values)
        self.register_buffer("spread",
                             (means - means.median(dim=0).values).abs().mean(dim=0) * 2 + 1e-8 * unit)
        self.register_buffer("scale", scales.median())
        sizes = [INPUTS[name] for name in options.inputs]
        width, self.parts = (64, [sum(sizes)]) if options.shape == "paper" else (32, sizes)
        self.attributes = nn.ModuleList(_branch(d, width) for d in self.parts)
        self.ratio = _branch(1, width)
        self.last = nn.Linear(width * (len(self.parts) + 1), 2)

    def logits(self, splats: Splats, rank: Tensor, ratio: float) -> Tensor:
        """[N, 2] logits of (drop, keep)."""
        x = torch.cat([self._input(name, splats, rank) for name in self.options.inputs], dim=1)
        parts = (x.detach() if self.options.detach else x).split(self.parts, dim=1)
        h = [net(part) for net, part in zip(self.attributes, parts, strict=True)]
        e = self.ratio(x.new_full((1, 1), ratio))
        return self.last(torch.cat([*h, e.expand(len(x), -1)], dim=1))

    def order(self, splats: Splats, rank: Tensor, seed: int) -> Tensor:
        """[N] permutation by the margin, the same for every ratio.

        With order_noise, by the margin plus logistic noise (the difference of two Gumbel draws), as the
        official code selects; but that draws anew for each cut, here one seeded draw serves all, so that cuts
        stay nested and repeatable.
        """
        with torch.no_grad():
            margin = _margin(self.logits(splats, rank, 1.0))
            if self.options.order_noise:
                uniform = torch.rand(len(margin), generator=generator(seed, "order"), dtype=torch.float64)
                margin = margin + torch.logit(uniform, eps=1e-12).to(margin)
            return torch.argsort(margin, descending=True, stable=True)

    def select(self, splats: Splats, ratio: float, rank: Tensor, progress: float,
               random: torch.Generator) -> Selection:
        """The selection to train at ratio: random, or without noise the floor(ratio N) of the largest
        margins.

        progress in [0, 1] through stage 2 sets the temperature.
        """
        o = self.options
        tau = o.temperature * (o.temperature_end / o.temperature) ** progress
        logits = self.logits(splats, rank, ratio)
        m = (straight_through(gumbel_softmax(logits, tau, random)) if o.noise
             else top(_margin(logits), ratio, tau))
        index = m.detach().nonzero()[:, 0]
        if len(index) == 0:  # nothing drawn: render the best one, so that there is an image to learn from
            index = rank.argmin()[None]
        losses = {}
        if o.gi_weight:
            losses["gi"] = o.gi_weight * (m - importance_mask(rank, ratio)).abs().mean()
        # without noise the number is exact, and the gradient would be that of its rounding
        if o.sparsity_weight and o.noise:
            losses["sparsity"] = o.sparsity_weight * (ratio - m.mean()).abs()
        return Selection(index, m[index], losses)

    def groups(self, config: cfg.Config) -> list[dict[str, Any]]:
        return [{"name": "selector", "params": list(self.parameters()), "lr": config.lr.gsnet,
                 "decay": 0.1}]

    def _input(self, name: str, splats: Splats, rank: Tensor) -> Tensor:
        """[N, INPUTS[name]] what the branches see of one attribute."""
        raw = not self.options.normalise
        if name == "means":
            return splats.means / self.unit if raw else (splats.means - self.centre) / self.spread
        if name == "quats":
            quats = torch.nn.functional.normalize(splats.quats, dim=1)
            # q and -q are the same rotation
            return quats if raw else torch.where(quats[:, :1] < 0, -quats, quats)
        if name == "scales":
            return splats.scales.exp() / self.unit if raw else splats.scales - self.scale
        if name == "opacities":
            return (torch.sigmoid(splats.opacities) if raw else splats.opacities)[:, None]
        # resolves the few most important best
        return -torch.special.ndtri((rank + 0.5) / len(rank))[:, None].float()


def gumbel_softmax(logits: Tensor, tau: float, random: torch.Generator) -> Tensor:
    """[N, C] soft sample: softmax((logits + Gumbel noise) / tau), supplementary eq. 1-3."""
    uniform = torch.rand(logits.shape, generator=random,
                         device=random.device).to(logits).clamp(1e-20, 1 - 1e-7)
    return torch.softmax((logits - (-uniform.log()).log()) / tau, dim=-1)


def straight_through(soft: Tensor) -> Tensor:
    """[N] hard 0/1 sample of the last class, with the gradient of the soft one.

    Supplementary eq. 5 has its stop-gradient on the wrong term, which would leave no gradient; this is hard +
    soft - sg(soft).
    """
    keep = soft[:, -1]
    hard = (soft.argmax(dim=-1) == soft.shape[1] - 1).to(keep)
    # exactly 0 or 1: of |m - teacher| the rounding would be the gradient
    return hard + (keep - keep.detach())


def top(margin: Tensor, ratio: float, tau: float) -> Tensor:
    """[N] 1 for the floor(ratio N) largest margins, else 0, with the gradient of sigmoid((margin - the
    smallest kept) / tau).

    Our noise-free alternative to supplementary eq. 1-5: what is trained is what is deployed.
    """
    kept = torch.argsort(margin.detach(), descending=True, stable=True)[:count_at(ratio, len(margin))]
    soft = torch.sigmoid((margin - margin.detach()[kept[-1:]]) / tau)
    return torch.zeros_like(margin).index_fill(0, kept, 1.0) + (soft - soft.detach())


def importance_mask(rank: Tensor, ratio: float) -> Tensor:
    """[N] float: 1 for the floor(ratio N) most important by rank, the teacher of the global-importance
    loss."""
    return (rank < count_at(ratio, len(rank))).float()


def _margin(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def _branch(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
