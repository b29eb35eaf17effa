"""What every backend of render() takes and returns."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Contributions = Literal["weight", "all"]


@dataclass(frozen=True)
class RasterConfig:
    """Constants of the rasterizer, gsplat 1.5.3's values."""

    eps2d: float = 0.3
    far: float = 1e20
    """Depth beyond which nothing is drawn, for numbers that float32 cannot square; the near one is the
    camera's."""
    radius_clip: float = 0.0
    alpha_min: float = 1 / 255
    alpha_max: float = 0.999
    t_stop: float = 1e-4
    extent: float = 3.33


DEFAULT = RasterConfig()


@dataclass
class RenderOutput:
    """What render() returns; H, W are the camera's, N the number of splats."""

    image: Tensor
    """[H, W, 3] float32, not clamped."""
    alpha: Tensor
    """[H, W] accumulated opacity, 1 - final transmittance."""
    means2d: Tensor
    """[N, 2] projected centres in pixels; an intermediate of the graph: call retain_grad() for its
    gradient."""
    radii: Tensor
    """[N, 2] int32 screen radii in pixels, 0 where the splat is not visible."""
    contributions: Tensor | None
    """[N, 1 or 3] per splat over the pixels it reaches: sum of alpha*T; of all, also their number and the sum
    of T."""
