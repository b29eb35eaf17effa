"""The order: which Gaussians stay. Cuts at all ratios are prefixes of one permutation, so they are nested and repeatable.

Training at a ratio asks for a Selection. A fixed order gives the first floor(e N); GsNet draws a random one, so that its
gradient explores, and its noise-free margin gives the final order.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexgs import config as cfg
from flexgs.config import count_at
from flexgs.seeds import generator
from flexgs.splats import Splats


@dataclass
class Selection:
    """The Gaussians of one elastic render."""

    index: slice | Tensor
    """Rows of the splats."""
    mask: Tensor | None = None
    """Factor on their opacities: ones, through which the selector is differentiated (supplementary eq. 8)."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The selector's own terms, weighted."""


def sampled_order(score: Tensor, temperature: float, seed: int) -> Tensor:
    """[N] permutation by log score plus Gumbel noise: weighted sampling without replacement (Efraimidis and Spirakis 2006).

    score [N] >= 0, float64. Temperature 0 sorts by score; Gaussians that no view sees come last either way.
    """
    logs = score.double().clamp(min=1e-30).log()
    uniform = torch.rand(len(score), generator=generator(seed, "order"), dtype=torch.float64).to(score.device)
    noise = -(-uniform.clamp(1e-300).log()).clamp(1e-300).log()
    return torch.argsort(logs + temperature * noise, descending=True, stable=True)


class GsNet(nn.Module):
    """FlexGS's adaptive selector: logits (drop, keep) per Gaussian and ratio, sampled by a straight-through Gumbel-softmax.

    The last layer is linear in the concatenated branches, so the margin keep - drop is a(Gaussian) + b(ratio): without noise
    the order does not depend on the ratio, and order() is all that inference needs. Inputs are normalised (means to the box of
    the scene, log-scales to their median), unlike the official code's raw world coordinates.
    """

    centre: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(self, options: cfg.GsNet, splats: Splats):
        super().__init__()
        self.options = options
        means, scales = splats.means.detach(), splats.scales.detach()
        self.register_buffer("centre", means.median(dim=0).values)
        self.register_buffer("spread", (means - means.median(dim=0).values).abs().mean(dim=0) * 2 + 1e-8)
        self.register_buffer("scale", scales.median())
        width, inputs = (64, (10,)) if options.shape == "paper" else (32, (3, 4, 3))
        self.inputs = inputs
        self.attributes = nn.ModuleList(_branch(d, width) for d in inputs)
        self.ratio = _branch(1, width)
        self.last = nn.Linear(width * (len(inputs) + 1), 2)

    def logits(self, splats: Splats, ratio: float) -> Tensor:
        """[N, 2] logits of (drop, keep)."""
        h = self._hidden(splats)
        e = self.ratio(torch.full((1, 1), ratio, device=h.device))
        return self.last(torch.cat([h, e.expand(len(h), -1)], dim=1))

    def order(self, splats: Splats) -> Tensor:
        """[N] permutation by the noise-free margin, the same for every ratio."""
        with torch.no_grad():
            z = self.logits(splats, 1.0)
            return torch.argsort(z[:, 1] - z[:, 0], descending=True, stable=True)

    def select(self, splats: Splats, ratio: float, rank: Tensor, progress: float,
               random: torch.Generator) -> Selection:
        """A random selection at ratio.

        rank [N] is each Gaussian's place by global importance, 0 the most important, which teaches the selector; progress in
        [0, 1] through stage 2 sets the temperature.
        """
        o = self.options
        tau = o.temperature * (o.temperature_end / o.temperature) ** progress
        m = straight_through(gumbel_softmax(self.logits(splats, ratio), tau, random))
        index = m.detach().nonzero()[:, 0]
        if len(index) == 0:  # nothing drawn: render the best one, so that there is an image to learn from
            index = rank.argmin()[None]
        losses = {}
        if o.gi_weight:
            losses["gi"] = o.gi_weight * (m - importance_mask(rank, ratio)).abs().mean()
        if o.sparsity_weight:
            losses["sparsity"] = o.sparsity_weight * (ratio - m.mean()).abs()
        return Selection(index, m[index], losses)

    def groups(self, config: cfg.Config) -> list[dict[str, Any]]:
        return [{"name": "selector", "params": list(self.parameters()), "lr": config.rates.selector, "decay": 0.1}]

    def _hidden(self, splats: Splats) -> Tensor:
        quats = torch.nn.functional.normalize(splats.quats, dim=1)
        quats = torch.where(quats[:, :1] < 0, -quats, quats)  # q and -q are the same rotation
        x = torch.cat([(splats.means - self.centre) / self.spread, quats, splats.scales - self.scale], dim=1)
        x = x.detach() if self.options.detach else x
        parts = x.split(self.inputs, dim=1)
        return torch.cat([net(part) for net, part in zip(self.attributes, parts, strict=True)], dim=1)


def gumbel_softmax(logits: Tensor, tau: float, random: torch.Generator) -> Tensor:
    """[N, C] soft sample: softmax((logits + Gumbel noise) / tau), supplementary eq. 1-3."""
    uniform = torch.rand(logits.shape, generator=random, device=random.device).to(logits).clamp(1e-20, 1 - 1e-7)
    return torch.softmax((logits - (-uniform.log()).log()) / tau, dim=-1)


def straight_through(soft: Tensor) -> Tensor:
    """[N] hard 0/1 sample of the last class, with the gradient of the soft one.

    Supplementary eq. 5 has its stop-gradient on the wrong term, which would leave no gradient; this is hard + soft - sg(soft).
    """
    keep = soft[:, -1]
    hard = (soft.argmax(dim=-1) == soft.shape[1] - 1).to(keep)
    return hard + keep - keep.detach()


def importance_mask(rank: Tensor, ratio: float) -> Tensor:
    """[N] float: 1 for the floor(ratio N) most important by rank, the teacher of the global-importance loss."""
    return (rank < count_at(ratio, len(rank))).float()


def _branch(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
