"""Natural selection of the Gaussians of small cuts: who stays, what the knots begin with, and continuing."""

import pytest
import torch
from tiny import tiny_config, tiny_scene

from flexgs.config import Config, count_at
from flexgs.errors import UserError
from flexgs.model.push import alive_at, push
from flexgs.training.trainer import Trainer

NAMES = ("means", "quats", "scales", "opacities", "sh0")


def config_of(**settings) -> Config:
    config = tiny_config("default", steps=120)
    config.order.push = 0.5
    for name, value in settings.items():
        setattr(config, name, value)
    return config.check()


def test_the_number_falls_exponentially_to_the_last_one():
    assert [alive_at(400, 100, progress) for progress in (0, 0.5, 1, 1.5)] == [400, 200, 100, 100]
    assert alive_at(400, 100, 0.004) == 400  # within the first round


def test_a_push_takes_the_faintest_and_says_who_died_last():
    logits = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0])
    fall, order = push(logits, 2)
    assert order.tolist() == [0, 2, 4, 1, 3]
    assert float(torch.sigmoid(logits[4] - fall)) == pytest.approx(0.005)
    assert push(torch.tensor([-9.0, 1.0, -8.0]), 1)[0] == 0  # these have died by themselves


def test_what_is_left_is_the_cut():
    """At each knot that the selection passes; the cut where it began still has the same Gaussians."""
    trainer = Trainer(config_of(), tiny_scene(100))
    while not trainer.selection:
        trainer.train_step()
    n, passed = len(trainer.splats), []
    while selection := trainer.selection:
        before = len(selection.splats)
        trainer.train_step()
        for knot in (0.32, 0.1):
            if before > count_at(knot, n) >= len(selection.splats):
                passed.append(knot)
        if passed and len(selection.splats) == count_at(passed[-1], n):
            cut = trainer.cut(passed[-1])
            for name in NAMES:
                assert torch.allclose(getattr(cut, name), getattr(selection.splats, name), atol=1e-5), name
    assert passed == [0.32, 0.1] and len(trainer.splats) == n == 100
    assert not [name for name, _ in trainer.optimizer.parameters() if name.startswith("selection")]


def test_the_cut_where_it_begins_keeps_its_gaussians():
    trainer = Trainer(config_of(), tiny_scene(100))
    while not trainer.selection:
        trainer.train_step()
    whole, half = trainer.splats.detach(), trainer.cut(0.5)
    trainer.selection.thin(32, trainer.optimizer)
    trainer._start_knots(trainer.selection)
    again = trainer.cut(0.5)
    for one, two in ((half, again), (whole[50:], trainer.splats.detach()[50:])):
        ranks = [s.means[:, 0].argsort() for s in (one, two)]
        for name in (*NAMES, "shN"):
            values = [getattr(s, name)[rank] for s, rank in zip((one, two), ranks, strict=True)]
            assert torch.allclose(*values, atol=1e-6), name
    assert not torch.equal(half.means, again.means)


def test_continued_during_a_selection_with_the_same_bits(tmp_path):
    whole = Trainer(config_of(), tiny_scene(100))
    while whole.step < 120:
        whole.train_step()
    part = Trainer(config_of(), tiny_scene(100))
    while part.step < 75:
        part.train_step()
    assert part.selection and 10 < len(part.selection.splats) < 32
    part.save(tmp_path)
    again = Trainer(config_of(), tiny_scene(100))
    again.load(tmp_path)
    while again.step < 120:
        again.train_step()
    assert whole._tensors().keys() == again._tensors().keys()
    for name, t in whole._tensors().items():
        assert torch.equal(t, again._tensors()[name]), name


def test_ratios_need_not_be_knots():
    config = config_of()
    config.deltas.knots, config.order.selection = (0.02, 0.4), (0.6, 0.2)
    trainer = Trainer(config.check(), tiny_scene(100))
    while trainer.step < 100:
        trainer.train_step()
    assert not trainer.selection and len(trainer.cut(0.2).means) == 20


@pytest.mark.parametrize(("name", "value", "said"), [
    ("selection", (0.1, 0.5), r"--order\.selection: found 0\.1 0\.5, expected the larger ratio first"),
    ("push", 0.9, r"--order\.push 0\.9: with --average 0\.15, expected at most 0\.85")])
def test_what_does_not_fit_is_refused(name, value, said):
    config = config_of()
    setattr(config.order, name, value)
    with pytest.raises(UserError, match=said):
        config.check()


@pytest.mark.parametrize(("part", "kind"), [("order", "importance"), ("transform", "field")])
def test_other_orders_and_transforms_select_nothing(part, kind):
    config = config_of()
    getattr(config, part).kind = kind
    trainer = Trainer(config.check(), tiny_scene())
    trainer.model()
    assert trainer.elastic and not trainer.selection
