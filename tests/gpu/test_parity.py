"""The CUDA backend (gsplat) against the CPU backend: same image, same gradients, same contributions.

Bounds are looser than for the oracle: depths equal to 1e-7 may swap, single pixels flip at alpha = 1/255, and gsplat's
exp is approximate.
"""

import pytest
import torch

from flexgs.bench import front_camera, random_splats
from flexgs.raster import RenderOutput, render
from flexgs.raster.reference import relative_l2
from flexgs.splats import Splats

pytestmark = pytest.mark.gpu
WIDTH, HEIGHT = 200, 150


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("gsplat", reason="gsplat is not installed")


def run(splats: Splats, device: str, sh_degree: int) -> tuple[RenderOutput, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    cotangent, mask = torch.randn(HEIGHT, WIDTH, 3, generator=g), torch.rand(len(splats), generator=g)
    splats = splats.clone().to(device).map(lambda t: t.detach()).requires_grad_()
    mask = mask.to(device).requires_grad_()
    background = torch.tensor([0.1, 0.6, 0.3], device=device)
    out = render(splats, front_camera(WIDTH, HEIGHT).to(device), background=background, mask=mask,
                 sh_degree=sh_degree, contributions="all")  # fmt: skip
    out.means2d.retain_grad()
    ((out.image * cotangent.to(device)).sum() + out.alpha.sum()).backward()
    grads = {name: t.grad.cpu() for name, t in splats.items()}
    return out, grads | {"mask": mask.grad.cpu(), "means2d": out.means2d.grad.cpu()}


@pytest.mark.parametrize("sh_degree", [0, 2, 3])
def test_parity(sh_degree: int) -> None:
    splats = random_splats(20_000)
    (a, grads_a), (b, grads_b) = run(splats, "cpu", sh_degree), run(splats, "cuda", sh_degree)
    difference = (a.image - b.image.cpu()).abs()
    assert difference.max() < 5e-3 and difference.mean() < 1e-5
    assert (a.alpha - b.alpha.cpu()).abs().max() < 5e-3
    assert ((a.radii > 0) != (b.radii.cpu() > 0)).float().mean() < 1e-3
    assert b.contributions is not None and a.contributions is not None
    for column in range(3):
        assert relative_l2(b.contributions[:, column].cpu(), a.contributions[:, column]) < 1e-3
    errors = {name: relative_l2(grads_b[name], g) for name, g in grads_a.items() if g.any()}
    assert max(errors.values()) < 1e-3, errors


def test_no_splats() -> None:
    background = torch.tensor([0.1, 0.6, 0.3], device="cuda")
    out = render(random_splats(5)[:0].to("cuda"), front_camera(33, 25).to("cuda"), background=background)
    assert torch.equal(out.image, background.expand(25, 33, 3))
