"""Every setting of a run, as one tree of dataclasses, and the presets that differ in a few lines of it.

Lengths are counted in *views*: training images rendered and compared, over all workers. A step of the optimizer uses
`batch` views, so the same numbers mean the same work for one worker and for eight.
"""

import dataclasses
import json
import math
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from flexgs.errors import UserError


@dataclass
class Data:
    """How the capture is read."""

    factor: int = 4
    """Downscaling: the folder images_N if there is one, else images resized."""
    test_every: int = 8
    """Every n-th view by sorted name is held out for evaluation."""
    masks: bool = True
    """Use masks/ beside images/ if it is there."""


@dataclass
class Base:
    """Stage 1: the plain 3DGS model that stage 2 makes elastic."""

    ply: str | None = None
    """Make the Gaussians of this PLY elastic instead: there is no stage 1, and stage 2 leaves them as they are."""
    share: float = 0.5
    """Stage 1's share of all views."""
    sh_degree: int = 3
    """Degree of the spherical harmonics; the active degree rises to it over the first fifth of stage 1."""
    grow_from: float = 0.03
    """Densification starts after this share of stage 1 ..."""
    grow_until: float = 0.8
    """... and ends after this one."""
    grow_every: int = 100
    """Views between two densifications."""
    grow_gradient: float = 2e-4
    """Mean gradient of the screen position (normalised device units) above which a Gaussian is cloned or split."""
    split_scale: float = 0.01
    """Larger than this share of the scene's extent: split; smaller: clone."""
    max_splats: int = 3_000_000
    """Densification stops at this many; the largest gradients go first."""
    prune_opacity: float = 0.005
    prune_scale: float = 0.1
    """After the first opacity reset, Gaussians larger than this share of the extent are removed."""
    reset_every: float = 0.4
    """Opacities are reset to at most 0.01 each time this share of stage 1 has passed, while growing."""


@dataclass
class Rates:
    """Adam's learning rates; those marked (E) are multiplied by the scene's extent."""

    means: float = 1.6e-4
    """(E) decays to a hundredth over each stage."""
    quats: float = 1e-3
    scales: float = 5e-3
    opacities: float = 0.05
    sh0: float = 2.5e-3
    shN: float = 1.25e-4
    delta_means: float = 3.0
    """Factor on the rate of means for the per-ratio deltas of the means; other deltas use the rates above."""
    selector: float = 8e-4
    """GsNet; decays to a tenth over stage 2."""
    field: float = 8e-4
    """Trunk and heads of the field; decays to a tenth over stage 2."""
    planes: float = 8e-3
    """Planes of the field; decays to a tenth over stage 2."""


@dataclass
class Loss:
    """Weights of the photometric terms; L1 and 1 - SSIM of the full and the elastic renders."""

    full_l1: float = 0.4
    full_ssim: float = 0.1
    elastic_l1: float = 0.4
    elastic_ssim: float = 0.1
    elastic_fade: float = 1.0
    """p: an elastic render at ratio e moves the Gaussians shared by all ratios with e^p times its gradient."""


@dataclass
class Ratios:
    """Which ratios stage 2 trains at."""

    sampling: Literal["log_uniform", "random", "round_robin"] = "log_uniform"
    bands: tuple[tuple[float, float], ...] = ((0.008, 0.08), (0.08, 0.8))
    """log_uniform: one elastic render per view and band, its ratio log-uniform within. Empty: no elastic render."""
    values: tuple[float, ...] = (0.01, 0.05, 0.10, 0.15)
    """random and round_robin: one elastic render per view at one of these."""

    @property
    def renders(self) -> int:
        """Elastic renders per view."""
        return len(self.bands) if self.sampling == "log_uniform" else 1


@dataclass
class Order:
    """Which Gaussians stay: the first floor(e N) of one order, so cuts are nested."""

    kind: Literal["sampled", "importance", "gsnet"] = "sampled"
    """sampled: weighted sampling without replacement, the score as weight; importance: by descending score; gsnet: learned."""
    score: str = "alpha_t"
    """A name of model/importance.py."""
    temperature: float = 1.0
    """sampled: scale of the Gumbel noise on log score; 0 is the plain order by importance."""
    keep: float = 1.0
    """Keep only this share of the Gaussians in stage 2, the first of the order: prune and fine-tune."""


@dataclass
class GsNet:
    """The adaptive selector of FlexGS."""

    shape: Literal["paper", "code"] = "paper"
    """paper: two branches (attributes, ratio) of width 64; code: four branches (position, rotation, scale, ratio) of 32."""
    temperature: float = 1.0
    """Of the Gumbel-softmax, at the start of stage 2."""
    temperature_end: float = 1.0
    """At its end; exponential in between."""
    gi_weight: float = 1.0
    """Of the loss that pulls the mask towards the global-importance mask."""
    sparsity_weight: float = 0.01
    """Of the loss that pulls the number of selected Gaussians towards e N."""
    refresh: int = 1000
    """Views between two computations of global importance."""
    detach: bool = True
    """Keep gradients of the mask from reaching means, quats and scales through the selector's inputs."""


