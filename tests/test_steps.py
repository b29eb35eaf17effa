"""One step of training, recomputed by hand: float64, plain torch, images by the oracle of the rasterizer.

The trainer's wiring is what is tested: which terms a step has, their weights, the background, the mask, which
Gaussians are rendered at which size, and what Adam makes of the gradients. The names and numbers here are
those of docs/method.md.
"""

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from tiny import EXTENT, UNIT, begun, camera, tiny_config, tiny_scene, tiny_splats
from torch import Tensor
from torch.nn.functional import conv2d, linear

from flexgs.camera import Camera
from flexgs.config import Config
from flexgs.raster.reference import render_reference, to_float64
from flexgs.seeds import generator
from flexgs.splats import Splats
from flexgs.training.trainer import Trainer

N, STEPS, BASE, BATCH = 40, 400, 200, 2
ATTRIBUTES = ("means", "quats", "scales", "opacities", "sh0", "shN")


# ---------------------------------------------------------------------- the loss


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Wang et al. 2004 with an 11 x 11 Gaussian window of sigma 1.5, zeros outside."""
    g = torch.exp(-torch.arange(-5, 6).double() ** 2 / 4.5)
    window = (torch.outer(g, g) / g.sum() ** 2).expand(3, 1, 11, 11)

    def mean(x: Tensor) -> Tensor:
        return conv2d(x.permute(2, 0, 1)[None], window, padding=5, groups=3)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()


def image_loss(image: Tensor, target: Tensor, mask: Tensor | None, l1: float, ssim_weight: float) -> Tensor:
    if mask is not None:
        image = torch.where(mask[..., None], image, target)
    return l1 * (image - target).abs().mean() + ssim_weight * (1 - ssim(image, target))


def half_size(at: Camera, target: Tensor, mask: Tensor | None) -> tuple[Camera, Tensor, Tensor | None]:
    """Means of 2 x 2 pixels, which count if all four do."""
    h, w = at.height // 2, at.width // 2
    mean = target.view(h, 2, w, 2, 3).mean(dim=(1, 3))
    return at.scaled(w, h), mean, None if mask is None else mask.view(h, 2, w, 2).all(3).all(1)


# ---------------------------------------------------------------------- ratios and selection


def ratio_of(config: Config, turn: int, i: int) -> float:
    r = config.ratios
    u = float(torch.rand((), generator=generator(config.seed, "ratio", turn, i), dtype=torch.float64))
    if r.sampling == "round_robin":
        return r.values[turn % len(r.values)]
    strata = torch.randperm(BATCH, generator=generator(config.seed, "strata", turn // BATCH, i)).tolist()
    u = strata[turn % BATCH] / BATCH + u / BATCH
    if r.sampling == "random":
        return r.values[math.floor(u * len(r.values))]
    low, high = [*r.bands, (r.bands[-1][1], 1.0), (r.lowest, r.bands[0][0])][i]
    return low + u * (high - low) if r.sampling == "uniform" else math.exp(math.log(low)
                                                                           + u * (math.log(high / low)))


def renders_of(config: Config, turn: int, frozen: bool) -> tuple[bool, list[int]]:
    """Whether the whole is rendered at the views of a step, and the numbers of their elastic renders."""
    r = config.ratios
    bands = len(r.bands) if r.sampling in ("uniform", "log_uniform") else 1
    whole, cuts = not frozen, list(range(bands))
    if r.alternate and not frozen:
        whole = turn % 2 == 0
        cuts = cuts[:-1] if whole else cuts
    if r.upper_every and turn % r.upper_every == 0 and r.bands[-1][1] < 1:
        cuts.append(bands)
        if r.lowest:
            cuts.append(bands + 1)
    return whole, cuts


def progress_of(trainer: Trainer, position: int) -> float:
    first, last = (0, BASE) if position < trainer.base_steps else (trainer.base_steps, STEPS)
    return (position - first) / (last - first)


def margins(trainer: Trainer, net, splats: Splats, rank: Tensor, ratio: float) -> Tensor:
    """[N, 2] GsNet's logits, from its weights and inputs."""
    o, own = trainer.config.gsnet, splats.detach() if trainer.config.gsnet.detach else splats
    unit = own.quats / own.quats.norm(dim=1, keepdim=True)
    quantile = -torch.distributions.Normal(0.0, 1.0).icdf((rank.double() + 0.5) / len(rank))
    columns = {
        "means": (own.means - net.centre) / net.spread if o.normalise else own.means / UNIT,
        "quats": unit * torch.where(unit[:, :1] < 0, -1.0, 1.0) if o.normalise else unit,
        "scales": own.scales - net.scale if o.normalise else own.scales.exp() / UNIT,
        "opacities": (own.opacities if o.normalise else own.opacities.sigmoid())[:, None],
        "importance": quantile[:, None]}
    inputs = [columns[name] for name in o.inputs]

    def branch(layers, x: Tensor) -> Tensor:
        return linear(linear(x, layers[0].weight, layers[0].bias).relu(), layers[2].weight,
                      layers[2].bias).relu()

    parts = [torch.cat(inputs, dim=1)] if o.shape == "paper" else inputs
    hidden = [branch(layers, x) for layers, x in zip(net.attributes, parts, strict=True)]
    e = branch(net.ratio, torch.full((len(own), 1), ratio, dtype=torch.float64))
    return linear(torch.cat([*hidden, e], dim=1), net.last.weight, net.last.bias)


