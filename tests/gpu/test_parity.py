"""The CUDA backend (gsplat) against the CPU backend: parity.py has the bounds and their reasons."""

import pytest
import torch

from flexgs.bench.raster import front_camera, random_splats
from flexgs.raster import render
from tests.gpu.parity import exceeded, loss_differences, raster_differences

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sh_degree", [0, 2, 3])
def test_parity(device, sh_degree):
    found = raster_differences(random_splats(20_000), front_camera(200, 150), device, sh_degree)
    assert not exceeded(found), found


def test_loss_and_metric(device):
    found = loss_differences(200, 150, device)
    assert not exceeded(found), found


def test_no_splats(device):
    background = torch.tensor([0.1, 0.6, 0.3], device=device)
    out = render(random_splats(5)[:0].to(device), front_camera(33, 25).to(device), background=background)
    assert torch.equal(out.image, background.expand(25, 33, 3))


def test_nothing_in_view(device):
    """All behind the camera: no pair of a Gaussian and a tile."""
    splats = random_splats(50)
    splats.means[:, 2] -= 1000
    found = raster_differences(splats, front_camera(33, 25), device)
    assert not exceeded(found), found
