"""Every setting of a run, as one tree of dataclasses, and the presets that differ in a few lines of it.

Lengths are counted in *views*: training images rendered and compared, over all workers. A step of the
optimizer uses `batch` views, so the same numbers mean the same work for one worker and for eight.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from flexgs import old_names
from flexgs.errors import UserError
from flexgs.inputs import Name, Range, read_json, typed

Ratio = Annotated[float, Range(1e-6, 1)]
"""A share of the Gaussians: of the largest models that there are, a millionth is a handful."""
Fraction = Annotated[float, Range(0, 1)]
Views = Annotated[int, Range(1, 10**9)]
"""A number of training views; a thousand million take years."""
Weight = Annotated[float, Range(0, 1000)]
"""Of a term of the loss. Adam takes out what all have in common; beyond this, float32 has no digits left for
the others."""
Rate = Annotated[float, Range(0, 0.1)]
"""Of Adam: about how far a parameter moves in a step. Log-scales and logits that move by more overflow within
some hundred."""
Factor = Annotated[float, Range(0, 100)]
Size = Annotated[float, Range(0, 1e6)]
"""A length in units of the scene scale, or a gradient: at the upper end, no Gaussian is as large."""
Cells = Annotated[int, Range(3, 4096)]
"""Of a grid along one axis; its smoothness is a second difference, which takes three."""
Temperature = Annotated[float, Range(1e-3, 1000)]
"""Of a softmax: logits are divided by it."""

MOST_CELLS = 2**26
"""Numbers in the planes of the field, ten times those of the paper: with their gradient and moments they take
1 GB."""
SCORES = Name("alpha_t", "opacity_t", "flexgs", "lightgaussian", "c3dgs", "eagles", "opacity", "volume",
              "footprint")
Input = Literal["means", "quats", "scales", "opacities", "importance"]
FieldHead = Literal["means", "scales", "quats", "opacities", "sh0"]


@dataclass
class DataConfig:
    """How the capture is read."""

    factor: Annotated[int, Range(1, 64)] = 4
    """Downscaling: the folder images_N if there is one, else images resized."""
    test_every: Annotated[int, Range(1, 10**6)] = 8
    """Every n-th view by sorted name is held out for evaluation."""
    masks: bool = True
    """Use masks/ beside images/ if it is there."""
    model: str | None = None
    """Which of several COLMAP models, such as 1 for sparse/1; by default the one of the most photographs."""
    cache_gb: Annotated[float, Range(0, 1e6)] | None = None
    """Memory for decoded images in each process; by default a quarter of what is free, at least 0.25 and at
    most 16."""

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_gb is None else int(self.cache_gb * 2**30)


@dataclass
class BaseConfig:
    """Stage 1: the plain 3DGS model that stage 2 makes elastic."""

    ply: str | None = None
    """Make the Gaussians of this PLY elastic instead: there is no stage 1, and stage 2 leaves them as they
    are."""
    stage1_fraction: Annotated[float, Range(0, 1, "(]")] = 0.5
    """Stage 1's share of all views."""
    sh_degree: Annotated[int, Range(0, 3)] = 3
    """Degree of the spherical harmonics; the active degree rises to it over the first fifth of stage 1."""
    refine_start: Fraction = 0.03
    """Densification starts after this share of stage 1 ..."""
    refine_stop: Fraction = 0.8
    """... and ends after this one."""
    refine_every: Views = 100
    """Views between two densifications."""
    grow_grad2d: Size = 2e-4
    """Mean gradient of the screen position (normalised device units) above which a Gaussian is cloned or
    split."""
    grow_scale3d: Size = 0.01
    """Larger than this share of the scene scale: split; smaller: clone."""
    max_splats: Annotated[int, Range(1, 10**8)] = 3_000_000
    """Densification stops at this many; the largest gradients go first."""
    prune_opa: Fraction = 0.005
    prune_scale3d: Annotated[float, Range(0, 1e6, "(]")] = 0.1
    """After the first opacity reset, Gaussians larger than this share of the scene_scale are removed."""
    l1: Weight = 0.8
    ssim: Weight = 0.2
    """Weights of L1 and of 1 - SSIM."""
    reset_every: Annotated[float, Range(0, 1000, "(]")] = 0.4
    """Opacities are reset to at most 0.01 each time this share of stage 1 has passed, while growing."""


