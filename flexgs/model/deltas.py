"""Per-Gaussian deltas: every Gaussian has its own small change at a few knots of log e."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from flexgs import config as cfg
from flexgs.config import Config, count_at
from flexgs.model.merge import merged
from flexgs.model.transform import Transform
from flexgs.splats import Splats

WIDTHS = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "sh0": 3}


class Deltas(Transform):
    """Additive changes of means, quats, log-scales, opacity logits and the constant colour, linear in log e between knots.

    Knot j stores its first rows only: no smaller cut holds the others. A Gaussian that enters between two knots takes the upper
    knot's change until that knot is passed; below the first knot its change is constant; from the last knot to e = 1 the change
    fades to zero. Trained in float32, stored in float16.
    """

    def __init__(self, options: cfg.Deltas, n: int):
        super().__init__()
        self.options, self.knots = options, options.knots
        self.counts = [count_at(share, n) for share in options.rows or options.knots]
        for name, width in WIDTHS.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(sum(self.counts), width)))

    def forward(self, kept: Splats, ratio: float, index: Tensor | None = None) -> Splats:
        assert index is None, "deltas belong to a fixed order"
        changed = {}
        for name in WIDTHS:
            base = getattr(kept, name)
            delta = self._at(getattr(self, name).float(), ratio, len(kept)).reshape(-1, *base.shape[1:])
            changed[name] = torch.cat([base[: len(delta)] + delta, base[len(delta):]])
        return Splats(**changed, shN=kept.shN)

    def _at(self, rows: Tensor, ratio: float, k: int) -> Tensor:
        """[m, width] the change of the first m <= k Gaussians; the others do not change."""
        knots = [knot[:k] for knot in rows.split(self.counts)]
        after = sum(knot <= ratio for knot in self.knots)  # number of knots at or below ratio
        if after == 0:
            return knots[0]
        left, right = self.knots[after - 1], 1.0 if after == len(knots) else self.knots[after]
        weight = math.log(ratio / left) / math.log(right / left)
        lower = knots[after - 1]
        if after == len(knots):
            return (1 - weight) * lower
        upper, m = knots[after], len(lower)
        return torch.cat([torch.lerp(lower, upper[:m], weight), upper[m:]])

    @torch.no_grad()
    def start(self, splats: Splats, score: Tensor) -> None:
        first = 0
        for knot, count in zip(self.knots, self.counts, strict=True):
            if knot <= self.options.merge:
                target = merged(splats, score, count)
                for name, width in WIDTHS.items():
                    change = getattr(target, name) - getattr(splats, name)[:count]
                    getattr(self, name)[first:first + count] = change.reshape(count, width)
            first += count

    def stored(self) -> "Deltas":
        return copy.deepcopy(self).half()

    def groups(self, config: Config, extent: float) -> list[dict[str, Any]]:
        rates = config.rates
        lrs = {"means": rates.means * extent * rates.delta_means, "quats": rates.quats, "scales": rates.scales,
               "opacities": rates.opacities, "sh0": rates.sh0}
        return [{"name": f"transform.{name}", "params": [getattr(self, name)], "lr": lr,
                 "decay": 0.01 if name == "means" else 1.0} for name, lr in lrs.items()]
