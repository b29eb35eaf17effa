"""Merging: exact counts, moments, the order that follows from it; training on renders; viewpoints."""

import pytest
import torch

from flexgs.model import merge_tree
from flexgs.model.merge_tree import Mixture, MergeTree, merge
from flexgs.model.viewpoints import viewpoints
from flexgs.raster import render
from flexgs.splats import Splats, rotation_matrices
from flexgs.training.distill import distill

from conftest import random_splats


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
    pair = pair.changed(scales=pair.scales[:1].expand(2, 3).clone(), quats=pair.quats[:1].expand(2, 4).clone())
    one = merge(pair, 1)
    grown = torch.linalg.det(covariances(one)[0]) / torch.linalg.det(covariances(pair)[0])
    assert float(grown) == pytest.approx(2 ** (3 * merge_tree.SPREAD), rel=0.01)
    assert float(torch.sigmoid(one.opacities[0])) > 0.99


def test_what_was_not_merged_stays_bit_for_bit(splats):
    mixture = Mixture.of(splats).after_pass(690)
    cut = mixture.splats(splats)
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
    assert torch.equal(order.sort().values, torch.arange(700))
    for count in (1, 100, 406, 500):
        mixture = Mixture.of(splats)
        while len(mixture) > count:
            mixture = mixture.after_pass(count)
        assert set(order[:count].tolist()) == set(mixture.kept.tolist())


@pytest.mark.parametrize("change", ["one place", "flat", "far", "faint", "huge"])
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
    cut = merge(splats, 7)
    assert len(cut) == 7 and all(bool(torch.isfinite(t).all()) for _, t in cut.items())


def error(cut: Splats, whole: Splats, cameras) -> float:
    with torch.no_grad():
        return sum(float((render(cut, c).image - render(whole, c).image).square().mean()) for c in cameras)


def test_merged_is_better_than_chosen_and_trained_is_better_still():
    whole = random_splats(3000)
    cameras = viewpoints(whole, 8)
    heavy = (torch.sigmoid(whole.opacities) * (whole.scales.sum(1) - whole.scales.amin(1)).exp())
    merged, chosen = merge(whole, 300), whole[heavy.argsort(descending=True)[:300]]
    trained = distill(merged, whole, cameras, 1.0)
    assert error(merged, whole, cameras) < 0.6 * error(chosen, whole, cameras)
    assert error(trained, whole, cameras) < 0.7 * error(merged, whole, cameras) and len(trained) == 300


def test_viewpoints_see_the_model(splats):
    cameras = viewpoints(splats, 6)
    assert [c.viewmat.tolist() for c in cameras] == [c.viewmat.tolist() for c in viewpoints(splats, 6)]
    with torch.no_grad():
        assert min(float(render(splats, camera).alpha.mean()) for camera in cameras) > 0.3
