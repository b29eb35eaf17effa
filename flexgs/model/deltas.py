"""Per-Gaussian deltas: every Gaussian stores a small change at a few ratios e, the knots."""

import copy
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexgs import config as cfg
from flexgs.config import Config, count_at
from flexgs.model.merge import merged, merged_by
from flexgs.model.merge_tree import MergeTree
from flexgs.model.transform import Transform
from flexgs.splats import Splats

WIDTHS = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "sh0": 3}
"""Numbers that one Gaussian has of each attribute that changes."""

FALL = {0.1: (5.0, 0.5), 0.32: (4.0, 0.5), 0.5: (1.5, 0.4)}
"""Ratio of a knot -> factors on its learning rates at the start and at the end of stage 2, if they fall. The
nearest ratio counts."""


class Term(NamedTuple):
    """A summand of the change: weight times stored rows start : start + rows, from Gaussian `first` on."""

    start: int
    rows: int
    first: int
    weight: float


class Deltas(Transform):
    """Additive changes of means, quats, log-scales, opacity logits and base colour, linear in log e.

    A knot stores changes for the first Gaussians only, as many as its cut keeps (options.rows may say
    otherwise). A Gaussian that smaller cuts drop has no change at the knot below, and takes that of the knot
    above alone. Below the first knot changes are constant; from the last knot to e = 1 they fade to zero.
    They are trained in float32 and stored in float16.
    """

    def __init__(self, options: cfg.DeltasConfig, n: int, unit: float = 1.0,
                 order: cfg.OrderConfig | None = None):
        super().__init__(unit)
        self.options, self.knots, self.order = options, options.knots, order or cfg.OrderConfig()
        self.counts = [count_at(fraction, n) for fraction in options.rows or options.knots]
        for name, width in WIDTHS.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(sum(self.counts), width)))

    @classmethod
    def make(cls, config: Config, splats: Splats, points: Tensor | None, unit: float) -> "Deltas":
        """Make deltas of zero for n = len(splats) Gaussians; see Transform.make."""
        return cls(config.deltas, len(splats), unit, config.order)

    def forward(self, kept: Splats, ratio: float, index: Tensor | None = None) -> Splats:
        """Add the changes at this ratio to the first Gaussians of a fixed order."""
        assert index is None, "deltas belong to a fixed order"
        terms = self._terms(ratio, len(kept))
        moves = [term._replace(weight=term.weight * self.unit) for term in terms]
        changed = _Shift.apply([moves if name == "means" else terms for name in WIDTHS],
                               *(getattr(kept, name) for name in WIDTHS),
                               *(getattr(self, name) for name in WIDTHS))
        return kept.changed(**dict(zip(WIDTHS, changed, strict=True)))

    def _terms(self, ratio: float, k: int) -> list[Term]:
        """Return the terms whose sum is the change of the first k Gaussians at a ratio."""
        starts = self._starts()
        counts = [min(count, k) for count in self.counts]
        after = sum(knot <= ratio for knot in self.knots)  # number of knots at or below ratio
        if after == 0:
            return [Term(0, counts[0], 0, 1.0)]
        left, right = self.knots[after - 1], 1.0 if after == len(counts) else self.knots[after]
        weight = 1.0  # a knot at ratio 1: no change there
        if left < right:
            weight = math.log(ratio / left) / math.log(right / left)
        lower = Term(starts[after - 1], counts[after - 1], 0, 1 - weight)
        if after == len(counts):
            return [lower]
        start, both = starts[after], lower.rows
        return [lower, Term(start, both, 0, weight), Term(start + both, counts[after] - both, both, 1.0)]

    @torch.no_grad()
    def start(self, splats: Splats, score: Tensor | None) -> None:
        """Start the knots up to options.merge from merged Gaussians, the others from no change.

        Without a score [N], which is for trees only, Gaussians weigh as much as the tree itself says.
        """
        by_tree = self.options.start == "tree" and self.order.kind == "tree"
        tree = MergeTree(splats, True, None if score is None else score.cpu().numpy()) if by_tree else None
        for knot, count, first in zip(self.knots, self.counts, self._starts(), strict=False):
            if knot <= self.options.merge and self.options.start != "none":
                kept = min(count, count_at(knot, len(splats)))  # rows beyond the cut start from zero
                if tree:
                    target = merged_by(tree, splats, kept)
                else:
                    assert score is not None
                    target = merged(splats, score, kept)
                self._start_at(first, target, splats)

    @torch.no_grad()
    def restart(self, splats: Splats, left: Splats, score: Tensor) -> None:
        """Start the knot that keeps as many Gaussians as are left, and all smaller ones, from those.

        Args:
            splats: all Gaussians, in order.
            left: the first m of them as a selection has changed them, which the smaller knots merge.
            score: [m] their importance.
        """
        tree = MergeTree(left, True, score.cpu().numpy())
        for count, first in zip(self.counts, self._starts(), strict=False):
            if count <= len(left):
                self._start_at(first, merged_by(tree, left, count) if count < len(left) else left, splats)

    def moved(self, order: Tensor) -> Tensor:
        """Return the row [M] that each row was before the first k Gaussians were put in an order [k].

        Knots of fewer than k Gaussians keep their rows, and have to be started again.
        """
        rows, k = torch.arange(sum(self.counts), device=order.device), len(order)
        for count, first in zip(self.counts, self._starts(), strict=False):
            if count >= k:
                rows[first:first + k] = first + order
        return rows

    def _starts(self) -> list[int]:
        """Return the first row of each knot, and the number of all rows."""
        return [0, *itertools.accumulate(self.counts)]

    def _start_at(self, first: int, target: Splats, splats: Splats) -> None:
        """Set the rows of a knot, from row `first` on, to what changes the first Gaussians to the target."""
        kept = len(target)
        for name, width in WIDTHS.items():
            change = getattr(target, name) - getattr(splats, name)[:kept]
            change = change / self.unit if name == "means" else change
            getattr(self, name)[first:first + kept] = change.reshape(kept, width)

    def rows(self, ratio: float, n: int) -> dict[str, list[tuple[int, int]]]:
        """Return the row ranges, one per knot, that cuts up to this ratio read; see Transform.rows."""
        starts, k = self._starts(), count_at(ratio, n)
        below = (0.0, *self.knots)  # a cut reads a knot if its ratio is above the previous knot
        ranges = [(start, start + min(count, k))
                  for start, count, lower in zip(starts, self.counts, below, strict=False) if lower < ratio]
        return dict.fromkeys(WIDTHS, ranges)

    def stored(self) -> "Deltas":
        """Return a copy in float16."""
        return copy.deepcopy(self).half()

    def groups(self, config: Config, scene_scale: float) -> list[dict[str, Any]]:
        """Return one parameter group per attribute; see Transform.groups."""
        rates = config.lr
        lrs = {"means": rates.means * scene_scale * rates.delta_means / self.unit, "quats": rates.quats,
               "scales": rates.scales, "opacities": rates.opacities, "sh0": rates.sh0}
        rows = self._factors(rates)
        return [{"name": f"transform.{name}", "params": [getattr(self, name)], "lr": lr, "rows": rows,
                 "decay": 0.01 if name == "means" else 1.0} for name, lr in lrs.items()]

    def _factors(self, rates: cfg.LearningRatesConfig) -> list[tuple[slice, float, float]]:
        """Return ranges of rows, and the factors on their learning rates at the start and the end."""
        near = [FALL[min(FALL, key=lambda e: abs(math.log(e / knot)))] if rates.delta_fall else (1.0, 1.0)
                for knot in self.knots]
        # Neighbours with equal factors share one range.
        ends = dict(zip(near, itertools.accumulate(self.counts), strict=True))
        ranges = itertools.pairwise([0, *ends.values()])
        return [(slice(*pair), *factors) for factors, pair in zip(ends, ranges, strict=True)]


