"""Merging: exact counts, moments, the order that follows from it; training on renders; viewpoints."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import random_splats
from test_model import elastic

from flexgs.errors import UserError
from flexgs.formats import save
from flexgs.model import merge_tree
from flexgs.model.elastic import ElasticModel
from flexgs.model.merge_tree import MergeTree, Mixture
from flexgs.model.viewpoints import at_detail, viewpoints
from flexgs.ply import read_ply
from flexgs.raster import render
from flexgs.splats import Splats, rotation_matrices
from flexgs.training.distill import distill
from tests.test_cli import flexgs


def merge(splats: Splats, count: int) -> Splats:
    return MergeTree(splats).cut(count)


def covariances(splats: Splats) -> torch.Tensor:
    axes = rotation_matrices(splats.quats.double()) * splats.scales.double().exp()[:, None]
    return axes @ axes.mT


def same(a: Splats, b: Splats) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))


@pytest.fixture(scope="module")
def splats() -> Splats:
    return random_splats(700)


@pytest.mark.parametrize("count", [1, 2, 13, 406, 407, 650, 699])
def test_every_count_is_exact_whatever_was_asked_before(splats, count):
    tree = MergeTree(splats)
    tree.cut(5)
    cut = tree.cut(count)
    assert len(cut) == count and same(cut, merge(splats, count)) and cut.shN.shape[1:] == splats.shN.shape[1:]
    assert all(bool(torch.isfinite(t).all()) for _, t in cut.items())


def test_torch_keeps_its_threads(splats):
    """numba's own parallel loops set those of torch too, and training after a merge waits for them."""
    before = torch.get_num_threads()
    merge(splats, 5)
    assert torch.get_num_threads() == before


def test_no_fewer_than_asked_is_the_model_itself(splats):
    assert same(merge(splats, 700), splats) and same(MergeTree(splats).cut(10_000), splats)


def test_a_pair_becomes_its_moments():
    pair = random_splats(2)
    pair.opacities[:] = torch.tensor([-3.0, -2.0])
    one = merge(pair, 1)
    scales = pair.scales.double().exp().sort(dim=1).values
    areas = scales[:, 1] * scales[:, 2]
    weights = areas * torch.sigmoid(pair.opacities.double())
    p = weights / weights.sum()
    mean = p @ pair.means.double()
    away = pair.means.double() - mean
    second = (p[:, None, None] * (covariances(pair) + away[:, :, None] * away[:, None])).sum(0)
    ours = one.scales[0].double().exp().sort().values
    opacity = float(weights.sum() / (ours[1] * ours[2]))
    assert opacity < 1  # else it spreads
    assert torch.allclose(one.means[0].double(), mean, atol=1e-6)
    assert torch.allclose(covariances(one)[0], second, rtol=1e-4, atol=1e-7)
    assert float(torch.sigmoid(one.opacities[0])) == pytest.approx(opacity, rel=1e-4)
    assert torch.allclose(one.shN[0].double(), (p[:, None, None] * pair.shN).sum(0), atol=1e-6)


def test_opaque_pairs_spread_in_place_of_an_opacity_above_1():
    pair = random_splats(2)
    pair.means[1], pair.opacities[:] = pair.means[0] + 1e-4, 8.0
    pair.scales[1], pair.quats[1] = pair.scales[0], pair.quats[0]
    one = merge(pair, 1)
    grown = torch.linalg.det(covariances(one)[0]) / torch.linalg.det(covariances(pair)[0])
    assert float(grown) == pytest.approx(2 ** (3 * merge_tree.SPREAD), rel=0.01)
    assert float(torch.sigmoid(one.opacities[0])) > 0.99


def test_what_was_not_merged_stays_bit_for_bit(splats):
    mixture = Mixture.of(splats.arrays(), np.arange(700)).after_pass(690)
    cut = splats.like(mixture.gaussians(splats.arrays()))
    assert int(mixture.alone.sum()) == 680
    kept = torch.from_numpy(mixture.kept[mixture.alone])
    assert same(cut[torch.from_numpy(mixture.alone)], splats[kept])


def test_equal_neighbours_go_first():
    splats = random_splats(60)
    for _, tensor in splats.items():
        tensor[30:] = tensor[:30]
    cut = merge(splats, 30)
    assert torch.allclose(cut.means[cut.means[:, 0].argsort()],
                          splats.means[:30][splats.means[:30, 0].argsort()], atol=1e-6)


def test_the_order_is_the_merges_in_reverse(splats):
    tree = MergeTree(splats)
    order = tree.order()
    assert np.array_equal(np.sort(order), np.arange(700))
    for count in (1, 100, 406, 500, 700):
        kept, cut = torch.from_numpy(tree.kept(count)), tree.cut(count)
        assert set(order[:count].tolist()) == set(kept.tolist())
        unmerged = (cut.means == splats.means[kept]).all(1)
        assert torch.equal(cut.sh0[unmerged], splats.sh0[kept][unmerged])
        assert int(unmerged.sum()) >= 2 * count - 700  # a merge leaves one of at least two