@dataclass
class LearningRatesConfig:
    """Adam's learning rates; those marked (E) are multiplied by the scene scale."""

    means: Rate = 1.6e-4
    """(E) decays to a hundredth over each stage."""
    quats: Rate = 1e-3
    scales: Rate = 5e-3
    opacities: Rate = 0.05
    sh0: Rate = 2.5e-3
    shN: Rate = 1.25e-4
    shN_factor: Factor = 4.0
    """Factor on the rate of shN in stage 2, where one set of coefficients serves all ratios."""
    delta_means: Factor = 3.0
    """Factor on the rate of means for the per-ratio deltas of the means; other deltas use the rates above."""
    gsnet: Rate = 8e-4
    """GsNet; decays to a tenth over stage 2."""
    field: Rate = 8e-4
    """Trunk and heads of the field; decays to a tenth over stage 2."""
    planes: Rate = 8e-3
    """Planes of the field; decays to a tenth over stage 2."""
    restart: bool = False
    """Forget Adam's moments of the Gaussians when stage 2 begins."""


@dataclass
class LossConfig:
    """Weights of stage 2's photometric terms: L1 and 1 - SSIM of the full and the elastic renders."""

    full_l1: Weight = 0.8
    full_ssim: Weight = 0.2
    elastic_l1: Weight = 0.4
    elastic_ssim: Weight = 0.1
    elastic_fade: Factor = 0.0
    """p: an elastic render at ratio e moves the Gaussians shared by all ratios with e^p times its
    gradient."""


@dataclass
class RatiosConfig:
    """Which ratios stage 2 trains at."""

    sampling: Literal["log_uniform", "uniform", "random", "round_robin"] = "log_uniform"
    bands: Annotated[tuple[tuple[Ratio, Ratio], ...],
                     Range(0, 16)] = ((0.008, 0.035), (0.035, 0.14), (0.14, 0.6))
    """log_uniform, uniform: one elastic render per view and band, its ratio drawn within. Empty: no elastic
    render."""
    values: Annotated[tuple[Ratio, ...], Range(1, 1000)] = (0.01, 0.05, 0.10, 0.15)
    """random and round_robin: one elastic render per view at one of these."""
    upper_every: Annotated[int, Range(0, 10**9)] = 0
    """log_uniform, uniform: every so many views one more render, above the bands and below the whole model;
    0: never."""
    alternate: bool = False
    """Render the whole model at even views and the last band at odd ones, instead of both at each."""
    half_above: Annotated[float, Range(0, 1e9)] | None = 64.0
    """Elastic renders in which each Gaussian has more pixels than this to itself are half as wide and high;
    None: never."""

    @property
    def renders(self) -> int:
        """Elastic renders per view, but for that of upper_every."""
        return len(self.bands) if self.sampling in ("log_uniform", "uniform") else 1

    @property
    def upper(self) -> bool:
        """Whether upper_every asks for a render and the bands leave room for it."""
        banded = self.sampling in ("log_uniform", "uniform") and len(self.bands) > 0
        return self.upper_every > 0 and banded and self.bands[-1][1] < 1


@dataclass
class OrderConfig:
    """Which Gaussians stay: the first floor(e N) of one order, so cuts are nested."""

    kind: Annotated[str, Name("sampled", "importance", "opacity", "gsnet")] = "sampled"
    """sampled: weighted sampling without replacement, the score as weight; importance: by descending score;
    both as of the beginning of stage 2. opacity: by descending opacity, as training changes it; gsnet:
    learned."""
    score: Annotated[str, SCORES] = "alpha_t"
    """What a Gaussian is worth; model/importance.py says how each is computed."""
    temperature: Factor = 1.0
    """sampled: scale of the Gumbel noise on log score; 0 is the plain order by importance."""
    keep: Ratio = 1.0
    """Keep only this share of the Gaussians in stage 2, the first of the order: prune and fine-tune."""

    @property
    def fixed(self) -> bool:
        """Whether the order stays as it was when stage 2 began."""
        return self.kind not in ("opacity", "gsnet")