@dataclass
class Transform:
    """What changes in the Gaussians that stay; nothing at e = 1."""

    kind: Literal["deltas", "field", "none"] = "deltas"


@dataclass
class Deltas:
    """Per-Gaussian changes at knots of log e, linear in between, none at e = 1."""

    knots: tuple[float, ...] = (0.01, 0.032, 0.1, 0.32)
    """Knot j holds the first floor(knot_j N) Gaussians only."""


@dataclass
class Field:
    """The spatial-ratio neural field of FlexGS: six feature planes per level and a multi-head predictor."""

    resolution: tuple[int, int, int, int] = (64, 64, 64, 100)
    """Of x, y, z and e at level 1."""
    levels: tuple[int, ...] = (1, 2, 4)
    """Factors on the resolution of x, y, z."""
    channels: int = 16
    width: int = 64
    """Hidden features of the predictor."""
    heads: tuple[Literal["means", "scales", "quats", "opacities", "sh0"], ...] = ("means", "scales", "quats")
    zero_init: bool = True
    """Start from a field that changes nothing (the official code starts from random heads)."""
    ratio_smoothness: float = 1e-3
    """Weight of the squared second difference along e."""
    ratio_l1: float = 1e-4
    """Weight of |plane - 1| of the ratio planes."""
    space_smoothness: float = 2e-4
    """Weight of the squared second differences along both axes of the spatial planes."""


@dataclass
class Evaluation:
    """What is measured on the test views."""

    ratios: tuple[float, ...] = (0.01, 0.05, 0.10, 0.15, 0.5, 1.0)
    lpips: tuple[Literal["vgg", "alex"], ...] = ("vgg", "alex")
    """LPIPS backbones; one that cannot be had is reported as not computed, with the reason."""
    lpips_weights: str | None = None
    """Folder of the backbones where nothing may be downloaded; default: $FLEXGS_LPIPS_WEIGHTS."""
    lpips_range: Literal["[-1, 1]", "[0, 1]"] = "[-1, 1]"
    """Range that the backbone is given: [-1, 1] is LPIPS as published, [0, 1] is what FlexGS's figures were made with."""


@dataclass
class Config:
    """A run. `Config.from_preset("paper")` gives a named one."""

    preset: str = "default"
    """The preset this one started from; a label only."""
    seed: int = 0
    steps: int = 30_000
    """Training views in all, stage 1 and stage 2; raising it continues a finished run."""
    batch: int | None = None
    """Views per optimizer step over all workers; None: one per worker."""
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    report_every: int = 200
    """Views between two progress lines."""
    checkpoint_every: int = 2000
    """Views between two checkpoints."""
    check_every: int = 500
    """Views between two comparisons of the workers' replicas."""
    data: Data = dataclasses.field(default_factory=Data)
    base: Base = dataclasses.field(default_factory=Base)
    rates: Rates = dataclasses.field(default_factory=Rates)
    loss: Loss = dataclasses.field(default_factory=Loss)
    ratios: Ratios = dataclasses.field(default_factory=Ratios)
    order: Order = dataclasses.field(default_factory=Order)
    gsnet: GsNet = dataclasses.field(default_factory=GsNet)
    transform: Transform = dataclasses.field(default_factory=Transform)
    deltas: Deltas = dataclasses.field(default_factory=Deltas)
    field: Field = dataclasses.field(default_factory=Field)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)

    @property
    def base_steps(self) -> int:
        """Views of stage 1."""
        return 0 if self.base.ply else round(self.steps * self.base.share)

    @staticmethod
    def from_preset(name: str, **settings: Any) -> "Config":
        """One of PRESETS by name; settings replace top-level fields, for instance steps=7000."""
        if name not in PRESETS:
            raise UserError(f"--preset {name}: unknown; expected one of {', '.join(PRESETS)}")
        config = Config(preset=name)
        PRESETS[name](config)
        return dataclasses.replace(config, **settings)

    def check(self) -> "Config":
        """Raise UserError for values that no run can use."""
        for option, ratios in {"evaluation.ratios": self.evaluation.ratios, "ratios.values": self.ratios.values,
                               "deltas.knots": self.deltas.knots, "order.keep": (self.order.keep,)}.items():
            for ratio in ratios:
                check_ratio(ratio, f"--{option}")
        if any(a >= b for a, b in zip(self.deltas.knots, self.deltas.knots[1:], strict=False)):
            raise UserError(f"--deltas.knots: found {self.deltas.knots}, expected rising ratios")
        for low, high in self.ratios.bands:
            if not 0 < low < high <= 1:
                raise UserError(f"--ratios.bands: found {low} {high}, expected 0 < low < high <= 1")
        positive = ("steps", "batch", "report_every", "checkpoint_every", "check_every",
                    "data.factor", "data.test_every", "base.max_splats", "base.grow_every", "gsnet.refresh")
        for option in positive:
            value: Any = self
            for part in option.split("."):
                value = getattr(value, part)
            if value is not None and value < 1:
                raise UserError(f"--{option}: found {value}, expected at least 1")
        if not 0 <= self.base.sh_degree <= 3:
            raise UserError(f"--base.sh-degree: found {self.base.sh_degree}, expected 0 to 3")
        if not 0 < self.base.share <= 1:
            raise UserError(f"--base.share: found {self.base.share}, expected above 0 and at most 1")
        return self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], source: str = "config") -> "Config":
        """The reverse of to_dict; UserError names a key that is unknown or a value of the wrong type."""
        return _read(Config, values, source).check()

    @staticmethod
    def load(path: Path) -> "Config":
        try:
            return Config.from_dict(json.loads(path.read_text()), str(path))
        except (OSError, json.JSONDecodeError) as e:
            raise UserError(f"{path}: not a readable JSON configuration ({e})") from None


