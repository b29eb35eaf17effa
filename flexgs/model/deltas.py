"""Per-Gaussian deltas: every Gaussian has its own small change at a few knots of log e."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from flexgs.config import Config, count_at
from flexgs.model.transform import Transform
from flexgs.splats import Splats

WIDTHS = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "sh0": 3}


class Deltas(Transform):
    """Additive changes of means, quats, log-scales, opacity logits and the constant colour, linear in log e between knots.

    Knot j stores the first floor(knot_j N) Gaussians only: no smaller cut holds the others. A Gaussian that enters between
    two knots takes the upper knot's change until that knot is passed; below the first knot its change is constant; from the
    last knot to e = 1 the change fades to zero.
    """

    def __init__(self, knots: tuple[float, ...], n: int):
        super().__init__()
        self.knots = knots
        self.counts = [count_at(k, n) for k in knots]
        for name, width in WIDTHS.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(sum(self.counts), width)))

    def forward(self, kept: Splats, ratio: float, index: Tensor | None = None) -> Splats:
        assert index is None, "deltas belong to a fixed order"
        changed = {}
        for name in WIDTHS:
            base = getattr(kept, name)
            delta = self._at(getattr(self, name), ratio, len(kept)).reshape(-1, *base.shape[1:])
            changed[name] = torch.cat([base[: len(delta)] + delta, base[len(delta):]])
        return Splats(**changed, shN=kept.shN)

    def _at(self, rows: Tensor, ratio: float, k: int) -> Tensor:
        """[m, width] the change of the first m <= k Gaussians; the others do not change."""
        knots = rows.split(self.counts)
        after = sum(knot <= ratio for knot in self.knots)  # number of knots at or below ratio
        if after == 0:
            return knots[0][:k]
        weight = (math.log(ratio) - math.log(self.knots[after - 1])) / (
            math.log(1.0 if after == len(knots) else self.knots[after]) - math.log(self.knots[after - 1]))
        lower = knots[after - 1]
        if after == len(knots):
            return (1 - weight) * lower
        upper = knots[after][:k]
        m = len(lower)
        return torch.cat([torch.lerp(lower, upper[:m], weight), upper[m:]])

    def groups(self, config: Config, extent: float) -> list[dict[str, Any]]:
        rates = config.rates
        lrs = {"means": rates.means * extent * rates.delta_means, "quats": rates.quats, "scales": rates.scales,
               "opacities": rates.opacities, "sh0": rates.sh0}
        return [{"name": f"transform.{name}", "params": [getattr(self, name)], "lr": lr,
                 "decay": 0.01 if name == "means" else 1.0} for name, lr in lrs.items()]
