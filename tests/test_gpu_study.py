"""The studies for a machine with a GPU, tiny and on whatever is here: they run, say what they ran on, and
repeat nothing."""

import json

import pytest

from flexgs import compare
from flexgs.run import git_sha
from tests.gpu import parity, record, study


def run(name, folder, *flags, code=0):
    assert study.main([name, "--tiny", "--output", str(folder), *flags]) == code
    return json.loads((folder / f"{name}.json").read_text())


def cases(found):
    return list(dict.fromkeys(row["case"] for row in found["rows"]))


def test_parity_has_a_verdict_on_every_comparison(tmp_path, capsys):
    found = run("parity", tmp_path)
    assert cases(found) == ["bound", "loss", "random, SH 0", "random, SH 2", "random, SH 3", "studio"]
    assert [row["pass"] for row in found["rows"][1:]] == 7 * [True]  # three cameras of the studio
    assert (found["torch"] and found["git_sha"] == git_sha() and found["device"]
            and found["settings"]["splats"] == 500)
    page = (tmp_path / "parity.md").read_text()
    assert page in capsys.readouterr().out and page.count("\n| ") == 9


def test_a_bound_that_is_not_kept_is_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setitem(parity.LOSS_BOUNDS, "ssim", 0.0)
    found = run("parity", tmp_path, code=1)
    assert [row["case"] for row in found["rows"] if row.get("pass") is False] == ["loss"]


def test_a_study_goes_on_where_its_minutes_ended(tmp_path, capsys):
    nothing = run("speed", tmp_path, "--minutes", "0")
    assert nothing["rows"] == [] and nothing["missing"] == [
        "500 Gaussians", "500 Gaussians, default in pieces", "500 Gaussians, one image",
        "500 Gaussians, one cut"]
    assert "the same command goes on: 500 Gaussians" in capsys.readouterr().out
    found = run("speed", tmp_path)
    assert found["missing"] == [] and cases(found) == nothing["missing"]
    ms = {row["step"]: row.get("ms") for row in found["rows"]}
    assert all(ms[name] > 0 for name in ("plain", "default", "fast", "paper", "whole render",
                                         "elastic renders", "loss", "backward", "Adam", "all", "render",
                                         "render, with sums of alpha T", "render, with all contributions",
                                         "cut to 10 %"))
    if "CPU" in found["device"]:
        assert ms["gsplat"] is None and "needs a GPU" in found["rows"][0]["remark"]
    assert run("speed", tmp_path)["rows"] == found["rows"]  # kept, to the last digit
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({**found, "git_sha": "another"}))
    assert run("speed", tmp_path, "--minutes", "0")["rows"] == []
    assert "was measured with another git_sha" in capsys.readouterr().err


def test_memory_has_a_slope_for_every_method(tmp_path):
    found = run("memory", tmp_path)
    rows = {row["case"]: row for row in found["rows"]}
    for name in ("plain", "default", "fast", "paper"):
        less, more = rows[f"{name}, 300 Gaussians"], rows[f"{name}, 500 Gaussians"]
        assert (less["bytes per Gaussian"] is None and more["bytes per Gaussian"] >= 0
                and more["estimate"] == 944)


def test_quality_stops_in_the_middle_and_goes_on(tmp_path, monkeypatch):
    parts = [f"studio, seed 0, {part}" for part in ("stage 1", "default", "plain")]
    # the minutes are over at the first report, and as the second part would begin
    for asked, done in ((1, 0), (2, 1)):
        left = iter(asked * [60.0])
        with monkeypatch.context() as patch:
            patch.setattr(record.Study, "left", property(lambda self, left=left: next(left, -1.0)))
            begun = run("quality", tmp_path)
        assert cases(begun) == parts[:done] and begun["missing"] == parts[done:]
    monkeypatch.setattr(compare, "train_stage1", None)  # it is not asked for again
    found = run("quality", tmp_path)
    assert cases(found) == parts and not found["missing"] and found["rows"][0] == begun["rows"][0]
    assert [row["Gaussians"] for row in found["rows"][1:]] == 2 * [50, 500]
    assert (tmp_path / "quality" / "20" / "studio" / "tables.md").is_file()
    monkeypatch.setattr(compare, "train_cell", None)
    assert run("quality", tmp_path)["rows"] == found["rows"]


@pytest.mark.parametrize(("args", "says"), [
    ([], ""), (["speed", "--sizes", "few"], "few"),
    (["quality", "--tiny", "--scenes", "nowhere"], "nowhere: no such folder")])
def test_bad_input_is_one_line(args, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert study.main(args) == 2
    assert says in capsys.readouterr().err