class _Shift(torch.autograd.Function):
    """Attributes [k, ...], each plus weighted ranges of its rows [M, width], which are parameters.

    The backward pass adds to the gradients of the rows in place: returned as tensors of M rows, most of which
    are zero in a small cut, they would be filled and added whole.
    """

    @staticmethod
    def forward(ctx: Any, terms: list[list[Term]], *tensors: Tensor) -> tuple[Tensor, ...]:
        bases, rows = tensors[:len(terms)], tensors[len(terms):]
        ctx.terms, ctx.rows = terms, rows
        out = []
        for base, changes, summands in zip(bases, rows, terms, strict=True):
            flat = base.clone(memory_format=torch.contiguous_format).view(-1, changes.shape[1])
            for t in summands:
                flat[t.first:t.first + t.rows].add_(changes[t.start:t.start + t.rows], alpha=t.weight)
            out.append(flat.view_as(base))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for gradient, changes, summands in zip(gradients, ctx.rows, ctx.terms, strict=True):
            if changes.grad is None:
                changes.grad = torch.zeros_like(changes)
            flat = gradient.reshape(-1, changes.shape[1])
            for t in summands:
                changes.grad[t.start:t.start + t.rows].add_(flat[t.first:t.first + t.rows], alpha=t.weight)
        return (None, *gradients, *[None] * len(gradients))
