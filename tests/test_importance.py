"""Every importance score against a slow computation from its definition, in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_splats
from torch import Tensor

from flexgs.camera import Camera
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.gaussians import SH_C0
from flexgs.model.importance import SCORES, score
from flexgs.raster.contract import RasterConfig
from flexgs.raster.reference import project, render_reference, to_float64
from flexgs.splats import Splats


def toy() -> tuple[Splats, list[Camera]]:
    """40 Gaussians in a ball, some of them opaque (a pixel ends), black or unseen; three views."""
    splats = random_splats(40, sh_degree=2, seed=4)
    splats = replace(splats, scales=splats.scales + 1, opacities=splats.opacities * 3 + 1, sh0=splats.sh0 * 3)
    splats.opacities[:8] = 9
    cameras = []
    for i, (width, height) in enumerate([(20, 17), (23, 12), (16, 16)]):
        viewmat = torch.eye(4)
        a = 0.7 * i
        viewmat[:3, :3] = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0],
                                        [-math.sin(a), 0, math.cos(a)]])
        viewmat[2, 3] = 3.0
        K = torch.tensor([[18.0, 0, width / 2], [0, 19.0, height / 2], [0, 0, 1]])
        cameras.append(Camera(viewmat, K, width, height))
    return splats, cameras


def scores(name: str, group: Group, **changed: Tensor) -> Tensor:
    """The score of the toy, of which some attributes may be changed."""
    splats, cameras = toy()
    return score(name, replace(splats, **changed), [SimpleNamespace(camera=c) for c in cameras], group)


def pixel_sums(splats: Splats, cameras: list[Camera]) -> np.ndarray:
    """[N, 3] sums of alpha*T, 1 and T: every pixel front to back (Kerbl et al. 2023), with the rasterizer's
    constants."""
    c, sums = RasterConfig(), np.zeros((len(splats), 3))
    opacity = splats.opacities.sigmoid()
    for camera in cameras:
        parts = project(splats.means, splats.quats, splats.scales.exp(), opacity, camera, c)[:4]
        means2d, inverses, depths, radii = (t.numpy() for t in parts)
        order = [i for i in np.argsort(depths) if radii[i, 0] > 0]
        for y in range(camera.height):
            for x in range(camera.width):
                T = 1.0
                for i in order:
                    d = np.array([x + 0.5, y + 0.5]) - means2d[i]
                    alpha = min(c.alpha_max, float(opacity[i]) * math.exp(-0.5 * d @ inverses[i] @ d))
                    if alpha < c.alpha_min:
                        continue
                    if T * (1 - alpha) <= c.t_stop:
                        break
                    sums[i] += alpha * T, 1, T
                    T *= 1 - alpha
    return sums


def volumes(splats: Splats) -> list[float]:
    return [math.exp(a) * math.exp(b) * math.exp(c) for a, b, c in splats.scales.tolist()]


def gamma(splats: Splats) -> np.ndarray:
    """min(V / V90, 1): V90 is the 90th percentile, interpolated between neighbours in the sorted list."""
    V = sorted(volumes(splats))
    place = 0.9 * (len(V) - 1)
    low = int(place)
    v90 = V[low] + (place - low) * (V[low + 1] - V[low])
    return np.array([min(v / v90, 1) for v in volumes(splats)])


def sigmoid(splats: Splats) -> np.ndarray:
    return np.array([1 / (1 + math.exp(-x)) for x in splats.opacities.tolist()])


def colour_sensitivity(splats: Splats, cameras: list[Camera]) -> np.ndarray:
    """max over coefficients c of (sum over views of |dE/dc|) / pixels; colours are raised, so that none is
    clamped at 0."""
    splats = replace(splats, sh0=splats.sh0 + 100).detach().requires_grad_()
    sums = []
    for camera in cameras:
        E = render_reference(splats, camera).image.sum()
        grads = torch.autograd.grad(E, [splats.sh0, splats.shN])
        sums.append(torch.cat([g.reshape(len(splats), -1) for g in grads], dim=1).abs())
    return (sum(sums).amax(1) / sum(c.width * c.height for c in cameras)).numpy()


ORACLES: dict[str, Callable[[Splats, list[Camera]], np.ndarray]] = {
    "alpha_t": lambda s, c: pixel_sums(s, c)[:, 0],
    "eagles": lambda s, c: pixel_sums(s, c)[:, 0],
    "opacity_t": lambda s, c: sigmoid(s) * pixel_sums(s, c)[:, 2],
    "flexgs": lambda s, c: gamma(s) * pixel_sums(s, c)[:, 0],
    "lightgaussian": lambda s, c: gamma(s) ** 0.1 * sigmoid(s) * pixel_sums(s, c)[:, 1],
    "c3dgs": colour_sensitivity,
    "opacity": lambda s, c: sigmoid(s),
    "volume": lambda s, c: np.array(volumes(s)),
    "footprint": lambda s, c: sigmoid(s)
    * np.array([math.exp((sum(a) - min(a)) / 4) for a in s.scales.tolist()]),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_equals_its_definition(name):
    """Of all of SCORES: a new score needs an oracle. 1e-5: the rasterizer computes in float32."""
    splats, cameras = toy()
    expected = torch.from_numpy(ORACLES[name](to_float64(splats).detach(), cameras))
    got = scores(name, Group())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
    # some are seen, some are not
    assert name in ("opacity", "volume", "footprint") or 0 < int((got == 0).sum()) < 20


def test_black_gaussians_count_for_the_colour_sensitivity():
    """Their colour is clamped in every view, so that the gradient of the image itself would not see them."""
    assert torch.equal(scores("c3dgs", Group(), sh0=torch.full((40, 3), -9.0)), scores("c3dgs", Group()))


def test_colour_sensitivity_of_degree_0_is_the_weight():
    pixels = sum(c.width * c.height for c in toy()[1])
    expected = SH_C0 * scores("alpha_t", Group()) / pixels
    torch.testing.assert_close(scores("c3dgs", Group(), shN=torch.zeros(40, 0, 3)), expected, rtol=1e-5,
                               atol=0)


@pytest.mark.parametrize("name", SCORES)
def test_score_leaves_the_splats_alone(name):
    """The trainer's tensors require gradients, and c3dgs differentiates."""
    attributes = dict(toy()[0].requires_grad_().items())
    assert not scores(name, Group(), **attributes).requires_grad
    assert all(t.grad is None for t in attributes.values())


def test_unknown_score_is_a_user_error():
    with pytest.raises(UserError, match=r"--order.score beauty: unknown; expected one of alpha_t, .*eagles"):
        scores("beauty", Group())


class OneOfTwo(Group):
    """A worker without a network: sum_ notes its own parts and adds those that the other one noted before."""

    def __init__(self, rank: int, theirs: list[Tensor]):
        super().__init__(rank, 2)
        self.mine: list[Tensor] = []
        self.theirs = iter(theirs)

    def sum_(self, tensors):
        for t in tensors:
            self.mine.append(t.clone())
            t += next(self.theirs, 0)


@pytest.mark.parametrize("name", SCORES)
def test_two_workers_equal_one(name):
    """Three views over two workers; only the order of float64 additions differs. test_distributed.py has the
    real sum."""
    first = OneOfTwo(0, [])
    scores(name, first)
    second = scores(name, OneOfTwo(1, first.mine))
    torch.testing.assert_close(second, scores(name, Group()), rtol=1e-12, atol=0)