@dataclass
class GsNetConfig:
    """The adaptive selector of FlexGS."""

    shape: Literal["paper", "code"] = "paper"
    """paper: two branches (all inputs, ratio) of width 64; code: a branch of 32 per input and one for the
    ratio."""
    inputs: Annotated[tuple[Input, ...], Range(1, 5)] = ("means", "quats", "scales")
    """What it sees of a Gaussian; importance: the normal quantile of its place by global importance."""
    normalise: bool = True
    """Means to the box of the scene, log-scales to their median, q and -q the same; False: the scene's unit,
    scales, raw q."""
    noise: bool = True
    """Training draws its selection with Gumbel noise; False: it takes the floor(eN) of the largest
    margins."""
    order_noise: bool = False
    """One seeded draw of the noise goes into the final order; False: the order is that of the margins."""
    temperature: Temperature = 1.0
    """Of the Gumbel-softmax, at the start of stage 2."""
    temperature_end: Temperature = 1.0
    """At its end; exponential in between."""
    gi_weight: Weight = 1.0
    """Of the loss that pulls the mask towards the global-importance mask."""
    sparsity_weight: Weight = 0.01
    """Of the loss that pulls the number of selected Gaussians towards e N; without noise the number is
    exact."""
    refresh: Views = 1000
    """Views between two computations of global importance."""
    detach: bool = True
    """Keep gradients of the mask from reaching means, quats and scales through the selector's inputs."""


@dataclass
class TransformConfig:
    """What changes in the Gaussians that stay; nothing at e = 1."""

    kind: Annotated[str, Name("deltas", "field", "none")] = "deltas"


@dataclass
class DeltasConfig:
    """Per-Gaussian changes at knots of log e, linear in between, none at e = 1."""

    knots: Annotated[tuple[Ratio, ...], Range(1, 64)] = (0.01, 0.032, 0.1, 0.32, 0.5)
    rows: tuple[Ratio, ...] | None = None
    """Knot j holds the first floor(rows_j N) Gaussians only; None: as many as a cut at the knot has. One knot
    with more rows than that, for instance knots 0.01 and rows 0.32, is rank 1: one change per Gaussian, times
    log e."""
    merge: Fraction = 0.1
    """Knots up to this ratio start from Gaussians merged with the dropped ones nearest to them; 0: from no
    change."""


@dataclass
class FieldConfig:
    """The spatial-ratio neural field of FlexGS: six feature planes per level and a multi-head predictor."""

    resolution: tuple[Cells, Cells, Cells, Cells] = (64, 64, 64, 100)
    """Of x, y, z and e at level 1; all planes together may have MOST_CELLS numbers."""
    levels: Annotated[tuple[Annotated[int, Range(1, 64)], ...], Range(1, 8)] = (1, 2, 4)
    """Factors on the resolution of x, y, z."""
    box: Literal["means", "points"] = "means"
    """means: 1st to 99th percentile of the means when stage 2 begins; points: all points of the capture."""
    ratio_axis: Literal["linear", "log"] = "linear"
    """linear: e itself is the coordinate, (0, 1] of [-1, 1]; log: log e, [0.005, 1] onto [-1, 1]."""
    gate: bool = False
    """Fade the changes out towards e = 1, with the factor log e / log 0.005."""
    channels: Annotated[int, Range(1, 256)] = 16
    width: Annotated[int, Range(1, 1024)] = 64
    """Hidden features of the predictor."""
    heads: Annotated[tuple[FieldHead, ...], Range(1, 5)] = ("means", "scales", "quats")
    zero_init: bool = True
    """Start from a field that changes nothing; False: from random heads."""
    scale_change: Literal["log", "activated"] = "log"
    """Changes are added to the log-scales, or to the scales themselves."""
    ratio_smoothness: Weight = 1e-3
    """Weight of the squared second difference along e."""
    ratio_l1: Weight = 1e-4
    """Weight of |plane - 1| of the ratio planes."""
    space_smoothness: Weight = 2e-4
    """Weight of the squared second differences of the spatial planes."""
    smooth_both: bool = True
    """... along both of their axes; False: along the second one only."""

    @property
    def cells(self) -> int:
        """Numbers in all planes."""
        levels = [(*(level * n for n in self.resolution[:3]), self.resolution[3]) for level in self.levels]
        return self.channels * sum(a * b for sizes in levels for a, b in itertools.combinations(sizes, 2))


