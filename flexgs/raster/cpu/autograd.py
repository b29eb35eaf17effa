"""The CPU backend: numba kernels as torch.autograd.Functions, and the renderer composed of them."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexgs.camera import Camera
from flexgs.pool import run_ranges, run_strides
from flexgs.raster.contract import Contributions, Projection, RasterConfig
from flexgs.raster.cpu import kernels as k
from flexgs.splats import Splats


class CameraRecord(NamedTuple):
    """A camera as the kernels read it."""

    record: np.ndarray
    """[23] float32: rotation (row by row), translation, fx fy cx cy, centre, limits left right top bottom."""
    width: int
    height: int
    near: float
    """Depth of the near plane in world units."""


@functools.lru_cache(maxsize=4096)
def view_of(camera: Camera) -> CameraRecord:
    """Pack a camera; as in gsplat, the Jacobian clamps x/z and y/z to 0.15 image sizes around the image."""
    viewmat, K = camera.viewmat.detach().double().numpy(), camera.K.detach().double().numpy()
    W, H = camera.width, camera.height
    R, t = viewmat[:3, :3], viewmat[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    mx, my = 0.15 * W / fx, 0.15 * H / fy
    limits = [cx / fx + mx, (W - cx) / fx + mx, cy / fy + my, (H - cy) / fy + my]
    record = np.concatenate([R.ravel(), t, [fx, fy, cx, cy], -R.T @ t, limits]).astype(np.float32)
    return CameraRecord(record, W, H, camera.near)


def _np(t: Tensor) -> np.ndarray:
    return t.detach().contiguous().numpy()


class Project(torch.autograd.Function):
    """Projection of raw Gaussians onto the image plane (EWA splatting, Zwicker et al. 2001), and colours.

    Colours depend on the view direction: max(0, 1/2 + SH) (3DGS, Kerbl et al. 2023).
    """

    @staticmethod
    def forward(ctx: Any, means: Tensor, quats: Tensor, log_scales: Tensor, logits: Tensor, sh0: Tensor,
                shN: Tensor, degree: int, mask: Tensor | None, view: CameraRecord,
                cfg: RasterConfig) -> tuple[Tensor, ...]:  # fmt: skip
        """Return means [N, 2], inverse covariances [N, 3], opacities [N] and colours [N, 3], differentiable.

        Then depths [N], radii [N, 2], and the splats [N * 12]: see SPLAT in kernels.py.
        """
        n, f = means.shape[0], np.float32
        m, q = _np(means), _np(quats)
        # numpy's exp and log are vectorised and do not spin up torch's threads.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scales = np.exp(_np(log_scales))
            sigmoids = 1 / (1 + np.exp(-_np(logits)))
            opac = sigmoids.copy() if mask is None else sigmoids * _np(mask)
            cutoffs = np.log(opac / f(cfg.alpha_min))
        means2d, conics, colors = (np.empty((n, width), f) for width in (2, 3, 3))
        depths, radii, splats = np.empty(n, f), np.empty((n, 2), np.int32), np.empty(n * int(k.SPLAT), f)
        count = (degree + 1) ** 2 - 1
        run_ranges(k.project_fwd, n, m, q, scales, opac, cutoffs, _np(sh0), _np(shN), count, view.record,
                   view.width, view.height, f(cfg.eps2d), f(view.near), f(cfg.far), f(cfg.radius_clip),
                   f(cfg.extent), means2d, conics, depths, radii, colors, splats)  # fmt: skip
        # torch refuses backward if one of these has changed in place
        ctx.save_for_backward(means, quats, log_scales, logits, sh0, shN, mask)
        ctx.saved = scales, sigmoids, count, view, conics, radii, colors
        out = [torch.from_numpy(a) for a in (means2d, conics, opac, colors, depths, radii, splats)]
        ctx.mark_non_differentiable(*out[4:])
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v_out: Tensor) -> tuple:
        """Return the gradients of means, quats, log_scales, logits, sh0, shN and mask."""
        means, quats, _, _, _, shN, mask = ctx.saved_tensors
        scales, sigmoids, count, view, conics, radii, colors = ctx.saved
        m, q, sh = _np(means), _np(quats), _np(shN)
        weights = np.empty(0, np.float32) if mask is None else _np(mask)
        out = [np.empty_like(a) for a in (m, q, scales, sigmoids, colors, sh, weights)]
        run_ranges(k.project_bwd, len(m), m, q, scales, sigmoids, weights, sh, count, view.record, conics,
                   radii, colors, *(_np(v) for v in v_out[:4]), *out)  # fmt: skip
        grads = [torch.from_numpy(a) for a in out]
        return (*grads[:6], None, None if mask is None else grads[6], None, None)


class Bins(NamedTuple):
    """n visible Gaussians (splats) by depth, and for each tile of 16 x 16 pixels the list that reaches it."""

    order: np.ndarray
    """[n] int32 indices of the visible splats, near first."""
    splats: np.ndarray
    """[n * 12] float32 packed splats in `order`; see SPLAT in kernels.py."""
    pairs: np.ndarray
    """[n + 1] int32 start of each splat's (splat, tile) pairs, where pairs are sorted by splat."""
    offsets: np.ndarray
    """[tiles + 1] int32 start of each tile's pairs, where pairs are sorted by tile."""
    ids: np.ndarray
    """[pairs] int32 position in `order` of the pair's splat, for pairs sorted by tile."""
    slots: np.ndarray
    """[pairs] int32 place among pairs sorted by splat, for pairs sorted by tile."""


