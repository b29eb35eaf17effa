"""render(): an image of Gaussians from a camera, by one backend per device under one contract.

The CPU backend (numba, `cpu/`) and the CUDA backend (gsplat, `cuda.py`) agree in their numerics;
`reference.py` is the float64 oracle that the tests hold both against. Between its two halves,
project() and rasterize(), workers that hold different Gaussians exchange them (distributed/shards.py).
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.raster.antialiased import compensation
from flexgs.raster.contract import DEFAULT, Contributions, Projection, RasterConfig, RenderOutput
from flexgs.splats import Splats


def render(
    splats: Splats,
    camera: Camera,
    *,
    background: Tensor | None = None,
    sh_degree: int | None = None,
    mask: Tensor | None = None,
    contributions: Contributions | None = None,
    config: RasterConfig = DEFAULT,
) -> RenderOutput:
    """Render Gaussians from a camera; differentiable in every tensor of splats and in mask.

    Args:
        splats: N Gaussians with raw values; activations (exp, sigmoid, normalisation) are applied here.
        camera: pose, intrinsics and size; another origin than that of the splats is converted to theirs, for
            which the pose should be float64.
        background: [3] colour behind the Gaussians; None: black.
        sh_degree: use spherical harmonics up to this degree only, as training does at first; None: all.
        mask: [N] factor on the activated opacity (FlexGS supplementary, eq. 8); None: one.
        contributions: also return the sums per Gaussian that importance scores are made of: the sum of
            alpha * T ("weight"), or all three ("all", slow on CUDA). See RenderOutput.
        config: constants of the rasterizer.
    """
    projection = project(splats, camera, sh_degree=sh_degree, mask=mask, config=config)
    return rasterize(projection, camera, background=background, contributions=contributions, config=config)


def project(splats: Splats, camera: Camera, *, sh_degree: int | None = None, mask: Tensor | None = None,
            config: RasterConfig = DEFAULT) -> Projection:
    """Do the first half of render(): every Gaussian by itself; see there for the arguments."""
    device, camera = splats.means.device, camera.at(splats.origin)
    if config.antialiased:
        factor = compensation(splats, camera.to(device), config.eps2d)
        mask = factor if mask is None else factor * mask
    degree = splats.sh_degree if sh_degree is None else min(sh_degree, splats.sh_degree)
    return _backend(device).project(splats, camera, degree, mask, config)


def rasterize(projection: Projection, camera: Camera, *, background: Tensor | None = None,
              contributions: Contributions | None = None, config: RasterConfig = DEFAULT) -> RenderOutput:
    """Do the second half of render(): all Gaussians together, of which only the size of the camera counts."""
    device = projection.means2d.device
    if background is None:
        background = torch.zeros(3, device=device)
    image, alpha, sums = _backend(device).rasterize(projection, camera, background, contributions, config)
    return RenderOutput(image, alpha, projection.means2d, projection.radii, sums)


def _backend(device: torch.device) -> ModuleType:
    # importing numba takes a second, and gsplat would try to compile itself
    return import_module(f"flexgs.raster.{'cpu.autograd' if device.type == 'cpu' else 'cuda'}")