@dataclass
class EvaluationConfig:
    """What is measured on the test views."""

    ratios: Annotated[tuple[Ratio, ...], Range(1, 1000)] = (0.01, 0.05, 0.10, 0.15, 0.5, 1.0)
    format: Literal["ply", "compressed_ply", "spz", "sog", "splat", "gltf", "vq", "latents"] = "ply"
    """What the cuts are stored as: quality is measured after reading the file back, and its bytes are
    counted."""
    lpips: tuple[Literal["vgg", "alex"], ...] = ("vgg", "alex")
    """LPIPS backbones; one that cannot be had is reported as not computed, with the reason."""
    lpips_weights: str | None = None
    """Folder of the backbones where nothing may be downloaded; default: $FLEXGS_LPIPS_WEIGHTS."""
    lpips_range: Literal["[-1, 1]", "[0, 1]"] = "[-1, 1]"
    """Range that the backbone is given: [-1, 1] is LPIPS as published, [0, 1] is what FlexGS's figures were
    made with."""
    views: Literal["all", "even", "odd"] = "all"
    """Of the test views: all, or every second one. A search chooses by the even ones and reports the odd
    ones."""

    def check(self, prefix: str = "--") -> None:
        """Raise UserError for values outside of their ranges."""
        check_ranges(self, prefix)


@dataclass
class DistributedConfig:
    """How the workers of one scene add up their gradients; docs/distributed.md says what pays where."""

    rows: Literal["all", "seen"] = "all"
    """seen: of the Gaussians, only those that some worker saw in this step; the sums are the same."""
    sh_rest: Literal["float32", "bfloat16"] = "float32"
    """What the gradients of shN travel as: three quarters of the bytes, which bfloat16 halves and rounds to 3
    digits."""