def bin_splats(unsorted: np.ndarray, depths: np.ndarray, radii: np.ndarray, view: CameraRecord) -> Bins:
    """Sort splats by depth, and list for each tile those whose ellipse reaches it, exactly."""
    W, H = view.width, view.height
    tiles_x, tiles_y = -(-W // k.TILE), -(-H // k.TILE)
    order = k.depth_order(depths.view(np.uint32), radii)
    n = len(order)
    splats, tile_rows = np.empty(n * int(k.SPLAT), np.float32), np.empty((n, 2), np.int32)
    starts, pairs = np.zeros(n + 1, np.int32), np.zeros(n + 1, np.int32)
    run_ranges(k.bin_rows, n, order, unsorted, H, splats, tile_rows, starts)
    tile_cols = np.empty((k.prefix(starts), 2), np.int32)
    run_ranges(k.bin_cols, n, splats, tile_rows, starts, W, H, tile_cols, pairs)
    total = k.prefix(pairs)
    offsets = np.zeros(tiles_x * tiles_y + 1, np.int32)
    ids, slots = np.empty(total, np.int32), np.empty(total, np.int32)
    k.bin_fill(tile_rows, starts, tile_cols, pairs, tiles_x, offsets, ids, slots)
    return Bins(order, splats, pairs, offsets, ids, slots)


class Rasterize(torch.autograd.Function):
    """Front-to-back compositing of projected Gaussians (3DGS, Kerbl et al. 2023)."""

    @staticmethod
    def forward(ctx: Any, means2d: Tensor, conics: Tensor, opac: Tensor, colors: Tensor, background: Tensor,
                depths: Tensor, radii: Tensor, splats: Tensor, view: CameraRecord, cfg: RasterConfig,
                want_contributions: bool) -> tuple[Tensor, ...]:  # fmt: skip
        """Return image [H, W, 3], alpha [H, W], and contributions [N, 3] if wanted, else [0, 3].

        splats hold the values of means2d, conics, opac and colors, which take part for their gradients.
        """
        W, H = view.width, view.height
        bins = bin_splats(_np(splats), _np(depths), _np(radii), view)
        packed = np.empty(len(bins.ids) * int(k.SPLAT), np.float32)
        image = np.empty((H, W, 3), np.float32)
        T, last = np.empty((H, W), np.float32), np.empty((H, W), np.float32)
        bg, tiles = _np(background), len(bins.offsets) - 1
        limits = np.float32(cfg.alpha_max), np.float32(cfg.t_stop)
        run_strides(k.raster_fwd, tiles, bins.offsets, bins.ids, bins.splats, packed, W, H,
                    *limits, bg, image, T, last)  # fmt: skip
        sums = np.zeros((len(depths) if want_contributions else 0, 3), np.float32)
        if want_contributions:
            parts = np.empty(len(bins.ids) * 3, np.float32)
            run_strides(k.contributions, tiles, bins.offsets, bins.slots, packed, W, H, *limits, parts)
            run_ranges(k.reduce_contributions, len(bins.order), bins.order, bins.pairs, parts, sums)
        ctx.saved = bins, packed, bg, T, last
        ctx.view, ctx.alpha_max, ctx.n = view, limits[0], len(depths)
        out = torch.from_numpy(image), torch.from_numpy(1 - T), torch.from_numpy(sums)
        ctx.mark_non_differentiable(out[2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_image: Tensor, v_alpha: Tensor, _: Tensor) -> tuple:
        """Return the gradients of means2d, conics, opac, colors and background."""
        bins, packed, bg, T, last = ctx.saved
        grads = np.empty(len(bins.ids) * int(k.SLOT), np.float32)
        run_strides(k.raster_bwd, len(bins.offsets) - 1, bins.offsets, bins.slots, packed,
                    ctx.view.width, ctx.view.height, ctx.alpha_max, bg, T, last, _np(v_image), _np(v_alpha),
                    grads)  # fmt: skip
        out = [np.zeros(shape, np.float32) for shape in ((ctx.n, 2), (ctx.n, 3), ctx.n, (ctx.n, 3))]
        run_ranges(k.reduce_grads, len(bins.order), bins.order, bins.pairs, grads, bins.splats, *out)
        v_background = None
        if ctx.needs_input_grad[4]:
            v_background = torch.einsum("hwc,hw->c", v_image, torch.from_numpy(T))
        return (*(torch.from_numpy(a) for a in out), v_background, *[None] * 6)


def project(splats: Splats, camera: Camera, sh_degree: int, mask: Tensor | None,
            cfg: RasterConfig) -> Projection:
    """Project Gaussians; flexgs.raster describes the arguments."""
    if splats.means.dtype != torch.float32:
        raise TypeError(f"the CPU rasterizer takes float32 splats, not {splats.means.dtype}")
    return Projection(*Project.apply(splats.means, splats.quats, splats.scales, splats.opacities, splats.sh0,
                                     splats.shN, sh_degree, mask, view_of(camera), cfg))


def rasterize(projection: Projection, camera: Camera, background: Tensor,
              contributions: Contributions | None,
              cfg: RasterConfig) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return image, alpha and contributions; see render() and RenderOutput."""
    means2d, conics, opac, colors, depths, radii, packed = projection
    packed = _packed(projection, cfg) if packed is None else packed
    image, alpha, sums = Rasterize.apply(means2d, conics, opac, colors, background, depths, radii, packed,
                                         view_of(camera), cfg, contributions is not None)
    wanted = sums if contributions == "all" else sums[:, :1]
    return image, alpha, wanted if contributions else None


def _packed(projection: Projection, cfg: RasterConfig) -> Tensor:
    """Return the splats [N * 12] of visible Gaussians, as project_fwd of kernels.py writes them."""
    f = np.float32
    means2d, conics, opac, colors = (_np(t) for t in projection[:4])
    cut = np.minimum(np.log(opac / f(cfg.alpha_min)), f(0.5) * f(cfg.extent) * f(cfg.extent))
    A, B, C = conics.T.astype(np.float64)
    height2 = (f(2) * cut * conics[:, 0]) / (A * C - B * B)
    half = np.sqrt(np.maximum(0, height2)).astype(f) + k.SLACK
    return torch.from_numpy(np.column_stack([means2d, conics * np.array([1 / 16, 1 / 8, 1 / 16], f), opac,
                                             cut / f(8), colors, half, np.zeros_like(half)]).ravel())
