"""The reference renderer: render() in plain torch, for any float dtype, differentiable by autograd.

It is written to be read, tile by tile, from the formulas of the papers: projection of a Gaussian (EWA
splatting, Zwicker et al. 2001), spherical harmonics and front-to-back compositing (3DGS, Kerbl et al. 2023),
with gsplat's constants. Tests compare the backends with it in float64, benchmarks in float32.
"""

import math

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.gaussians import SH_C0
from flexgs.raster.contract import RasterConfig, RenderOutput
from flexgs.splats import Splats, rotation_matrices

TILE = 16
DEFAULTS = RasterConfig()


def sh_basis(directions: Tensor) -> Tensor:
    """Evaluate the real spherical harmonics of degree 1 to 3 at unit directions [N, 3]; returns [N, 15]."""
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    return torch.stack([
        -0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x,
        1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (2 * zz - xx - yy),
        -1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy),
        -0.5900435899266435 * y * (3 * xx - yy), 2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (4 * zz - xx - yy), 0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
        -0.4570457994644658 * x * (4 * zz - xx - yy), 1.445305721320277 * z * (xx - yy),
        -0.5900435899266435 * x * (xx - 3 * yy),
    ], -1)  # fmt: skip


def project(means: Tensor, quats: Tensor, scales: Tensor, opac: Tensor, camera: Camera,
            config: RasterConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project activated Gaussians onto the image plane (EWA splatting, Zwicker et al. 2001).

    Returns means2d [N, 2] in pixels, inverse covariances [N, 2, 2], depths [N], radii [N, 2] in pixels, 0
    where a Gaussian is not visible, and opacities [N], which the 2D filter of Mip-Splatting (Yu et al. 2024)
    lowers if config.antialiased.
    """
    R, t = camera.viewmat[:3, :3].to(means), camera.viewmat[:3, 3].to(means)
    K = camera.K.to(means)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    W, H = camera.width, camera.height
    p = means @ R.T + t
    in_depth = (p[:, 2] >= camera.near) & (p[:, 2] <= config.far)
    x, y, z = torch.where(in_depth[:, None], p, torch.ones_like(p)).unbind(-1)
    tx = z * (x / z).clamp(-(cx / fx + 0.15 * W / fx), (W - cx) / fx + 0.15 * W / fx)
    ty = z * (y / z).clamp(-(cy / fy + 0.15 * H / fy), (H - cy) / fy + 0.15 * H / fy)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * tx / z**2, zero, fy / z, -fy * ty / z**2], -1).reshape(-1, 2, 3)
    half = J @ R @ (rotation_matrices(quats) * scales[:, None, :])
    thin = half @ half.mT
    cov = thin + config.eps2d * torch.eye(2).to(means)
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)
    det = cov[:, 0, 0] * cov[:, 1, 1] - cov[:, 0, 1] ** 2
    if config.antialiased:
        opac = opac * ((thin[:, 0, 0] * thin[:, 1, 1] - thin[:, 0, 1] ** 2) / det).sqrt()
    with torch.no_grad():
        reach = (2 * (opac / config.alpha_min).clamp_min(1).log()).sqrt().clamp_max(config.extent)
        radii = (reach[:, None] * cov.diagonal(dim1=1, dim2=2).sqrt()).ceil()
        visible = in_depth & (opac >= config.alpha_min) & (det > 0) & (radii > config.radius_clip).any(1)
        size = torch.tensor([W, H]).to(means)
        visible &= ((means2d + radii > 0) & (means2d - radii < size)).all(1)
        radii = (radii * visible[:, None]).int()
    det = torch.where(visible, det, torch.ones_like(det))
    a, b, c = cov[:, 0, 0] / det, -cov[:, 0, 1] / det, cov[:, 1, 1] / det
    return means2d, torch.stack([c, b, b, a], -1).reshape(-1, 2, 2), p[:, 2], radii, opac


def composite(part: Tensor, pixels: Tensor, background: Tensor,
              config: RasterConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Blend G Gaussians, near first, at P pixel centres (3DGS, Kerbl et al. 2023, eq. 3).

    Args:
        part: [G, 10] mean x y, inverse covariance (row by row), opacity, r g b.
        pixels: [P, 2] pixel centres.
        background: [3] colour behind the Gaussians.
        config: constants of the rasterizer.

    Returns:
        r, g, b, alpha [P, 4] and, each [G, P], the weights alpha * T, 1 where the Gaussian counts, and the
        transmittance T before it.
    """
    d = pixels - part[:, None, :2]
    A, B, C = part[:, 2, None], part[:, 3, None], part[:, 5, None]
    sigma = 0.5 * (A * d[..., 0] ** 2 + C * d[..., 1] ** 2) + B * d[..., 0] * d[..., 1]
    alpha = (part[:, 6, None] * torch.exp(-sigma)).clamp_max(config.alpha_max)
    alpha = alpha * ((sigma >= 0) & (alpha >= config.alpha_min))
    with torch.no_grad():
        going = (1 - alpha).cumprod(0) > config.t_stop  # never rises: False from the first stop on
    alpha = alpha * going
    after = (1 - alpha).cumprod(0)
    T = torch.cat([torch.ones_like(pixels[None, :, 0]), after])
    weights = alpha * T[:-1]
    rgb = weights.T @ part[:, 7:] + T[-1, :, None] * background
    return torch.cat([rgb, 1 - T[-1, :, None]], 1), weights, (alpha > 0).to(pixels), T[:-1]


def render_reference(
    splats: Splats,
    camera: Camera,
    *,
    background: Tensor | None = None,
    sh_degree: int | None = None,
    mask: Tensor | None = None,
    contributions: bool = False,
    config: RasterConfig = DEFAULTS,
    depths: Tensor | None = None,
) -> RenderOutput:
    """Render like render(), in the dtype of splats.means.

    depths [N] replaces the depths to sort by: float32 depths that are equal in a backend differ in float64,
    and swapping two Gaussians changes pixels. contributions asks for all three sums.
    """
    camera = camera.at(splats.origin)
    means, W, H = splats.means, camera.width, camera.height
    opac = splats.opacities.sigmoid() if mask is None else splats.opacities.sigmoid() * mask
    means2d, conics, z, radii, opac = project(means, splats.quats, splats.scales.exp(), opac, camera, config)
    degree = splats.sh_degree if sh_degree is None else min(sh_degree, splats.sh_degree)
    count = (degree + 1) ** 2 - 1
    directions = torch.nn.functional.normalize(means - camera.center.to(means), dim=-1)
    colors = 0.5 + SH_C0 * splats.sh0 + (sh_basis(directions)[:, :count, None] * splats.shN[:, :count]).sum(1)
    colors = colors.clamp_min(0)
    background = torch.zeros(3).to(means) if background is None else background

    order = (z if depths is None else depths).detach().sort(stable=True).indices
    order = order[radii[order, 0] > 0]
    low, high = (means2d - radii).detach()[order], (means2d + radii).detach()[order]
    corners = [(x0, y0) for y0 in range(0, H, TILE) for x0 in range(0, W, TILE)]
    lists = []
    for x0, y0 in corners:
        corner = torch.tensor([x0, y0]).to(means)
        lists.append(order[((low < corner + TILE) & (high > corner)).all(1)])
    # Gather once for all tiles: the gradient of each gather is as large as the scene.
    table = torch.cat([means2d, conics.flatten(1), opac[:, None], colors], 1)
    parts = table[torch.cat(lists)].split([len(ids) for ids in lists])

    sums = means.new_zeros(len(splats), 3) if contributions else None
    tiles = []
    for (x0, y0), ids, part in zip(corners, lists, parts, strict=True):
        xs, ys = torch.arange(x0, min(x0 + TILE, W)), torch.arange(y0, min(y0 + TILE, H))
        pixels = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2).to(means) + 0.5
        image, weights, hits, T = composite(part, pixels, background, config)
        tiles.append(image.reshape(len(ys), len(xs), 4))
        if sums is not None:
            sums[ids] += torch.stack([weights.sum(1), hits.sum(1), (hits * T).sum(1)], -1).detach()
    across = -(-W // TILE)
    out = torch.cat([torch.cat(tiles[i : i + across], 1) for i in range(0, len(tiles), across)])
    return RenderOutput(out[..., :3], out[..., 3], means2d, radii, sums)


def to_float64(splats: Splats) -> Splats:
    """Return a detached float64 copy that requires gradients."""
    return splats.map(lambda t: t.detach().double()).requires_grad_()


def relative_l2(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b| in float64; 0 if both are 0."""
    a, b = a.detach().double(), b.detach().double()
    error, size = (a - b).norm().item(), b.norm().item()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)
