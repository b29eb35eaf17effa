"""Orders, transforms and cuts."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_splats

from flexgs import config as cfg
from flexgs.config import Config, count_at
from flexgs.errors import UserError
from flexgs.model.deltas import Deltas
from flexgs.model.elastic import ElasticModel, make_transform
from flexgs.model.field import AXES, E_MIN, Field
from flexgs.model.gsnet import GsNet, importance_mask, top
from flexgs.model.merge import merged, merged_by
from flexgs.model.merge_tree import MergeTree
from flexgs.model.order import sampled_order
from flexgs.seeds import generator
from flexgs.splats import Splats, rotation_matrices

SMALL_FIELD = cfg.FieldConfig(resolution=(8, 8, 8, 10), levels=(1, 2), channels=4, width=16)


def small(kind: str) -> Config:
    return Config(transform=cfg.TransformConfig(kind), field=SMALL_FIELD)


def elastic(kind: str, n: int = 1000) -> ElasticModel:
    """A model whose transform really changes something."""
    splats, config = random_splats(n), small(kind)
    torch.manual_seed(0)
    transform = make_transform(config, splats)
    with torch.no_grad():
        for p in transform.parameters():
            p += 0.1 * torch.randn(p.shape)
    return ElasticModel(splats, transform.stored(), config)


@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_counts_are_exact_and_cuts_repeatable(kind):
    model = elastic(kind)
    for ratio in (0.001, 0.0123, 0.05, 0.29, 0.32, 0.999, 1.0):
        cut = model.cut(ratio)
        assert len(cut) == max(1, math.floor(ratio * 1000 + 1e-9))
        assert all(torch.equal(a, b) for (_, a),
                   (_, b) in zip(cut.items(), model.cut(ratio).items(), strict=True))


@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_whole_model_is_the_base(kind):
    model = elastic(kind)
    for whole in (model.cut(1.0), model.cut("100%"), model.cut("5M")):
        assert all(torch.equal(a, b) for (_, a),
                   (_, b) in zip(whole.items(), model.splats.items(), strict=True))


@pytest.mark.parametrize("kind", ["deltas", "field"])
def test_untrained_transform_changes_nothing(kind):
    splats = random_splats(200)
    model = ElasticModel(splats, make_transform(small(kind), splats), small(kind))
    for ratio in (0.005, 0.02, 0.1, 0.7):
        cut = model.cut(ratio)
        assert all(torch.equal(a, b[: len(cut)]) for (_, a),
                   (_, b) in zip(cut.items(), splats.items(), strict=True))


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
        with pytest.raises(UserError, match="the model is damaged"):
            ElasticModel.load(tmp_path)


def test_deltas_are_linear_in_log_ratio_between_knots():
    deltas, splats = Deltas(cfg.DeltasConfig(knots=(0.01, 0.1)), 1000), random_splats(1000)
    with torch.no_grad():
        deltas.means[:10] = 1.0   # knot 1 %: the first 10
        deltas.means[10:] = 3.0   # knot 10 %: the first 100

    def moved(ratio: float) -> torch.Tensor:
        k = count_at(ratio, 1000)
        return (deltas(splats[:k], ratio).means - splats.means[:k])[:, 0].detach()

    assert torch.allclose(moved(0.01), torch.ones(10), atol=1e-5)
    assert torch.allclose(moved(0.002), torch.ones(2), atol=1e-5)  # constant below the first knot
    assert torch.allclose(moved(10**-1.5)[:10], torch.full((10,), 2.0), atol=1e-5)  # half way
    # entered after the knot at 1 %
    assert torch.allclose(moved(10**-1.5)[10:], torch.full((21,), 3.0), atol=1e-5)
    assert torch.allclose(moved(0.1), torch.full((100,), 3.0), atol=1e-5)
    assert torch.allclose(moved(10**-0.5)[:100], torch.full((100,), 1.5), atol=1e-5)  # fades towards e = 1
    assert torch.equal(moved(10**-0.5)[100:], torch.zeros(216))


def test_one_knot_with_more_rows_is_rank_1():
    """A change per Gaussian times log e / log 0.01."""
    deltas, splats = Deltas(cfg.DeltasConfig(knots=(0.01,), rows=(0.32,)), 1000), random_splats(1000)
    with torch.no_grad():
        deltas.scales.copy_(torch.arange(320.0)[:, None].expand(-1, 3))
    for ratio in (0.01, 0.05, 0.3, 0.7):
        k = count_at(ratio, 1000)
        moved = (deltas(splats[:k], ratio).scales - splats.scales[:k])[:, 0]
        expected = torch.arange(320.0) * math.log(ratio) / math.log(0.01)
        assert torch.allclose(moved[:320], expected[:k], atol=1e-3)
        assert torch.equal(moved[320:], torch.zeros(max(0, k - 320)))


def test_rank_1_starts_from_the_merged_gaussians_of_its_knot():
    splats, score = random_splats(1000), torch.ones(1000)
    deltas = Deltas(cfg.DeltasConfig(knots=(0.01,), rows=(0.32,), merge=0.1), 1000)
    deltas.start(splats, score)
    assert torch.allclose(deltas(splats[:10], 0.01).means, merged(splats, score, 10).means, atol=1e-5)
    assert torch.equal(deltas(splats, 0.9)[10:].means, splats.means[10:])


def test_elasticity_costs_at_most_12_percent_of_the_base(tmp_path):
    """Against the bytes of N Gaussians with spherical harmonics of degree 3; the order itself is the order of
    the file."""
    splats = random_splats(5000, sh_degree=3)
    transform = make_transform(Config(), splats).stored()
    extra = sum(t.numel() * t.element_size() for t in transform.state_dict().values())
    assert 0 < extra <= 0.12 * sum(t.numel() * t.element_size() for _, t in splats.items())
    ElasticModel(splats, transform, Config()).save(tmp_path)
    again = ElasticModel.load(tmp_path)
    assert torch.equal(again.splats.means, splats.means)
    size = (tmp_path / "model.safetensors").stat().st_size
    again.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == size


def test_merged_gaussians_have_the_moments_of_their_mixture():
    """Mean, covariance and colour of each mixture by a loop over its parts; nothing to merge changes
    nothing."""
    splats, weight, k = random_splats(60), torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.1, 7
    got = merged(splats, weight, k)
    owner = torch.cdist(splats.means.double(), splats.means[:k].double()).argmin(dim=1)

    def covariance(s: Splats, i: int) -> torch.Tensor:
        half = rotation_matrices(s.quats.double())[i] * s.scales[i].double().exp()
        return half @ half.T

    for j in range(k):
        parts = [i for i in range(60) if (i == j if i < k else owner[i] == j)]
        w = weight[parts].double() / weight[parts].double().sum()
        mean = sum(a * splats.means[i].double() for a, i in zip(w, parts, strict=True))
        away = [splats.means[i].double() - mean for i in parts]
        cov = sum(a * (covariance(splats, i) + torch.outer(d, d)) for a, i,
                  d in zip(w, parts, away, strict=True))
        assert torch.allclose(got.means[j].double(), mean, atol=1e-5)
        assert torch.allclose(covariance(got, j), cov, rtol=1e-4, atol=1e-5)
        colour = sum(a * splats.sh0[i].double() for a, i in zip(w, parts, strict=True))
        assert torch.allclose(got.sh0[j].double(), colour, atol=1e-5)
    same = merged(splats, weight, 60)
    assert all(torch.allclose(a, b, atol=1e-5) for (_, a),
               (_, b) in zip(same.items(), splats.items(), strict=True))


@pytest.mark.parametrize("clones", [0, 50])
def test_gaussians_of_a_tree_take_the_places_that_they_stand_for(clones):
    """The first k are the tree's cut, with the axes of those in whose place they stand; of equal Gaussians
    the tree may keep another one."""
    splats = random_splats(300)
    splats = splats[torch.cat([torch.arange(300), torch.arange(clones)])]
    splats = splats[MergeTree(splats).order()]
    tree, k = MergeTree(splats), 200
    got, cut = merged_by(tree, splats, k), tree.cut(k)

    def covariances(s: Splats) -> torch.Tensor:
        axes = rotation_matrices(s.quats.double()) * s.scales.double().exp()[:, None]
        return axes @ axes.mT

    near = torch.cdist(got.means.double(), cut.means.double()).argmin(dim=1)
    assert sorted(near.tolist()) == [*range(k)]  # each of them once
    assert torch.allclose(covariances(got), covariances(cut[near]), rtol=1e-3, atol=1e-6)
    assert torch.equal(got.opacities, cut.opacities[near])
    alone = (got.means == splats.means[:k]).all(dim=1) & (got.opacities == splats.opacities[:k])
    assert alone.any() and not alone.all()
    for name in ("quats", "scales"):  # nothing to interpolate where nothing was merged
        torch.testing.assert_close(getattr(got, name)[alone], getattr(splats, name)[:k][alone], rtol=1e-4,
                                   atol=1e-4)
    assert float((got.quats * splats.quats[:k]).sum(1).min()) >= 0


def test_field_features_match_a_slow_interpolation():
    """Bilinear interpolation with aligned corners, product within a level, levels side by side; in
    float64."""
    torch.manual_seed(1)
    splats = random_splats(5).map(torch.Tensor.double)
    field = Field(SMALL_FIELD, splats.means).double()
    ratio = 0.3
    got = field.features(splats.means, ratio)
    sizes = [(8, 8, 8, 10), (16, 16, 16, 10)]
    for i in range(5):
        point = [float(v) for v in 2 * (splats.means[i] - field.box[0]) / (field.box[1] - field.box[0])
                 - 1] + [ratio]
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


ALL_HEADS = ("means", "scales", "quats", "opacities", "sh0")
FIELD_MODES = [{"ratio_axis": "log"}, {"gate": True}, {"scale_change": "activated"}, {"heads": ALL_HEADS},
               {"heads": ()}, {"box": "points"}]


def field_of(splats: Splats, **options) -> Field:
    """A field that changes something."""
    torch.manual_seed(0)
    field = Field(replace(SMALL_FIELD, **options), splats.means)
    with torch.no_grad():
        for p in field.parameters():
            p += 0.3 * torch.randn(p.shape)
    return field


def largest_change(field: Field, splats: Splats, ratio: float) -> float:
    pairs = zip(field(splats, ratio).detach().items(), splats.items(), strict=True)
    return max(float((a - b).abs().max()) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("mode", FIELD_MODES)
def test_untrained_field_changes_nothing_in_any_mode(mode):
    splats = random_splats(200)
    config = Config(transform=cfg.TransformConfig("field"), field=replace(SMALL_FIELD, **mode))
    model = ElasticModel(splats, make_transform(config, splats, splats.means * 3), config)
    for ratio in (0.001, 0.02, 0.7):
        cut = model.cut(ratio)
        for (_, a), (_, b) in zip(cut.items(), splats.items(), strict=True):
            assert torch.allclose(a, b[: len(cut)], atol=1e-6)


def test_gate_makes_the_whole_model_a_limit():
    splats = random_splats(50)
    gated, free = (field_of(splats, gate=gate, heads=ALL_HEADS) for gate in (True, False))
    assert largest_change(free, splats, 1 - 1e-6) > 0.1
    assert largest_change(gated, splats, 1 - 1e-6) < 1e-5
    assert largest_change(gated, splats, 1.0) == 0
    for ratio in (E_MIN, E_MIN / 4):  # fully open
        assert largest_change(gated, splats, ratio) == pytest.approx(largest_change(free, splats, ratio))


def test_log_axis_ends_at_the_first_and_the_last_column():
    splats = random_splats(20)
    field = field_of(splats, ratio_axis="log")
    for ratios, column in (((E_MIN, E_MIN / 3), 0), ((1.0,), -1)):
        flat = field_of(splats, ratio_axis="log")
        for i, plane in enumerate(flat.planes):
            if AXES[i % 6][1] == 3:
                plane.data[:] = plane.data[:, :, column, None].clone()
        for ratio in ratios:
            assert torch.allclose(field.features(splats.means, ratio), flat.features(splats.means, 0.1),
                                  atol=1e-5)
    middle = field.features(splats.means, E_MIN**0.5)
    assert not torch.allclose(middle, flat.features(splats.means, 0.1), atol=1e-2)


def test_activated_scales_that_turn_negative_stay_finite():
    """The rasterizer squares scales, so the official code renders s + T as |s + T|; its logarithm must
    exist."""
    splats = random_splats(300)
    field = field_of(splats, scale_change="activated", heads=("scales",))
    with torch.no_grad():
        field.heads["scales"][3].weight.zero_()
        field.heads["scales"][3].bias.copy_(-torch.stack([splats.scales[0].exp()[0],
                                                          *[torch.tensor(x) for x in (0.05, 9.0)]]))
    leaf = splats.clone().requires_grad_()
    scales = field(leaf, 0.1).scales
    assert torch.allclose(scales[:, 2].exp(), 9 - splats.scales[:, 2].exp(), rtol=1e-4)
    # exactly zero without the floor
    assert float(scales[0, 0].detach()) == pytest.approx(math.log(1e-6), abs=1e-3)
    scales.sum().backward()
    assert torch.isfinite(scales).all() and torch.isfinite(leaf.scales.grad).all()


def test_box_of_the_points_holds_the_outliers():
    points = torch.cat([random_splats(500).means, torch.tensor([[100.0, 0, 0]])])
    assert float(Field(replace(SMALL_FIELD, box="points"), points).box[1, 0]) == 100
    assert float(Field(SMALL_FIELD, points).box[1, 0]) < 5


def test_sampling_without_replacement_follows_the_weights():
    """The first of the order is i with probability w_i / sum w; checked against the analytic value over 4000
    orders."""
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
    net = GsNet(cfg.GsNetConfig(shape=shape), splats)
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == {"paper": 9410, "code": 4962}[shape]  # 9410 and 4962: counted from the layers' sizes
    rank = torch.arange(400)
    z1, z2 = net.logits(splats, rank, 0.01), net.logits(splats, rank, 0.7)
    margins = (z1[:, 1] - z1[:, 0]) - (z2[:, 1] - z2[:, 0])
    assert float(margins.std()) < 1e-6  # the margin is a(Gaussian) + b(ratio)
    assert torch.equal(net.order(splats, rank, 0), net.order(splats, rank, 1))  # no noise, no seed


def test_gsnet_learns_the_teacher_from_its_losses_alone():
    splats = random_splats(300)
    torch.manual_seed(0)
    net = GsNet(cfg.GsNetConfig(), splats)
    rank = torch.argsort(torch.argsort(splats.scales.sum(dim=1), descending=True))
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(300):
        selection = net.select(splats, 0.2, rank, 0.0, generator(0, step))
        adam.zero_grad()
        sum(selection.losses.values()).backward()
        adam.step()
    kept = net.order(splats, rank, 0)[:60]
    assert float(importance_mask(rank, 0.2)[kept].mean()) > 0.9


def test_selected_mask_carries_the_gradient_and_the_value_one():
    splats: Splats = random_splats(300)
    net = GsNet(cfg.GsNetConfig(gi_weight=0, sparsity_weight=0), splats)
    selection = net.select(splats, 0.2, torch.arange(300), 0.0, generator(0, 1))
    assert torch.allclose(selection.mask, torch.ones_like(selection.mask))
    selection.mask.sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.last.parameters())
    assert not selection.losses


def test_selection_without_noise_is_exact_nested_and_teaches():
    """floor(e N) of value one; the gradient is that of sigmoid((margin - the smallest kept) / tau)."""
    splats, rank = random_splats(300), torch.arange(300)
    torch.manual_seed(0)
    net = GsNet(cfg.GsNetConfig(noise=False), splats)
    order, before = net.order(splats, rank, 0), set()
    for ratio in (0.001, 0.037, 0.2, 0.8, 1.0):
        selection = net.select(splats, ratio, rank, 0.0, generator(0, 1))
        kept = set(selection.index.tolist())
        assert kept == set(order[:count_at(ratio, 300)].tolist()) and before <= kept
        assert torch.equal(selection.mask, torch.ones(len(kept)))
        assert list(selection.losses) == ["gi"]  # the number is exact
        before = kept
    margin = torch.tensor([0.3, -1.0, 2.0, 0.5], requires_grad=True)
    mask = top(margin, 0.5, 0.7)
    assert mask.tolist() == [0, 0, 1, 1]
    mask.sum().backward()
    soft = torch.sigmoid((margin.detach() - 0.5) / 0.7)
    assert torch.allclose(margin.grad, soft * (1 - soft) / 0.7)


def test_importance_as_an_input_gives_the_order_by_importance():
    splats = random_splats(400)
    rank = torch.randperm(400, generator=generator(0, "test"))
    torch.manual_seed(0)
    net = GsNet(cfg.GsNetConfig(inputs=("importance", "opacities"), noise=False), splats)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(150):
        adam.zero_grad()
        net.select(splats, (0.02, 0.1, 0.3)[step % 3], rank, 0.0, generator(0)).losses["gi"].backward()
        adam.step()
    for ratio in (0.02, 0.1, 0.3):
        assert (float(importance_mask(rank, ratio)[net.order(splats, rank, 0)[:count_at(ratio, 400)]].mean())
                > 0.9)


@pytest.mark.parametrize("detach", [True, False])
def test_selector_gradients_reach_the_gaussians_only_if_asked(detach):
    splats = random_splats(200).requires_grad_()
    net = GsNet(cfg.GsNetConfig(shape="code", normalise=False, detach=detach), splats)
    sum(net.select(splats, 0.2, torch.arange(200), 0.0, generator(0, 1)).losses.values()).backward()
    reached = [name for name, t in splats.items() if t.grad is not None and float(t.grad.abs().sum()) > 0]
    assert reached == ([] if detach else ["means", "quats", "scales"])


def test_noise_of_the_official_order_is_drawn_once():
    splats, rank = random_splats(400), torch.arange(400)
    net = GsNet(cfg.GsNetConfig(order_noise=True), splats)
    assert torch.equal(net.order(splats, rank, 0), net.order(splats, rank, 0))
    assert not torch.equal(net.order(splats, rank, 0), net.order(splats, rank, 1))
    keep = torch.ones(400).index_fill(0, rank[200:], -1.0)
    net.logits = lambda splats, rank, ratio: torch.stack([torch.zeros(400), keep], dim=1)
    wins = 0.0  # how often one of margin 1 comes before one of margin -1
    for seed in range(40):
        place = torch.argsort(net.order(splats, rank, seed))
        wins += float((place[:200, None] < place[None, 200:]).float().mean()) / 40
    d = 2.0
    # P(difference of two logistics < d)
    expected = math.exp(d) * (math.exp(d) - 1 - d) / (math.exp(d) - 1) ** 2
    assert wins == pytest.approx(expected, abs=0.02)


def test_smoothness_and_its_gradient_match_torch():
    """The field's regulariser, by its definition in torch's own operations."""
    field = Field(SMALL_FIELD, random_splats(50).means).double()
    with torch.no_grad():
        for p in field.planes:
            p += torch.rand(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    field.regulariser().backward()
    o, expected = SMALL_FIELD, torch.zeros((), dtype=torch.float64)
    got = [p.grad.clone() for p in field.planes]
    for i, p in enumerate(field.planes):
        p.grad = None
        if AXES[i % 6][1] == 3:
            expected = (expected + o.ratio_smoothness * p.diff(n=2, dim=2).square().mean()
                        + o.ratio_l1 * (p - 1).abs().mean())
        else:
            expected = expected + o.space_smoothness * sum(p.diff(n=2, dim=d).square().mean() for d in (2, 3))
    expected.backward()
    assert float(field.regulariser()) == pytest.approx(float(expected), rel=1e-12)
    assert all(torch.allclose(a, p.grad, atol=1e-15) for a, p in zip(got, field.planes, strict=True))
