"""The adapter to gsplat where there is no GPU: gsplat's own Python, with its CUDA launches done by torch.

What is tested is what reaches the kernels and what becomes of their results: shapes, layouts, order of
arguments, tiles, gradients. The kernels themselves are held against the CPU backend on a GPU, in tests/gpu.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgs.bench.scenes import front_camera, random_splats
from flexgs.camera import Camera
from flexgs.raster import cuda, render
from flexgs.raster.antialiased import compensation
from flexgs.raster.contract import RasterConfig
from flexgs.raster.cuda import TILE
from flexgs.raster.reference import composite, relative_l2
from flexgs.splats import Splats

wrapper = pytest.importorskip("gsplat.cuda._wrapper", reason="gsplat is not installed")
own = pytest.importorskip("gsplat.cuda._torch_impl")
CONFIG = RasterConfig()


def project(means, covars, quats, scales, opacities, viewmats, Ks, W, H, eps2d, near, far, clip, compensate,
            model):
    covars, _ = own._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    radii, means2d, depths, conics, _ = own._fully_fused_projection(means, covars, viewmats, Ks, W, H, eps2d,
                                                                    near, far)
    radii[:, opacities < CONFIG.alpha_min] = 0
    return radii, means2d, depths, conics, means.new_zeros(0)


def project_backward(means, covars, quats, scales, viewmats, Ks, W, H, eps2d, model, radii, conics,
                     compensations,
                     v_means2d, v_depths, v_conics, v_compensations, of_viewmats):  # fmt: skip
    def forward(means: Tensor, quats: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        opaque = means.new_ones(len(means))
        out = project(means, None, quats, scales, opaque, viewmats, Ks, W, H, eps2d, 0.01, CONFIG.far, 0.0,
                      False, model)
        seen = (radii > 0).all(-1)
        return tuple(torch.where(seen.view(*seen.shape, *[1] * (t.dim() - 2)), t, torch.zeros_like(t))
                     for t in out[1:4])

    v_means, v_quats, v_scales = vjp(forward, (means, quats, scales), (v_means2d, v_depths, v_conics))
    return v_means, None, v_quats, v_scales, None


def test_the_anti_aliased_factor_is_that_of_gsplat():
    splats, camera = random_splats(300, seed=4), front_camera(80, 60)
    splats.scales[::2] -= 4  # much smaller than a pixel
    covars, _ = own._quat_scale_to_covar_preci(splats.quats, splats.scales.exp(), compute_preci=False)
    radii, *_, expected = own._fully_fused_projection(
        splats.means, covars, camera.viewmat[None], camera.K[None], 80, 60, calc_compensations=True)
    seen = (radii[0] > 0).all(-1)
    found = compensation(splats, camera, CONFIG.eps2d)[seen]
    assert seen.sum() > 100 and found.min() < 0.1
    assert torch.allclose(found, expected[0, seen], rtol=1e-3, atol=1e-4)


def harmonics(degree, directions, coefficients, masks):
    values = own._spherical_harmonics(degree, directions, coefficients)
    return torch.where(masks[:, None], values, torch.zeros_like(values))


def harmonics_backward(bases, degree, directions, coefficients, masks, v_colors, of_directions):
    v_directions, v_coefficients = vjp(lambda d, c: (harmonics(degree, d, c, masks),),
                                       (directions, coefficients), (v_colors,))
    return v_coefficients, v_directions


def tiles_of(means2d, radii, depths, image_ids, gaussian_ids, images, tile, across, down, sort, segmented):
    assert image_ids is None and images == 1 and sort
    return own._isect_tiles(means2d, radii, depths, tile, across, down)


def blend(means2d, conics, colors, opacities, backgrounds, masks, W, H, tile, offsets, flatten_ids):
    """[1, H, W, C] colours, [1, H, W, 1] alpha."""
    channels = colors.shape[-1]
    background = torch.zeros(3) if backgrounds is None else backgrounds[0]
    image = torch.zeros(H, W, 4)
    for (y, x), pixels, ids in each_tile(W, H, tile, offsets, flatten_ids):
        c = conics[0, ids]
        rgb = colors[0, ids].expand(-1, 3)  # one channel is the same one three times
        part = torch.cat([means2d[0, ids], c[:, :2], c[:, 1:], opacities[0, ids, None], rgb], 1)
        values, *_ = composite(part, pixels, background, CONFIG)
        image = image.index_put((y, x), values)
    return image[None, ..., :channels], image[None, ..., 3:]


def blend_backward(means2d, conics, colors, opacities, backgrounds, masks, W, H, tile, offsets, flatten_ids,
                   alphas, last_ids,
                   v_colors, v_alphas, absgrad):  # fmt: skip
    gradients = vjp(lambda *values: blend(*values, backgrounds, masks, W, H, tile, offsets, flatten_ids),
                    (means2d, conics, colors, opacities), (v_colors, v_alphas))  # fmt: skip
    return None, *gradients


def hits(first, last, transmittances, means2d, conics, opacities, W, H, tile, offsets, flatten_ids):
    """[M] Gaussian and pixel of each hit, by pixel and, within a pixel, near to far."""
    assert first == 0 and (transmittances == 1).all()
    gaussians, places = [], []
    for (y, x), pixels, ids in each_tile(W, H, tile, offsets, flatten_ids):
        c = conics[0, ids]
        part = torch.cat([means2d[0, ids], c[:, :2], c[:, 1:], opacities[0, ids, None],
                          torch.zeros(len(ids), 3)], 1)
        _, _, counts, _ = composite(part, pixels, torch.zeros(3), CONFIG)
        pixel, row = counts.T.nonzero().unbind(1)
        gaussians.append(ids[row])
        places.append((y * W + x)[pixel])
    gaussian, place = torch.cat(gaussians), torch.cat(places)
    order = place.argsort(stable=True)
    return gaussian[order], place[order]


def each_tile(W: int, H: int, tile: int, offsets: Tensor, flatten_ids: Tensor):
    """Rows and columns, centres, and the Gaussians, near first, of each tile that has any or not."""
    _, down, across = offsets.shape
    bounds = [*offsets.flatten().tolist(), len(flatten_ids)]
    for i in range(down * across):
        top, left = i // across * tile, i % across * tile
        y, x = torch.meshgrid(torch.arange(top, min(top + tile, H)), torch.arange(left, min(left + tile, W)),
                              indexing="ij")
        y, x = y.flatten(), x.flatten()
        yield (y, x), torch.stack([x, y], 1) + 0.5, flatten_ids[bounds[i] : bounds[i + 1]].long()


def vjp(f: Callable, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = tuple(t.detach().requires_grad_() for t in inputs)
        return torch.autograd.grad(f(*inputs), inputs, cotangents, allow_unused=True, materialize_grads=True)


LAUNCHES: dict[str, Callable[..., Any]] = {
    "projection_ewa_3dgs_fused_fwd": project,
    "projection_ewa_3dgs_fused_bwd": project_backward,
    "spherical_harmonics_fwd": harmonics,
    "spherical_harmonics_bwd": harmonics_backward,
    "intersect_tile": tiles_of,
    "intersect_offset": own._isect_offset_encode,
    "rasterize_to_pixels_3dgs_fwd": lambda *args: (*blend(*args), None),
    "rasterize_to_pixels_3dgs_bwd": blend_backward,
    "rasterize_to_indices_3dgs": hits,
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "_make_lazy_cuda_func", LAUNCHES.__getitem__)
    monkeypatch.setattr(wrapper, "_make_lazy_cuda_obj", lambda name: name)


def run(backend: Callable, splats: Splats, camera: Camera, degree: int) -> dict[str, Tensor]:
    """Everything that comes out, and the gradients of all that goes in."""
    g = torch.Generator().manual_seed(0)
    cotangent, mask = torch.randn(camera.height, camera.width, 3,
                                  generator=g), torch.rand(len(splats), generator=g)
    splats, mask = splats.clone().map(lambda t: t.detach()).requires_grad_(), mask.requires_grad_()
    image, alpha, means2d, _, sums = backend(splats, camera, torch.tensor([0.1, 0.6, 0.3]), degree, mask)
    means2d.retain_grad()
    ((image * cotangent).sum() + alpha.sum()).backward()
    outputs = {"image": image, "alpha": alpha, "means2d": means2d, "contributions": sums,
               "mask gradient": mask.grad}
    return outputs | {"means2d gradient": means2d.grad} | {f"{name} gradient": t.grad for name,
                                                           t in splats.items()}


def render_cuda(splats: Splats, camera: Camera, background: Tensor, degree: int, mask: Tensor | None,
                contributions: str) -> tuple:  # fmt: skip
    projection = cuda.project(splats, camera, degree, mask, CONFIG)
    image, alpha, sums = cuda.rasterize(projection, camera, background, contributions, CONFIG)
    return image, alpha, projection.means2d, projection.radii, sums


def through_gsplat(splats: Splats, camera: Camera, background: Tensor, degree: int, mask: Tensor) -> tuple:
    return render_cuda(splats, camera, background, degree, mask, "all")


def on_the_cpu(splats: Splats, camera: Camera, background: Tensor, degree: int, mask: Tensor) -> tuple:
    out = render(splats, camera, background=background, sh_degree=degree, mask=mask, contributions="all")
    return out.image, out.alpha, out.means2d, out.radii, out.contributions


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("size", [(50, 37), (3 * TILE, 2 * TILE)])
def test_equals_the_cpu_backend(degree: int, size: tuple[int, int]) -> None:
    splats, camera = random_splats(300, sh_degree=2), front_camera(*size)
    theirs, ours = run(through_gsplat, splats, camera, degree), run(on_the_cpu, splats, camera, degree)
    seen = ours["contributions"][:, 1] > 0
    assert seen.sum() > 100
    for name, values in ours.items():
        rows = seen if len(values) == len(splats) else slice(None)
        assert relative_l2(theirs[name][rows], values[rows]) < 1e-4, name


def test_the_weights_alone() -> None:
    splats, camera, black = random_splats(300), front_camera(50, 37), torch.zeros(3)
    weights = render_cuda(splats, camera, black, 0, None, "weight")[-1]
    assert torch.equal(weights, render_cuda(splats, camera, black, 0, None, "all")[-1][:, :1])
    assert relative_l2(weights, render(splats, camera, contributions="weight").contributions) < 1e-4


def test_nothing_in_sight() -> None:
    splats, camera = random_splats(20), front_camera(20, 18)
    splats.means[:, 2] = -5
    background = torch.tensor([0.1, 0.6, 0.3])
    image, alpha, _, radii, sums = render_cuda(splats, camera, background, 0, None, "all")
    assert (torch.equal(image, background.expand(18, 20, 3)) and not alpha.any() and not radii.any()
            and not sums.any())
