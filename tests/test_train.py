"""Training: it learns, it resumes exactly, it refuses what it cannot do, its pieces do what they say."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import random_splats
from safetensors.torch import load_file

from flexgs import stored
from flexgs.config import Config, EvaluationConfig, count_at
from flexgs.distributed import Group, Shard
from flexgs.errors import UserError
from flexgs.evaluate import evaluate
from flexgs.model.elastic import ElasticModel
from flexgs.model.importance import score
from flexgs.model.transform import Transform
from flexgs.ply import read_ply, write_ply
from flexgs.raster import project, render
from flexgs.run import LocalSession, StoppedError, finished, history, resume, run
from flexgs.splats import rotation_matrices
from flexgs.training.checkpoint import DamagedError
from flexgs.training.densify import Densifier, crosses, halves, reorder
from flexgs.training.optim import Optimizer, splat_groups
from flexgs.training.trainer import NonFiniteLossError, Trainer

QUIET = lambda step, metrics: None  # noqa: E731


def forget(step, write):
    """Keep no checkpoint."""


def equal(a, b):
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))


def train(config, scene):
    trainer = Trainer(config, scene)
    trainer.fit(QUIET, forget)
    return trainer.model()


def method_of(preset, config):
    """config with the method of a preset, and a field that is as small as the capture."""
    for part in ("order", "transform", "gsnet", "field", "ratios", "lr", "loss", "background", "average"):
        setattr(config, part, getattr(Config.from_preset(preset), part))
    config.field.resolution, config.field.channels, config.gsnet.refresh = (8, 8, 8, 8), 4, 25
    return config


@pytest.mark.parametrize("preset", ["default", "paper", "official", "mended", "matryoshka"])
def test_interrupted_equals_uninterrupted(preset, scene, config, tmp_path):
    """Bit for bit, resumed in stage 1 and again in stage 2, where the parameters are averaged already."""
    method_of(preset, config)
    config.average *= 5  # the last 45 of 60 views
    whole = Trainer(config, scene)
    whole.fit(QUIET, forget)

    class Killed(Exception):
        pass

    def run_until(stop, checkpoint):
        trainer = Trainer(config, scene)
        if checkpoint:
            trainer.load(checkpoint)

        def keep(step, write):
            folder = tmp_path / f"{step}"
            folder.mkdir()
            write(folder)
            if step >= stop:
                raise Killed

        with pytest.raises(Killed):
            trainer.fit(QUIET, keep)
        return tmp_path / f"{trainer.step}"

    first = run_until(40, None)
    assert json.loads((first / "state.json").read_text())["step"] == 40  # stage 1 ends at 60
    second = run_until(80, first)
    last = Trainer(config, scene)
    last.load(second)
    assert last.step == 80
    last.fit(QUIET, forget)
    assert equal(last.splats, whole.splats)
    for ratio in (0.01, 0.1, 0.5):
        assert equal(last.model().cut(ratio), whole.model().cut(ratio))


def test_elastic_training_beats_pruning(scene, config):
    """Same capture, steps and counts: the cuts of the elastic model against the plain model pruned by
    importance."""
    config.steps, config.base.reset_every = 400, 2.0  # too short to recover from an opacity reset
    elastic = train(config, scene)
    config.loss, config.ratios, config.order, config.transform = (
        getattr(Config.from_preset("plain"), name) for name in ("loss", "ratios", "order", "transform"))
    plain = train(config, scene)
    assert len(elastic.splats) == len(plain.splats)
    ours, theirs = (evaluate(m, scene, EvaluationConfig((0.05, 0.2, 1.0)), config.background)["ratios"]
                    for m in (elastic, plain))
    assert ours["0.05"]["psnr"] > theirs["0.05"]["psnr"] + 1
    assert ours["0.2"]["psnr"] > theirs["0.2"]["psnr"] + 1
    assert theirs["1"]["psnr"] > 17
    assert ours["1"]["psnr"] > theirs["1"]["psnr"] - 0.7  # 400 views: noise, not a claim about quality


def test_matryoshka_orders_by_the_opacity_that_training_changes(scene, config):
    trainer = Trainer(method_of("matryoshka", config), scene)
    trainer.fit(QUIET, forget)
    first, last = trainer.splats.opacities.detach(), trainer.model().splats.opacities
    assert torch.equal(last, first.sort(descending=True).values)
    assert not torch.equal(last, first)  # sorted when stage 2 began, not any more


def test_what_is_only_pruned_is_ordered_by_its_last_state(scene, config):
    """As training goes on after the first order, which nothing depends on."""
    trainer = Trainer(method_of("plain", config), scene)
    trainer.fit(QUIET, forget)
    scores = score("lightgaussian", trainer.model().splats, scene.train, Group())
    assert (scores.diff() <= 0).all()
    assert not (score("lightgaussian", trainer.splats, scene.train, Group()).diff() <= 0).all()


def test_a_ratio_between_two_trained_ones_is_not_worse_than_the_lower(scene, config):
    """On the training views; 20 % between 10 % and 40 %, only these two trained. It is 0.5 dB better over
    seeds."""
    method_of("mended", config)
    config.steps, config.base.reset_every = 300, 2.0  # too short to recover from an opacity reset
    config.ratios.sampling, config.ratios.values = "round_robin", (0.1, 0.4)
    seen = dataclasses.replace(scene, test=scene.train)
    rows = evaluate(train(config, seen), seen, EvaluationConfig((0.1, 0.2, 0.4), lpips=()), config.background)
    low, between, high = (row["psnr"] for row in rows["ratios"].values())
    assert low < between < high


def test_moments_are_forgotten_only_if_asked(scene, config):
    for restart in (False, True):
        config.lr.restart = restart
        trainer = Trainer(config, scene)
        trainer.train_step()
        assert trainer.optimizer.moments()
        trainer.model()  # begins stage 2
        assert bool(trainer.optimizer.moments()) is not restart


def test_run_folder_holds_what_it_promises(scene, config, tmp_path):
    from flexgs.ply import read_ply

    folder, lines = tmp_path / "studio", []
    session = LocalSession(folder, Group(), lambda step, m: lines.append(step))
    results = run(config, scene, folder, Group(), session)
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "results.json", "model", "checkpoints", "cuts", "renders"}
    assert lines == [20, 40, 60, 80, 100, 120]
    assert [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()] == lines
    assert results == json.loads((folder / "results.json").read_text())
    # how it was measured hides nothing of what was
    assert results["protocol"].items() >= scene.protocol.items()
    assert finished(folder, config, scene) == results
    assert Config.load(folder / "config.json") == config
    n = results["splats"]
    for ratio, row in results["ratios"].items():
        assert row["splats"] == max(1, math.floor(float(ratio) * n + 1e-9))
        ply = next((folder / "cuts").glob(f"*_{100 * float(ratio):06.2f}pct.ply"))
        assert row["mb"] == round(ply.stat().st_size / 1e6, 4)
        cut, psnrs = read_ply(ply), []
        for view in scene.test:  # the exported file has the quality that was reported
            image = render(cut, view.camera).image.clamp(0, 1)
            psnrs.append(-10 * math.log10(float((image - view.image() / 255).square().mean())))
        assert abs(sum(psnrs) / len(psnrs) - row["psnr"]) < 0.01
    config.steps += 40
    assert finished(folder, config, scene) is None
    more = run(config, scene, folder, Group(), session)
    assert more["steps"] == 160 and lines[6:] == [140, 160]
    assert more["splats"] == n  # the longer run goes on in stage 2
    config.steps = 100
    with pytest.raises(UserError, match="already seen 160"):
        (folder / "results.json").unlink()
        run(config, scene, folder, Group(), session)


def test_figures_of_another_ssim_are_measured_again_without_training(scene, config, tmp_path):
    """So that no table has two of them."""
    lines: list[int] = []
    session = LocalSession(tmp_path, Group(), lambda step, m: lines.append(step))
    results = run(config, scene, tmp_path, Group(), session)
    trained, weights = len(lines), (tmp_path / "model" / "model.safetensors").read_bytes()
    protocol = {**results["protocol"], "ssim": "11x11 Gaussian window, sigma 1.5, zero padding"}
    (tmp_path / "results.json").write_text(json.dumps({**results, "protocol": protocol}))
    assert finished(tmp_path, config, scene) is None
    again = run(config, scene, tmp_path, Group(), session)
    assert len(lines) == trained and (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert again["protocol"] == results["protocol"] and finished(tmp_path, config, scene) == again


def test_a_stopped_run_goes_on_where_it_was_stopped(scene, config, tmp_path):
    class Stopping(LocalSession):
        def stop(self, reported: bool) -> bool:
            return reported and steps[-1] == 60  # between two checkpoints

    def session(kind: type[LocalSession], name: str) -> LocalSession:
        return kind(tmp_path / name, Group(), lambda step, m: steps.append(step))

    steps: list[int] = []
    whole = run(config, scene, tmp_path / "whole", Group(), session(LocalSession, "whole"))
    steps.clear()
    with pytest.raises(StoppedError, match="stopped at 60 of 120 views"):
        run(config, scene, tmp_path / "run", Group(), session(Stopping, "run"))
    assert (tmp_path / "run" / "checkpoints"
            / "step_00000060").is_dir() and finished(tmp_path / "run", config, scene) is None
    resumed = run(config, scene, tmp_path / "run", Group(), session(Stopping, "run"))
    assert steps == [20, 40, 60, 80, 100, 120]
    for ratio, row in resumed["ratios"].items():
        assert row["psnr"] == whole["ratios"][ratio]["psnr"]


def test_losses_are_means_of_the_views_between_reports_although_it_was_killed_there(scene, config, tmp_path):
    """As a kill leaves it: a checkpoint at 50 views, reports at 40 and 60; the terms of stage 2 too."""
    config.base.stage1_fraction = 0.25

    def losses(trainer: Trainer, stop: int = 0) -> dict[int, dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        trainer.fit(lambda step, metrics: found.update(
                        {step: {name: value for name, value in metrics.items() if name.startswith("loss")}}),
                    lambda step, write: write(tmp_path), stop=lambda reported: trainer.step == stop)
        return found

    whole = losses(Trainer(config, scene))
    before, again = losses(Trainer(config, scene), 50), Trainer(config, scene)
    again.load(tmp_path)
    assert before | losses(again) == whole and 60 in whole and 60 not in before


def test_a_last_batch_beyond_the_steps_is_an_end(scene, config, tmp_path):
    """41 views in batches of 2 end at 42; starting again finds nothing to do, not an error."""
    config.steps, config.batch = 41, 2
    session = LocalSession(tmp_path / "run", Group(), QUIET)
    Trainer(config, scene).fit(QUIET, session.checkpoint)
    again = Trainer(config, scene)
    again.load(next(session.checkpoints()))
    again.fit(QUIET, session.checkpoint)
    assert again.step == 42


def test_another_method_does_not_continue_a_checkpoint(scene, config, tmp_path):
    trainer = Trainer(config, scene)
    trainer.train_step()
    trainer.save(tmp_path)
    # stage 2: many runs share one stage 1
    config.lr.restart, config.loss.full_l1, config.field.gate = True, 0.7, True
    Trainer(config, scene).load(tmp_path)
    config.lr.means *= 2
    with pytest.raises(UserError, match="another lr"):
        Trainer(config, scene).load(tmp_path)
    config.lr.means /= 2
    config.base.l1 = 1.0
    with pytest.raises(UserError, match="another base"):
        Trainer(config, scene).load(tmp_path)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_broken_checkpoint_is_a_user_error(name, scene, config, tmp_path):
    trainer = Trainer(config, scene)
    trainer.train_step()
    trainer.save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 9, len(whole) // 2, len(whole) - 2):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged"):
            Trainer(config, scene).load(tmp_path)


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(scene, config, tmp_path):
    config.checkpoint_every = 10
    session = LocalSession(tmp_path / "run", Group(), QUIET)
    trainer = Trainer(config, scene)

    def poison(step, metrics):
        trainer.splats.sh0.data[:] = math.nan

    with pytest.raises(NonFiniteLossError, match=r"studio, step 20: the loss is nan"):
        trainer.fit(poison, session.checkpoint)
    again = Trainer(config, scene)
    resume(again, session)  # the one at 20 has been poisoned
    assert again.step == 10


def test_a_slow_training_keeps_checkpoints_by_the_clock(scene, config):
    """At reports, since all workers have to agree; a fast one keeps them by views alone."""
    config.steps, config.checkpoint_every, config.report_every = 70, 50, 20
    for seconds, expected in ((1e-9, [20, 40, 50, 60, 70]), (1e6, [50, 70])):
        config.checkpoint_seconds, kept = seconds, []
        Trainer(config, scene).fit(QUIET, lambda step, write, kept=kept: kept.append(step))
        assert kept == expected


def changed(folder, name, change):
    """Write a tensor file again, with its SHA-256 as it should be."""
    tensors = load_file(folder / f"{name}.safetensors")
    change(tensors)
    about = json.loads((folder / f"{name}.json").read_text())
    del about["sha256"]
    stored.save(folder, name, tensors, about)


DAMAGE = {
    "fewer rows": lambda t: t.update({"splats.quats": t["splats.quats"][:1].clone()}),
    "another type": lambda t: t.update({"splats.means": t["splats.means"].double()}),
    "a missing tensor": lambda t: t.pop("splats.sh0"),
    "a tensor of nobody": lambda t: t.update(more=torch.zeros(1)),
    "more harmonics": lambda t: t.update({"splats.shN": torch.zeros(len(t["splats.means"]), 8, 3)}),
    "NaN": lambda t: t["splats.scales"].fill_(math.nan),
    "a moment of other rows": lambda t: t.update({"adam.splats.sh0/exp_avg": torch.zeros(1, 3)}),
    "an infinite moment": lambda t: t["adam.splats.means/exp_avg_sq"].fill_(math.inf),
    "statistics of other rows": lambda t: t.update({"densify.seen": torch.zeros(1)}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(kind, scene, config, tmp_path, capsys):
    """The one before it is taken, with one line; the trainer is not touched by the damaged one."""
    session, trainer = LocalSession(tmp_path, Group(), QUIET), Trainer(config, scene)
    for step in (1, 2):
        trainer.train_step()
        session.checkpoint(step, trainer.save)
    changed(next(session.checkpoints()), "state", DAMAGE[kind])
    again = Trainer(config, scene)
    resume(again, session)
    assert again.step == 1
    line, = capsys.readouterr().err.splitlines()
    assert "step_00000002" in line and line.endswith("going on from the views 1")
    changed(list(session.checkpoints())[1], "state", DAMAGE[kind])
    with pytest.raises(UserError, match=r"no older one is whole: remove them"):
        resume(Trainer(config, scene), session)


def test_a_changed_bit_is_noticed(scene, config, tmp_path):
    trainer = Trainer(config, scene)
    trainer.train_step()
    trainer.save(tmp_path)
    for name in ("state.safetensors", "state.json"):
        whole = (tmp_path / name).read_bytes()
        at = len(whole) - 9 if name == "state.safetensors" else whole.index(b'"seconds": ') + 13
        (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(DamagedError):
            Trainer(config, scene).load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    Trainer(config, scene).load(tmp_path)


def test_another_capture_does_not_continue_a_checkpoint(scene, config, tmp_path):
    trainer = Trainer(config, scene)
    trainer.save(tmp_path)
    count, names, _, files = scene.digest.split("-")
    solved_again = dataclasses.replace(scene, protocol={"digest": f"{count}-{names}-0-{files}"})
    with pytest.raises(UserError, match="was made from another capture, with other poses or "
                                        "lenses; choose another"):
        Trainer(config, solved_again).load(tmp_path)
    Trainer(config,
            dataclasses.replace(scene, protocol={"digest": "from before there were parts"})).load(tmp_path)


def test_a_small_model_file_takes_no_memory_for_what_it_claims(scene, config, tmp_path):
    config.steps = 4
    model = train(config, scene)
    model.save(tmp_path)
    about = json.loads((tmp_path / "model.json").read_text())
    # 0.3 GB
    about["config"]["transform"]["kind"], about["config"]["field"]["resolution"] = "field", [200] * 4
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"found no 'transform\.box'"):
        ElasticModel.load(tmp_path)
    model.save(tmp_path)
    changed(tmp_path, "model", lambda t: t.update({"transform.means": t["transform.means"][:1].clone()}))
    with pytest.raises(UserError, match=r"found transform\.means of float16 \[1, 3\]"):
        ElasticModel.load(tmp_path)


def test_lines_of_the_history_that_are_none_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 20, "loss": 0.1}\n\xff\n[1]\n{"loss": 1}\n{"step": '
                     b'"x"}\n{"step": 40}\n{"step": 6')
    assert [row["step"] for row in history(path)] == [20, 40]


def test_batch_must_fit_the_workers(scene, config):
    config.batch = 3
    with pytest.raises(UserError, match="multiple of the 2 workers"):
        Trainer(config, scene, Group(0, 2))


# ---------------------------------------------------------------------- pieces


def test_optimizer_is_adam_when_rows_come_and_go(config):
    """Rows that stay go on exactly as in an optimizer that never saw the others."""
    splats = random_splats(30).requires_grad_()
    alone = splats[10:].clone().requires_grad_()
    ours, theirs = (Optimizer(splat_groups(s, config.lr, 2.0), 1) for s in (splats, alone))

    def step(s, optimizer):
        optimizer.step([torch.sin(p.detach() * 3 + i) for i, (_, p) in enumerate(s.items())], 0.3)

    step(splats, ours)
    step(alone, theirs)
    smaller = reorder(splats, ours, torch.arange(10, 30), Shard())
    for _ in range(3):
        step(smaller, ours)
        step(alone, theirs)
    assert equal(smaller, alone)


def test_rotation_matrices_are_rotations():
    r = rotation_matrices(torch.randn(50, 4, dtype=torch.float64))
    assert torch.allclose(r @ r.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(50, 3, 3),
                          atol=1e-12)
    assert torch.allclose(torch.linalg.det(r), torch.ones(50, dtype=torch.float64))
    quarter = rotation_matrices(torch.tensor([[2.0, 0, 0, 2.0]]))[0]  # 90 degrees about z, not of unit length
    assert torch.allclose(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), atol=1e-6)


def test_halves_sample_the_gaussian_they_come_from():
    one, g = random_splats(1), torch.Generator().manual_seed(0)
    many = halves(one[torch.zeros(40_000, dtype=torch.long)],
                  [torch.randn(40_000, 3, generator=g) for _ in range(2)])
    r, s = rotation_matrices(one.quats)[0], one.scales.exp()[0]
    assert torch.allclose(many.means.mean(dim=0), one.means[0], atol=4 * float(s.max()) / 200)
    assert torch.allclose(torch.cov(many.means.T), r @ torch.diag(s * s) @ r.T, rtol=0.1,
                          atol=float(s.max() ** 2) * 0.03)
    assert torch.allclose(many.scales, one.scales - math.log(1.6))


def test_densifier_obeys_cap_and_thresholds(config):
    splats = random_splats(100).requires_grad_()
    with torch.no_grad():
        splats.opacities[:] = 0.0
        splats.opacities[90:] = -8.0  # transparent: pruned
        splats.scales[:50] = -9.0     # small: cloned; the others are split
        splats.scales[50:] = 0.0
    optimizer = Optimizer(splat_groups(splats, config.lr, 1.0), 1)
    base = config.base
    base.max_splats, base.refine_every, base.refine_start = 130, 10, 0.0
    densifier = Densifier(base, 100, 1.0, 0, 100, torch.device("cpu"))
    densifier.gradient[:] = torch.linspace(2e-3, 4e-3, 100)  # over two views: all above the threshold
    densifier.seen[:] = 2
    grown = densifier.refine(splats, optimizer, 9, 10, Shard())
    # 30 may grow, the largest gradients: 70..99; of those 70..89 are split in two, and 90..99 are split and
    # pruned with them
    assert len(grown) == 100 - 30 + 2 * 30
    assert len(densifier.seen) == len(grown) and float(densifier.seen.sum()) == 0


def test_crosses():
    assert [s for s in range(1, 21) if crosses(s - 1, s, 5)] == [5, 10, 15, 20]
    assert [s for s in range(3, 22, 3) if crosses(s - 3, s, 5)] == [6, 12, 15, 21]


def test_adapt_makes_a_ply_elastic_and_leaves_it_as_it_is(scene, config, tmp_path):
    """The whole model is the PLY's, bit for bit, and the cuts are better than the same Gaussians without
    training."""
    config.steps, config.base.stage1_fraction = 300, 1.0
    write_ply(train(config, scene).splats, tmp_path / "plain.ply")
    given = read_ply(tmp_path / "plain.ply")

    config.base.ply, config.steps = str(tmp_path / "plain.ply"), 200
    session = LocalSession(tmp_path / "run", Group(), QUIET)
    results = run(config, scene, tmp_path / "run", Group(), session)
    model = ElasticModel.load(tmp_path / "run")
    order = torch.cdist(model.splats.means, given.means).argmin(dim=1)
    assert len(set(order.tolist())) == len(given)
    assert equal(model.splats, given[order])
    untrained = ElasticModel(model.splats, Transform(), config)
    before = evaluate(untrained, scene, EvaluationConfig((0.05, 0.2), lpips=()), config.background)["ratios"]
    for ratio in ("0.05", "0.2"):
        at = evaluate(model, scene, EvaluationConfig((float(ratio),), lpips=()),
                      config.background)["ratios"][ratio]
        assert at["psnr"] > before[ratio]["psnr"] + 1
    assert results["ratios"]["1"]["splats"] == len(given)


@pytest.mark.parametrize("preset", ["fast", "lightgs"])
def test_presets_train_both_stages(preset, scene, config):
    """fast renders the whole and the cuts in turn; lightgs keeps its share only."""
    chosen = Config.from_preset(preset)
    config.order, config.transform, config.ratios, config.loss = (chosen.order, chosen.transform,
                                                                  chosen.ratios, chosen.loss)
    trainer = Trainer(config, scene)
    trainer.fit(QUIET, forget, until=trainer.base_steps)
    base = trainer.splats.clone()
    trainer.fit(QUIET, forget)
    assert len(trainer.splats) == count_at(chosen.order.keep, len(base))
    assert not torch.isin(trainer.splats.sh0[:, 0], base.sh0[:, 0]).any()  # every one has moved


@pytest.mark.parametrize(("preset", "whole"), [("default", 1), ("fast", 2)])
def test_which_views_render_what(preset, whole, scene, config, monkeypatch) -> None:
    config.ratios = Config.from_preset(preset).ratios
    trainer = Trainer(config, scene)
    trainer.fit(QUIET, forget, until=60)
    seen: dict[str, set[int]] = {"whole": set(), "upper": set(), "small": set()}

    def watched(splats, *args, **options):
        e = len(splats) / len(trainer.splats)
        seen["whole" if e == 1 else "upper" if e > 0.6 else "small"].add(trainer.step)
        return project(splats, *args, **options)

    monkeypatch.setattr("flexgs.training.trainer.project", watched)
    while trainer.step < 76:
        trainer.train_step()
    assert seen == {"whole": set(range(60, 76, whole)), "upper": {64, 72}, "small": set(range(60, 76))}
