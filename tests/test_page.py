"""What `flexgs cut --web` and `--html` write; test_browser.py looks at it."""

import base64
import gzip
import json
import re

import pytest
import torch
from PIL import Image

from flexgs.config import Config
from flexgs.deploy import page
from flexgs.deploy.merged import MergedModel
from flexgs.deploy.nested import as_deltas
from flexgs.deploy.page import write_page, write_web
from flexgs.deploy.progressive import Progressive
from flexgs.deploy.progressive import write as pack
from flexgs.deploy.source import open_model
from flexgs.errors import size_text
from flexgs.formats import save
from flexgs.model.elastic import ElasticModel, make_transform
from tests.conftest import random_splats
from tests.test_cli import flexgs


def test_a_folder_for_a_web_server(trained, tmp_path, capsys):
    folder = tmp_path / "page"
    assert flexgs("cut", trained, "--web", folder) == 0
    assert "3 photographs of test views" in capsys.readouterr().out
    about = json.loads((folder / "manifest.json").read_text())
    assert about["title"] == "studio" and len(about["views"]) == 3 and len(about["up"]) == 3
    for view in about["views"]:
        assert Image.open(folder / view["photo"]).size == (view["width"], view["height"]) == (64, 48)
        assert len(view["viewmat"]) == 16 and view["fx"] > 0
    assert max(Image.open(folder / "poster.jpg").size) == 720
    assert gzip.decompress((folder / "flexgs.js.gz").read_bytes()) == (folder / "flexgs.js").read_bytes()
    assert Progressive.open(folder / "model.fgs").cut(0.05).means.equal(
        _repacked(trained, tmp_path).cut(0.05).means)
    before = sorted(folder.iterdir())
    assert flexgs("cut", trained, "--web", folder) == 2
    assert "is there already; expected a new or empty folder" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def _repacked(trained, tmp_path) -> Progressive:
    pack(ElasticModel.load(trained), tmp_path / "again.fgs")
    return Progressive.open(tmp_path / "again.fgs")


def test_one_file_holds_the_packed_model_stage_by_stage(trained, tmp_path):
    write_page(open_model(trained), tmp_path / "x.html", "a <b> & c")
    text = (tmp_path / "x.html").read_text()
    pieces = re.findall(r'<script type="text/plain">([^<]*)</script>', text)
    (tmp_path / "x.fgs").write_bytes(b"".join(map(base64.b64decode, pieces)))
    packed = Progressive.open(tmp_path / "x.fgs")
    assert len(pieces) == len(packed.chunks) + 1 and len(packed) == 800
    assert "<title>a &lt;b&gt; &amp; c</title>" in text and "http" not in text.replace("https?", "")
    write_page(packed, tmp_path / "y.html", "of a packed file")
    assert re.findall(r'<script type="text/plain">([^<]*)</script>', (tmp_path / "y.html").read_text())


def test_other_models_are_packed_as_deltas(tmp_path, monkeypatch):
    """A field is computed by no browser, and a file of splats has no transform at all."""
    splats, config = random_splats(300), Config.from_preset("paper")
    torch.manual_seed(0)
    field = make_transform(config, splats, splats.means, unit=0.5)
    with torch.no_grad():
        for values in field.heads.parameters():
            values.normal_(0, 0.1)
    model = ElasticModel(splats, field, config)
    deltas = as_deltas(model, (0.05, 0.3, 1.0))
    for ratio in (0.05, 0.3, 1.0):
        theirs, ours = model.cut(ratio), deltas.cut(ratio)
        for name, values in theirs.items():
            torch.testing.assert_close(getattr(ours, name), values, atol=2e-3, rtol=2e-3)
    assert not torch.equal(model.cut(0.05).means, splats.means[:15])
    for i, other in enumerate((model, MergedModel(splats.arrays(), Config.from_preset("plain")))):
        monkeypatch.setattr(page, "LARGE", 200)
        write_web(other, tmp_path / str(i), "x")
        packed = Progressive.open(tmp_path / str(i) / "model.fgs")
        assert packed.model.config.transform.kind == "deltas"
        assert [chunk.ratio for chunk in packed.chunks] == [0.001, 0.01, 0.05, 0.15, 0.5, 1.0]
        assert not (tmp_path / str(i) / "photographs").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_a_tiny_model_has_no_stage_twice(count, tmp_path):
    write_web(MergedModel(random_splats(count).arrays(), Config.from_preset("plain")), tmp_path / "x", "x")
    chunks = Progressive.open(tmp_path / "x" / "model.fgs").chunks
    assert len(chunks) == {1: 1, 3: 2}[count]


@pytest.mark.parametrize(("options", "expected"), [
    (("--web", "full"), "full: is there already"),
    (("--web", "x.html"), "--html x.html: found --web at the same place or within"),
    (("--web", "x.html/in"), "--html x.html: found --web at the same place or within"),
    (("-o", "x.spz", "--budget", "5 pounds"), "budget '5 pounds'"),
    (("-o", "x.jpg", "--budget", "5%"), "expected a name that ends in one of"),
    (("-o", "full", "--lod", "50", "25"), "is there already"),
    (("-o", "x.html", "--budget", "5%"), "expected a name that ends in one of"),
    (("--web", "out/page", "-o", "out", "--lod", "50", "25"), "--output out: found --web"),
])
def test_nothing_is_written_if_one_of_the_results_is_refused(options, expected, tmp_path,
                                                             monkeypatch, capsys):
    save(random_splats(20).arrays(), tmp_path / "whole.ply")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert flexgs("cut", "whole.ply", "--html", "x.html", *options) == 2
    assert expected in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"whole.ply", "full", "mine.txt"}


def test_sizes_of_small_stages_are_said_in_kilobytes():
    assert page._stages([1200, 300, 2_000_000, 44]) == "stages end at 1.2 kB, 1.5 kB, 2.00 MB"
    assert size_text(999_999) == "1.00 MB" and size_text(999_900) == "999.9 kB"
