"""The CPU rasterizer against the float64 oracle, and what it promises beyond: determinism, independence,
SIMD."""

import math
import os
import platform
import re
import sys
from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from flexgs.bench.raster import RasterCase, bench_raster
from flexgs.bench.scenes import front_camera, random_splats
from flexgs.camera import Camera
from flexgs.errors import MissingDependencyError
from flexgs.pool import get_num_threads, set_num_threads
from flexgs.raster import render
from flexgs.raster.contract import DEFAULT, RasterConfig, RenderOutput
from flexgs.raster.cpu import kernels
from flexgs.raster.cpu.autograd import Project, view_of
from flexgs.raster.cuda import project
from flexgs.raster.reference import relative_l2, render_reference, to_float64
from flexgs.splats import Splats, cat

W, H = 100, 75  # ragged: not multiples of the tile


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = get_num_threads()
    set_num_threads(1)
    yield
    set_num_threads(before)


def tilted(camera: Camera) -> Camera:
    """Off-axis: a rotation, a translation, an off-centre principal point and two focal lengths."""
    viewmat = torch.eye(4)
    a, b = 0.2, -0.1
    Ry = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    Rx = torch.tensor([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    viewmat[:3, :3] = Rx @ Ry
    viewmat[:3, 3] = torch.tensor([0.3, -0.2, 1.0])
    K = camera.K.clone()
    K[0, 2] += 3.3
    K[1, 1] *= 1.1
    return Camera(viewmat, K, camera.width, camera.height)


def depths_of(splats: Splats, camera: Camera, mask: Tensor | None = None) -> Tensor:
    """The float32 depths by which the backend sorts."""
    s = splats.detach()
    raw = s.means, s.quats, s.scales, s.opacities, s.sh0, s.shN
    return Project.apply(*raw, 0, mask, view_of(camera), RasterConfig())[4]


def loss_of(out: RenderOutput, seed: int = 1) -> Tensor:
    """A random linear function of image and alpha: all cotangents at once."""
    g = torch.Generator().manual_seed(seed)
    image, alpha = torch.randn(out.image.shape, generator=g), torch.randn(out.alpha.shape, generator=g)
    return (out.image * image).sum() + (out.alpha * alpha).sum()


def compare(splats: Splats, camera: Camera, *, sh_degree: int | None = None, masked: bool = True,
            tolerance: float = 1e-5, config: RasterConfig = DEFAULT) -> RenderOutput:  # fmt: skip
    """Image, alpha, contributions and all gradients equal the oracle's."""
    n = len(splats)
    splats = splats.clone().requires_grad_()
    mask = torch.rand(n, generator=torch.Generator().manual_seed(2)).requires_grad_() if masked else None
    background = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    out = render(splats, camera, background=background, mask=mask, sh_degree=sh_degree, contributions="all",
                 config=config)
    out.means2d.retain_grad()
    loss_of(out).backward()

    exact = to_float64(splats)
    mask64 = mask.detach().double().requires_grad_() if masked else None
    background64 = background.detach().double().requires_grad_()
    depths = depths_of(splats, camera, None if mask is None else mask.detach())
    ref = render_reference(exact, camera, background=background64, mask=mask64, sh_degree=sh_degree,
                           contributions=True, depths=depths, config=config)  # fmt: skip
    ref.means2d.retain_grad()
    loss_of(ref).backward()

    assert torch.equal(out.radii, ref.radii)
    assert (out.image - ref.image).abs().max() < 1e-5
    assert (out.alpha - ref.alpha).abs().max() < 1e-5
    assert torch.equal(out.contributions[:, 1].double(), ref.contributions[:, 1])
    assert relative_l2(out.contributions, ref.contributions) < 1e-6
    pairs = {name: (t.grad, getattr(exact, name).grad) for name, t in splats.items()}
    pairs |= {"means2d": (out.means2d.grad, ref.means2d.grad),
              "background": (background.grad, background64.grad)}
    if masked:
        pairs["mask"] = mask.grad, mask64.grad
    errors = {name: relative_l2(a, torch.zeros_like(a) if b is None else b) for name, (a, b) in pairs.items()}
    assert max(errors.values()) < tolerance, errors
    return out


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_equals_the_oracle(degree: int) -> None:
    out = compare(random_splats(2000, sh_degree=degree, seed=degree), tilted(front_camera(W, H)))
    assert (out.radii[:, 0] > 0).sum() > 500


@pytest.mark.parametrize("masked", [True, False])
def test_anti_aliased_equals_the_oracle(masked: bool) -> None:
    """Also where Gaussians are much thinner than a pixel, in one direction or in both."""
    splats = random_splats(2000, sh_degree=1, seed=5)
    splats.scales[::2, 0] -= 3
    splats.scales[::3] -= 2
    compare(splats, tilted(front_camera(W, H)), masked=masked, config=RasterConfig(antialiased=True))


def test_anti_aliased_a_distant_gaussian_keeps_its_light() -> None:
    """The sum over the image falls with the square of the distance; else the added variance holds it up."""
    def light(z: float, antialiased: bool) -> float:
        camera = front_camera(64, 64)
        one = splat([0.0, 0.0, z], [0.1, 0.1, 0.1])
        return float(render(one, camera, config=RasterConfig(antialiased=antialiased)).alpha.sum())

    assert light(20.0, True) / light(5.0, True) == pytest.approx(1 / 16, rel=0.15)
    assert light(20.0, False) / light(5.0, False) > 3 / 16


def test_without_mask_and_with_a_cap_on_the_degree() -> None:
    splats = random_splats(500, sh_degree=3)
    out = compare(splats, front_camera(33, 25), sh_degree=1, masked=False)
    low = Splats(**dict(splats.items()) | {"shN": splats.shN[:, :3].contiguous()})
    again = render(low, front_camera(33, 25), background=torch.tensor([0.2, 0.5, 0.9]))
    assert torch.equal(out.image, again.image)


def splat(mean: list[float], scale: list[float], opacity: float = 0.9,
          quat: tuple = (0.7, 0.1, -0.5, 0.4)) -> Splats:
    logit = math.log(opacity / (1 - opacity))
    rows = torch.tensor([mean, scale], dtype=torch.float32)
    return Splats(rows[:1], torch.tensor([quat], dtype=torch.float32), rows[1:].log(), torch.tensor([logit]),
                  torch.full((1, 3), 0.5), 0.1 * torch.ones(1, 3, 3))  # fmt: skip


def test_extreme_shapes_equal_the_oracle() -> None:
    splats = cat([
        splat([0.1, 0.2, 5], [3, 2, 4], 0.6),  # covers the image
        splat([0.0, 0.1, 4], [1e-4, 1e-4, 1e-4]),  # far below a pixel
        splat([0.2, -0.3, 4], [2, 1e-3, 1e-3]),  # a needle
        splat([-0.5, 0.3, 3], [1, 1, 1e-5]),  # a disc
        splat([3.0, 0.1, 2], [0.8, 0.7, 0.9]),  # its centre outside, where the Jacobian is clamped
        splat([-0.1, 2.5, 2], [0.5, 0.9, 0.9]),
        splat([0.3, 0.1, 3], [0.3, 0.2, 0.2], 0.9999),  # alpha is clamped
        splat([0.3, 0.1, 3.5], [0.5, 0.5, 0.2], 0.99),  # and the pixels behind it end
        splat([0.31, 0.1, 3.6], [0.5, 0.5, 0.2], 0.99),
        splat([0, 0, -1], [1, 1, 1]),  # behind the camera
        splat([0, 0, 3], [1, 1, 1], 0.003),  # below 1/255
    ])  # fmt: skip
    out = compare(splats, front_camera(W, H), masked=False, tolerance=1e-4)  # the needle has 7e-5
    assert (out.radii[:9] > 0).all() and (out.radii[9:] == 0).all()


@pytest.mark.parametrize("splats", [
    random_splats(5, sh_degree=1)[:0],
    splat([0, 0, -3], [1, 1, 1]),
    splat([0, 0, 3], [0.1, 0.1, 0.1], quat=(0, 0, 0, 0)),
    splat([0, 0, 3], [math.inf, 1, 1]),
    splat([0, 0, 3], [0.1, 0.1, 0.1], 0.001),
], ids=["none", "behind", "no rotation", "infinite", "transparent"])  # fmt: skip
def test_nothing_to_see(splats: Splats) -> None:
    background = torch.tensor([0.1, 0.2, 0.3])
    splats = splats.clone().requires_grad_()
    out = render(splats, front_camera(33, 25), background=background, contributions="all")
    assert torch.equal(out.image, background.expand(25, 33, 3))
    assert not out.alpha.any() and not out.radii.any() and not out.contributions.any()
    loss_of(out).backward()
    assert all(not t.grad.any() for _, t in splats.items())


def gradients(splats: Splats, camera: Camera) -> list[Tensor]:
    splats = splats.clone().requires_grad_()
    out = render(splats, camera, contributions="all")
    loss_of(out).backward()
    return [out.image, out.alpha, out.contributions, *(t.grad for _, t in splats.items())]


def test_bitwise_equal_for_any_number_of_threads() -> None:
    splats, camera = random_splats(9000), front_camera(160, 120)
    first = gradients(splats, camera)
    for n in (2, 3):
        set_num_threads(n)
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(splats, camera), strict=True))


