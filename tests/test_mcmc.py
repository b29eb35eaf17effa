"""3DGS-MCMC: relocation against the integral it is derived from, counts, noise, and continuing."""

import math

import pytest
import torch
from tiny import tiny_config, tiny_scene, tiny_splats

from flexgs.config import BaseConfig, LearningRatesConfig
from flexgs.distributed import Shard
from flexgs.errors import UserError
from flexgs.splats import Splats
from flexgs.training.mcmc import Mcmc, relocated
from flexgs.training.optim import Optimizer, splat_groups
from flexgs.training.trainer import Trainer

EXTENT = 10.0
"""A scene scale whose unit of length is 2."""


@pytest.mark.parametrize("copies", [1, 2, 3, 7, 40, 400])
def test_copies_cover_a_line_as_the_gaussian_did(copies):
    """The centre is as opaque, and so is the line across as a whole, by numerical integration."""
    opacity = torch.tensor([0.006, 0.3, 0.8, 0.99, 0.9999], dtype=torch.float64)
    new, factor = relocated(opacity, torch.full((5,), copies))
    assert torch.allclose(1 - (1 - new) ** copies, opacity, rtol=1e-9)
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)[:, None]
    covered = 1 - (1 - new * torch.exp(-0.5 * (x / factor) ** 2)) ** copies
    assert torch.allclose(torch.trapezoid(covered, x, dim=0), opacity * math.sqrt(2 * math.pi), rtol=1e-6)


def test_the_factor_is_that_of_the_paper():
    """As it is printed: a double sum over i <= N and k < i."""
    for o, n in ((0.2, 2), (0.7, 5), (0.95, 12)):
        new = 1 - (1 - o) ** (1 / n)
        printed = sum(math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
                      for i in range(1, n + 1) for k in range(i))
        _, factor = relocated(torch.tensor([o], dtype=torch.float64), torch.tensor([n]))
        assert float(factor) == pytest.approx(o / printed, rel=1e-9)


def prepared(n: int = 40, **options) -> tuple[Mcmc, Splats, Optimizer]:
    splats = tiny_splats(n).requires_grad_()
    with torch.no_grad():
        splats.opacities.fill_(0.0)
    optimizer = Optimizer(splat_groups(splats, LearningRatesConfig(means=0.0), EXTENT), 1)
    optimizer.step([torch.ones_like(p) for _, p in optimizer.parameters()], 0.0)
    with torch.no_grad():  # that step has moved them
        splats.opacities.fill_(0.0)
    return Mcmc(BaseConfig(**options), 1000, EXTENT, 0, n, torch.device("cpu")), splats, optimizer


def test_the_dead_move_to_the_living_and_the_number_grows_to_the_cap():
    mcmc, splats, optimizer = prepared(max_splats=43)
    with torch.no_grad():
        splats.opacities[:10] = -6.0  # an opacity of 0.0025
    before, counts = splats.clone(), []
    for step in range(100, 501, 100):
        splats = mcmc.refine(splats, optimizer, step - 1, step, Shard())
        counts.append(len(splats))
    assert counts == [42, 43, 43, 43, 43]
    places = {tuple(mean) for mean in splats.means.tolist()}
    assert places <= {tuple(mean) for mean in before.means[10:].tolist()}
    assert float(splats.opacities.detach().sigmoid().min()) > 0.005
    # what shares a place is as opaque together as the one that was there
    left = torch.zeros(40, dtype=torch.float64)
    for mean, o in zip(splats.means, splats.opacities.detach().double().sigmoid(), strict=True):
        left[(before.means == mean).all(dim=1)] += torch.log1p(-o)
    assert torch.allclose(left[10:].exp(), torch.full((30,), 0.5, dtype=torch.float64), rtol=1e-4)
    moments = optimizer.moments()["splats.scales/exp_avg"]
    assert len(moments) == 43 and bool((moments == 0).all(dim=1).any() & (moments != 0).all(dim=1).any())


def test_without_living_ones_there_is_nowhere_to_go():
    mcmc, splats, optimizer = prepared()
    with torch.no_grad():
        splats.opacities.fill_(-6.0)
    with pytest.raises(UserError, match=r"view 100: every Gaussian is fainter than --base\.prune-opa 0\.005"):
        mcmc.refine(splats, optimizer, 99, 100, Shard())


def test_noise_has_the_shape_of_the_gaussian_and_moves_transparent_ones_only():
    """Its standard deviation along an axis is rate * sigmoid * s^2, lengths in units of the scene."""
    mcmc, splats, optimizer = prepared(n=4000)
    optimizer.groups[0]["lr"] = 1e-3
    with torch.no_grad():
        splats.quats[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        splats.scales[:] = torch.tensor([0.1, 0.2, 0.4]).log()
        splats.opacities[:2000] = math.log(0.005 / 0.995)
    before = splats.means.detach().clone()
    mcmc.refine(splats, optimizer, 501, 502, Shard())
    moved = (splats.means.detach() - before).double()
    rate = 5e5 * 1e-3 * 0.01 ** 0.502
    expected = rate * 0.5 * torch.tensor([0.01, 0.04, 0.16], dtype=torch.float64) / 2**2
    assert torch.allclose(moved[:2000].std(dim=0), expected, rtol=0.06)
    assert float(moved[2000:].abs().max()) < 1e-6


def trained(**base) -> Trainer:
    config = tiny_config("mcmc", steps=60)
    config.base.stage1_fraction, config.base.refine_every = 1.0, 5
    for name, value in base.items():
        setattr(config.base, name, value)
    return Trainer(config, tiny_scene())


def until(trainer: Trainer, step: int) -> Trainer:
    trainer.fit(lambda step, metrics: None, lambda step, write: None, until=step)
    return trainer


@pytest.mark.parametrize("most", [25, 47])
def test_the_number_at_the_end_is_the_one_asked_for(most):
    """Of 40 points, fewer or more: nothing is pruned."""
    assert len(until(trained(max_splats=most), 60).model().splats) == most


def test_continued_equals_uninterrupted(tmp_path):
    whole, part = until(trained(), 60), until(trained(), 33)
    part.save(tmp_path)
    again = trained()
    again.load(tmp_path)
    until(again, 60)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.splats.items(), again.splats.items(),
                                                           strict=True))


def test_the_loss_counts_opacities_and_sizes():
    """The first step's loss is larger by the weights times the means, sizes in units of the scene."""
    losses = [float(trained(opacity_reg=a, scale_reg=b)._view_loss(0)) for a, b in ((0, 0), (3, 0), (0, 7))]
    trainer = trained()
    assert losses[1] - losses[0] == pytest.approx(3 * 0.5, rel=1e-4)
    size = float(trainer.splats.scales.detach().exp().mean()) / 0.25
    assert losses[2] - losses[0] == pytest.approx(7 * size, rel=1e-4)
