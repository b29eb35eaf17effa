"""The spatial-ratio neural field of FlexGS: feature planes, decoded to changes of the Gaussians.

See FlexGS, section 3.3 and supplementary B.1. The planes and their fusion are those of HexPlane (Cao and
Johnson 2023) and K-Planes (Fridovich-Keil et al. 2023), with the elastic ratio e in the place of time.
"""

import math
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexgs import config as cfg
from flexgs.model.transform import Transform
from flexgs.splats import Splats, quantile

AXES = tuple(combinations(range(4), 2))  # (x, y), (x, z), (x, e), (y, z), (y, e), (z, e)
E_MIN = 0.005
"""Ratio at the lower end of the logarithmic axis, at and below which the gate is fully open."""
OUTPUTS = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "sh0": 3}
"""Numbers that one Gaussian has of each attribute that a head may change."""


class Field(Transform):
    """Feature planes, a linear trunk and one head per attribute, as FlexGS has them.

    The features of a level's six planes are multiplied, those of the levels concatenated. Changes are added
    to raw attributes or, with scale_change "activated" (FlexGS's code), to the scales themselves. Scales that
    turn negative, which FlexGS's rasterizer squares away, become their absolute values, at least 1e-6.
    By default the box spans the 1st to 99th percentile of the means, so that outliers do not waste the grid.
    """

    box: Tensor
    """[2, 3] lower and upper corner of what the planes span, in world coordinates."""

    def __init__(self, options: cfg.FieldConfig, points: Tensor, unit: float = 1.0):
        """Fit the box to points [M, 3]: the means or the points of the capture, as options.box says."""
        super().__init__(unit)
        self.options = options
        points = points.detach()
        corners = (points.aminmax(dim=0) if options.box == "points"
                   else (quantile(points, 0.01), quantile(points, 0.99)))
        self.register_buffer("box", torch.stack(corners))
        self.planes = nn.ParameterList()
        for level in options.levels:
            size = [r * level for r in options.resolution[:3]] + [options.resolution[3]]
            for a, b in AXES:
                plane = torch.empty(1, options.channels, size[b], size[a])
                self.planes.append(nn.init.ones_(plane) if b == 3 else nn.init.uniform_(plane, 0.1, 0.5))
        self.trunk = nn.Linear(options.channels * len(options.levels), options.width)
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.ReLU(), nn.Linear(options.width, options.width),
                                                        nn.ReLU(), nn.Linear(options.width, OUTPUTS[name]))
                                    for name in options.heads})
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if options.zero_init and name.endswith(".3"):  # the last layer of a head
                    nn.init.zeros_(layer.weight)
                    nn.init.zeros_(layer.bias)

    @classmethod
    def make(cls, config: cfg.Config, splats: Splats, points: Tensor | None, unit: float) -> "Field":
        """Make a field for these Gaussians; see Transform.make."""
        boxed = points if points is not None and config.field.box == "points" else splats.means
        return cls(config.field, boxed, unit)

    def forward(self, kept: Splats, ratio: float, index: Tensor | None = None) -> Splats:
        """Add the decoded changes at this ratio to the kept Gaussians."""
        o = self.options
        hidden = self.trunk(self.features(kept.means, ratio))
        gate = min(1.0, math.log(ratio) / math.log(E_MIN)) if o.gate else 1.0
        changed = dict(kept.items())
        for name, head in self.heads.items():
            change = gate * head(hidden).view_as(changed[name])
            if name == "scales" and o.scale_change == "activated":
                changed[name] = (kept.scales.exp()
                                 + self.unit * change).abs().clamp(min=1e-6 * self.unit).log()
            else:
                changed[name] = changed[name] + (self.unit * change if name == "means" else change)
        return kept.changed(**changed)

    def features(self, means: Tensor, ratio: float) -> Tensor:
        """Sample the planes at means [N, 3] and one ratio; returns [N, channels * levels]."""
        space = 2 * (means - self.box[0]) / (self.box[1] - self.box[0]) - 1
        e = ratio if self.options.ratio_axis == "linear" else 1 - 2 * math.log(ratio) / math.log(E_MIN)
        point = torch.cat([space, torch.full_like(space[:, :1], e)], dim=1)
        levels = []
        for level in range(len(self.options.levels)):
            product = torch.ones((), device=means.device, dtype=means.dtype)
            for plane, axes in zip(self.planes[level * 6:level * 6 + 6], AXES, strict=True):
                grid = point[:, list(axes)].view(1, -1, 1, 2)
                sample = F.grid_sample(plane, grid, align_corners=True, padding_mode="border")
                product = product * sample[0, :, :, 0].T
            levels.append(product)
        return torch.cat(levels, dim=1)

    def regulariser(self) -> Tensor | float:
        """Return the losses of FlexGS's code: smoothness of all planes, |plane - 1| of the ratio planes."""
        o = self.options
        loss: Tensor | float = 0.0
        for i, plane in enumerate(self.planes):
            if AXES[i % 6][1] == 3:
                loss = (loss + o.ratio_smoothness * _Bend.apply(plane, 2)
                        + o.ratio_l1 * (plane - 1).abs().mean())
            else:
                loss = loss + o.space_smoothness * (_Bend.apply(plane, 2)
                                                    + (_Bend.apply(plane, 3) if o.smooth_both else 0.0))
        return loss

    def groups(self, config: cfg.Config, scene_scale: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the network and of the planes; see Transform.groups."""
        rates = config.lr
        network = [*self.trunk.parameters(), *self.heads.parameters()]
        return [{"name": "transform.network", "params": network, "lr": rates.field, "decay": 0.1},
                {"name": "transform.planes", "params": list(self.planes), "lr": rates.planes, "decay": 0.1}]


class _Bend(torch.autograd.Function):
    """Mean squared second difference along dim, with fewer passes than torch's own operations take."""

    @staticmethod
    def forward(ctx: Any, plane: Tensor, dim: int) -> Tensor:
        n = plane.shape[dim] - 2
        bend = plane.narrow(dim, 0, n) + plane.narrow(dim, 2, n)
        bend.sub_(plane.narrow(dim, 1, n), alpha=2)
        ctx.bend, ctx.dim, ctx.shape = bend, dim, plane.shape
        return torch.linalg.vector_norm(bend).square() / bend.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        n, bend = ctx.shape[ctx.dim] - 2, ctx.bend * (2 * gradient / ctx.bend.numel())
        out = bend.new_zeros(ctx.shape)
        for first, weight in ((0, 1), (1, -2), (2, 1)):
            out.narrow(ctx.dim, first, n).add_(bend, alpha=weight)
        return out, None