def test_what_adds_nothing_to_the_images_goes_first_and_changes_nothing(splats, monkeypatch):
    """However solid it is: others may hide it."""
    seen = np.zeros(700)
    seen[:100] = 1
    tree = MergeTree(splats, True, seen)
    kept = tree.kept(200)
    assert set(range(100)) <= set(kept.tolist()) == set(tree.order()[:200].tolist())
    assert not set(range(100)) <= set(MergeTree(splats).kept(200).tolist())
    monkeypatch.setattr(merge_tree, "BLOCK", 400)
    assert set(range(100)) <= set(MergeTree(splats, weights=seen).kept(300).tolist())
    cut, rows = tree.cut(200), torch.from_numpy(kept[kept < 100])
    for name in ("means", "scales", "sh0", "shN"):
        mine, given = (getattr(s, name) for s in (cut[torch.from_numpy(kept < 100)], splats[rows]))
        mine, given = (t.sort(dim=1).values if name == "scales" else t for t in (mine, given))
        assert torch.allclose(mine, given, atol=1e-4), name


def test_by_blocks_a_cut_is_about_the_same(splats, monkeypatch):
    """Of more Gaussians than are merged at once, each block of space by itself; counts stay exact."""
    whole = random_splats(3000)
    cameras, expected = at_detail(whole, viewpoints(whole, 4)), merge(whole, 300)
    monkeypatch.setattr(merge_tree, "BLOCK", 500)
    for count in (1, 100, 300, 2999):
        cut = merge(whole, count)
        assert len(cut) == count and same(cut, merge(whole, count))
    assert error(merge(whole, 300), whole, cameras) < 1.1 * error(expected, whole, cameras)
    assert same(merge(whole, 3000), whole)
    tree = MergeTree(whole, whole=True)  # as training asks for it, so that the order fits the cuts
    assert same(tree.cut(300), expected) and set(tree.order()[:300]) == set(tree.kept(300))


@pytest.mark.parametrize("change", ["one place", "flat", "far", "faint", "huge", "bright",
                                    "everywhere"])
def test_extreme_gaussians(change):
    splats = random_splats(50)
    if change == "one place":
        splats.means[:] = 1.0
    if change == "flat":
        splats.scales[:, 0] = -60.0
    if change == "far":
        splats.means[:] += 1e7
    if change == "faint":
        splats.opacities[:] = -100.0
    if change == "huge":
        splats.scales[:] = 30.0
    if change == "bright":
        splats.sh0[:] *= 1e25
    if change == "everywhere":
        splats.means[:] *= 1e36
    cut = merge(splats, 7)
    assert len(cut) == 7 and all(bool(torch.isfinite(t).all()) for _, t in cut.items())


def error(cut: Splats, whole: Splats, cameras) -> float:
    with torch.no_grad():
        return sum(float((render(cut, c).image - render(whole, c).image).square().mean()) for c in cameras)


def test_merged_is_better_than_chosen_and_trained_is_better_still():
    whole = random_splats(3000)
    cameras = at_detail(whole, viewpoints(whole, 8))
    heavy = (torch.sigmoid(whole.opacities) * (whole.scales.sum(1) - whole.scales.amin(1)).exp())
    merged, chosen = merge(whole, 300), whole[heavy.argsort(descending=True)[:300]]
    trained = distill(merged, whole, cameras, [i / 120 for i in range(120)])
    assert error(merged, whole, cameras) < 0.6 * error(chosen, whole, cameras)
    assert error(trained, whole, cameras) < 0.8 * error(merged, whole, cameras) and len(trained) == 300


def test_viewpoints_see_the_model(splats):
    cameras = viewpoints(splats, 6)
    assert [c.viewmat.tolist() for c in cameras] == [c.viewmat.tolist() for c in viewpoints(splats, 6)]
    with torch.no_grad():
        assert min(float(render(splats, camera).alpha.mean()) for camera in cameras) > 0.3


@pytest.fixture(scope="module")
def ply(trained, tmp_path_factory):
    return next((trained / "cuts").glob("*100.00pct.ply"))


@pytest.mark.parametrize("how", [[], ["--seconds", "0.2"], ["--cameras", "RUN", "--seconds", "0.2"],
                                 ["--cameras", "BARE", "--seconds", "0.2"], ["--by", "prune"]])
def test_a_file_is_cut_to_exactly_as_many(how, ply, trained, capture, tmp_path):
    """BARE: a capture whose photographs are not there."""
    shutil.copytree(capture / "sparse", tmp_path / "bare" / "sparse")
    places = {"RUN": str(trained), "BARE": str(tmp_path / "bare")}
    assert flexgs("cut", ply, "--budget", "100", *(places.get(word, word) for word in how),
                  "-o", tmp_path / "x.ply") == 0
    assert len(read_ply(tmp_path / "x.ply")) == 100


def test_a_budget_in_bytes_holds_after_training(ply, tmp_path):
    assert flexgs("cut", ply, "--budget", "4kB", "--seconds", "0.1", "-o", tmp_path / "x.spz") == 0
    assert 3_000 < (tmp_path / "x.spz").stat().st_size <= 4_000


