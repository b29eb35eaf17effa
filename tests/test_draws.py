"""What is drawn and what is ordered: views, ratios, the order of the Gaussians, and what stage 2 begins
with."""

import math

import pytest
import torch
from tiny import UNIT, begun, same, tiny_config, tiny_scene, tiny_splats

from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.model.importance import score
from flexgs.model.merge import merged
from flexgs.model.merge_tree import MergeTree
from flexgs.scene import ViewSampler
from flexgs.seeds import generator
from flexgs.training.trainer import Trainer


def started(preset: str = "default", **order) -> tuple[Trainer, torch.Tensor]:
    """A trainer at the beginning of stage 2 and the scores of its Gaussians before they were ordered."""
    config = tiny_config(preset)
    for name, value in order.items():
        setattr(config.order, name, value)
    trainer = begun(Trainer(config, tiny_scene()), tiny_splats())
    scores = score(config.order.score, trainer.splats, trainer.scene.train, Group())
    trainer.step = trainer.base_steps - 1
    trainer.train_step()  # so that Adam has moments
    begun(trainer, tiny_splats())
    trainer.step = trainer.base_steps
    return trainer, scores


@pytest.mark.parametrize("kind", ["sampled", "importance"])
def test_stage_2_begins_in_the_order_with_moments_and_merged_knots(kind):
    """The deltas start from Gaussians merged by their own scores: reordered with them."""
    trainer, scores = started(kind=kind, keep=0.75)
    trainer.config.deltas.merge = 0.1
    before, moments = trainer.splats.clone(), {k: v.clone() for k, v in trainer.optimizer.moments().items()}
    noise = torch.zeros(40)
    if kind == "sampled":
        U = torch.rand(40, generator=generator(0, "order"), dtype=torch.float64)
        noise = -(-U.log()).log()
    order = (scores.clamp(min=1e-30).log() + noise).argsort(descending=True, stable=True)[:30]
    trainer.model()
    assert same(trainer.splats, before[order])
    for name, t in trainer.optimizer.moments().items():
        if name.startswith("splats") and not name.endswith("step"):
            assert torch.equal(t, moments[name][order]), name
    ordered, deltas = before[order], trainer.transform
    first = 0
    for knot, count in ((0.002, 1), (0.005, 1), (0.01, 1), (0.032, 1), (0.1, 3), (0.32, 9),
                        (0.5, 15)):  # of 30
        change = deltas.means[first:first + count].detach()
        if knot <= 0.1:
            assert torch.allclose(ordered.means[:count] + UNIT * change,
                                  merged(ordered, scores[order], count).means, atol=1e-5)
            assert change.any()
        else:
            assert not change.any()
        first += count
    assert first == len(deltas.means)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_with_the_tree_stage_2_begins_merged(keep):
    """With exactly as many as it keeps, in the order of their own tree, with the moments of those that the
    merged ones stand for; and the knots start from the tree's cuts."""
    trainer, scores = started(kind="tree", keep=keep)
    before, moments = trainer.splats.clone(), {k: v.clone() for k, v in trainer.optimizer.moments().items()}
    trainer.model()
    tree, count = MergeTree(before, True, scores.numpy()), int(40 * keep)
    cut, kept = tree.cut(count), torch.as_tensor(tree.kept(count))
    rest = MergeTree(cut, True, scores[kept].numpy())
    rows = rest.order()
    assert same(trainer.splats, cut[rows]) and same(cut, before) == (keep == 1)
    assert torch.equal(trainer.optimizer.moments()["splats.means/exp_avg"],
                       moments["splats.means/exp_avg"][kept[rows]])
    with torch.no_grad():
        first = trainer.transform(trainer.splats[:count // 10], 0.1)
    assert torch.allclose(first.means.sort(dim=0).values,
                          rest.cut(count // 10).means.sort(dim=0).values, atol=1e-5)
    assert not torch.allclose(first.means, trainer.splats.means[:count // 10], atol=1e-2)


def test_the_temperature_of_the_order_scales_its_noise():
    """0 is the plain order; the larger, the less the score says."""
    agreement = []
    for temperature in (0.0, 0.5, 5.0):
        trainer, scores = started(kind="sampled", temperature=temperature)
        before = trainer.splats.clone()
        trainer.model()
        places = torch.cdist(trainer.splats.means.detach(), before.means).argmin(dim=1)
        ranks = scores.argsort(descending=True).argsort()[places].double()
        agreement.append(float(torch.corrcoef(torch.stack([ranks, torch.arange(40.0).double()]))[0, 1]))
    assert agreement[0] > 0.999 and agreement[0] > agreement[1] > agreement[2] and agreement[2] < 0.7


def ratios(sampling: str, i: int, n: int = 2000, **options) -> torch.Tensor:
    config = tiny_config()
    config.ratios.sampling = sampling
    for name, value in options.items():
        setattr(config.ratios, name, value)
    trainer = Trainer(config, tiny_scene())
    return torch.tensor([trainer._ratio(position, i) for position in range(n)], dtype=torch.float64)


@pytest.mark.parametrize(("i", "low", "high"),
                         [(0, 0.008, 0.035), (1, 0.035, 0.18), (2, 0.035, 0.18), (3, 0.18, 0.6),
                          (4, 0.6, 1.0), (5, 0.0015, 0.008)])
def test_ratios_are_log_uniform_within_their_band(i, low, high):
    """The last two lie above and below all bands. Kolmogorov: 2,000 draws are within 0.04 of the law in
    99.7 % of cases."""
    drawn = ratios("log_uniform", i).sort().values
    assert low <= float(drawn[0]) and float(drawn[-1]) <= high
    law = (drawn / low).log() / math.log(high / low)
    assert float((law - (torch.arange(2000) + 0.5) / 2000).abs().max()) < 0.04
    uniform = ratios("uniform", i).sort().values
    assert float(((uniform - low) / (high - low) - (torch.arange(2000) + 0.5) / 2000).abs().max()) < 0.04


def test_a_batch_of_steps_leaves_no_part_of_a_band_out():
    """As many steps as a step has views draw from as many equal parts of the band, each from another."""
    config = tiny_config()
    config.batch = 8
    trainer = Trainer(config, tiny_scene())
    parts = [int(8 * math.log(trainer._ratio(turn, 1) / 0.035) / math.log(0.18 / 0.035))
             for turn in range(32)]
    assert all(sorted(parts[i:i + 8]) == [*range(8)] for i in range(0, 32, 8))
    assert len({tuple(parts[i:i + 8]) for i in range(0, 32, 8)}) == 4


def test_ratios_of_one_view_are_drawn_for_themselves():
    a, b = ratios("log_uniform", 0, 500), ratios("log_uniform", 1, 500)
    places = torch.stack([(a / 0.008).log(), (b / 0.035).log()])
    assert abs(float(torch.corrcoef(places)[0, 1])) < 0.15


@pytest.mark.parametrize("preset", ["default", "fast"])
@pytest.mark.parametrize("batch", [1, 4])
def test_all_views_of_a_step_have_the_same_renders(preset, batch, monkeypatch):
    """So workers with a view each have equal work. A step of one view draws for each view."""
    config = tiny_config(preset, steps=40 * batch)
    config.batch, config.base.stage1_fraction, config.ratios.upper_every = batch, 0.5, 4
    config.order.selection = None  # its steps have other renders, which are equal work too
    trainer, drawn = Trainer(config, tiny_scene()), {}
    trainer.step = trainer.base_steps
    trainer.train_step()  # begins stage 2
    select = trainer.order.select

    def selected(splats, ratio, progress, draw):
        drawn.setdefault(draw[0], []).append(ratio)
        return select(splats, ratio, progress, draw)

    monkeypatch.setattr(trainer.order, "select", selected)
    kinds = set()
    for _ in range(8):
        turn, drawn = trainer.step // batch, {}
        trainer.train_step()
        renders, *others = [drawn[trainer.step - batch + slot] for slot in range(batch)]
        shared = config.ratios.renders - 2  # from the last but one band on
        assert all(other[shared:] == renders[shared:] for other in others)
        assert renders[shared] == trainer._ratio(turn, shared)
        assert len({view[0] for view in (renders, *others)}) == batch  # the cheapest differs
        kinds.add(len(renders))
    assert kinds == ({4, 6} if preset == "default" else {2, 3, 4})


def test_named_ratios_take_their_share_of_the_draws():
    drawn = ratios("log_uniform", 1, 2000, named=0.25, values=(0.01, 0.05, 0.1)).tolist()
    assert [drawn.count(value) / 2000 for value in (0.01, 0.05, 0.1)] == [
        0, *[pytest.approx(0.125, abs=0.03)] * 2]
    assert all(0.035 <= ratio <= 0.18 for ratio in drawn) and len(set(drawn)) > 1400


def test_ratios_in_turn_and_at_random():
    values = (0.3, 0.1, 0.2)
    assert ratios("round_robin", 0, 7, values=values).tolist() == [0.3, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3]
    drawn = ratios("random", 0, 3000, values=values).tolist()
    assert [drawn.count(v) / 3000 for v in values] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_views_are_drawn_by_epochs():
    sampler, other = ViewSampler(7, 3), ViewSampler(7, 4)
    epochs = [[sampler[7 * e + i] for i in range(7)] for e in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert [sampler[i] for i in (30, 2, 30)] == [epochs[4][2], epochs[0][2], epochs[4][2]]  # in any order
    assert [other[i] for i in range(35)] != [sampler[i] for i in range(35)]


def test_draws_depend_on_seed_and_purpose():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 2), (0, "a", 2, 1)]
    drawn = [float(torch.rand((), generator=generator(*key))) for key in keys]
    assert len(set(drawn)) == len(keys) and drawn == [float(torch.rand((), generator=generator(*key)))
                                                      for key in keys]


def test_where_there_are_more_points_than_gaussians_may_be():
    config = tiny_config()
    config.base.max_splats = 25
    scene = tiny_scene(40)
    first, again = (Trainer(config, scene).splats.detach() for _ in range(2))
    assert same(first, again) and len(first) == 25
    where = torch.cdist(first.means, scene.points.xyz).argmin(dim=1)
    assert len(set(where.tolist())) == 25 and where.max() > 30  # from everywhere, not the first ones
    assert torch.allclose(0.5 + 0.28209479 * first.sh0, scene.points.rgb[where] / 255, atol=1e-5)
    config.seed = 1
    assert not same(Trainer(config, scene).splats.detach(), first)


def test_a_learned_order_is_that_of_its_margins():
    for noise in (False, True):
        config: Config = tiny_config("paper")
        config.gsnet.order_noise = noise
        trainer = begun(Trainer(config, tiny_scene()), tiny_splats())
        before = trainer.splats.clone()
        found = trainer.model()
        z = trainer.order.gsnet.logits(before, trainer.order.rank, 0.5).detach().double()
        margin = z[:, 1] - z[:, 0]
        if noise:
            margin = margin + torch.logit(torch.rand(40, generator=generator(0, "order"),
                                                     dtype=torch.float64))
        assert torch.equal(found.splats.means, before.means[margin.argsort(descending=True)])


def test_of_the_training_views_a_model_keeps_the_cameras():
    trainer, _ = started()
    cameras = trainer.model().cameras
    assert [(c.width, c.height) for c in cameras] == [(v.camera.width, v.camera.height)
                                                      for v in trainer.scene.train]
