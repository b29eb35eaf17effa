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
