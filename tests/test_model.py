"""Orders, transforms and cuts."""

import math

import pytest
import torch
from conftest import random_splats

from flexgs import config as cfg
from flexgs.config import Config, count_at
from flexgs.errors import UserError
from flexgs.model.deltas import Deltas
from flexgs.model.elastic import ElasticModel
from flexgs.model.field import Field
from flexgs.model.selector import GsNet, importance_mask, sampled_order
from flexgs.model.transform import make_transform
from flexgs.seeds import generator
from flexgs.splats import Splats

SMALL_FIELD = cfg.Field(resolution=(8, 8, 8, 10), levels=(1, 2), channels=4, width=16)


def small(kind: str) -> Config:
    return Config(transform=cfg.Transform(kind), field=SMALL_FIELD)


def elastic(kind: str, n: int = 1000) -> ElasticModel:
    """A model whose transform really changes something."""
    splats, config = random_splats(n), small(kind)
    torch.manual_seed(0)
    transform = make_transform(config, splats)
    with torch.no_grad():
        for p in transform.parameters():
            p += 0.1 * torch.randn(p.shape)
    return ElasticModel(splats, transform, config)


@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_counts_are_exact_and_cuts_repeatable(kind):
    model = elastic(kind)
    for ratio in (0.001, 0.0123, 0.05, 0.29, 0.32, 0.999, 1.0):
        cut = model.cut(ratio)
        assert len(cut) == max(1, math.floor(ratio * 1000 + 1e-9))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(cut.items(), model.cut(ratio).items(), strict=True))


@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_whole_model_is_the_base(kind):
    model = elastic(kind)
    for whole in (model.cut(1.0), model.cut("100%"), model.cut("5M")):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.items(), model.splats.items(), strict=True))


@pytest.mark.parametrize("kind", ["deltas", "field"])
def test_untrained_transform_changes_nothing(kind):
    splats = random_splats(200)
    model = ElasticModel(splats, make_transform(small(kind), splats), small(kind))
    for ratio in (0.005, 0.02, 0.1, 0.7):
        cut = model.cut(ratio)
        assert all(torch.equal(a, b[: len(cut)]) for (_, a), (_, b) in zip(cut.items(), splats.items(), strict=True))


