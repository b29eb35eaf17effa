"""The equations of the supplementary of FlexGS (arXiv 2506.04174), part A, one by one.

Eq. 1-4: the Gumbel-softmax and its hard sample; eq. 5: straight-through; eq. 6-7: its Jacobian; eq. 8: the
mask as a factor on the opacity; eq. 9: the elastic loss; eq. 10: its gradient to a Gaussian's attributes. z
has the classes (drop, keep).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import random_splats
from torch import Tensor

from flexgs import config as cfg
from flexgs.bench.scenes import front_camera
from flexgs.camera import Camera
from flexgs.image.losses import photometric
from flexgs.model.gsnet import GsNet, gumbel_softmax, straight_through
from flexgs.raster import render
from flexgs.raster.contract import RasterConfig
from flexgs.raster.reference import relative_l2, render_reference, to_float64
from flexgs.seeds import generator
from flexgs.splats import Splats

TAU = 0.7


def noise() -> torch.Generator:
    return generator(3, "test")


# ---------------------------------------------------------------------- A.1: the selection


def test_equations_1_to_3_soft_sample():
    """g = -log(-log U), z~ = (z + g) / tau, z_soft = exp(z~) / sum exp(z~): from the same U, one number at a
    time."""
    z = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U = torch.rand(30, 2, generator=noise()).tolist()
    soft = gumbel_softmax(z, TAU, noise())
    for i in range(30):
        exps = [math.exp((float(z[i, c]) - math.log(-math.log(U[i][c]))) / TAU) for c in range(2)]
        assert soft[i].tolist() == pytest.approx([e / sum(exps) for e in exps], rel=1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_equation_4_hard_sample_has_the_analytic_probability(tau):
    """The hard sample is the arg max of the soft one; P(keep) = sigmoid(z_keep - z_drop) whatever tau."""
    z = torch.tensor([[0.0, -2.0], [1.0, 1.0], [0.0, 1.5]])
    soft = gumbel_softmax(z.repeat_interleave(20_000, dim=0), tau, noise())
    m = straight_through(soft)
    assert torch.equal(m.round(), soft.argmax(dim=1).float())
    expected = torch.sigmoid(z[:, 1] - z[:, 0])
    assert torch.allclose(m.view(3, -1).mean(dim=1), expected, rtol=0, atol=0.012)  # 3.4 standard deviations


def test_equation_5_straight_through():
    """The value is the hard one, the gradient that of the soft one: B = hard + soft - stop_gradient(soft).

    As printed, hard - soft + soft, the soft terms cancel in the gradient too, and nothing would be learned.
    """
    random = torch.Generator().manual_seed(2)
    z = torch.randn(50, 2, dtype=torch.float64, generator=random, requires_grad=True)
    soft = gumbel_softmax(z, TAU, noise())
    hard = (soft[:, 1] > soft[:, 0]).double()
    m = straight_through(soft)
    assert torch.allclose(m, hard, rtol=0, atol=1e-15) and 0 < float(hard.sum()) < 50
    w = torch.randn(50, dtype=torch.float64, generator=random)
    (got,) = torch.autograd.grad(m @ w, z, retain_graph=True)
    (expected,) = torch.autograd.grad(soft[:, 1] @ w, z, retain_graph=True)
    assert torch.equal(got, expected) and float(got.abs().min()) > 0
    (printed,) = torch.autograd.grad((hard - soft[:, 1] + soft[:, 1]) @ w, z)
    assert not printed.any()


def test_equations_6_and_7_jacobian():
    """dM/dz = 1/tau [-B0 B1, B1 (1 - B1)] with B the soft probabilities; a Gaussian's mask depends on its own
    logits alone.

    With the hard one-hot B of eq. 5, as printed, every entry is 0 * 1 or 1 * 0, so that GsNet would not
    learn.
    """
    z = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = torch.autograd.functional.jacobian(lambda z: straight_through(gumbel_softmax(z, TAU, noise())), z)
    assert full.shape == (12, 12, 2)
    soft = gumbel_softmax(z, TAU, noise())

    def printed(B: Tensor) -> Tensor:
        return torch.stack([-B[:, 0] * B[:, 1], B[:, 1] * (1 - B[:, 1])], dim=1) / TAU

    assert torch.allclose(full, torch.eye(12, dtype=torch.float64)[..., None] * printed(soft), rtol=0,
                          atol=1e-15)
    own = full[range(12), range(12)]
    assert torch.allclose(own, differences(lambda z: gumbel_softmax(z, TAU, noise())[:, 1].sum(), z),
                          atol=1e-9)
    assert own.all()
    hard = torch.nn.functional.one_hot(soft.argmax(dim=1), 2).double()
    assert not printed(hard).any()


# ---------------------------------------------------------------------- A.2: gradients of the masked render


def differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-6) -> Tensor:
    """The gradient of the scalar f at x by central differences, one entry of x at a time; float64."""
    grad = torch.empty_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1)
        step[i] = h
        with torch.no_grad():
            grad.view(-1)[i] = (f(x + step.view_as(x)) - f(x - step.view_as(x))) / (2 * h)
    return grad


def toy() -> tuple[Splats, Camera, Tensor]:
    """Six overlapping Gaussians before a small camera, and a photograph; colours are positive, so none is
    clamped."""
    splats = random_splats(6, seed=2).map(Tensor.double)
    means = splats.means * 0.5 + torch.tensor([0.0, 0.0, 4.0])
    photo = torch.rand(13, 18, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return replace(splats, means=means, scales=splats.scales + 1.5,
                   sh0=splats.sh0.abs()), front_camera(18, 13), photo


def elastic_loss(splats: Splats, camera: Camera, photo: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 9, the norm taken as a mean: float64 splats are rendered by the reference, float32 ones by the CPU
    backend."""
    backend = render_reference if splats.means.dtype == torch.float64 else render
    return photometric(backend(splats, camera, mask=mask).image, photo, l1=1, ssim=0)


