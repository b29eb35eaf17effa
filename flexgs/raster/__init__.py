"""render(): splats and a camera in, an image out. One contract, one backend per device.

The CPU backend (numba, `cpu/`) and the CUDA backend (gsplat, `cuda.py`) agree in their numerics; `reference.py` is the
float64 oracle that the tests hold both against.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.splats import Splats

Contributions = Literal["weight", "all"]


@dataclass(frozen=True)
class RasterConfig:
    """Constants of the rasterizer, gsplat 1.5.3's values."""

    eps2d: float = 0.3
    far: float = 1e20
    """Depth beyond which nothing is drawn, for numbers that float32 cannot square; the near one is the camera's."""
    radius_clip: float = 0.0
    alpha_min: float = 1 / 255
    alpha_max: float = 0.999
    t_stop: float = 1e-4
    extent: float = 3.33


@dataclass
class RenderOutput:
    """What render() returns; H, W are the camera's, N the number of splats."""

    image: Tensor
    """[H, W, 3] float32, not clamped."""
    alpha: Tensor
    """[H, W] accumulated opacity, 1 - final transmittance."""
    means2d: Tensor
    """[N, 2] projected centres in pixels; an intermediate of the graph: call retain_grad() for its gradient."""
    radii: Tensor
    """[N, 2] int32 screen radii in pixels, 0 where the splat is not visible."""
    contributions: Tensor | None
    """[N, 1 or 3] per splat over the pixels it reaches: sum of alpha*T; of all, also their number and the sum of T."""


def render(
    splats: Splats,
    camera: Camera,
    *,
    background: Tensor | None = None,
    sh_degree: int | None = None,
    mask: Tensor | None = None,
    contributions: Contributions | None = None,
    config: RasterConfig = RasterConfig(),
) -> RenderOutput:
    """Render splats from camera; differentiable in every tensor of splats and in mask.

    A camera with another origin than the splats' is brought to theirs; its pose should then be of float64.

    Args:
        splats: raw values; activations (exp, sigmoid, normalisation) are applied here.
        background: [3] colour behind the splats; None is black.
        sh_degree: use spherical harmonics up to this degree only (training raises it step by step); None uses all.
        mask: [N] factor on the activated opacity (FlexGS supplementary, eq. 8); None is one.
        contributions: also return the per-splat sums that importance scores are made of: the first, or all three. Only the
            first is cheap on CUDA.
    """
    device = splats.means.device
    if background is None:
        background = torch.zeros(3, device=device)
    degree = splats.sh_degree if sh_degree is None else min(sh_degree, splats.sh_degree)
    if device.type == "cpu":
        from flexgs.raster.cpu.autograd import render_cpu as backend  # numba takes a second to import
    else:
        from flexgs.raster.cuda import render_cuda as backend
    return RenderOutput(*backend(splats, camera.at(splats.origin), background, degree, mask, contributions, config))


def clock(device: torch.device) -> float:
    """Seconds, when all that device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
