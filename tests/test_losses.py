"""The fused CPU loss against float64 torch, and ssim against its definition."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flexgs.bench.scenes import front_camera
from flexgs.image.losses import halved, photometric, ssim_map
from flexgs.image.quality import ssim
from flexgs.pool import get_num_threads, set_num_threads


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = get_num_threads()
    yield
    set_num_threads(before)


def pair(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth target and a noisy image."""
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(3, height, width, generator=g)
    target = torch.nn.functional.avg_pool2d(target, 5, 1, 2).permute(1, 2, 0).contiguous()
    return (target + 0.1 * torch.randn(height, width, 3, generator=g)).requires_grad_(), target


@pytest.mark.parametrize("size", [(75, 100), (7, 9), (1, 1), (40, 5)])
@pytest.mark.parametrize("weights", [(0.8, 0.2), (0.0, 1.0), (1.0, 0.0)])
def test_equals_float64(size: tuple[int, int], weights: tuple[float, float]) -> None:
    l1, w = weights
    image, target = pair(*size)
    exact = image.detach().double().requires_grad_()
    loss = photometric(image, target, l1=l1, ssim=w)
    expected = photometric(exact, target.double(), l1=l1, ssim=w)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    with torch.no_grad():
        assert photometric(image, target, l1=l1, ssim=w).item() == pytest.approx(loss.item(), abs=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    assert (image.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


def test_ssim_is_its_definition() -> None:
    """At one inner pixel, from windowed means, variances and covariance (Wang et al. 2004, eq. 13)."""
    a, b = (t.detach().double() for t in pair(11, 11))
    g = torch.exp(-0.5 * (torch.arange(-5, 6).double() / 1.5) ** 2)
    window = torch.outer(g, g)[..., None] / g.sum() ** 2

    def mean(x: Tensor) -> Tensor:
        return (window * x).sum((0, 1))

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean((a - ma) ** 2), mean((b - mb) ** 2), mean((a - ma) * (b - mb))
    centre = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert torch.allclose(ssim_map(a, b)[:, 5, 5], centre, atol=1e-12)
    assert ssim(a, a) == pytest.approx(1)


def test_the_loss_is_torchmetrics_ssim_away_from_the_border() -> None:
    """5 pixels in, where no window reaches zeros (the loss) or reflected pixels (torchmetrics); fused and
    plain alike."""
    image, target = (t.detach().clamp(0, 1) for t in pair(40, 50))
    a, b = (t.double().permute(2, 0, 1)[None] for t in (image, target))
    _, theirs = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    ours = ssim_map(image.double(), target.double())
    torch.testing.assert_close(ours[:, 5:-5, 5:-5], theirs[0, :, 5:-5, 5:-5], atol=1e-6, rtol=0)
    # The fused loss has no map: a mask that hides all but the middle leaves a mean of ones and of the
    # middle's windows.
    middle = torch.zeros(40, 50, dtype=torch.bool)
    middle[15:-15, 15:-15] = True
    hidden = torch.where(middle[..., None], image, target)
    a = hidden.double().permute(2, 0, 1)[None]
    _, theirs = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    assert photometric(image, target, l1=0, ssim=1,
                       mask=middle).item() == pytest.approx(1 - theirs.mean().item(), abs=1e-5)


def test_uint8_target() -> None:
    image, target = pair(20, 30)
    quantised = (target * 255).round().byte()
    a = photometric(image, quantised)
    assert a.item() == pytest.approx(photometric(image, quantised / 255).item(), abs=1e-6)


def test_masked_pixels_count_for_nothing() -> None:
    image, target = pair(30, 40)
    mask = torch.ones(30, 40, dtype=torch.bool)
    mask[10:20, 5:25] = False
    with torch.no_grad():
        image[~mask] = 7.0
    loss = photometric(image, target, mask=mask)
    loss.backward()
    assert not image.grad[~mask].any() and image.grad[mask].all()
    with torch.no_grad():
        other = torch.where(mask[..., None], image, target)
        assert loss.item() == pytest.approx(photometric(other, target).item())
        assert photometric(image, target, mask=torch.zeros_like(mask)).item() == pytest.approx(0, abs=1e-6)


def test_bitwise_equal_for_any_number_of_threads() -> None:
    image, target = pair(64, 48)
    results = []
    for n in (1, 2, 3):
        set_num_threads(n)
        image.grad = None
        loss = photometric(image, target)
        loss.backward()
        results.append((loss.item(), image.grad))
    assert all(a == results[0][0] and torch.equal(g, results[0][1]) for a, g in results)


def test_two_losses_before_one_backward() -> None:
    (image, target), (_, other) = pair(40, 30), pair(40, 30, seed=1)
    (ga,) = torch.autograd.grad(photometric(image, target), image)
    (gb,) = torch.autograd.grad(photometric(image, other), image)
    (both,) = torch.autograd.grad(photometric(image, target) + photometric(image, other), image)
    torch.testing.assert_close(both, ga + gb)


def test_halved_is_the_mean_of_four_pixels_under_the_scaled_camera():
    camera = front_camera(8, 6)
    target = (torch.rand(6, 8, 3) * 255).to(torch.uint8)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[0, 1] = False
    small, image, kept = halved(camera, target, mask)
    assert (small.width, small.height) == (4, 3)
    assert torch.allclose(image, (target.float() / 255).view(3, 2, 4, 2, 3).mean(dim=(1, 3)), atol=1e-6)
    assert kept.sum() == 11 and not kept[0, 0]
    point = torch.tensor([0.3, -0.2, 1.0])
    assert torch.allclose(small.K @ point * torch.tensor([2, 2, 1]), camera.K @ point, atol=1e-5)
