"""Densification by the numbers of 3DGS: who is cloned, split, pruned and reset, and when."""

import math

import pytest
import torch
from tiny import begun, camera, tiny_config, tiny_scene, tiny_splats

from flexgs.config import BaseConfig, LearningRatesConfig
from flexgs.distributed import Shard
from flexgs.raster.contract import Projection
from flexgs.splats import Splats
from flexgs.training.densify import Densifier, halves
from flexgs.training.optim import Optimizer, splat_groups
from flexgs.training.trainer import Trainer

EXTENT = 2.0
"""So that, of the defaults, what is larger than 0.02 is split, and what is larger than 0.2 pruned."""


def prepared(length: int = 1000, n: int = 8, **options) -> tuple[Densifier, Splats, Optimizer]:
    splats = tiny_splats(n).requires_grad_()
    with torch.no_grad():
        splats.scales.fill_(math.log(0.01))
        splats.opacities.fill_(0.0)
    optimizer = Optimizer(splat_groups(splats, LearningRatesConfig(), EXTENT), 1)
    optimizer.step([torch.ones_like(p) for _, p in optimizer.parameters()], 0.0)
    with torch.no_grad():  # that step has moved them
        splats.scales.fill_(math.log(0.01))
        splats.opacities.fill_(0.0)
    return Densifier(BaseConfig(**options), length, EXTENT, 0, n, torch.device("cpu")), splats, optimizer


def test_the_gradient_is_in_halves_of_the_image():
    """Pixels times half the width across and half the height down, over the views that saw the Gaussian."""
    densifier, _, _ = prepared(n=3)
    gradients = torch.tensor([[3.0, 0.0], [0.0, 5.0], [3.0, 4.0]])
    at = camera(0)
    means2d = torch.zeros(3, 2, requires_grad=True)
    means2d.grad = gradients
    radii = torch.tensor([[2, 1], [0, 3], [1, 1]], dtype=torch.int32)
    densifier.observe(Projection(means2d, *[torch.zeros(3)] * 4, radii), at, 2.0)
    # 24 x 18
    assert densifier.gradient.tolist() == pytest.approx([3 * 12 * 2, 5 * 9 * 2,
                                                         2 * math.hypot(3 * 12, 4 * 9)])
    assert densifier.seen.tolist() == [1, 0, 1]


def test_small_ones_are_cloned_and_large_ones_are_split():
    densifier, splats, optimizer = prepared()
    with torch.no_grad():
        splats.scales[2, 1] = math.log(0.021)   # one axis is enough
        splats.scales[3] = math.log(0.019)
        splats.opacities[6] = math.log(0.0049 / 0.9951)  # transparent
        splats.opacities[7] = math.log(0.0051 / 0.9949)
    densifier.seen[:] = 4
    densifier.gradient[:] = 4 * 1.9e-4
    densifier.gradient[2:4] = 4 * 2.1e-4
    before = splats.clone()
    grown = densifier.refine(splats, optimizer, 99, 100, Shard())
    kept = [0, 1, 3, 4, 5, 7]
    assert torch.equal(grown.means[:6], before.means[kept]) and len(grown) == 6 + 1 + 2
    assert torch.equal(grown.means[6], before.means[3]) and torch.equal(grown.scales[6], before.scales[3])
    assert torch.allclose(grown.scales[7:].exp(), before.scales[2].exp() / 1.6)
    assert not torch.equal(grown.means[7], grown.means[8])
    assert torch.equal(grown.opacities[7:], before.opacities[[2, 2]])  # of a half, as of the whole
    moments = optimizer.moments()
    assert moments["splats.means/exp_avg"][:6].all() and not moments["splats.means/exp_avg"][6:].any()
    assert (float(densifier.gradient.sum()), float(densifier.seen.sum()), len(densifier.seen)) == (0, 0, 9)


def test_one_view_is_enough():
    densifier, splats, optimizer = prepared()
    densifier.seen[:] = 1
    densifier.gradient[3] = 2.1e-4
    assert len(densifier.refine(splats, optimizer, 99, 100, Shard())) == 9


def test_the_halves_differ_from_step_to_step_and_seed_to_seed():
    one = tiny_splats(1)
    a, b = (halves(one, [torch.randn(1, 3, generator=torch.Generator().manual_seed(seed))] * 2)
            for seed in (0, 1))
    assert not torch.equal(a.means, b.means) and len(a) == 2


@pytest.mark.parametrize(("step", "kept"), [(300, 8), (500, 7)])
def test_very_large_ones_are_pruned_once_opacities_were_reset(step, kept):
    densifier, splats, optimizer = prepared()  # the first reset is at 400
    with torch.no_grad():
        splats.scales[1, 0] = math.log(0.21)  # more than a tenth of the extent
        splats.scales[2, 2] = math.log(0.19)
    assert len(densifier.refine(splats, optimizer, step - 1, step, Shard())) == kept


def test_the_cap_holds_and_the_largest_gradients_go_first():
    densifier, splats, optimizer = prepared(max_splats=10)
    densifier.seen[:] = 1
    densifier.gradient[:] = torch.tensor([5, 9, 3, 7, 8, 4, 6, 2]) * 1e-3
    before = splats.clone()
    grown = densifier.refine(splats, optimizer, 99, 100, Shard())
    assert torch.equal(grown.means[8:], before.means[[1, 4]])


def test_when_it_grows_and_when_opacities_are_reset():
    grown, reset = [], []
    for step in range(20, 1001, 20):
        densifier, splats, optimizer = prepared()
        densifier.seen[:] = 1
        densifier.gradient[:] = 1.0
        after = densifier.refine(splats, optimizer, step - 20, step, Shard())
        grown += [step] if len(after) > 8 else []
        reset += [step] if float(after.opacities.detach().max().sigmoid()) < 0.011 else []
    assert grown == [100, 200, 300, 400, 500, 600, 700, 800]  # after 30, up to 80 %, every 100
    assert reset == [400]  # each 40 % of the stage, while growing


def test_a_reset_leaves_a_hundredth_and_no_momentum():
    densifier, splats, optimizer = prepared(refine_start=0.9)
    with torch.no_grad():
        splats.opacities[0] = -6.0
    densifier.refine(splats, optimizer, 399, 400, Shard())
    opacities = splats.opacities.detach().sigmoid()
    assert (opacities[1:].tolist() == pytest.approx([0.01] * 7)
            and float(opacities[0]) == pytest.approx(1 / (1 + math.exp(6))))
    moments = optimizer.moments()
    assert not moments["splats.opacities/exp_avg"].any() and not moments["splats.opacities/exp_avg_sq"].any()
    assert moments["splats.means/exp_avg"].all()


def test_the_trainer_grows_in_stage_1_and_not_in_stage_2():
    config = tiny_config(steps=60)
    base = config.base
    base.refine_every, base.refine_start, base.refine_stop, base.grow_grad2d = 5, 0.1, 1.0, 1e-9
    base.max_splats, base.prune_opa = 10_000, 0.0
    trainer, counts = begun(Trainer(config, tiny_scene()), tiny_splats()), {}
    while trainer.step < 60:
        before = len(trainer.splats)
        trainer.train_step()
        counts[trainer.step] = len(trainer.splats) - before
    assert [step for step, more in counts.items() if more] == [5, 10, 15, 20, 25, 30]
    assert len(trainer.splats) > 400
