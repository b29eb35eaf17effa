"""Per-Gaussian deltas: every Gaussian has its own small change at a few knots of log e."""

import copy
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexgs import config as cfg
from flexgs.config import Config, count_at
from flexgs.model.merge import merged
from flexgs.model.transform import Transform
from flexgs.splats import Splats

WIDTHS = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "sh0": 3}


class Term(NamedTuple):
    """weight times the stored rows start : start + rows, for the Gaussians from first on."""

    start: int
    rows: int
    first: int
    weight: float


class Deltas(Transform):
    """Additive changes of means, quats, log-scales, opacity logits and the constant colour, linear in log e
    between knots.

    Knot j stores its first rows only: no smaller cut holds the others. A Gaussian that enters between two
    knots takes the upper knot's change until that knot is passed; below the first knot its change is
    constant; from the last knot to e = 1 the change fades to zero. Trained in float32, stored in float16.
    """

    def __init__(self, options: cfg.DeltasConfig, n: int, unit: float = 1.0):
        super().__init__(unit)
        self.options, self.knots = options, options.knots
        self.counts = [count_at(share, n) for share in options.rows or options.knots]
        for name, width in WIDTHS.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(sum(self.counts), width)))

    @classmethod
    def make(cls, config: Config, splats: Splats, points: Tensor | None, unit: float) -> "Deltas":
        return cls(config.deltas, len(splats), unit)

    def forward(self, kept: Splats, ratio: float, index: Tensor | None = None) -> Splats:
        assert index is None, "deltas belong to a fixed order"
        terms = self._terms(ratio, len(kept))
        moves = [term._replace(weight=term.weight * self.unit) for term in terms]
        return kept.changed(**{name: _Shift.apply(getattr(kept, name), getattr(self, name),
                                                  moves if name == "means" else terms)
                               for name in WIDTHS})

    def _terms(self, ratio: float, k: int) -> list[Term]:
        """What adds up to the change of the first k Gaussians at ratio."""
        starts = [0, *itertools.accumulate(self.counts)]
        counts = [min(count, k) for count in self.counts]
        after = sum(knot <= ratio for knot in self.knots)  # number of knots at or below ratio
        if after == 0:
            return [Term(0, counts[0], 0, 1.0)]
        left, right = self.knots[after - 1], 1.0 if after == len(counts) else self.knots[after]
        # a knot at 1: no change there
        weight = math.log(ratio / left) / math.log(right / left) if left < right else 1.0
        lower = Term(starts[after - 1], counts[after - 1], 0, 1 - weight)
        if after == len(counts):
            return [lower]
        start, both = starts[after], lower.rows
        return [lower, Term(start, both, 0, weight), Term(start + both, counts[after] - both, both, 1.0)]

    @torch.no_grad()
    def start(self, splats: Splats, score: Tensor) -> None:
        first = 0
        for knot, count in zip(self.knots, self.counts, strict=True):
            if knot <= self.options.merge:
                # of a knot with more rows, the others are not in its cut
                kept = min(count, count_at(knot, len(splats)))
                target = merged(splats, score, kept)
                for name, width in WIDTHS.items():
                    change = getattr(target, name) - getattr(splats, name)[:kept]
                    change = change / self.unit if name == "means" else change
                    getattr(self, name)[first:first + kept] = change.reshape(kept, width)
            first += count

    def rows(self, ratio: float, n: int) -> dict[str, list[tuple[int, int]]]:
        starts, k = [0, *itertools.accumulate(self.counts)], count_at(ratio, n)
        below = (0.0, *self.knots)  # a knot is read by cuts above the one below it
        ranges = [(starts[j], starts[j] + min(count, k)) for j,
                  count in enumerate(self.counts) if below[j] < ratio]
        return dict.fromkeys(WIDTHS, ranges)

    def stored(self) -> "Deltas":
        return copy.deepcopy(self).half()

    def groups(self, config: Config, scene_scale: float) -> list[dict[str, Any]]:
        rates = config.lr
        lrs = {"means": rates.means * scene_scale * rates.delta_means / self.unit, "quats": rates.quats,
               "scales": rates.scales, "opacities": rates.opacities, "sh0": rates.sh0}
        return [{"name": f"transform.{name}", "params": [getattr(self, name)], "lr": lr,
                 "decay": 0.01 if name == "means" else 1.0} for name, lr in lrs.items()]


class _Shift(torch.autograd.Function):
    """base [k, ...] plus weighted ranges of rows [M, width]; in torch's own operations a step takes 6 %
    longer."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, rows: Tensor, terms: list[Term]) -> Tensor:
        ctx.terms, ctx.rows = terms, rows
        out = base.clone(memory_format=torch.contiguous_format).view(len(base), -1)
        for t in terms:
            out[t.first:t.first + t.rows].add_(rows[t.start:t.start + t.rows], alpha=t.weight)
        return out.view_as(base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, rows = gradient.reshape(len(gradient), -1), torch.zeros_like(ctx.rows)
        for t in ctx.terms:
            rows[t.start:t.start + t.rows].add_(flat[t.first:t.first + t.rows], alpha=t.weight)
        return gradient, rows, None