def test_equation_8_masked_opacity():
    """alpha = o * M * G2: one Gaussian on the axis, where its projection is round with variance (f s / z)^2 +
    eps2d."""
    camera, s, z, o, m = front_camera(17, 17), 0.3, 2.0, 0.8, 0.6
    row = torch.tensor([[0, 0, z]], dtype=torch.float64)
    splats = Splats(row, torch.tensor([[1.0, 0, 0, 0]]).double(), torch.full_like(row, math.log(s)),
                    torch.tensor([math.log(o / (1 - o))]).double(), 0 * row, torch.zeros(1, 0, 3).double())
    alpha = render_reference(splats, camera, mask=torch.tensor([m]).double()).alpha
    variance = (float(camera.K[0, 0]) * s / z) ** 2 + RasterConfig().eps2d
    for y, x in [(8, 8), (8, 10), (5, 11)]:
        G2 = math.exp(-((x + 0.5 - 8.5) ** 2 + (y + 0.5 - 8.5) ** 2) / (2 * variance))
        assert float(alpha[y, x]) == pytest.approx(o * m * G2, rel=1e-6)  # K is float32


def test_equations_8_and_9_only_the_kept_are_rendered():
    """A 0/1 mask over all and the kept ones alone give the same image and loss; training renders the kept
    ones alone."""
    splats, camera, photo = toy()
    m = torch.tensor([1.0, 0, 1, 1, 0, 1]).double()
    masked, kept = (render_reference(splats, camera, mask=m).image,
                    render_reference(splats[m.bool()], camera).image)
    assert torch.allclose(masked, kept, rtol=0, atol=1e-15)
    loss = elastic_loss(splats, camera, photo, m)
    assert float(loss) == pytest.approx(sum(map(abs, (masked - photo).flatten().tolist())) / photo.numel(),
                                        rel=1e-12)


