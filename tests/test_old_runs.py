"""Runs that were trained before files and settings changed, at commit 8409108, go on and are cut as if
nothing had changed."""

import shutil
from pathlib import Path

import pytest
import torch

from flexgs.model.elastic import ElasticModel
from tests.test_cli import flexgs

OLD = Path(__file__).parent / "data" / "old_runs"


@pytest.mark.parametrize("preset", ["default", "mended"])
def test_an_old_run_goes_on(preset, tmp_path):
    """From its checkpoint at view 40, in stage 2, to the model that it ended with; up to what another
    processor rounds."""
    run = shutil.copytree(OLD / preset / "capture", tmp_path / "capture")
    before = ElasticModel.load(run)
    shutil.rmtree(run / "model")
    (run / "results.json").unlink()
    assert flexgs("train", OLD / "capture", "--config", run / "config.json", "--output", tmp_path) == 0
    after = ElasticModel.load(run)
    assert len(after) == len(before) and after.capture == before.capture
    for (name, a), (_, b) in zip(before.splats.items(), after.splats.items(), strict=True):
        assert float((a - b).abs().mean()) < 1e-4, name
    for name, value in before.transform.state_dict().items():
        assert float((value - after.transform.state_dict()[name]).abs().float().mean()) < 1e-3, name


@pytest.mark.parametrize("preset", ["default", "mended"])
def test_an_old_model_is_cut(preset, tmp_path, capsys):
    run = shutil.copytree(OLD / preset / "capture", tmp_path / "capture")
    assert flexgs("cut", run, "--budget", "10%", "-o", tmp_path / "x.ply") == 0
    assert flexgs("info", run) == 0 and f"preset {preset}" in capsys.readouterr().out
    cut = ElasticModel.load(run).cut(0.1)
    assert len(cut) == 25 and bool(torch.isfinite(cut.means).all())