@dataclass
class Config:
    """A run. `Config.from_preset("paper")` gives a named one."""

    preset: str = "default"
    """The preset to start from; other flags change it."""
    seed: Annotated[int, Range(0, 10**18 - 1)] = 0
    steps: Views = 30_000
    """Training views in all, stage 1 and stage 2; raising it continues a finished run."""
    batch: Annotated[int, Range(1, 1024)] | None = None
    """Views per optimizer step over all workers; None: one per worker."""
    background: tuple[Fraction, Fraction, Fraction] = (0.0, 0.0, 0.0)
    report_every: Views = 200
    """Views between two progress lines."""
    checkpoint_every: Views = 2000
    """Views between two checkpoints."""
    check_every: Views = 500
    """Views between two comparisons of the workers' replicas."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    lr: LearningRatesConfig = dataclasses.field(default_factory=LearningRatesConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    ratios: RatiosConfig = dataclasses.field(default_factory=RatiosConfig)
    order: OrderConfig = dataclasses.field(default_factory=OrderConfig)
    gsnet: GsNetConfig = dataclasses.field(default_factory=GsNetConfig)
    transform: TransformConfig = dataclasses.field(default_factory=TransformConfig)
    deltas: DeltasConfig = dataclasses.field(default_factory=DeltasConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    @property
    def base_steps(self) -> int:
        """Views of stage 1."""
        return 0 if self.base.ply else round(self.steps * self.base.stage1_fraction)

    @staticmethod
    def from_preset(name: str, **settings: Any) -> "Config":
        """One of PRESETS by name; settings replace top-level fields, for instance steps=7000."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS)
            raise UserError(f"--preset {name}: unknown; "
                            f"{f'did you mean {near[0]}? ' if near else ''}expected one of "
                            f"{', '.join(PRESETS)}")
        config = Config(preset=name)
        PRESETS[name](config)
        return dataclasses.replace(config, **settings)

    def check(self) -> "Config":
        """Raise UserError for values that no run can use: outside of their ranges, which stand at the
        settings, or at odds with each other, which is tested here."""
        check_ranges(self)
        for option, rising in {"knots": self.deltas.knots, "rows": self.deltas.rows or ()}.items():
            if any(a >= b for a, b in itertools.pairwise(rising)):
                raise UserError(f"--deltas.{option}: found {rising}, expected rising ratios")
        if self.deltas.rows is not None and len(self.deltas.rows) != len(self.deltas.knots):
            raise UserError(f"--deltas.rows: found {len(self.deltas.rows)}, expected one for each of the "
                            f"{len(self.deltas.knots)} knots")
        for low, high in self.ratios.bands:
            if low >= high:
                raise UserError(f"--ratios.bands: found {low} {high}, expected 0 < low < high <= 1")
        if len(set(self.gsnet.inputs)) < len(self.gsnet.inputs):
            raise UserError(f"--gsnet.inputs: found {self.gsnet.inputs}, expected each once")
        if self.field.cells > MOST_CELLS:
            raise UserError("--field.resolution, --field.levels, --field.channels: found "
                            f"{self.field.cells:,} numbers in the planes, expected at most {MOST_CELLS:,}")
        if not self.order.fixed and self.transform.kind == "deltas":
            raise UserError("--transform.kind deltas: needs a fixed order, found "
                            f"--order.kind {self.order.kind}; expected field or none")
        if not self.order.fixed and self.order.keep < 1:
            raise UserError(f"--order.keep: found {self.order.keep} with --order.kind {self.order.kind}, "
                            "whose order is known at the end only; expected --order.kind "
                            "importance or sampled")
        if self.base.ply and self.transform.kind == "none":
            raise UserError("--transform.kind none: with --base.ply there is nothing to train; "
                            "expected deltas or field")
        return self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def stage1(self) -> dict[str, Any]:
        """The settings that the Gaussians of stage 1 depend on, but for numbers of views, as JSON values:
        runs that agree in them can start from one stage 1."""
        tree = self.to_dict()
        return {**{key: tree[key] for key in ("seed", "background", "base")},
                # how images are held
                "data": {key: value for key, value in tree["data"].items() if key != "cache_gb"},
                "lr": {key: tree["lr"][key]
                       for key in ("means", "quats", "scales", "opacities", "sh0", "shN")}}

    @staticmethod
    def from_dict(values: dict[str, Any], source: str = "config") -> "Config":
        """The reverse of to_dict; UserError names the source and a key that is unknown, or a value that
        cannot be."""
        config: Config = typed(Config, old_names.config(values), source)
        try:
            return config.check()
        except UserError as e:
            raise UserError(f"{source}: {e}") from None

    @staticmethod
    def load(path: Path) -> "Config":
        return Config.from_dict(read_json(path), str(path))


def settings(tree: Any, prefix: str = "--") -> Iterator[tuple[str, Any, Any]]:
    """(flag, annotated type, value) of every setting of a tree of dataclasses: --lr.delta-means and so
    on."""
    kinds = get_type_hints(type(tree), include_extras=True)
    for f in dataclasses.fields(tree):
        flag, value = f"{prefix}{f.name.replace('_', '-')}", getattr(tree, f.name)
        yield from settings(value, f"{flag}.") if dataclasses.is_dataclass(value) else [(flag, kinds[f.name], value)]


def check_ranges(tree: Any, prefix: str = "--") -> None:
    """UserError for the first setting of a tree of dataclasses that is outside of its range."""
    for flag, kind, value in settings(tree, prefix):
        typed(kind, value, flag)


def ratio_name(ratio: float) -> str:
    """0.05 -> "0.05", as results.json and tables name it; other ratios have other names, and the name is the
    ratio."""
    return short if float(short := f"{ratio:g}") == ratio else repr(ratio)