@pytest.mark.parametrize("words, said", [
    (["PLY", "--scene", "CAPTURE", "--cameras", "RUN"], "found --scene and --cameras, expected one"),
    (["RUN", "--seconds", "3"], "found --seconds, which train merged Gaussians; expected a file of splats"),
    (["RUN", "--by", "prune"], "found --by prune, expected a file of splats with it"),
    (["PLY", "--by", "prune", "--cameras", "RUN"], "found --cameras, which train merged"),
    (["PLY", "--cameras", "NONE"], "NONE: no such folder"), (["PLY", "--seconds", "-1"], "--seconds: found")])
def test_what_cannot_be_is_one_line(words, said, ply, trained, capture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(trained), "PLY": str(ply), "CAPTURE": str(capture)}
    assert flexgs("cut", *(places.get(word, word) for word in words), "--budget", "5%", "-o", "x.ply") == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_file_becomes_elastic_without_a_capture(ply, tmp_path, capsys):
    small = ["--preset", "smoke", "--steps", "20", "--deltas.knots", "0.1", "0.5", "--evaluation.lpips"]
    command = ["adapt", "--ply", ply, "--output", tmp_path, *small]
    assert flexgs(*command) == 0
    advised = re.search("flexgs cut .* -o (.*)", capsys.readouterr().out)
    assert advised and advised[1].strip("'") not in ("", ply.name)  # which would replace the only original
    model = ElasticModel.load(tmp_path / ply.stem)
    whole = read_ply(ply)
    assert len(model.cut(0.1)) == len(whole) // 10
    assert torch.equal(model.cut(1.0).means.sort(0).values, whole.means.sort(0).values)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "renders").rglob("*.png")}
    assert len(before) == 48
    assert flexgs(*command) == 0 and "already finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (model.config.order.kind, model.config.deltas.start) == ("tree", "tree")
    assert flexgs(*command, "--order.kind", "sampled") == 2  # what is typed is what is done
    assert "was trained with another order;" in capsys.readouterr().err


def test_a_folder_of_somebody_else_stays(ply, tmp_path, capsys):
    mine = tmp_path / "renders" / ply.stem / "transforms.json"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"frames": []}')
    assert flexgs("adapt", "--ply", ply, "--output", tmp_path, "--preset", "smoke") == 2
    assert "holds no renders of a model" in capsys.readouterr().err and mine.read_text() == '{"frames": []}'


@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e30])
def test_viewpoints_that_cannot_be(spread):
    splats = random_splats(50)
    splats.means[:] *= spread
    with pytest.raises(UserError, match="give the cameras"):
        viewpoints(splats)


@pytest.mark.parametrize("means, said", [(0.0, "median distance of 0 from their middle"),
                                         (1e4, "found cameras whose images show nothing of it")])
def test_a_file_that_cannot_be_looked_at_is_named(means, said, trained, tmp_path, capsys):
    splats = random_splats(50)
    save(splats.changed(means=0 * splats.means + means), tmp_path / "far.ply")
    cameras = ["--cameras", trained] if means else ["--seconds", "1"]
    assert flexgs("cut", tmp_path / "far.ply", "--budget", "50%", *cameras, "-o", tmp_path / "x.ply") == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"flexgs: {tmp_path / 'far.ply'}: found") and said in complaint
    assert not (tmp_path / "x.ply").exists()


def test_a_run_whose_results_are_of_merged_cuts_is_cut_so(tmp_path, capsys):
    model = elastic("none")
    model.config.evaluation.cuts = "merged"
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run")
    assert flexgs("cut", tmp_path / "run", "--budget", "30%", "-o", tmp_path / "x.ply") == 0
    cut, expected = read_ply(tmp_path / "x.ply"), MergeTree(model.splats).cut(int(0.3 * len(model)))
    torch.testing.assert_close(cut.means, expected.means)
    assert not torch.equal(cut.means, model.cut("30%").means)
    assert flexgs("pack", tmp_path / "run", "-o", tmp_path / "x.fgs") == 2  # each would be a part of the next
    assert "cuts are not parts of it" in capsys.readouterr().err and not (tmp_path / "x.fgs").exists()


def test_a_run_whose_results_are_of_merged_cuts_is_measured_so(trained, capture, tmp_path, capsys):
    model, psnrs = ElasticModel.load(trained), []
    model.config.evaluation.cuts = "merged"
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run")
    for words in ([tmp_path / "run", "--scene", capture], [trained, "--cuts", "merged"], [trained]):
        assert flexgs("eval", *words, "--ratios", "0.1", "--json", "--lpips") == 0
        psnrs.append(json.loads(capsys.readouterr().out)["ratios"]["0.1"]["psnr"])
    assert psnrs[0] == psnrs[1] != psnrs[2]


def test_levels_are_trained_too(ply, tmp_path):
    command = ["cut", ply, "--lod", "100", "20", "--seconds"]
    assert flexgs(*command, "0", "-o", tmp_path / "merged") == 0
    assert flexgs(*command, "0.2", "-o", tmp_path / "trained") == 0
    a, b = (read_ply(tmp_path / way / "lod1.ply") for way in ("merged", "trained"))
    assert len(a) == len(b) and not torch.equal(a.means, b.means)