@pytest.mark.parametrize("name", ["means", "quats", "scales", "opacities", "sh0", "shN", "mask"])
def test_equation_10_every_attribute(name):
    """The gradient of the elastic loss to each attribute and to the mask, against central differences; at
    masks below 1 too."""
    splats, camera, photo = toy()
    inputs = dict(splats.items()) | {"mask": torch.tensor([1, 0.9, 0.5, 1, 0.7, 1]).double()}

    def loss(x: Tensor) -> Tensor:
        values = inputs | {name: x}
        mask = values.pop("mask")
        return elastic_loss(Splats(**values), camera, photo, mask)

    x = inputs[name].clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(x), x)
    expected = differences(loss, x.detach())
    # each Gaussian is seen
    assert (expected.flatten(1) if expected.dim() > 1 else expected[:, None]).any(dim=1).all()
    assert relative_l2(got, expected) < 1e-6


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", ["means", "quats", "scales"])
def test_equation_10_through_the_selector(name, detach):
    """dL/dmu = dL/dM dM/dz dz/dmu + (the render's own part): through GsNet, its straight-through mask and the
    render.

    The hard mask is piecewise constant, so the finite difference is taken on the factor m at m = 1 and
    chained with the soft Jacobian of eq. 7: dL/dz = dL/dm * y (1 - y) / tau * (-1, 1), and 0 for the
    Gaussians not drawn. dz/dmu is by finite differences again. With detached inputs (the default) the first
    part is missing for the attributes, not for GsNet.
    """
    splats, camera, photo = toy()
    torch.manual_seed(0)
    net = GsNet(cfg.GsNetConfig(detach=detach, gi_weight=0, sparsity_weight=0, temperature=TAU),
                splats).double()
    leaf, rank = splats.clone().requires_grad_(), torch.arange(6)
    chosen = net.select(leaf, 0.5, rank, 0.0, noise())
    index = chosen.index
    assert 0 < len(index) < 6
    elastic_loss(leaf[index], camera, photo, chosen.mask).backward()

    dm = differences(lambda m: elastic_loss(splats[index], camera, photo, m),
                     torch.ones(len(index), dtype=torch.float64))
    y = gumbel_softmax(net.logits(splats, rank, 0.5), TAU, noise()).detach()[index, 1]
    slope, dz = y * (1 - y) / TAU, torch.zeros(6, 2, dtype=torch.float64)
    dz[index] = torch.stack([-dm * slope, dm * slope], dim=1)
    # dL/dz itself: the bias is added to each row of z
    assert relative_l2(net.last.bias.grad, dz.sum(0)) < 1e-7

    def moved(x: Tensor) -> Splats:
        return replace(splats, **{name: x})

    x = getattr(splats, name)
    own = differences(lambda x: elastic_loss(moved(x)[index], camera, photo), x)
    selector = differences(lambda x: (dz * net.logits(moved(x), rank, 0.5)).sum(), x)
    assert selector[index].any(dim=1).all()
    assert relative_l2(getattr(leaf, name).grad, own if detach else own + selector) < 1e-6


def test_equation_10_in_float32():
    """The CPU backend in float32 against the float64 reference: 1e-5 in relative L2, for each attribute and
    the mask."""
    splats, camera, photo = toy()
    single = splats.map(lambda t: t.float()).requires_grad_()
    exact = to_float64(single)
    masks = [torch.tensor([1, 0.9, 0.5, 1, 0, 1], dtype=t, requires_grad=True)
             for t in (torch.float32, torch.float64)]
    elastic_loss(single, camera, photo.float(), masks[0]).backward()
    elastic_loss(exact, camera, photo, masks[1]).backward()
    pairs = {name: (t.grad, getattr(exact, name).grad) for name,
             t in single.items()} | {"mask": [m.grad for m in masks]}
    errors = {name: relative_l2(*pair) for name, pair in pairs.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equation_10_nothing_for_the_masked_ones(dtype):
    """A Gaussian with mask 0 gets no gradient from the render, not even for its mask: its alpha is below
    1/255, so skipped.

    Eq. 10 suggests otherwise. It means that the render loss can only re-weigh the Gaussians that were drawn;
    others come in through the noise and the teacher (global importance). It also means that training may
    leave them out of the render.
    """
    splats, camera, photo = toy()
    splats = splats.map(lambda t: t.to(dtype)).requires_grad_()
    m = torch.tensor([1, 1, 0, 1, 0, 1], dtype=dtype, requires_grad=True)
    elastic_loss(splats, camera, photo.to(dtype), m).backward()
    for grad in (m.grad, *(t.grad for _, t in splats.items())):
        assert not grad[m == 0].any() and grad[m == 1].any()
    with torch.no_grad():  # although it would change the loss to draw them
        assert all(elastic_loss(splats, camera, photo.to(dtype), m + one)
                   != elastic_loss(splats, camera, photo.to(dtype), m)
                   for one in torch.eye(6, dtype=dtype)[m == 0])