def net_of(trainer: Trainer):
    return getattr(trainer.order, "gsnet", None)


def selected(trainer: Trainer, net, splats: Splats, ratio: float, position: int,
             i: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows, the factor on their opacities, and the selector's own loss."""
    config, k, none = (trainer.config, max(1, math.floor(ratio * N + 1e-9)),
                       torch.zeros((), dtype=torch.float64))
    if config.order.kind == "opacity":
        return splats.opacities.detach().argsort(descending=True)[:k], None, none
    if net is None:
        return torch.arange(k), None, none
    o, rank = config.gsnet, trainer.order.rank
    assert rank is not None
    z, progress = margins(trainer, net, splats, rank, ratio), progress_of(trainer, position)
    tau = math.exp(math.log(o.temperature) + progress * math.log(o.temperature_end / o.temperature))
    if o.noise:
        U = torch.rand((N, 2), generator=generator(config.seed, "gumbel", position, i)).double()
        soft = ((z - (-U.log()).log()) / tau).softmax(1)[:, 1]
        m = (soft > 0.5).double() + (soft - soft.detach())
    else:
        margin = z[:, 1] - z[:, 0]
        last = margin.detach().sort(descending=True).values[k - 1]
        soft = ((margin - last) / tau).sigmoid()
        m = (margin.detach() >= last).double() + (soft - soft.detach())
    rows = (m.detach() > 0.5).nonzero()[:, 0]
    assert len(rows) > 0
    loss = o.gi_weight * (m - (rank < k).double()).abs().mean()
    return rows, m[rows], loss + (o.sparsity_weight * (ratio - m.mean()).abs() if o.noise else 0)


# ---------------------------------------------------------------------- the transform


def changed(trainer: Trainer, transform, kept: Splats, ratio: float) -> Splats:
    kind = trainer.config.transform.kind
    return {"deltas": shifted, "field": bent,
            "none": lambda *_: kept}[kind](trainer.config, transform, kept, ratio)


def shifted(config: Config, deltas, kept: Splats, ratio: float) -> Splats:
    """Per-Gaussian changes, linear in log e between the knots that hold the Gaussian, and down to none at e =
    1."""
    knots = [*config.deltas.knots, 1.0]
    counts = [max(1, math.floor(knot * N + 1e-9)) for knot in knots[:-1]]
    changes = {}
    for name in ("means", "quats", "scales", "opacities", "sh0"):
        stored, base = getattr(deltas, name).split(counts), getattr(kept, name)
        rows = []
        for row in range(len(kept)):
            values = [stored[j][row] if row < counts[j] else None
                      for j in range(len(counts))] + [stored[0][0] * 0]
            right = next((j for j, knot in enumerate(knots) if ratio < knot), None)
            assert right is not None
            if right == 0:
                rows.append(values[0])
                continue
            a, b = values[right - 1], values[right]
            w = math.log(ratio / knots[right - 1]) / math.log(knots[right] / knots[right - 1])
            if a is None and right == len(counts):
                rows.append(stored[0][0] * 0)
            else:
                rows.append(b if a is None else (1 - w) * a + w * b)
        change = torch.stack([stored[0][0] * 0 if r is None else r for r in rows]).view_as(base)
        changes[name] = base + (UNIT * change if name == "means" else change)
    return Splats(**changes, shN=kept.shN)


def bent(config: Config, field, kept: Splats, ratio: float) -> Splats:
    """The field's features (tests/test_model.py) through its trunk and heads."""
    o, out = config.field, dict(kept.items())
    hidden = linear(field.features(kept.means, ratio), field.trunk.weight, field.trunk.bias)
    gate = min(1.0, math.log(ratio) / math.log(0.005)) if o.gate else 1.0
    for name in o.heads:
        first, second = field.heads[name][1], field.heads[name][3]
        change = linear(linear(hidden.relu(), first.weight, first.bias).relu(), second.weight,
                        second.bias) * gate
        out[name] = out[name] + (UNIT if name == "means" else 1) * change.view_as(out[name])
        if name == "scales" and o.scale_change == "activated":
            out[name] = (kept.scales.exp() + UNIT * change).abs().clamp(min=1e-6 * UNIT).log()
    return Splats(**out)


def roughness(config: Config, transform) -> Tensor | float:
    """The field's regularisers: squared second differences, and |plane - 1| along e."""
    if config.transform.kind != "field":
        return 0.0
    o, loss = config.field, torch.zeros((), dtype=torch.float64)
    for i, plane in enumerate(transform.planes):
        rows = (plane[:, :, 2:] - 2 * plane[:, :, 1:-1] + plane[:, :, :-2]).square().mean()
        columns = (plane[..., 2:] - 2 * plane[..., 1:-1] + plane[..., :-2]).square().mean()
        if i % 6 in (2, 4, 5):  # x, y or z against e
            loss = loss + o.ratio_smoothness * rows + o.ratio_l1 * (plane - 1).abs().mean()
        else:
            loss = loss + o.space_smoothness * (rows + (columns if o.smooth_both else 0))
    return loss


# ---------------------------------------------------------------------- a step


class Hand:
    """The gradient of the step that the trainer is about to make, by the name of the parameter."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.config = trainer, trainer.config
        self.splats = to_float64(trainer.splats)
        self.selected = to_float64(trainer.selection.splats) if trainer.selection else None
        self.transform = copy.deepcopy(trainer.transform).double()
        self.net = copy.deepcopy(net_of(trainer)).double() if net_of(trainer) else None
        self.gradient = torch.zeros(N, dtype=torch.float64)
        self.seen = torch.zeros(N)
        self.loss = torch.zeros((), dtype=torch.float64)
        self.masked: set[bool] = set()
        names = {id(p): q for module,
                 twin in ((trainer.transform, self.transform), (net_of(trainer), self.net)) if twin
                 # type: ignore[union-attr]
                 for p, q in zip(module.parameters(), twin.parameters(), strict=True)}
        pairs = [(trainer.splats, self.splats)]
        pairs += [(trainer.selection.splats, self.selected)] if trainer.selection else []
        for ours, twins in pairs:
            names |= {id(p): q for (_, p), (_, q) in zip(ours.items(), twins.items(), strict=True)}
        self.twins = {name: names[id(p)] for name, p in trainer.optimizer.parameters()}
        for slot in range(BATCH):
            self.view(trainer.step + slot)
        self.gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name,
                          p in self.twins.items()}

    def render(self, splats: Splats, at: Camera, **options):
        background = torch.tensor(self.config.background, dtype=torch.float64)
        return render_reference(splats, at, background=background, **options)

    def view(self, position: int) -> None:
        config = self.config
        at, target, mask = self.photograph(position)
        self.masked.add(mask is not None)
        if self.trainer.step < self.trainer.base_steps:
            # 0, 1, 2, 3 within the first fifth
            degree = min(config.base.sh_degree, math.floor(position / (BASE / 5) * 3))
            out = self.render(self.splats, at, sh_degree=degree)
            out.means2d.retain_grad()
            self.back(image_loss(out.image, target, mask, config.base.l1, config.base.ssim))
            pixels = out.means2d.grad * BATCH
            self.gradient += (pixels[:, 0] * at.width / 2).hypot(pixels[:, 1] * at.height / 2)
            self.seen += (out.radii > 0).all(dim=1)
            return
        weights = config.loss
        whole, cuts = renders_of(config, self.trainer.step // BATCH, self.trainer.frozen)
        if whole:
            image = self.render(self.splats, at).image
            self.back(image_loss(image, target, mask, weights.full_l1, weights.full_ssim))
        if self.selected:
            image = self.render(self.selected, at).image
            self.back(image_loss(image, target, mask, weights.full_l1, weights.full_ssim))
            assert config.ratios.bands[-1] == (0.18, 0.6)
            cuts = [i for i in cuts if i == len(config.ratios.bands) - 1]  # that which is not selected from
        usual = len(config.ratios.bands) if config.ratios.sampling in ("uniform", "log_uniform") else 1
        kinds = max(1, len(dict.fromkeys(config.ratios.bands[:usual])))
        half, bands = len(self.trainer.scene.train) // 2, config.ratios.bands
        for i in cuts:  # a band's second cut is of the view half an epoch later
            again = sum(band == bands[i] for band in bands[:i]) if i < usual else 0
            self.back(self.elastic(position, i, *self.photograph(position + again * half)) / kinds)

    def photograph(self, position: int) -> tuple[Camera, Tensor, Tensor | None]:
        views = self.trainer.scene.train
        epoch, place = divmod(position, len(views))
        order = torch.randperm(len(views), generator=generator(self.config.seed, "views", epoch))
        view = views[int(order[place])]
        return view.camera, view.image().double() / 255, view.mask()

    def elastic(self, position: int, i: int, at: Camera, target: Tensor, mask: Tensor | None) -> Tensor:
        config, bands = self.config, len(renders_of(self.config, 1, True)[1])
        ratio = ratio_of(config, self.trainer.step // BATCH if i >= bands - 2 else position, i)
        k = max(1, math.floor(ratio * N + 1e-9))
        if config.ratios.half_above is not None and at.width * at.height / k > config.ratios.half_above:
            at, target, mask = half_size(at, target, mask)
        rows, factor, own = selected(self.trainer, self.net, self.splats, ratio, position, i)
        fade = 0.0 if self.trainer.frozen else ratio**config.loss.elastic_fade
        # the value, a part of the gradient
        kept = self.splats[rows].map(lambda t: t.detach() + fade * (t - t.detach()))
        image = self.render(changed(self.trainer, self.transform, kept, ratio), at, mask=factor).image
        loss = image_loss(image, target, mask, config.loss.elastic_l1, config.loss.elastic_ssim)
        return loss + own + roughness(config, self.transform)

    def back(self, loss: Tensor) -> None:
        (loss / BATCH).backward()
        self.loss += (loss / BATCH).detach()


def lrs(config: Config, progress: float) -> dict[str, float]:
    """By the first words of a parameter's name, for a step of BATCH views; after docs/method.md, "Learning
    rates"."""
    r, decayed, networks = config.lr, 0.01**progress, 0.1**progress
    plain = {"quats": r.quats, "scales": r.scales, "opacities": r.opacities, "sh0": r.sh0}
    rates = {"splats.means": r.means * EXTENT * decayed, **{f"splats.{name}": lr for name,
                                                            lr in plain.items()},
             "selection.means": 3 * r.means * EXTENT * decayed,
             **{f"selection.{name}": 3 * lr for name, lr in plain.items()},
             "transform.means": r.means * EXTENT * r.delta_means * decayed / UNIT,
             **{f"transform.{name}": lr for name, lr in plain.items()},
             "transform.network": r.field * networks,
             "transform.planes": r.planes * networks, "selector": r.gsnet * networks}
    return {name: lr * BATCH**0.5 for name, lr in rates.items()}


def falling(trainer: Trainer, progress: float) -> torch.Tensor:
    """Factors [M, 1] on the rates of the deltas' rows, knot after knot."""
    ends = {0.002: (5, 0.5), 0.005: (5, 0.5), 0.01: (5, 0.5), 0.032: (5, 0.5), 0.1: (5, 0.5), 0.32: (4, 0.5),
            0.5: (1.5, 0.4)}
    factors = [ends[knot][0] ** (1 - progress) * ends[knot][1]**progress for knot in trainer.transform.knots]
    return torch.tensor(factors).double().repeat_interleave(torch.tensor(trainer.transform.counts))[:, None]


def check(trainer: Trainer) -> Hand:
    """Make one step and compare every gradient, the loss, and every parameter after it."""
    before = {name: p.detach().clone().double() for name, p in trainer.optimizer.parameters()}
    moments = {name: t.clone().double() for name, t in trainer.optimizer.moments().items()}
    stage_2, position = trainer.step >= trainer.base_steps, trainer.step
    hand = Hand(trainer)
    assert hand.masked == {True, False}  # one view has a mask, one has none
    trainer.metrics()  # its loss is the mean since it was last asked
    trainer.train_step()
    rates = lrs(trainer.config, progress_of(trainer, position))
    rates["splats.shN"] = trainer.config.lr.shN * BATCH**0.5 * (trainer.config.lr.shN_factor if stage_2
                                                                else 1.0)
    b1, b2, eps = 0.9**BATCH, 0.999**BATCH, 1e-15 / BATCH**0.5
    assert trainer.metrics()["loss"] == pytest.approx(float(hand.loss), abs=2e-5)
    after, now = dict(trainer.optimizer.parameters()), trainer.optimizer.moments()
    assert set(after) == set(before) == set(hand.gradients)
    for name, g in hand.gradients.items():
        m, v = moments[f"{name}/exp_avg"], moments[f"{name}/exp_avg_sq"]
        got = (now[f"{name}/exp_avg"].double() - b1 * m) / (1 - b1)
        assert float((got - g).norm()) <= 2e-3 * float(g.norm()) + 1e-9, f"gradient of {name}"
        assert g.abs().max() > 0 or name == "splats.shN", name  # something is learned by each
        m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, moments[f"{name}/step"] + 1
        lr = rates[re.sub(r"\.\d+$", "", name)]
        if name.startswith("transform.") and trainer.config.lr.delta_fall:
            lr = lr * falling(trainer, progress_of(trainer, position))
        update = lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        moved = after[name].detach().double() - before[name]
        # where the rounding of float32 does not decide the direction
        surely = v.sqrt() > 1e-3 * v.max().sqrt()
        rounding = 1e-6 * before[name].abs().max()
        assert ((moved + update).abs() <= 0.03 * lr + rounding)[surely].all(), f"{name} after Adam"
    return hand


def trainer_of(config: Config, position: int, base: Splats | None = None) -> Trainer:
    """Before the step at this position, in the middle of its stage, with moments of a step before; nothing is
    as it began. A selection has restarted the deltas in the step before that one."""
    config.batch, config.steps, config.base.stage1_fraction = BATCH, STEPS, BASE / STEPS
    trainer = Trainer(config, tiny_scene(N), base=base)
    if base is None:
        begun(trainer, tiny_splats(N))
    steps = 2 if config.selection and position > trainer.base_steps else 1
    trainer.step = position - steps * BATCH
    for _ in range(steps):
        trainer.train_step()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (*trainer.transform.parameters(), *trainer.order.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=g)
    return trainer


@pytest.mark.parametrize("position", [2, 18, 30])  # degrees 0, 1 and 2 of the harmonics
def test_stage_1(position):
    config = tiny_config()
    config.background = (0.9, 0.5, 0.2)
    trainer = trainer_of(config, position)
    before = trainer.densifier.gradient.clone(), trainer.densifier.seen.clone()
    hand = check(trainer)
    torch.testing.assert_close(trainer.densifier.gradient - before[0], hand.gradient, rtol=2e-3, atol=1e-9)
    assert torch.equal(trainer.densifier.seen - before[1], hand.seen)


def default(config: Config) -> None:
    config.loss.elastic_fade, config.ratios.upper_every, config.ratios.half_above = 0.7, 2, 50.0


def selecting(config: Config) -> None:
    """Of the 20 Gaussians that it began with 8 are alive in each of the last three steps."""
    default(config)
    config.order.selection, config.order.push = (0.5, 0.1), 0.75


def bands_twice(config: Config) -> None:
    low, middle, top = dict.fromkeys(config.ratios.bands)
    config.ratios.bands = (low, low, middle, middle, middle, top)


def fast(config: Config) -> None:
    config.loss.elastic_fade, config.ratios.half_above = 0.4, 30.0


def losses(config: Config) -> None:
    """All of the selector's and the field's terms, large enough to be seen in every gradient."""
    config.gsnet.gi_weight, config.gsnet.sparsity_weight = 0.7, 0.3
    config.gsnet.temperature, config.gsnet.temperature_end = 2.0, 0.5
    config.field.ratio_smoothness, config.field.ratio_l1, config.field.space_smoothness = 0.3, 0.05, 0.2
    config.ratios.values = tuple(4 * value for value in config.ratios.values)  # of 40 Gaussians
    config.ratios.bands = tuple((low, min(1.0, high)) for low, high in config.ratios.bands)


def in_turn(config: Config) -> None:
    config.ratios.sampling, config.ratios.values, config.order.kind = ("round_robin", (0.3, 0.7, 0.1),
                                                                       "importance")
    config.background = (0.1, 0.9, 0.4)


@pytest.mark.parametrize(("preset", "change"), [
    ("default", default), ("default", selecting), ("default", bands_twice), ("default", in_turn),
    ("fast", fast), ("plain", in_turn), ("matryoshka", default), ("paper", losses), ("official", losses),
    ("mended", losses)])
def test_stage_2(preset: str, change: Callable[[Config], None]):
    config = tiny_config(preset)
    config.lr.shN_factor, config.background, config.order.selection = 3.0, (1.0, 1.0, 1.0), None
    change(config)
    trainer = trainer_of(config, BASE + 86)
    assert bool(trainer.selection) is (change is selecting)
    check(trainer)


@pytest.mark.parametrize(("preset", "change"), [("default", default), ("default", selecting), ("fast", fast),
                                                ("mended", losses)])
def test_stage_2_of_a_frozen_base(preset, change):
    """The whole is not rendered, and the Gaussians stay; the cuts train as they do otherwise."""
    config = tiny_config(preset)
    config.base.ply, config.order.selection = "given.ply", None
    change(config)
    given = tiny_splats(N)
    trainer = trainer_of(config, 86, given)
    check(trainer)
    assert {name.split(".")[0] for name, _ in trainer.optimizer.parameters()} <= {"transform", "selector",
                                                                                    "selection"}
    moved = trainer.splats.means.detach()
    assert torch.equal(moved.sort(dim=0).values, given.means.sort(dim=0).values)


def test_the_cameras_differ():
    """The scene of these tests shows a swapped width and height, and a lens of another view."""
    assert len({(camera(i).width, camera(i).height, float(camera(i).K[0, 0])) for i in range(5)}) >= 5