def test_two_renders_before_one_backward() -> None:
    """No buffer that a backward needs is shared between calls."""
    splats, camera = random_splats(1000, sh_degree=1).requires_grad_(), front_camera(48, 40)

    def grads() -> list[Tensor]:
        got = [t.grad.clone() for _, t in splats.items()]
        for _, t in splats.items():
            t.grad = None
        return got

    separate = []
    for seed, cam in ((1, camera), (2, tilted(camera))):
        loss_of(render(splats, cam), seed).backward()
        separate.append(grads())
    both = loss_of(render(splats, camera), 1) + loss_of(render(splats, tilted(camera)), 2)
    both.backward()
    for a, b, c in zip(*separate, grads(), strict=True):
        torch.testing.assert_close(c, a + b, rtol=1e-5, atol=1e-5 * c.abs().max().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_threads_start_again_after_a_fork() -> None:
    set_num_threads(2)
    splats, camera = random_splats(5000, sh_degree=0), front_camera(160, 120)
    expected = render(splats, camera).image.numpy()
    if (child := os.fork()) == 0:
        same = False
        try:
            # torch's own threads may hang here
            same = np.array_equal(render(splats, camera).image.numpy(), expected)
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_errors_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    splats, camera = random_splats(5), front_camera(33, 25)
    with pytest.raises(TypeError, match="float32"):
        render(splats.map(Tensor.double), camera)
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(MissingDependencyError, match=r"flexgs\[cuda\]"):
        project(splats, camera, 3, None, RasterConfig())


def test_bench_prints_and_returns_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench_raster((RasterCase(200, 33, 25),), threads=(1,), repeats=1)
    assert row["count"] == 200 and row["ratio"] > 0 and "33x25" in capsys.readouterr().out


def test_refuses_a_backward_after_an_update_in_place() -> None:
    splats = random_splats(100).requires_grad_()
    loss = render(splats, front_camera(33, 25)).image.sum()
    with torch.no_grad():
        splats.shN.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nearer_splats_first_and_equal_depths_by_index() -> None:
    red = splat([0, 0, 3], [1, 1, 1], 0.9)
    blue = red.clone()
    red.sh0[:], blue.sh0[:] = torch.tensor([5.0, -5, -5]), torch.tensor([-5.0, -5, 5])
    camera = front_camera(33, 25)
    assert render(cat([red, blue]), camera).image[12, 16].argmax() == 0
    assert render(cat([blue, red]), camera).image[12, 16].argmax() == 2
    blue.means[:, 2] = 2.9
    assert render(cat([red, blue]), camera).image[12, 16].argmax() == 2


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for x86 instructions")
@pytest.mark.parametrize("name", ["project_fwd", "project_bwd", "raster_fwd", "raster_bwd"])
def test_loops_over_lanes_are_vectorised(name: str) -> None:
    """LLVM gives up silently; the loop is then ten times slower. exp alone has 5 packed FMAs."""
    render(random_splats(50).requires_grad_(), front_camera(33, 25)).image.sum().backward()
    kernel = getattr(kernels, name)
    options = {k: v for k, v in kernel.targetoptions.items() if k != "nopython"}
    fresh = numba.njit(**options)(kernel.py_func)  # code from the cache cannot be inspected
    fresh.compile(kernel.signatures[0])
    (assembly,) = fresh.inspect_asm().values()
    packed = re.findall(r"\bvf(?:n?madd|n?msub)\d+ps\s[^\n]*%[yz]mm", assembly)
    assert len(kernel.signatures) == 1, "compiled more than once: two memory layouts of an argument"
    assert len(packed) >= 8, f"{len(packed)} packed FMAs"
