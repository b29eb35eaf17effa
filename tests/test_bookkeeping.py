"""What is written down about a run, a comparison and a study: seconds, bytes, lines of the history, the best
of the trials."""

import dataclasses
import json
from pathlib import Path

import optuna
import pytest
import torch
from tiny import begun, same, tiny_config, tiny_scene, tiny_splats

from flexgs import compare
from flexgs.config import Config, percent_name, ratio_name
from flexgs.distributed import Group
from flexgs.run import LocalSession, cut_name, run
from flexgs.store import Store
from flexgs.tracking import metric_name
from flexgs.training.checkpoint import latest_checkpoint
from flexgs.training.trainer import Trainer
from tuning.report import write as write_report
from tuning.space import Own, applied, flags, space
from tuning.study import Suggest, best, directions, front, goal, quality, values
from tuning.trial import NUMBER, Record, Search, _digest, base_folder, figures, flat
from tuning.trial import begun as begin


def quiet(step, metrics):
    """Print nothing."""


def made(step, write):
    """Keep no checkpoint."""


# ---------------------------------------------------------------------- a run


def test_seconds_go_on_where_they_were(tmp_path):
    """A resumed run has the time of its first part."""
    config, scene = tiny_config("plain", steps=8), tiny_scene()
    trainer = Trainer(config, scene)
    trainer.fit(quiet, made, until=4)
    trainer.seconds += 1000
    trainer.save(tmp_path)
    again = Trainer(config, scene)
    again.load(tmp_path)
    assert again.seconds == trainer.seconds > 1000 and again.step == 4
    again.fit(quiet, made)
    assert 1000 < again.seconds < 1060
    about = json.loads((tmp_path / "state.json").read_text())
    assert about["step"] == 4 and about["base_steps"] == 4 and about["elastic"] is False


def test_the_history_of_a_resumed_run_has_every_report_once(tmp_path):
    """Lines up to the checkpoint stay, also that of the checkpoint itself; later ones are written again."""
    config, scene, folder = tiny_config("plain", steps=16), tiny_scene(), tmp_path / "run"
    config.report_every, config.checkpoint_every = 2, 6
    config.evaluation.ratios = (0.5, 1.0)
    config.data.factor = 1

    class Killed(Exception):
        pass

    def kill(step, metrics):
        if step == 10:
            raise Killed

    with pytest.raises(Killed):
        run(config, scene, folder, Group(), LocalSession(folder, Group(), kill))
    assert latest_checkpoint(folder / "checkpoints").name == "step_00000006"
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 12, "lo')  # half a line
    first = (folder / "metrics.jsonl").read_text().splitlines()
    results = run(config, scene, folder, Group(), LocalSession(folder, Group(), quiet))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert lines[:3] == first[:3]
    assert sorted(p.name
                  for p in (folder / "checkpoints").glob("step_*")) == ["step_00000012", "step_00000016"]
    assert (results["splats"] == 40 and results["steps"] == 16
            and results["train_seconds"] <= results["seconds"] + 0.1)
    model = json.loads((folder / "model" / "model.json").read_text())
    assert model["splats"] == 40


@pytest.mark.parametrize("elastic", [False, True])
def test_a_checkpoint_is_all_that_the_next_step_depends_on(elastic, tmp_path):
    config, scene = tiny_config("paper", steps=40), tiny_scene()
    one = begun(Trainer(config, scene), tiny_splats())
    one.step = 22 if elastic else 2
    for _ in range(3):
        one.train_step()
    one.save(tmp_path)
    two = Trainer(config, scene)
    two.load(tmp_path)
    assert torch.equal(two.densifier.gradient, one.densifier.gradient) or elastic
    assert torch.equal(two.densifier.seen, one.densifier.seen) or elastic
    for trainer in (one, two):
        trainer.train_step()
    assert same(one.splats, two.splats)
    moments = two.optimizer.moments()
    assert all(torch.equal(t, moments[name]) for name, t in one.optimizer.moments().items())


# ---------------------------------------------------------------------- a comparison


def cell_folder(folder: Path, seconds: float, ratios: tuple[str, ...], size: int) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(bytes(size))
    rows = {ratio: {"psnr": 20.0 + float(ratio), "ssim": 0.5, "splats": 9, "mb": 1.0, "cut_seconds": 0.5}
            for ratio in ratios}
    (folder / "results.json").write_text(json.dumps(
        {"scene": "tiny", "preset": "plain", "steps": 40, "train_seconds": seconds, "protocol": {},
         "ratios": rows}))


