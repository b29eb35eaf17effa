"""Methods side by side: one stage 1 for all, equal counts, and nothing done twice."""

import json

import pytest
import torch

from flexgs.bench import bench_step
from flexgs.compare import compare, method_config
from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.evaluate.table import methods_table
from flexgs.model.elastic import ElasticModel

METHODS = ("default", "default --transform.kind none", "plain", "lightgs")


def quiet(step, metrics):
    """Print nothing."""


def test_methods_start_from_one_stage_1_and_end_at_equal_counts(scene, config, tmp_path):
    config.evaluation.ratios, config.evaluation.lpips = (0.1, 1.0), ()
    rows = compare(scene, config, METHODS, tmp_path, "cpu", quiet)
    counts = {method: {ratio: r["splats"] for ratio, r in row["ratios"].items()} for method, row in rows.items()}
    n = counts["plain"]["1"]
    assert [counts.pop(method) for method in METHODS[:3]] == 3 * [{"0.1": n // 10, "1": n}]
    assert counts == {"lightgs": {"0.1": n // 10}}
    assert json.loads((tmp_path / "compare.json").read_text())["methods"] == json.loads(json.dumps(rows))
    assert methods_table(rows).row_count == 4
    steps = [json.loads(line)["step"] for line in (tmp_path / "lightgs-10pct" / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) > config.base_steps  # it did no stage 1 of its own

    before = (tmp_path / "plain" / "results.json").stat().st_mtime_ns
    again = compare(scene, config, METHODS, tmp_path, "cpu", quiet)
    assert again == rows
    assert (tmp_path / "plain" / "results.json").stat().st_mtime_ns == before


def test_pruned_model_is_the_best_by_its_score(scene, config, tmp_path):
    """With no step of fine-tuning, lightgs is the base cut by LightGaussian's score."""
    config.evaluation.ratios, config.evaluation.lpips, config.steps = (0.2,), (), 61
    config.base.share = 60 / 61
    config.rates.means = config.rates.quats = config.rates.scales = config.rates.opacities = config.rates.sh0 = 0.0
    config.rates.shN = 0.0
    compare(scene, config, ("lightgs", "plain --order.score lightgaussian"), tmp_path, "cpu", quiet)
    pruned = ElasticModel.load(tmp_path / "lightgs-20pct")
    cut = ElasticModel.load(tmp_path / "plain-order.score-lightgaussian").cut(0.2)
    assert torch.equal(pruned.splats.means, cut.means)


def test_method_keeps_the_common_part_and_has_the_last_word():
    common = Config.from_preset("smoke", seed=3)
    config = method_config("paper --rates.field 0.001", common)
    assert (config.seed, config.steps, config.base, config.background) == (3, 200, common.base, common.background)
    assert (config.order.kind, config.rates.field) == ("gsnet", 0.001)


@pytest.mark.parametrize("method", ["nothing", "default --no-such 1", "default --deltas.knots 2", "default --base.ply x.ply"])
def test_bad_method_is_a_user_error(method):
    with pytest.raises(UserError, match=r"preset nothing|no-such|deltas\.knots|base\.ply"):
        method_config(method, Config())


def test_bench_step_times_every_method_on_the_same_gaussians(scene, config, tmp_path):
    compare(scene, config, ("plain",), tmp_path, "cpu", quiet)
    rows = bench_step(scene, tmp_path / "stage1" / "done", ("default", "fast"), repeats=1)
    bands = len(Config().ratios.bands)
    assert list(rows)[:3] == ["plain", "default", "fast"] and len(rows) == 3 + bands
    assert rows["plain"]["ratio"] == 1 and all(row["ms"] > 0 for row in rows.values())
