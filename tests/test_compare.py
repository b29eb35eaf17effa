"""Methods side by side: one stage 1 for all, equal counts, and nothing done twice."""

import json

import pytest
import torch

from flexgs import compare
from flexgs.bench.step import bench_step
from flexgs.callbacks import Callback
from flexgs.compare import method_config
from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.evaluate import cut_as
from flexgs.model.elastic import ElasticModel
from flexgs.model.importance import score
from flexgs.model.merge_tree import MergeTree
from flexgs.model.transform import Transform
from flexgs.ply import read_ply
from flexgs.run import check_before

METHODS = ("default", "default --transform.kind none", "plain", "lightgs", "scratch")


def compared(scene, common, methods, folder):
    compare.train_stage1(scene, common, folder, "cpu")
    cells = compare.cells(methods, common, folder)
    for cell in cells:
        compare.train_cell(cell, scene, "cpu")
    return compare.measured(cells)


def test_methods_start_from_one_stage_1_and_end_at_equal_counts(scene, config, tmp_path):
    config.evaluation.ratios, config.evaluation.lpips = (0.1, 1.0), ()
    rows = compared(scene, config, METHODS, tmp_path)
    counts = {method: {ratio: r["splats"] for ratio, r in row["ratios"].items()} for method,
              (row,) in rows.items()}
    n = counts["plain"]["1"]
    assert [counts.pop(method) for method in METHODS[:3]] == 3 * [{"0.1": n // 10, "1": n}]
    assert counts.pop("lightgs") == {"0.1": n // 10}
    assert 0 < counts.pop("scratch")["0.1"] <= n // 10 and not counts  # what it has pruned last is missing

    def steps(cell):
        lines = (tmp_path / "seed_0" / cell / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    assert min(steps("lightgs-10pct")) > config.base_steps  # it did no stage 1 of its own
    assert min(steps("scratch-10pct")) < config.base_steps and max(steps("scratch-10pct")) == config.steps

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("results.json")}
    assert compared(scene, config, METHODS, tmp_path) == rows
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("results.json")} == before

    config.evaluation.ratios = (0.1, 0.3)
    trained = (tmp_path / "seed_0" / "default" / "metrics.jsonl").read_text()
    more = compared(scene, config, ("default", "lightgs"), tmp_path)
    assert [list(row["ratios"]) for method, (row,) in more.items()] == 2 * [["0.1", "0.3"]]
    assert more["default"][0]["ratios"]["0.1"]["psnr"] == rows["default"][0]["ratios"]["0.1"]["psnr"]
    # measured again, not trained again
    assert (tmp_path / "seed_0" / "default" / "metrics.jsonl").read_text() == trained


def test_costs_are_counted_for_all_that_a_method_trains(scene, config, tmp_path):
    config.evaluation.ratios, config.evaluation.lpips = (0.1, 0.2, 1.0), ()
    rows = compared(scene, config, ("plain", "lightgs"), tmp_path)
    (plain,), (pruned,) = rows["plain"], rows["lightgs"]
    folder = tmp_path / "seed_0"
    models = [folder / f"lightgs-{percent}pct" for percent in (10, 20)]
    assert pruned["stored_mb"] == pytest.approx(sum((m / "model" / "model.safetensors").stat().st_size
                                                    for m in models) / 1e6,
                                                abs=2e-3)
    stage1 = json.loads((folder / "stage1" / "done" / "state.json").read_text())["seconds"]
    own = [json.loads((m / "results.json").read_text())["train_seconds"] - stage1 for m in models]
    assert pruned["train_seconds"] == pytest.approx(stage1 + sum(own), abs=0.2)
    assert pruned["ratios"]["0.1"]["cut_seconds"] > own[0] - 0.01 > 0
    assert plain["ratios"]["0.1"]["cut_seconds"] < own[0]
    assert plain["train_seconds"] > stage1 - 0.1  # it is rounded


def test_another_evaluation_of_the_same_training_is_only_measured(scene, config, tmp_path):
    config.evaluation.ratios, config.evaluation.lpips = (0.2,), ()
    rows = compared(scene, config,
                    ("lightgs", "lightgs --evaluation.format vq", "lightgs --lr.shN-factor 4"), tmp_path)
    ply, vq, other = (row["ratios"]["0.2"] for (row,) in rows.values())
    assert vq["mb"] < ply["mb"] and vq["splats"] == ply["splats"] and other["psnr"] != ply["psnr"]
    folder = tmp_path / "seed_0"
    # nothing was trained
    assert not (folder / "lightgs-evaluation.format-vq-20pct" / "metrics.jsonl").exists()
    assert (folder / "lightgs-lr.shN-factor-4-20pct" / "metrics.jsonl").exists()
    (first,), (again,) = rows["lightgs"], rows["lightgs --evaluation.format vq"]
    assert first["train_seconds"] == pytest.approx(again["train_seconds"], abs=1)


def test_a_cell_that_was_interrupted_goes_on(scene, config, tmp_path):
    class Killed(Exception):
        pass

    class Kill(Callback):
        def report(self, step, metrics):
            if step >= 80:
                raise Killed

    config.evaluation.ratios, config.evaluation.lpips = (0.1,), ()
    compare.train_stage1(scene, config, tmp_path, "cpu")
    cell, = compare.cells(("default",), config, tmp_path)
    with pytest.raises(Killed):
        compare.train_cell(cell, scene, "cpu", [Kill()])
    assert compare.measured([cell]) == {}
    whole = compared(scene, config, ("default",), tmp_path / "whole")
    rows = compared(scene, config, ("default",), tmp_path)
    assert rows["default"][0]["ratios"]["0.1"]["psnr"] == whole["default"][0]["ratios"]["0.1"]["psnr"]


def test_pruned_model_is_the_best_by_its_score(scene, config, tmp_path):
    """With no step of fine-tuning, lightgs is the base cut by LightGaussian's score, in an order of its
    own."""
    config.evaluation.ratios, config.evaluation.lpips, config.steps = (0.2,), (), 61
    config.base.stage1_fraction = 60 / 61
    config.lr.means = config.lr.quats = config.lr.scales = config.lr.opacities = config.lr.sh0 = (0.0)
    config.lr.shN = 0.0
    compared(scene, config, ("lightgs", "plain"), tmp_path)
    pruned = ElasticModel.load(tmp_path / "seed_0" / "lightgs-20pct")
    cut = ElasticModel.load(tmp_path / "seed_0" / "plain").cut(0.2)
    assert sorted(pruned.splats.means.tolist()) == sorted(cut.means.tolist())


def test_merged_models_are_rivals(scene, config, tmp_path):
    """decimate is `plain`, trained once and merged to each ratio; decimate-ft is stage 1 merged to one ratio,
    here without a step of fine-tuning, and weighted by LightGaussian's score."""
    config.evaluation.ratios, config.evaluation.lpips, config.steps = (0.2, 1.0), (), 61
    config.base.stage1_fraction = 60 / 61
    for name in ("means", "quats", "scales", "opacities", "sh0", "shN"):
        setattr(config.lr, name, 0.0)
    methods = ("plain", "decimate", "decimate-ft", "plain --evaluation.format vq")
    rows = compared(scene, config, methods, tmp_path)
    (plain,), (merged,), (tuned,), _ = rows.values()
    folder, n = tmp_path / "seed_0", plain["ratios"]["1"]["splats"]
    whole = ElasticModel.load(folder / "plain").splats
    weights = score("lightgaussian", whole, scene.train, Group()).numpy()
    for tree, splats in ((MergeTree(whole),
                          read_ply(folder / "decimate" / "cuts" / "studio_020.00pct.ply").at(scene.origin)),
                         (MergeTree(whole, True, weights),
                          ElasticModel.load(folder / "decimate-ft-20pct").splats)):
        cut = tree.cut(n // 5)
        assert torch.allclose(splats.means.sort(dim=0).values, cut.means.sort(dim=0).values, atol=1e-5)
    assert merged["ratios"]["0.2"]["psnr"] > plain["ratios"]["0.2"]["psnr"] < tuned["ratios"]["0.2"]["psnr"]
    assert merged["ratios"]["1"]["psnr"] == plain["ratios"]["1"]["psnr"]
    trained = {path.parent.name for path in folder.glob("*/metrics.jsonl")}
    assert trained == {"plain", "decimate-ft-20pct"}
    assert merged["stored_mb"] == plain["stored_mb"] > tuned["stored_mb"]
    assert merged["ratios"]["0.2"]["cut_seconds"] > plain["ratios"]["0.2"]["cut_seconds"]
    assert list(tuned["ratios"]) == ["0.2"]


def test_a_rival_that_needs_a_program(scene, config, splats, tmp_path, monkeypatch):
    """splat-transform takes part where Node.js is there, and else the training does not begin."""
    config = method_config("decimate-st", config)
    try:
        check_before(config, scene, splats, tmp_path)
        model = ElasticModel(splats, Transform(), config)
        assert len(cut_as(model, config.evaluation).cut(0.1)) == 50
    except UserError as e:
        assert str(e).startswith("splat-transform: ")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^splat-transform: found no n\w+, which it needs; install Node"):
        check_before(config, scene, splats, tmp_path)


def test_method_keeps_the_common_part_and_has_the_last_word():
    common = Config.from_preset("smoke", seed=3)
    config = method_config("paper --lr.field 0.001", common)
    assert (config.seed, config.steps, config.base,
            config.background) == (3, 200, common.base, common.background)
    assert (config.order.kind, config.lr.field) == ("gsnet", 0.001)
    common.evaluation.cuts, common.evaluation.ratios = "merged", (0.3,)
    cuts = {"default": "merged", "decimate-st": "splat-transform", "decimate --evaluation.cuts own": "own"}
    assert {method: method_config(method, common).evaluation.cuts for method in cuts} == cuts
    assert method_config("decimate", common).evaluation.ratios == (0.3,)


@pytest.mark.parametrize("method",
                         ["nothing", "default --no-such 1", "default --deltas.knots 2",
                          "default --base.ply x.ply"])
def test_bad_method_is_a_user_error(method):
    with pytest.raises(UserError, match=r"preset nothing|no-such|deltas\.knots|base\.ply"):
        method_config(method, Config())


def test_bench_step_times_every_method_on_the_same_gaussians(scene, config, tmp_path):
    compare.train_stage1(scene, config, tmp_path, "cpu")
    rows = bench_step(scene, tmp_path / "seed_0" / "stage1" / "done", ("default", "fast"), repeats=1)
    bands = len(Config().ratios.bands)
    assert list(rows)[:3] == ["plain", "default", "fast"] and len(rows) == 3 + bands
    assert rows["plain"]["ratio"] == 1 and all(row["ms"] > 0 for row in rows.values())