def test_time_and_bytes_of_a_comparison(tmp_path):
    """Stage 1 took 100 s: it counts once for a method, not for each of its models, and not at all for what
    has none."""
    config = tiny_config("plain")
    config.evaluation.ratios = (0.1, 0.2, 1.0)
    found = compare.cells(("plain", "lightgs", "scratch"), config, tmp_path)
    stage1 = tmp_path / "seed_0" / "stage1" / "done"
    stage1.mkdir(parents=True)
    trainer = Trainer(config, tiny_scene())
    trainer.seconds = 100.0
    trainer.save(stage1)
    cell_folder(tmp_path / "seed_0" / "plain", 130.0, ("0.1", "0.2", "1"), 3_000_000)
    cell_folder(tmp_path / "seed_0" / "lightgs-10pct", 120.0, ("1",), 400_000)
    cell_folder(tmp_path / "seed_0" / "lightgs-20pct", 140.0, ("1",), 800_000)
    cell_folder(tmp_path / "seed_0" / "scratch-10pct", 70.0, ("1",), 400_000)
    rows = {method: row for method, (row,) in compare.measured(found).items()}
    assert {m: row["train_seconds"] for m,
            row in rows.items()} == {"plain": 130, "lightgs": 100 + 20 + 40, "scratch": 70}
    assert {m: row["stored_mb"] for m, row in rows.items()} == {"plain": 3.0, "lightgs": 1.2, "scratch": 0.4}
    assert {r: row["cut_seconds"] for r,
            row in rows["lightgs"]["ratios"].items()} == {"0.1": 20.5, "0.2": 40.5}
    assert {r: row["cut_seconds"] for r,
            row in rows["plain"]["ratios"].items()} == {"0.1": 0.5, "0.2": 0.5, "1": 0.5}
    assert rows["scratch"]["ratios"]["0.1"]["cut_seconds"] == 70.5 and rows["lightgs"]["seed"] == 0


def test_nobody_is_compared_twice():
    """Named twice, a method would be said to take twice the time and bytes."""
    config = tiny_config("plain")
    assert [cell.method for cell in compare.cells(("plain", "default", "plain"), config,
                                                  Path("x"))] == ["plain", "default"]
    assert [common.seed for common in compare.seeded(config, (2, 0, 2))] == [2, 0]
    assert compare.seeded(config, ()) == [config]


def test_ratios_have_names_of_their_own():
    """Those that have been used keep their names; what differs in any digit has another."""
    ratios = (0.01, 0.05, 0.1, 0.125, 0.5, 0.50001, 0.5000000001, 0.99999999, 1.0, 1e-6, 0.07)
    assert ([ratio_name(r) for r in ratios[:5]] == ["0.01", "0.05", "0.1", "0.125", "0.5"]
            and ratio_name(1.0) == "1")
    assert [cut_name("a", r) for r in (*ratios[:5], 1.0, 0.07)] == [
        f"a_{percent}pct.ply" for percent in ("001.00", "005.00", "010.00", "012.50", "050.00", "100.00",
                                              "007.00")]
    for name in (ratio_name, percent_name, metric_name, lambda ratio: cut_name("a", ratio)):
        assert len({name(ratio) for ratio in ratios}) == len(ratios)
    assert all(float(ratio_name(ratio)) == ratio for ratio in ratios)


def test_cells_of_a_comparison():
    config = dataclasses.replace(tiny_config("plain"), seed=3)
    config.evaluation.ratios = (0.1, 1.0)
    found = {cell.folder.name: cell for cell in compare.cells(("default", "lightgs", "scratch"), config,
                                                              Path("x"))}
    assert set(found) == {"default", "lightgs-10pct", "scratch-10pct"}
    assert (found["lightgs-10pct"].config.order.keep == 0.1
            and found["lightgs-10pct"].config.evaluation.ratios == (1.0,))
    assert found["default"].config.evaluation.ratios == (0.1, 1.0) and found["default"].ratio is None
    assert found["scratch-10pct"].from_nothing and not found["lightgs-10pct"].from_nothing
    assert all(cell.folder.parent.name == "seed_3" and cell.config.seed == 3 for cell in found.values())


# ---------------------------------------------------------------------- a study


def record(number: int, psnr: float, mb: float, at_5: float, ended: bool = True, **changed) -> Record:
    own = Own(Config())
    space(own, Config())
    ratios = {"0.05": {"psnr": at_5, "ssim": 0.5}}
    rungs = {rung: {"psnr_auc": psnr - 1, "mb": mb, "ratios": ratios} for rung in ("1", "2")}
    rungs |= {"4": {"psnr_auc": psnr, "mb": mb, "ratios": ratios}} if ended else {}
    return Record({**own.params, **changed}, number, rungs, stopped=not ended)


TRIALS = [record(0, 20.0, 5.0, 18.0), record(1, 22.0, 9.0, 16.0), record(2, 21.0, 7.0, 19.0),
          record(3, 30.0, 1.0, 30.0, False), record(4, 22.0, 9.5, 19.0)]


@pytest.mark.parametrize(("objective", "winner"), [("psnr_auc", 1), ("psnr/ratio_0.05", 2), ("pareto", 1)])
def test_the_best_trial_is_so_by_the_asked_objective(objective, winner, tmp_path):
    """Only finished ones count, and of equal ones the earlier."""
    assert best(TRIALS, objective).number == winner
    assert [r.number for r in front(TRIALS)] == [0, 2, 1]
    assert values(TRIALS[1], "pareto") == [22.0, 9.0] and values(TRIALS[1], "psnr/ratio_0.05") == [16.0]