def percent_name(ratio: float) -> str:
    """0.05 -> "5", as files and folders name it; other ratios have other names."""
    return f"{(100 * Decimal(ratio_name(ratio))).normalize():f}"


def percent(ratio: float | str) -> str:
    """0.05 -> "5 %", as people read it."""
    return f"{100 * float(ratio):g} %"


def check_ratio(ratio: float, option: str = "ratio") -> float:
    """ratio itself if it lies in (0, 1], else UserError."""
    if not 0 < ratio <= 1:
        raise UserError(f"{option}: found {ratio}, expected a ratio above 0 and at most 1 (0.05 keeps 5 %)")
    return ratio


def count_at(ratio: float, n: int) -> int:
    """floor(ratio n), at least 1 (FlexGS supplementary, B.2); exact for ratios that binary floats round
    down."""
    return max(1, math.floor(check_ratio(ratio) * n + 1e-9))


def check_same_method(theirs: Config, ours: Config, elastic: bool, folder: Path) -> None:
    """UserError if what was trained under theirs, into folder, cannot be continued under ours.

    Before stage 2 begins (elastic False) only the settings of stage 1 matter, so that many runs can start
    from one stage 1.
    """
    if elastic:
        was, now = ({**c.to_dict(), "data": c.stage1()["data"]} for c in (theirs, ours))
    else:
        was, now = theirs.stage1(), ours.stage1()
    if differing := [k for k in was if k not in _FREE and was[k] != now[k]]:
        raise UserError(f"{folder}: was trained with another {', '.join(differing)}; "
                        "use the same settings to continue or choose another output folder")


_FREE = ("steps", "preset", "batch", "report_every", "checkpoint_every", "check_every", "distributed",
         "evaluation")


def _default(config: Config) -> None:
    """Ours: sampled order, per-Gaussian deltas, three elastic renders per view."""
    config.ratios.upper_every = 8


def _fast(config: Config) -> None:
    """The default with the two costliest renders in turn: the whole model and the largest cut."""
    _default(config)
    config.ratios.alternate = True


def _paper(config: Config) -> None:
    """FlexGS as its paper describes it, its unusable formulas replaced. Rows are those of docs/method.md."""
    config.lr.shN_factor, config.ratios.half_above = 1.0, None
    config.steps = 35_000
    config.base.stage1_fraction = 15 / 35                              # row 11: 15k + 20k
    config.base.refine_stop = 1.0
    config.base.reset_every = 0.2
    config.loss = LossConfig(full_l1=0.5, full_ssim=0.2, elastic_l1=0.5, elastic_ssim=0.1)  # row 9
    config.ratios.sampling = "random"                        # row 12
    config.order = OrderConfig(kind="gsnet", score="alpha_t")      # row 6
    config.transform.kind = "field"
    config.background = (1.0, 1.0, 1.0)


def _official(config: Config) -> None:
    """FlexGS as its released code does it: what differs from its paper. Rows are those of docs/method.md.

    The code multiplies the learning rates of its networks by the scene scale E; the fixed ones used here
    are those of E = 5.
    """
    _paper(config)
    config.steps = 45_000
    config.base.stage1_fraction = 15 / 45                              # row 11: 15k + 30k
    config.base.l1 = 1.0                                     # row 10
    config.ratios.sampling = "round_robin"                   # row 12
    config.ratios.values = (0.20, 0.15, 0.10, 0.05, 0.01)    # row 12
    config.order.score = "opacity_t"                         # row 6
    config.gsnet.shape = "code"                              # row 1: four branches of 32
    config.gsnet.normalise = False                           # row 31: raw inputs ...
    # row 31: ... through which gradients reach the Gaussians
    config.gsnet.detach = False
    config.gsnet.order_noise = True                          # row 20
    config.field.resolution = (64, 64, 64, 150)              # row 13: 150 columns
    config.field.smooth_both = False                         # row 16
    config.field.scale_change = "activated"                  # row 17
    config.field.zero_init = False                           # row 19
    config.field.box = "points"                              # row 30
    config.lr.restart = True                              # row 23


