"""A stranger's file as a packed model: made elastic by the merge tree alone, without training."""

import pytest
import torch
from conftest import random_splats

from flexgs.deploy.nested import nested
from flexgs.deploy.progressive import Progressive
from flexgs.deploy.source import open_model
from flexgs.formats import save
from flexgs.model.merge_tree import MergeTree
from tests.test_cli import flexgs

RATIOS = (0.02, 0.1, 0.5, 1.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("strangers") / "x.ply"
    save(random_splats(600, 1), path)
    return path


@pytest.mark.parametrize("ratio", RATIOS)
def test_cuts_at_the_ratios_are_the_merged_ones(file, ratio):
    """In another order, to float16, and with the higher harmonics of the heaviest of each cluster."""
    model = open_model(file)
    cut, merged = nested(model, RATIOS).cut(ratio), MergeTree(model.splats).cut(round(600 * ratio))
    mine, theirs = (torch.cat([s.means, s.scales.sort(dim=1).values, s.opacities[:, None], s.sh0], 1)
                    for s in (cut, merged))
    nearest = torch.cdist(mine.double(), theirs.double()).argmin(1)
    assert len(nearest.unique()) == len(cut) == round(600 * ratio)
    torch.testing.assert_close(mine, theirs[nearest], atol=4e-3, rtol=0)


def test_smaller_cuts_are_the_first_of_larger_ones(file):
    model = nested(open_model(file), RATIOS)
    assert torch.equal(model.cut(0.1).shN, model.cut(0.5).shN[:60])


@pytest.mark.parametrize("degree", range(4))
def test_files_of_each_degree_are_packed(degree, tmp_path):
    splats = random_splats(50, degree)
    save(splats, tmp_path / "x.ply")
    assert flexgs("pack", tmp_path / "x.ply", "-o", tmp_path / "x.fgs", "--ratios", 0.1, 1) == 0
    packed = Progressive.open(tmp_path / "x.fgs")
    assert len(packed.cut(0.1)) == 5
    order = MergeTree(splats).order().copy()
    torch.testing.assert_close(packed.cut(1.0).shN, splats.shN[order], atol=0.1, rtol=0)


@pytest.mark.parametrize("ratios", [RATIOS, (1.0,)])
def test_a_file_is_packed(file, ratios, tmp_path, capsys):
    assert flexgs("pack", file, "-o", tmp_path / "x.fgs", "--ratios", *ratios) == 0
    packed, model = Progressive.open(tmp_path / "x.fgs"), nested(open_model(file), ratios)
    for ratio in ratios:
        cut, exact = packed.cut(ratio), model.cut(ratio)
        assert len(cut) == len(exact)
        assert float((cut.means - exact.means).abs().max()) < 0.05
    assert packed.config.order.kind == "tree"
    capsys.readouterr()
    assert flexgs("pack", tmp_path / "x.fgs", "-o", tmp_path / "y.fgs") == 2
    assert "found a packed model, expected a run or a file of splats" in capsys.readouterr().err


@pytest.mark.parametrize(("ratios", "said"), [
    ((0, 1), "--ratios: found 0.0, expected a ratio above 0"),
    ((0.5,), "--ratios: found 0.5, expected rising ones, the last of them 1"),
    ((1e-7, 1), "--ratios: --deltas.knots: found 1e-07, expected 1e-06 to 1"),
    ([i / 100 for i in range(1, 101)], "--ratios: --deltas.knots: found 99 entries, expected 1 to 64")])
@pytest.mark.parametrize("exact", [(), ("--exact",)])
def test_impossible_ratios_are_refused_and_the_file_that_was_there_stays(file, ratios, said, exact, tmp_path,
                                                                         capsys):
    (tmp_path / "x.fgs").write_bytes(b"old")
    assert flexgs("pack", file, "-o", tmp_path / "x.fgs", "--ratios", *ratios, *exact) == 2
    assert said in capsys.readouterr().err and (tmp_path / "x.fgs").read_bytes() == b"old"


@pytest.mark.parametrize("exact", [(), ("--exact",)])
def test_changes_that_float16_cannot_hold_are_refused(exact, tmp_path, capsys):
    splats = random_splats(100)
    save(splats.changed(sh0=1e6 * splats.sh0), tmp_path / "x.ply")
    assert flexgs("pack", tmp_path / "x.ply", "-o", tmp_path / "x.fgs", *exact) == 2
    said = capsys.readouterr().err
    assert f"flexgs: {tmp_path / 'x.ply'}: found sh0 of neighbours" in said and said.count("\n") == 1
    assert not (tmp_path / "x.fgs").exists()


def test_a_model_of_astronomic_size_is_packed(tmp_path):
    splats = random_splats(100)
    far = splats.changed(means=1e30 * splats.means)
    save(far, tmp_path / "x.ply")
    assert flexgs("pack", tmp_path / "x.ply", "-o", tmp_path / "x.fgs", "--exact") == 0
    assert torch.equal(Progressive.open(tmp_path / "x.fgs").cut(1.0).means.sort(0).values,
                       far.means.sort(0).values)


def test_no_views_are_claimed_of_a_file_that_was_not_trained(file, tmp_path, capsys):
    assert flexgs("pack", file, "-o", tmp_path / "x.fgs") == flexgs("info", tmp_path / "x.fgs") == 0
    assert "recipe       order tree, transform deltas\n" in capsys.readouterr().out
