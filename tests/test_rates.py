"""How fast each parameter learns, at every moment of both stages, in every preset; and what else depends on
the moment.

The numbers are written here by hand from docs/method.md, "Learning rates". What is measured is how far Adam
moves a parameter.
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny import EXTENT, UNIT, begun, same, tiny_config, tiny_scene, tiny_splats

from flexgs.config import PRESETS, LearningRatesConfig
from flexgs.evaluate import evaluate
from flexgs.raster import project
from flexgs.training import trainer as module
from flexgs.training.optim import Optimizer, splat_groups
from flexgs.training.trainer import Meter, Trainer

BATCH = 4
E = EXTENT
GAUSSIANS = {"splats.means": (1.6e-4 * E, 100), "splats.quats": (1e-3, 1), "splats.scales": (5e-3, 1),
             "splats.opacities": (0.05, 1), "splats.sh0": (2.5e-3, 1)}
"""Rate at the start of a stage, and what it is divided by at its end."""
STAGE_1 = {**GAUSSIANS, "splats.shN": (1.25e-4, 1)}
STAGE_2 = {**GAUSSIANS, "splats.shN": (1.25e-4, 1)}
FALLING = {name: (3 * lr, 6 * end) for name, (lr, end) in STAGE_2.items()}
QUICK_HARMONICS = {**GAUSSIANS, "splats.shN": (5e-4, 1)}
DELTAS = {"transform.means": (5 * 4.8e-4 * E / UNIT, 1000), "transform.quats": (5e-3, 10),
          "transform.scales": (25e-3, 10), "transform.opacities": (0.25, 10),
          "transform.sh0": (12.5e-3, 10)}
"""Of the first knot."""
SELECTION = {name.replace("splats", "selection"): (3 * lr, end) for name, (lr, end) in GAUSSIANS.items()}
FLEXGS = {"selector": (8e-4, 10), "transform.network": (8e-4, 10), "transform.planes": (8e-3, 10)}
MENDED = {"selector": (4e-3, 10), "transform.network": (4e-3, 10), "transform.planes": (4e-2, 10)}
SECOND = {
    **dict.fromkeys(("default", "fast", "quality", "smoke"), QUICK_HARMONICS | DELTAS | SELECTION),
    "paper": STAGE_2 | FLEXGS, "official": STAGE_2 | FLEXGS, "mended": STAGE_2 | MENDED,
    "plain": STAGE_2, "lightgs": STAGE_2, "lightgs+": FALLING, "c3dgs": STAGE_2, "eagles": STAGE_2,
    "decimate": STAGE_2,
    "decimate-st": STAGE_2, "decimate-ft": STAGE_2, "matryoshka": STAGE_2, "scratch": STAGE_2,
    "mcmc": STAGE_2, "gns": FALLING}


def moved(optimizer: Optimizer, progress: float) -> dict[str, float]:
    """By group: how far a first step moves parameters that are 0, whose gradient is 1."""
    optimizer.state.clear()
    for _, p in optimizer.parameters():
        p.data.zero_()
    optimizer.step([torch.ones_like(p) for _, p in optimizer.parameters()], progress)
    found: dict[str, set[float]] = {}
    for name, p in optimizer.parameters():
        group = ".".join(word for word in name.split(".") if not word.isdigit())
        found.setdefault(group, set()).update((-p.detach()).flatten().tolist()[:1])
    assert all(len(values) == 1 for values in found.values()), found
    return {name: values.pop() for name, values in found.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_group_at_the_start_the_middle_and_the_end(preset):
    config = tiny_config(preset)
    config.batch = BATCH
    trainer = begun(Trainer(config, tiny_scene()), tiny_splats())
    for stage, table in ((1, STAGE_1), (2, SECOND[preset])):
        if stage == 2:
            trainer.model()  # begins it
        for progress in (0.0, 0.5, 1.0):
            expected = {name: lr / end**progress * 2 for name, (lr, end) in table.items()}  # 2 = sqrt(batch)
            assert moved(trainer.optimizer, progress) == pytest.approx(expected, rel=1e-4), (stage, progress)


def test_the_deltas_of_each_knot_have_rates_of_their_own():
    """5, 5, 5, 5, 5, 4 and 1.5 times those of the Gaussians, falling to a half, and 0.4 at the last."""
    config = tiny_config("default")
    config.batch = BATCH
    trainer = begun(Trainer(config, tiny_scene()), tiny_splats())
    trainer.model()
    for progress, expected in ((0.0, (5, 5, 5, 5, 5, 4, 1.5)), (1.0, (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4))):
        moved(trainer.optimizer, progress)
        ends = [sum(trainer.transform.counts[:i + 1]) - 1 for i in range(7)]
        scales = -trainer.transform.scales.detach()[ends, 0]
        found = (scales / 5e-3 / math.sqrt(BATCH)).tolist()
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_model_is_the_mean_of_the_last_parameters(monkeypatch):
    """Of every fifth view of the last part of stage 2; what nobody trains is not touched."""
    config = tiny_config("default", steps=60)
    config.base.stage1_fraction, config.average = 1 / 3, 0.5
    trainer, seen = begun(Trainer(config, tiny_scene()), tiny_splats()), []
    while trainer.step < 60:
        if trainer.step == 59:
            monkeypatch.setattr(module.Average, "apply", lambda self, parameters: None)
        trainer.train_step()
        if trainer.step > 40 and trainer.step % module.EVERY == 0:
            seen.append({name: p.detach().clone() for name, p in trainer.optimizer.parameters()})
    assert len(seen) == 4 and trainer.average.tensors()["count"] == 4
    monkeypatch.undo()
    trainer.average.apply(trainer.optimizer.parameters())
    for name, p in trainer.optimizer.parameters():
        mean = torch.stack([values[name].double() for values in seen]).mean(0)
        torch.testing.assert_close(p.detach().double(), mean, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, seen[-1][name])


def test_a_longer_run_forgets_the_mean_of_a_shorter_one():
    config = tiny_config("default", steps=60)
    config.base.stage1_fraction, config.average = 1 / 3, 0.5
    trainer = begun(Trainer(config, tiny_scene()), tiny_splats())
    while trainer.step < 55:
        trainer.train_step()
    assert trainer.average.tensors()
    trainer.config.steps = 600
    trainer.train_step()
    assert not trainer.average.tensors()


def test_a_step_knows_how_far_its_stage_is(monkeypatch):
    """Each stage counts from its own beginning; the decaying rates and the temperature follow."""
    config = tiny_config("plain", steps=40)
    config.base.stage1_fraction, config.batch = 0.25, 2
    trainer, seen = begun(Trainer(config, tiny_scene()), tiny_splats()), []

    class Watched(Optimizer):
        def step(self, gradients, progress):
            seen.append(progress)
            super().step(gradients, progress)

    monkeypatch.setattr(module, "Optimizer", Watched)
    trainer.optimizer.__class__ = Watched
    while trainer.step < 40:
        trainer.train_step()
    assert seen == pytest.approx([*(i / 10 for i in range(0, 10, 2)), *(i / 30 for i in range(0, 30, 2))])


@pytest.mark.parametrize("batch", [1, 3])
def test_adam_of_a_batch(batch):
    """Two steps by the formulas of Kingma and Ba 2015, with the constants for batches; also where epsilon
    decides."""
    splats = tiny_splats(20, 1).map(torch.zeros_like).requires_grad_()
    optimizer = Optimizer(splat_groups(splats, LearningRatesConfig(), 2.0), batch)
    b1, b2, eps, m, v, x = 0.9**batch, 0.999**batch, 1e-15 / math.sqrt(batch), 0.0, 0.0, 0.0
    for t, g in enumerate((3e-15, -1e-15, 2e-15), 1):
        optimizer.step([torch.full_like(p, g) for _, p in optimizer.parameters()], 0.25)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x -= 5e-3 * math.sqrt(batch) * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    assert splats.scales.detach().flatten().tolist() == pytest.approx([x] * 60, rel=1e-4)
    means = x / 5e-3 * 1.6e-4 * 2.0 * 0.01**0.25
    assert splats.means.detach().flatten().tolist() == pytest.approx([means] * 60, rel=1e-4)


def test_the_unit_of_a_scene_changes_no_step():
    """Where epsilon decides: positions in units of 8 and their gradients, which are in eighths, move as those
    in units of 1."""
    moved = []
    for unit in (1.0, 8.0):
        splats = tiny_splats(20, 1).map(torch.zeros_like).requires_grad_()
        optimizer = Optimizer(splat_groups(splats, LearningRatesConfig(), 2.0, unit=unit), 1)
        optimizer.step([torch.full_like(p, 2e-15 / (unit if name == "splats.means" else 1.0))
                        for name, p in optimizer.parameters()], 0.0)
        moved.append(splats.means.detach())
    assert moved[0].abs().min() > 0 and torch.allclose(*moved, rtol=1e-5)


def test_harmonics_join_one_by_one_in_the_first_fifth_of_stage_1(monkeypatch):
    config = tiny_config(steps=600)
    config.base.sh_degree, config.base.refine_start = 3, 2.0
    trainer, degrees = Trainer(config, tiny_scene()), {}

    def watched(*args, **options):
        degrees[trainer.step] = options.get("sh_degree")
        return project(*args, **options)

    monkeypatch.setattr(module, "project", watched)
    for position in (0, 19, 20, 39, 40, 59, 60, 299):  # 300 views: the fifth is 60
        trainer.step = position
        trainer.train_step()
    assert degrees == {0: 0, 19: 0, 20: 1, 39: 1, 40: 2, 59: 2, 60: 3, 299: 3}


def test_global_importance_is_computed_again_every_so_many_views():
    config = tiny_config("paper", steps=400)
    config.batch, config.gsnet.refresh = 2, 10
    trainer = begun(Trainer(config, tiny_scene()), tiny_splats())
    trainer.step = trainer.base_steps
    trainer.train_step()
    changed = []
    while trainer.step < 222:
        before = trainer.order.rank.clone()
        trainer.splats.opacities.data.copy_(torch.randn(40,
                                                        generator=torch.Generator().manual_seed(trainer.step)))
        scores, at = trainer._scores(), trainer.step
        trainer.train_step()
        if not torch.equal(trainer.order.rank, before):
            changed.append(at)
            # 0: the most important
            assert trainer.order.rank.tolist() == scores.argsort(descending=True).argsort().tolist()
    assert changed == [210, 220]


def test_the_rest_of_a_run_is_estimated_from_its_rate():
    config = tiny_config(steps=400)
    trainer = Trainer(config, tiny_scene())
    trainer.step = 100
    trainer._meter.add(0.5, 30)
    trainer._meter.add(0.25, 30)
    trainer._meter.start -= 2.0
    found = trainer.metrics()
    assert found["loss"] == 0.375 and found["views_per_second"] == pytest.approx(30, rel=0.05)
    later = 200 * trainer.config.ratios.cost  # a view of stage 2 has more renders
    assert found["eta_seconds"] == pytest.approx((100 + later) / found["views_per_second"])
    assert (found["stage"], found["steps"], found["splats"], found["workers"]) == (1, 400, 40, 1)
    trainer._meter.add(1.0, 5)
    assert trainer.metrics()["loss"] == 1.0  # since it was last asked
    meter = Meter()
    meter.start -= 2.0
    meter.add(1.0, 2)
    assert meter.read()[2] == pytest.approx(1.0, rel=0.1)
    for step, stage in ((200, 1), (201, 2)):  # a step is of the stage of the view that it ended with
        trainer.step = step
        assert trainer.metrics()["stage"] == stage


def test_what_is_shown_meanwhile_is_measured_as_in_the_end():
    """On test views, without what their masks leave out, at a few ratios once there is an order."""
    config = tiny_config(steps=8)
    config.background, config.average = (1.0, 0.9, 0.8), 0.0
    trainer = begun(Trainer(config, tiny_scene(200)), tiny_splats(200))
    assert [key for key in trainer.metrics() if "psnr" in key] == ["test_psnr_1"]
    assert len(trainer.cut(0.1)) == 20
    trainer.fit(lambda step, metrics: None, lambda step, write: None)
    model = trainer.model()
    options = replace(config.evaluation, ratios=(0.05, 0.15, 1.0), lpips=())
    for ratio, row in evaluate(model, trainer.scene, options, config.background)["ratios"].items():
        assert trainer.metrics()[f"test_psnr_{ratio}"] == pytest.approx(row["psnr"], abs=5e-3)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_terms_of_the_loss_add_up_to_it(preset):
    config = replace(tiny_config(preset, steps=12), report_every=1)
    config.gsnet.temperature, config.gsnet.temperature_end = 4.0, 0.25
    trainer, rows = begun(Trainer(config, tiny_scene()), tiny_splats()), {}
    trainer.fit(lambda step, metrics: rows.update({step: metrics}), lambda step, write: None)
    for step in range(trainer.base_steps + 1, 13):
        terms = {name: value for name, value in rows[step].items() if name.startswith("loss_")}
        assert sum(terms.values()) == pytest.approx(rows[step]["loss"], abs=5e-6)
        assert {"loss_full", "loss_elastic"} <= terms.keys()
        assert ({"loss_transform", "loss_gi", "loss_sparsity"} <= terms.keys()) == (preset == "paper")
    assert not {name for name in rows[1] if name.startswith("loss_")}  # one term only
    temperatures = [row["gsnet_temperature"] for row in rows.values() if "gsnet_temperature" in row]
    assert temperatures[-1:] == ([0.25] if preset == "paper" else [])
    assert temperatures == sorted(temperatures, reverse=True)


@pytest.mark.parametrize("preset", ["default", "paper", "matryoshka", "antialiased"])
def test_watching_changes_no_bit_of_the_model(preset):
    def trained(every: int) -> Trainer:
        config = replace(tiny_config("default" if preset == "antialiased" else preset, steps=12),
                         report_every=every, antialiased=preset == "antialiased")
        trainer = begun(Trainer(config, tiny_scene()), tiny_splats())

        def report(step: int, metrics: dict) -> None:
            if every == 1:
                evaluate(trainer.model_so_far(), trainer.scene, replace(config.evaluation, lpips=()),
                         config.background)

        trainer.fit(report, lambda step, write: None)
        return trainer

    often, never = trained(1), trained(10**6)
    assert all(torch.equal(t, never._tensors()[name]) for name, t in often._tensors().items())
    assert same(often.model().cut(0.3), never.model().cut(0.3))