def check_ratio(ratio: float, option: str = "ratio") -> float:
    """ratio itself if it lies in (0, 1], else UserError."""
    if not 0 < ratio <= 1:
        raise UserError(f"{option}: found {ratio}, expected a ratio above 0 and at most 1 (0.05 keeps 5 %)")
    return ratio


def count_at(ratio: float, n: int) -> int:
    """floor(ratio n), at least 1 (FlexGS supplementary, B.2); exact for ratios that binary floats round down."""
    return max(1, math.floor(check_ratio(ratio) * n + 1e-9))


def check_same_method(theirs: Config, ours: Config, elastic: bool, folder: Path) -> None:
    """UserError if what was trained under theirs, into folder, cannot be continued under ours.

    Before stage 2 begins (elastic False) only the settings of stage 1 matter, so that many runs can start from one stage 1.
    """
    was, now = ({k: v for k, v in c.to_dict().items() if k not in _FREE} for c in (theirs, ours))
    if not elastic:
        was, now = ({**{k: c[k] for k in ("seed", "background", "data", "base")},
                     "rates": {k: c["rates"][k] for k in BASE_RATES}} for c in (was, now))
    if differing := [k for k in was if was[k] != now[k]]:
        raise UserError(f"{folder}: was trained with another {', '.join(differing)}; "
                        "use the same settings to continue or choose another output folder")


_FREE = ("steps", "preset", "batch", "report_every", "checkpoint_every", "check_every", "evaluation")
BASE_RATES = ("means", "quats", "scales", "opacities", "sh0", "shN")


def _read(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> the annotated type, for the few kinds of annotation that Config uses."""
    if is_dataclass(kind):
        known = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) - {f.name for f in fields(kind)}:
            unknown = sorted(set(value) - set(known)) if isinstance(value, dict) else value
            raise UserError(f"{where}: unknown setting {unknown}, expected some of {', '.join(known)}")
        return typing.cast(Any, kind)(**{k: _read(known[k], v, f"{where}: {k}") for k, v in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_read(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif origin is typing.Literal:
        if value in args:
            return value
    elif type(None) in args:
        return None if value is None else _read(args[0], value, where)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: found {value!r}, expected {kind if origin else kind.__name__}")


def _default(config: Config) -> None:
    """Ours: sampled order, per-Gaussian deltas, two elastic renders per view."""


def _fast(config: Config) -> None:
    """The default with one elastic render per view."""
    config.ratios.bands = ((0.008, 0.8),)


def _paper(config: Config) -> None:
    """FlexGS as its paper describes it, with the defects mended that have no effect on its claims."""
    config.steps = 35_000
    config.base.share = 15 / 35
    config.base.grow_until = 1.0
    config.base.reset_every = 0.2
    config.loss = Loss(full_l1=0.5, full_ssim=0.2, elastic_l1=0.5, elastic_ssim=0.1, elastic_fade=0.0)
    config.ratios.sampling = "random"
    config.order = Order(kind="gsnet", score="alpha_t")
    config.transform.kind = "field"
    config.background = (1.0, 1.0, 1.0)


def _plain(config: Config) -> None:
    """Plain 3DGS of the same length: the yardstick at e = 1; its cuts are pruned by importance, not trained."""
    config.loss.full_l1, config.loss.full_ssim = 0.8, 0.2
    config.ratios.bands = ()
    config.order.kind = "importance"
    config.transform.kind = "none"


def _smoke(config: Config) -> None:
    """Seconds on any machine, for tests."""
    config.steps, config.report_every, config.checkpoint_every, config.check_every = 200, 50, 100, 50
    config.base.max_splats, config.base.grow_every, config.base.sh_degree = 4_000, 40, 1


PRESETS = {"default": _default, "fast": _fast, "paper": _paper, "plain": _plain, "smoke": _smoke}
