"""The CUDA backend: an adapter to gsplat 1.5.3 (Ye et al. 2025).

It is imported only when a CUDA tensor is rendered, since gsplat's functions would try to compile themselves
on a machine without CUDA.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.errors import MissingDependencyError
from flexgs.raster.contract import Contributions, Projection, RasterConfig
from flexgs.splats import Splats

TILE = 16
FIXED = ("alpha_min", "alpha_max", "t_stop", "extent")  # constants compiled into gsplat


def project(splats: Splats, camera: Camera, sh_degree: int, mask: Tensor | None,
            cfg: RasterConfig) -> Projection:
    """Project Gaussians; flexgs.raster describes the arguments."""
    gsplat = _gsplat()
    for name in FIXED:
        if getattr(cfg, name) != getattr(RasterConfig(), name):
            raise ValueError(f"RasterConfig.{name} is fixed on CUDA: {getattr(RasterConfig(), name)}")
    means, W, H = splats.means, camera.width, camera.height
    camera = camera.to(means.device)
    viewmat, K = camera.viewmat.float()[None], camera.K.float()[None]
    opac = splats.opacities.sigmoid() if mask is None else splats.opacities.sigmoid() * mask
    if len(splats) == 0:  # gsplat divides by the number of splats
        return Projection(means[:, :2], means[:, :3], opac, splats.sh0, opac.detach(),
                          means.new_zeros(0, 2, dtype=torch.int32))
    radii, means2d, depths, conics, _ = gsplat.fully_fused_projection(
        means, None, splats.quats, splats.scales.exp(), viewmat, K, W, H, eps2d=cfg.eps2d,
        near_plane=camera.near, far_plane=cfg.far, radius_clip=cfg.radius_clip, opacities=opac.detach(),
    )  # fmt: skip
    sh = torch.cat([splats.sh0[:, None], splats.shN], 1)
    visible = (radii[0] > 0).all(-1)
    colors = gsplat.spherical_harmonics(sh_degree, means - camera.center.float(), sh, masks=visible)
    return Projection(means2d[0], conics[0], opac, (colors + 0.5).clamp_min(0), depths[0], radii[0])


def rasterize(projection: Projection, camera: Camera, background: Tensor, contributions: Contributions | None,
              cfg: RasterConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return image, alpha and contributions; see render() and RenderOutput."""
    gsplat, W, H = _gsplat(), camera.width, camera.height
    means2d, conics, opac, colors, depths, radii, _ = projection
    background = background.to(means2d)
    if len(means2d) == 0:  # gsplat divides by their number; the sum of none ties the image to the graph
        sums = means2d.new_zeros(0, 3 if contributions == "all" else 1) if contributions else None
        return background.expand(H, W, 3) + colors.sum(), means2d.new_zeros(H, W), sums
    tiles = -(-W // TILE), -(-H // TILE)
    _, isect_ids, flatten_ids = gsplat.isect_tiles(means2d[None], radii[None], depths[None], TILE, *tiles)
    offsets = gsplat.isect_offset_encode(isect_ids, 1, *tiles).reshape(1, tiles[1], tiles[0])
    image, alpha = gsplat.rasterize_to_pixels(
        means2d[None], conics[None], colors[None], opac[None], W, H, TILE, offsets, flatten_ids,
        backgrounds=background[None]
    )
    sums = None
    if contributions:
        flat = means2d.detach(), conics.detach(), opac.detach()
        sums = _weights(gsplat, *flat, W, H, offsets, flatten_ids)
        if contributions == "all":
            sums = torch.cat([sums, _hits(gsplat, *flat, W, H, offsets, flatten_ids)], 1)
    return image[0], alpha[0, ..., 0], sums


def _gsplat() -> Any:
    try:
        import gsplat
    except ImportError as error:
        raise MissingDependencyError("gsplat", "cuda", "rendering on a CUDA device") from error
    return gsplat


def _weights(gsplat: Any, means2d: Tensor, conics: Tensor, opac: Tensor, W: int, H: int, offsets: Tensor,
             flatten_ids: Tensor) -> Tensor:  # fmt: skip
    """Return the sum of alpha * T of each Gaussian, [N, 1].

    The image is the sum of colour * alpha * T, so this is the gradient of the summed image to the colour.
    """
    with torch.enable_grad():
        weight = torch.zeros(len(opac), 1, device=opac.device, requires_grad=True)
        image, _ = gsplat.rasterize_to_pixels(
            means2d[None], conics[None], weight[None], opac[None], W, H, TILE, offsets, flatten_ids
        )
        return torch.autograd.grad(image.sum(), weight)[0]


def _hits(gsplat: Any, means2d: Tensor, conics: Tensor, opac: Tensor, W: int, H: int, offsets: Tensor,
          flatten_ids: Tensor) -> Tensor:  # fmt: skip
    """Return the number of pixels and the sum of T of each Gaussian, [N, 2].

    They come from gsplat's lists of (Gaussian, pixel) hits, one row of tiles at a time to bound memory. A row
    takes one call, because a second one would not know which pixels the first had finished.
    """
    sums = torch.zeros(len(opac), 2, dtype=torch.float64, device=opac.device)
    starts = [*offsets[0, :, 0].tolist(), len(flatten_ids)]
    for row, (begin, end) in enumerate(pairwise(starts)):
        if begin == end:
            continue
        top = row * TILE
        height = min(TILE, H - top)
        shifted = means2d - means2d.new_tensor([0, top])
        ids, pixels, _ = gsplat.rasterize_to_indices_in_range(
            0, 2**31 - 1, opac.new_ones(1, height, W), shifted[None], conics[None], opac[None], W, height,
            TILE, offsets[:, row : row + 1] - begin, flatten_ids[begin:end].contiguous(),
        )  # fmt: skip
        if len(ids) == 0:
            continue
        centres = torch.stack([pixels % W, pixels // W], -1) + 0.5
        T = _transmittances(centres - shifted[ids], conics[ids], opac[ids], pixels, W * height)
        sums.index_add_(0, ids, torch.stack([torch.ones_like(T), T], -1))
    return sums.float()


def _transmittances(d: Tensor, conics: Tensor, opac: Tensor, pixels: Tensor, size: int) -> Tensor:
    """Return the float64 transmittance before each hit, [M]; hits are sorted by pixel, then by depth."""
    x, y = d.unbind(1)
    sigma = 0.5 * (conics[:, 0] * x**2 + conics[:, 2] * y**2) + conics[:, 1] * x * y
    alpha = (opac * torch.exp(-sigma)).clamp_max(RasterConfig().alpha_max)
    steps = torch.log1p(-alpha.double())
    before = steps.cumsum(0) - steps
    counts = torch.bincount(pixels, minlength=size)
    first = (counts.cumsum(0) - counts)[pixels]  # start of the pixel's list
    return torch.exp(before - before[first])