def _mended(config: Config) -> None:
    """FlexGS's own architecture without its defects. Steps are those of docs/method.md, which mends one by
    one."""
    _paper(config)
    config.ratios.sampling = "log_uniform"                   # row 12
    config.ratios.bands = ((0.008, 0.08), (0.08, 0.8))
    # row 20: training selects as the final order does
    config.gsnet.noise = False
    config.gsnet.inputs = ("means", "quats", "scales", "opacities", "importance")  # step 3
    config.field.ratio_axis = "log"                          # row 13
    config.field.resolution = (64, 64, 64, 32)               # row 13
    config.field.gate = True                                 # step 5
    config.field.heads = ("means", "scales", "quats", "opacities", "sh0")  # step 6
    config.lr.gsnet, config.lr.field, config.lr.planes = 4e-3, 4e-3, 4e-2  # step 7: five times


def _plain(config: Config) -> None:
    """Plain 3DGS of the same length: the yardstick at 100 %. Its cuts are pruned by LightGaussian's score and
    not fine-tuned, the paper's LightGS*.
    """
    config.lr.shN_factor, config.ratios.half_above = 1.0, None
    config.ratios.bands = ()
    config.order = OrderConfig(kind="importance", score="lightgaussian")
    config.transform.kind = "none"


def _lightgs(config: Config) -> None:
    """LightGaussian (Fan et al. 2024): pruned by its score, then fine-tuned, a model for each ratio. Left
    out: distillation of the harmonics and vector quantisation.
    """
    _plain(config)
    config.order.keep = 0.1  # below 1: compare makes a model for each ratio


def _c3dgs(config: Config) -> None:
    """Compressed 3DGS (Niedermayr et al. 2024): pruned by the images' sensitivity to the colour, then
    fine-tuned, a model for each ratio. Its vector quantisation: --evaluation.format vq. Left out: fine-tuning
    the quantised model.
    """
    _lightgs(config)
    config.order.score = "c3dgs"


def _eagles(config: Config) -> None:
    """EAGLES (Girish et al. 2024): pruned by influence, then fine-tuned, a model for each ratio. Its
    quantised latents: --evaluation.format latents. Left out: training with them, and from coarse to fine
    images.
    """
    _lightgs(config)
    config.order.score = "eagles"


def _matryoshka(config: Config) -> None:
    """Matryoshka Gaussian Splatting (Guo et al. 2026): ordered by opacity at every step, the whole and one
    random prefix of it rendered per view. Left out: densification as in 3DGS-MCMC, training so from the first
    step.
    """
    _plain(config)
    config.order.kind = "opacity"
    config.ratios.sampling = "uniform"
    # the lower end is not published; this is the smallest ratio measured
    config.ratios.bands = ((0.01, 1.0),)
    config.loss.elastic_l1, config.loss.elastic_ssim = config.loss.full_l1, config.loss.full_ssim


def _scratch(config: Config) -> None:
    """Plain 3DGS trained small: as many steps in all, densified to floor(e N) and no further, a model for
    each ratio.

    Without resets of the opacities, after each of which a model at its limit is pruned and starts to grow
    again.
    """
    _plain(config)
    config.base.stage1_fraction = 1.0  # compare makes a model for each ratio, from nothing
    config.base.reset_every = 2.0


def _smoke(config: Config) -> None:
    """Seconds on any machine, for tests."""
    _default(config)
    config.steps, config.report_every, config.checkpoint_every, config.check_every = 200, 50, 100, 50
    config.base.max_splats, config.base.refine_every, config.base.sh_degree = 4_000, 40, 1


PRESETS = {f.__name__[1:]: f for f in (_default, _fast, _paper, _official, _mended, _plain, _lightgs, _c3dgs,
                                       _eagles, _matryoshka, _scratch, _smoke)}

METHODS = ("plain", "lightgs", "c3dgs", "eagles", "matryoshka", "scratch", "official", "paper", "default",
           "fast")
"""What is compared unless the user names methods: the paper's rivals, two beyond the paper, and FlexGS."""