def test_what_is_maximised():
    assert goal("ssim/ratio_0.05") == {"metric": "ssim/ratio_0.05", "mode": "max"}
    assert goal("pareto") == {"metric": ["psnr_auc", "mb"],
                              "mode": ["max", "min"]} and quality("pareto") == "psnr_auc"
    assert [d.name for d in directions("pareto")] == ["MAXIMIZE", "MINIMIZE"]
    assert [d.name for d in directions("psnr_auc")] == ["MAXIMIZE"]


def test_the_report_names_the_best_and_its_settings(tmp_path):
    search = Search(tmp_path / "capture", Store(tmp_path), Config())
    trials = [dataclasses.replace(r, params={**r.params, "loss.elastic_l1": 0.123456 + r.number / 10})
              for r in TRIALS]
    for r in trials:
        folder = search.trial(r.params).folder
        folder.mkdir(parents=True)
        r.save(folder)
    write_report(search, "psnr/ratio_0.05", best(search.records(), "psnr/ratio_0.05"), "verdict", "command")
    written = json.loads((tmp_path / "best.json").read_text())
    assert (written["loss"]["elastic_l1"] == pytest.approx(0.323456, abs=1e-6)
            and written["evaluation"]["views"] == "all")
    assert "trial 2" in (tmp_path / "report.md").read_text()


def test_parameters_of_a_trial_keep_six_digits():
    start = Config()
    params = {"loss.elastic_l1": 0.123456, "lr.delta_means": 1.23457, "deltas.merge": 0.032,
              "ratios.bands": "0.01 0.1 0.1 0.7"}
    config = applied(params, start)
    assert (config.loss.elastic_l1, config.lr.delta_means,
            config.deltas.merge) == (0.123456, 1.23457, 0.032)
    assert config.ratios.bands == ((0.01, 0.1), (0.1, 0.7))
    assert flags({"lr.field": 0.000123456}) == ["--lr.field", "0.000123456"]


def test_trials_share_a_stage_1_only_if_it_is_the_same(tmp_path):
    search = Search(tmp_path, Store(tmp_path), Config())
    usual = base_folder(search, Config())
    alike = Config(seed=5)  # seeds lie below
    alike.loss.elastic_l1, alike.order.temperature, alike.field.gate, alike.lr.field = 0.9, 0.3, True, 1.0
    assert base_folder(search, alike) == usual
    for change in (lambda c: setattr(c.base, "sh_degree", 1),
                   lambda c: setattr(c, "background", (1.0, 1.0, 1.0)),
                   lambda c: setattr(c.data, "factor", 2), lambda c: setattr(c, "steps", 7),
                   lambda c: setattr(c, "batch", 2), lambda c: setattr(c.lr, "means", 1.0),
                   lambda c: setattr(c.lr, "shN", 1.0)):
        other = Config()
        change(other)
        assert base_folder(search, other) != usual
    assert _digest({"a": 1}) == "c575b056e175"  # another name would lose the trials of earlier searches
    assert _digest({"a": 1, "b": 2}) == _digest({"b": 2, "a": 1}) != _digest({"a": 1, "b": 3})


def test_a_record_says_how_the_trial_stands(tmp_path):
    assert [r.status for r in TRIALS[2:4]] == ["finished", "stopped"]
    assert (dataclasses.replace(TRIALS[0], error="x").status == "failed"
            and Record({}, 0).status == "interrupted")
    assert TRIALS[3].last["psnr_auc"] == 29 and TRIALS[0].last["psnr_auc"] == 20 and Record({}, 0).last == {}
    search = Search(tmp_path, Store(tmp_path), Config())
    assert begin(search, {"a": 1}, 3).number == 3 == begin(search, {"a": 1}, 9).number
    assert flat(TRIALS[0].last) == {"psnr_auc": 20.0, "mb": 5.0, "psnr/ratio_0.05": 18.0,
                                    "ssim/ratio_0.05": 0.5}


def test_bytes_of_a_trial_are_those_of_its_elastic_model():
    config, scene = tiny_config(steps=8), tiny_scene()
    config.evaluation.ratios = (0.5, 1.0)
    trainer = begun(Trainer(config, scene), tiny_splats())
    model = trainer.model().transform.stored(), trainer.model()
    rows = sum(max(1, int(knot * 40)) for knot in config.deltas.knots)
    expected = 40 * 4 * (3 + 4 + 3 + 1 + 3 + 24) + 2 * rows * (3 + 4 + 3 + 1 + 3)  # float32, and float16
    assert figures(model[1], scene, config)["mb"] == round(expected / 1e6, 3)


def test_trials_are_numbered_from_the_first():
    study, suggest = optuna.create_study(), Suggest(Config(), False, (), 5)
    assert [suggest(study.ask())[NUMBER] for _ in range(3)] == [5, 6, 7]
