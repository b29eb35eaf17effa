"""Natural selection: who dies by a push on all opacities, how many are left when, and continuing."""

import math

import pytest
import torch
from tiny import tiny_config, tiny_scene, tiny_splats

from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.model.order import make_order
from flexgs.training.trainer import Trainer


def config_of(**order) -> Config:
    config = tiny_config("gns", steps=120)
    for name, value in {"keep": 0.25, "push": 0.5, **order}.items():
        setattr(config.order, name, value)
    return config.check()


def test_a_push_is_the_same_for_all_and_ends_where_enough_have_died():
    order, splats = make_order(config_of()), tiny_splats(40)
    splats.opacities[:] = torch.linspace(2, -2, 40)
    order.build(splats)
    before = splats.opacities.clone()
    assert order.survivors(splats, 0.0, 0.004) is None and torch.equal(splats.opacities, before)
    rows = order.survivors(splats, 0.004, 0.25)  # half of the push: 40 to 10 is 20 there
    assert rows.tolist() == list(range(20))
    dead, pushed = math.log(0.005 / 0.995), before - splats.opacities
    assert torch.allclose(pushed, pushed[:1].expand(40))
    assert float(splats.opacities[20]) == pytest.approx(dead, abs=1e-5) and float(splats.opacities[19]) > dead


def test_those_that_died_by_themselves_need_no_push():
    order, splats = make_order(config_of()), tiny_splats(40)
    splats.opacities[:], splats.opacities[5:35] = 1.0, -9.0
    order.build(splats)
    before = splats.opacities.clone()
    assert order.survivors(splats, 0.0, 0.25).tolist() == [0, 1, 2, 3, 4, *range(25, 40)]
    assert torch.equal(splats.opacities, before)


def counts(trainer: Trainer, until: int) -> dict[int, int]:
    found = {}
    while trainer.step < until:
        trainer.train_step()
        found[trainer.step] = len(trainer.splats)
    return found


def test_the_number_falls_during_the_push_and_stays_afterwards(tmp_path):
    """Also when the training is continued in between, and then with the same bits."""
    whole = Trainer(config_of(), tiny_scene())
    n = counts(whole, 120)
    assert n[60] == 40 and n[75] == 20 and set(list(n.values())[89:]) == {10}
    part = Trainer(config_of(), tiny_scene())
    counts(part, 78)
    part.save(tmp_path)
    again = Trainer(config_of(), tiny_scene())
    again.load(tmp_path)
    assert counts(again, 120) == {step: count for step, count in n.items() if step > 78}
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.splats.items(), again.splats.items(),
                                                           strict=True))
    assert len(again.model().splats) == 10


def test_what_it_cannot_do_is_refused():
    config = config_of()
    config.transform.kind = "deltas"
    with pytest.raises(UserError, match=r"--order\.kind gns: found --transform\.kind deltas"):
        config.check()
    config = config_of()
    config.average = 0.6
    with pytest.raises(UserError, match=r"--order\.push 0\.5: with --average 0\.6, expected at most 0\.4"):
        config.check()