@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_save_and_load(kind, tmp_path):
    model = elastic(kind)
    model.save(tmp_path)
    again = ElasticModel.load(tmp_path)
    for ratio in (0.01, 0.2, 1.0):
        for (_, a), (_, b) in zip(model.cut(ratio).items(), again.cut(ratio).items(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_broken_model_is_a_user_error(name, tmp_path):
    elastic("deltas", 50).save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 2):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a flexgs model"):
            ElasticModel.load(tmp_path)


def test_deltas_are_linear_in_log_ratio_between_knots():
    deltas, splats = Deltas((0.01, 0.1), 1000), random_splats(1000)
    with torch.no_grad():
        deltas.means[:10] = 1.0   # knot 1 %: the first 10
        deltas.means[10:] = 3.0   # knot 10 %: the first 100

    def moved(ratio: float) -> torch.Tensor:
        k = count_at(ratio, 1000)
        return (deltas(splats[:k], ratio).means - splats.means[:k])[:, 0].detach()

    assert torch.allclose(moved(0.01), torch.ones(10), atol=1e-5)
    assert torch.allclose(moved(0.002), torch.ones(2), atol=1e-5)  # constant below the first knot
    assert torch.allclose(moved(10**-1.5)[:10], torch.full((10,), 2.0), atol=1e-5)  # half way
    assert torch.allclose(moved(10**-1.5)[10:], torch.full((21,), 3.0), atol=1e-5)  # entered after the knot at 1 %
    assert torch.allclose(moved(0.1), torch.full((100,), 3.0), atol=1e-5)
    assert torch.allclose(moved(10**-0.5)[:100], torch.full((100,), 1.5), atol=1e-5)  # fades towards e = 1
    assert torch.equal(moved(10**-0.5)[100:], torch.zeros(216))


def test_field_features_match_a_slow_interpolation():
    """Bilinear interpolation with aligned corners, product within a level, levels side by side; in float64."""
    torch.manual_seed(1)
    splats = random_splats(5).map(torch.Tensor.double)
    field = Field(SMALL_FIELD, splats.means).double()
    ratio = 0.3
    got = field.features(splats.means, ratio)
    sizes = [(8, 8, 8, 10), (16, 16, 16, 10)]
    for i in range(5):
        point = [float(v) for v in 2 * (splats.means[i] - field.box[0]) / (field.box[1] - field.box[0]) - 1] + [ratio]
        for level in range(2):
            product = torch.ones(4, dtype=torch.float64)
            for j, (a, b) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
                plane = field.planes[level * 6 + j][0]
                u, v = ((min(1, max(-1, point[axis])) + 1) / 2 * (sizes[level][axis] - 1) for axis in (a, b))
                u0, v0 = min(int(u), sizes[level][a] - 2), min(int(v), sizes[level][b] - 2)
                fu, fv = u - u0, v - v0
                product = product * ((1 - fv) * ((1 - fu) * plane[:, v0, u0] + fu * plane[:, v0, u0 + 1])
                                     + fv * ((1 - fu) * plane[:, v0 + 1, u0] + fu * plane[:, v0 + 1, u0 + 1]))
            assert torch.allclose(got[i, level * 4:level * 4 + 4], product, atol=1e-12)


def test_sampling_without_replacement_follows_the_weights():
    """The first of the order is i with probability w_i / sum w; checked against the analytic value over 4000 orders."""
    weights = torch.tensor([1.0, 2.0, 3.0, 10.0])
    first = torch.tensor([int(sampled_order(weights, 1.0, seed)[0]) for seed in range(4000)])
    share = torch.bincount(first, minlength=4) / 4000
    assert torch.allclose(share, weights / weights.sum(), atol=0.03)  # three standard deviations: 0.023
    assert sampled_order(weights, 0.0, 5).tolist() == [3, 2, 1, 0]


def test_unseen_gaussians_come_last():
    score = torch.tensor([0.0, 1e-9, 5.0, 0.0])
    assert all(set(sampled_order(score, 1.0, s)[2:].tolist()) == {0, 3} for s in range(50))


@pytest.mark.parametrize("shape", ["paper", "code"])
def test_gsnet_order_does_not_depend_on_the_ratio(shape):
    splats = random_splats(400)
    torch.manual_seed(0)
    net = GsNet(cfg.GsNet(shape=shape), splats)
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == {"paper": 9410, "code": 4962}[shape]  # 9410 and 4962: counted from the layers' sizes
    z1, z2 = net.logits(splats, 0.01), net.logits(splats, 0.7)
    margins = (z1[:, 1] - z1[:, 0]) - (z2[:, 1] - z2[:, 0])
    assert float(margins.std()) < 1e-6  # the margin is a(Gaussian) + b(ratio)
    assert torch.equal(net.order(splats), net.order(splats))


def test_gsnet_learns_the_teacher_from_its_losses_alone():
    splats = random_splats(300)
    torch.manual_seed(0)
    net = GsNet(cfg.GsNet(), splats)
    rank = torch.argsort(torch.argsort(splats.scales.sum(dim=1), descending=True))
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(300):
        selection = net.select(splats, 0.2, rank, 0.0, generator(0, step))
        adam.zero_grad()
        sum(selection.losses.values()).backward()
        adam.step()
    kept = net.order(splats)[:60]
    assert float(importance_mask(rank, 0.2)[kept].mean()) > 0.9


def test_selected_mask_carries_the_gradient_and_the_value_one():
    splats: Splats = random_splats(300)
    net = GsNet(cfg.GsNet(gi_weight=0, sparsity_weight=0), splats)
    selection = net.select(splats, 0.2, torch.arange(300), 0.0, generator(0, 1))
    assert torch.allclose(selection.mask, torch.ones_like(selection.mask))
    selection.mask.sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.last.parameters())
    assert not selection.losses
