"""The contract of render(): the constants that every backend takes, and what it returns."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Contributions = Literal["weight", "all"]


@dataclass(frozen=True)
class RasterConfig:
    """Constants of the rasterizer, with the values of gsplat 1.5.3."""

    eps2d: float = 0.3
    """Variance in square pixels that is added to every projected Gaussian (3DGS's low-pass filter)."""
    far: float = 1e20
    """Depth in world units beyond which nothing is drawn; float32 cannot square larger numbers."""
    radius_clip: float = 0.0
    """Gaussians whose screen radii are both at most this many pixels are not drawn. 0: all are drawn."""
    alpha_min: float = 1 / 255
    """A Gaussian does not count at pixels where its alpha is smaller."""
    alpha_max: float = 0.999
    """Upper limit of a Gaussian's alpha at a pixel."""
    t_stop: float = 1e-4
    """Transmittance at which a pixel is finished; a Gaussian that would reach it does not count."""
    extent: float = 3.33
    """Standard deviations from its centre beyond which a Gaussian is cut off."""
    antialiased: bool = False
    """Multiply opacities by what the added variance makes Gaussians too large (antialiased.py)."""


DEFAULT = RasterConfig()


class Projection(NamedTuple):
    """N Gaussians as an image of one camera sees them; what is rasterized, and all that it depends on.

    The first four are part of the graph. Where a Gaussian is not visible, only its radii mean anything.
    """

    means2d: Tensor
    """[N, 2] centres in pixels; retain_grad() keeps their gradient."""
    conics: Tensor
    """[N, 3] inverse covariances in 1 / pixels^2: xx, xy and yy."""
    opacities: Tensor
    """[N] activated opacities, times the mask."""
    colors: Tensor
    """[N, 3] colours towards the camera."""
    depths: Tensor
    """[N] depths in world units."""
    radii: Tensor
    """[N, 2] int32 screen radii in pixels, 0 where the Gaussian is not visible."""
    packed: Tensor | None = None
    """[N * 12] the same as the CPU's kernels read it; None: made of the others when it is needed."""


@dataclass
class RenderOutput:
    """What render() returns, for an image of H x W pixels and N Gaussians."""

    image: Tensor
    """[H, W, 3] float32 colours, not clamped to [0, 1]."""
    alpha: Tensor
    """[H, W] accumulated opacity: 1 - final transmittance."""
    means2d: Tensor
    """[N, 2] projected centres in pixels, part of the graph: retain_grad() keeps their gradient."""
    radii: Tensor
    """[N, 2] int32 screen radii in pixels, 0 where the Gaussian is not visible."""
    contributions: Tensor | None
    """[N, 1 or 3] sums over the pixels that each Gaussian reaches: of alpha * T, of 1, and of T, where T is
    the transmittance in front of it. None if they were not asked for."""
