"""render(): an image of Gaussians from a camera, by one backend per device under one contract.

The CPU backend (numba, `cpu/`) and the CUDA backend (gsplat, `cuda.py`) agree in their numerics;
`reference.py` is the float64 oracle that the tests hold both against.
"""

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.raster.antialiased import compensation
from flexgs.raster.contract import DEFAULT, Contributions, RasterConfig, RenderOutput
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
    device, camera = splats.means.device, camera.at(splats.origin)
    if config.antialiased:
        factor = compensation(splats, camera.to(device), config.eps2d)
        mask = factor if mask is None else factor * mask
    if background is None:
        background = torch.zeros(3, device=device)
    degree = splats.sh_degree if sh_degree is None else min(sh_degree, splats.sh_degree)
    if device.type == "cpu":
        from flexgs.raster.cpu.autograd import render_cpu as backend  # numba takes a second to import
    else:
        from flexgs.raster.cuda import render_cuda as backend
    return RenderOutput(*backend(splats, camera, background, degree, mask, contributions,
                                 config))
