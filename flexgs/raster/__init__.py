"""render(): splats and a camera in, an image out. One contract, one backend per device.

The CPU backend (numba, `cpu/`) and the CUDA backend (gsplat, `cuda.py`) agree in their numerics;
`reference.py` is the float64 oracle that the tests hold both against.
"""

import torch
from torch import Tensor

from flexgs.camera import Camera
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
    """Render splats from camera; differentiable in every tensor of splats and in mask.

    A camera with another origin than the splats' is brought to theirs; its pose should then be of float64.

    Args:
        splats: raw values; activations (exp, sigmoid, normalisation) are applied here.
        background: [3] colour behind the splats; None is black.
        sh_degree: use spherical harmonics up to this degree only (training raises it step by step); None uses
        all.
        mask: [N] factor on the activated opacity (FlexGS supplementary, eq. 8); None is one.
        contributions: also return the per-splat sums that importance scores are made of: the first, or all
            three. Only the first is cheap on CUDA.
    """
    device = splats.means.device
    if background is None:
        background = torch.zeros(3, device=device)
    degree = splats.sh_degree if sh_degree is None else min(sh_degree, splats.sh_degree)
    if device.type == "cpu":
        from flexgs.raster.cpu.autograd import render_cpu as backend  # numba takes a second to import
    else:
        from flexgs.raster.cuda import render_cuda as backend
    return RenderOutput(*backend(splats, camera.at(splats.origin), background, degree, mask, contributions,
                                 config))
