"""Every setting of a run, as one tree of dataclasses, and the presets that differ in a few lines of it.

Training is counted in *views*: training images rendered and compared, over all workers. One optimizer step
uses `batch` views, so a number of views means the same work for one worker and for eight.

The text below a field is what `flexgs train --help` prints for it.
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
"""Fraction of the Gaussians that a cut keeps; of the largest models there are, a millionth is a handful."""
Fraction = Annotated[float, Range(0, 1)]
Views = Annotated[int, Range(1, 10**9)]
"""Number of training views; a thousand million would take years."""
Weight = Annotated[float, Range(0, 1000)]
"""Weight of a loss term. Adam cancels a common factor; above 1000 float32 has no digits left for the rest."""
Rate = Annotated[float, Range(0, 0.1)]
"""Learning rate of Adam, about how far a parameter moves in a step. Log-scales and logits that move further
overflow within some hundred steps."""
Factor = Annotated[float, Range(0, 100)]
Positive = Annotated[float, Range(0, 100, "(]")]
Size = Annotated[float, Range(0, 1e6)]
"""Length as a fraction of the scene scale, or a gradient; no Gaussian is as large as the upper end."""
Cells = Annotated[int, Range(3, 4096)]
"""Grid cells along one axis; the smoothness loss is a second difference, which needs three."""
Temperature = Annotated[float, Range(1e-3, 1000)]
"""Temperature of a softmax: the logits are divided by it."""

CUT_COST = 0.36
"""What the training render of a cut costs, as a fraction of one of the whole model: a mean of the bands."""
MOST_CELLS = 2**26
"""Most numbers in the planes of the field: ten times FlexGS's, 1 GB with gradients and Adam's moments."""
SCORES = Name("alpha_t", "opacity_t", "flexgs", "lightgaussian", "c3dgs", "eagles", "opacity", "volume",
              "footprint")
Input = Literal["means", "quats", "scales", "opacities", "importance"]
FieldHead = Literal["means", "scales", "quats", "opacities", "sh0"]


@dataclass
class DataConfig:
    """How the images and camera poses of a capture are read."""

    factor: Annotated[int, Range(1, 64)] = 4
    """Train on images 1/N as wide and high, from the folder images_N if there is one, else resized. 1: full
    size."""
    test_every: Annotated[int, Range(1, 10**6)] = 8
    """Hold out every Nth image, sorted by name and starting with the first, for evaluation, unless the
    capture names its own test images."""
    masks: bool = True
    """Use the masks in masks/ beside images/, if there are any."""
    model: str | None = None
    """Which COLMAP model to read, such as 1 for sparse/1. None: the one with the most images."""
    cache_gb: Annotated[float, Range(0, 1e6)] | None = None
    """GiB of decoded images that the workers of a machine keep in memory together; 0 decodes every time.
    None: a quarter of the free memory, at least 0.25 and at most 16 for each worker."""

    @property
    def cache_bytes(self) -> int | None:
        """The size of a machine's image caches in bytes; None where cache_gb leaves it to the free memory."""
        return None if self.cache_gb is None else int(self.cache_gb * 2**30)


@dataclass
class BaseConfig:
    """Stage 1: plain 3DGS (Kerbl et al. 2023), the model that stage 2 makes elastic.

    Sizes are fractions of the scene scale: 1.1 times the largest distance of a camera from their mean.
    """

    ply: str | None = None
    """PLY file of Gaussians to make elastic. Stage 1 is then skipped, and stage 2 does not change them."""
    stage1_fraction: Annotated[float, Range(0, 1, "(]")] = 0.5
    """Fraction of all views that stage 1 trains for; the rest is stage 2. 1: no stage 2."""
    sh_degree: Annotated[int, Range(0, 3)] = 3
    """Degree of the spherical harmonics, reached step by step over the first fifth of stage 1. 0: colours
    do not depend on the view direction."""
    densify: Literal["gradient", "mcmc"] = "gradient"
    """How Gaussians are added and removed. gradient: as in 3DGS, by the gradient of the screen position;
    mcmc: as in 3DGS-MCMC (Kheradmand et al. 2024), transparent ones move to opaque ones."""
    init_opa: Annotated[float, Range(0, 1, "()")] = 0.1
    """Opacity of the Gaussians that training begins with."""
    init_scale: Positive = 1.0
    """Standard deviation of the Gaussians that training begins with, times the distance of their points."""
    refine_start: Fraction = 0.03
    """Fraction of stage 1 after which densification (cloning, splitting and pruning) starts. 1: never."""
    refine_stop: Fraction = 0.8
    """Fraction of stage 1 after which densification and opacity resets end. 0: there are none."""
    refine_every: Views = 100
    """Views between two rounds of densification."""
    grow_grad2d: Size = 2e-4
    """Clone or split Gaussians whose mean gradient of the screen position, in normalised device
    coordinates, is larger than this."""
    grow_scale3d: Size = 0.01
    """Split growing Gaussians that are larger than this fraction of the scene scale, clone smaller ones."""
    max_splats: Annotated[int, Range(1, 10**8)] = 3_000_000
    """Most Gaussians, initial points included; near the limit those with the largest gradients grow first."""
    prune_opa: Fraction = 0.005
    """Densification removes Gaussians whose opacity is below this. 0: none."""
    opacity_reg: Weight = 0.01
    """Weight of the mean opacity in the loss, for densify mcmc."""
    scale_reg: Weight = 0.01
    """Weight of the mean standard deviation, in fifths of the scene scale, in the loss, for densify mcmc."""
    noise_lr: Annotated[float, Range(0, 1e9)] = 5e5
    """Noise of nearly transparent positions, as a factor on the learning rate of the means, for densify
    mcmc."""
    prune_scale3d: Annotated[float, Range(0, 1e6, "(]")] = 0.1
    """After the first opacity reset, densification removes Gaussians larger than this fraction of the scene
    scale."""
    l1: Weight = 0.8
    """Weight of the L1 loss in stage 1."""
    ssim: Weight = 0.2
    """Weight of the loss 1 - SSIM in stage 1."""
    reset_every: Annotated[float, Range(0, 1000, "(]")] = 0.4
    """Fraction of stage 1 between two opacity resets, which lower all opacities to at most 0.01. At or above
    refine_stop: no resets."""


@dataclass
class LearningRatesConfig:
    """Learning rates of Adam for batches of one view; a batch of B views multiplies them by sqrt(B)."""

    means: Rate = 1.6e-4
    """Learning rate of the positions, times the scene scale; decays to a hundredth over each stage."""
    quats: Rate = 1e-3
    """Learning rate of the rotations (quaternions)."""
    scales: Rate = 5e-3
    """Learning rate of the log-scales."""
    opacities: Rate = 0.05
    """Learning rate of the opacity logits."""
    sh0: Rate = 2.5e-3
    """Learning rate of the constant spherical-harmonics coefficient, the base colour."""
    shN: Rate = 1.25e-4
    """Learning rate of the spherical-harmonics coefficients of degree 1 and higher."""
    shN_factor: Factor = 4.0
    """Factor on the learning rate of shN in stage 2, where one set of coefficients serves all ratios."""
    stage2: tuple[Positive, Positive] = (1.0, 1.0)
    """Factors on the learning rates of the Gaussians at the start and at the end of stage 2; in between they
    change exponentially."""
    delta_fall: bool = False
    """Multiply the learning rates of the deltas by 5 at the start of stage 2, falling to a half at its end;
    less at knots above 0.1 (model/deltas.py has the factors)."""
    delta_means: Factor = 3.0
    """Factor on the learning rate of the positions for their per-ratio deltas; deltas of other attributes
    use the learning rate of the attribute."""
    gsnet: Rate = 8e-4
    """Learning rate of GsNet; decays to a tenth over stage 2."""
    field: Rate = 8e-4
    """Learning rate of the field's trunk and heads; decays to a tenth over stage 2."""
    planes: Rate = 8e-3
    """Learning rate of the field's feature planes; decays to a tenth over stage 2."""
    restart: bool = False
    """Start stage 2 with fresh Adam moments for the Gaussians instead of those of stage 1."""


@dataclass
class LossConfig:
    """Weights of the image losses of stage 2, for the whole model and for its cuts (elastic renders)."""

    full_l1: Weight = 0.8
    """Weight of the L1 loss of the whole model."""
    full_ssim: Weight = 0.2
    """Weight of the loss 1 - SSIM of the whole model."""
    elastic_l1: Weight = 0.4
    """Weight of the L1 loss of the cuts of a view, divided by the number of different bands."""
    elastic_ssim: Weight = 0.1
    """Weight of the loss 1 - SSIM of the cuts of a view, divided by the number of different bands."""
    elastic_fade: Factor = 0.0
    """Exponent p of the factor e^p on the gradient that a cut at ratio e gives the Gaussians that all
    ratios share. 0: no factor; larger: small cuts move them less."""


@dataclass
class RatiosConfig:
    """Ratios (fractions of the Gaussians kept) of the cuts that stage 2 renders."""

    sampling: Literal["log_uniform", "uniform", "random", "round_robin"] = "log_uniform"
    """log_uniform, uniform: one ratio drawn within each of `bands`, the same one for all views of a step
    in the last two bands. random, round_robin: one of `values` for every step, drawn or in turn."""
    bands: Annotated[tuple[tuple[Ratio, Ratio], ...],
                     Range(0, 16)] = ((0.008, 0.035), (0.035, 0.14), (0.14, 0.6))
    """Ranges of the ratio, for log_uniform and uniform: every view renders one cut within each. A range that
    is there again renders one more, of the view half an epoch later. Empty: no cuts are trained."""
    values: Annotated[tuple[Ratio, ...], Range(1, 1000)] = (0.01, 0.05, 0.10, 0.15)
    """Ratios to choose from, for random and round_robin: every view renders one cut at one of them."""
    named: Fraction = 0.0
    """Probability that a cut within a band is at one of `values` there, instead of at a drawn ratio. Above 0,
    models are better at `values` and worse at other ratios."""
    upper_every: Annotated[int, Range(0, 10**9)] = 0
    """Every N steps, render one extra cut of each view between the top band and 1, for log_uniform and
    uniform. 0: never."""
    lowest: Fraction = 0.0
    """Smallest ratio trained: with upper_every, every N steps also render one cut between it and the bands.
    0: none below them."""
    alternate: bool = False
    """Render the whole model in even steps and the top band in odd ones, instead of both in each."""
    half_above: Annotated[float, Range(0, 1e9)] | None = 64.0
    """Render a cut at half resolution when it has fewer Gaussians than pixels / half_above. 0: always; None:
    never."""

    @property
    def renders(self) -> int:
        """Number of elastic renders per view, without the extra one of upper_every."""
        return len(self.bands) if self.sampling in ("log_uniform", "uniform") else 1

    @property
    def kinds(self) -> int:
        """Number of different bands, by which the losses of the cuts are divided; at least 1."""
        return len(set(self.bands[:self.renders])) or 1

    @property
    def cost(self) -> float:
        """About how long a view of stage 2 takes, as a multiple of one of stage 1.

        `flexgs bench step` measured 2.4 for the preset default, 1.4 for fast and 3.2 for quality.
        """
        whole = 0.5 if self.alternate else 1.0
        return whole + CUT_COST * (self.renders - 1 + whole)

    @property
    def rare(self) -> list[tuple[float, float]]:
        """Ranges outside of the bands, of which a cut is rendered every `upper_every` steps."""
        if self.sampling not in ("log_uniform", "uniform") or not self.bands or not self.upper_every:
            return []
        beyond = [(self.bands[-1][1], 1.0), (self.lowest, self.bands[0][0])]
        return [(low, high) for low, high in beyond if 0 < low < high]


@dataclass
class OrderConfig:
    """The order of the Gaussians: a cut at ratio e keeps the first floor(e N) of them, so cuts are nested."""

    kind: Annotated[str, Name("sampled", "importance", "tree", "opacity", "gsnet", "gns")] = "sampled"
    """sampled, importance, tree: fixed when stage 2 starts, by weighted sampling without replacement, by
    descending score, or by merging pairs, weighted by score; opacity: re-sorted at every step; gsnet:
    learned; gns: natural selection of the Gaussians to keep (Deng et al. 2025), then by descending score."""
    score: Annotated[str, SCORES] = "alpha_t"
    """Importance score of a Gaussian; model/importance.py has the formula and the paper of each."""
    temperature: Factor = 1.0
    """Scale of the random (Gumbel) noise on the log score, for sampled. 0: by descending score; larger: more
    random."""
    keep: Ratio = 1.0
    """Fraction of the Gaussians that stage 2 keeps, the first ones of the order: prune, then fine-tune. With
    kind tree the others are merged into them. 1: all."""
    push: Annotated[float, Range(0, 1, "(]")] = 0.12
    """With kind gns, the first fraction of stage 2, over which opacities are pushed down until as many
    Gaussians have died as keep asks for."""

    @property
    def fixed(self) -> bool:
        """Whether the order stays as it was when stage 2 began."""
        return self.kind not in ("opacity", "gsnet")


@dataclass
class GsNetConfig:
    """GsNet, the network of FlexGS that learns which Gaussians stay (order.kind gsnet)."""

    shape: Literal["paper", "code"] = "paper"
    """paper: one branch for all inputs and one for the ratio, of width 64; code: one branch per input and one
    for the ratio, of width 32."""
    inputs: Annotated[tuple[Input, ...], Range(1, 5)] = ("means", "quats", "scales")
    """Attributes of a Gaussian that GsNet sees; importance: the normal quantile of its rank by importance."""
    normalise: bool = True
    """Centre and scale the means, subtract the median from the log-scales and give q and -q the same value.
    False: raw means, scales and unit quaternions."""
    noise: bool = True
    """Draw the selection in training with Gumbel noise. False: select the floor(e N) with the largest
    margins."""
    order_noise: bool = False
    """Add one seeded draw of the noise to the margins that the final order sorts by. False: no noise."""
    temperature: Temperature = 1.0
    """Temperature of the Gumbel-softmax at the start of stage 2."""
    temperature_end: Temperature = 1.0
    """Temperature of the Gumbel-softmax at the end of stage 2; it changes exponentially in between."""
    gi_weight: Weight = 1.0
    """Weight of the loss that pulls the selection towards the floor(e N) most important Gaussians."""
    sparsity_weight: Weight = 0.01
    """Weight of the loss that pulls the number selected towards e N; unused without noise, where it is
    exact."""
    refresh: Views = 1000
    """Views between two computations of the importance that teaches GsNet."""
    detach: bool = True
    """Stop the gradients of the selection before they reach the Gaussians through GsNet's inputs."""


@dataclass
class TransformConfig:
    """What changes in the Gaussians that a cut keeps; nothing changes at ratio 1."""

    kind: Annotated[str, Name("deltas", "field", "none")] = "deltas"
    """deltas: changes stored per Gaussian; field: a neural field decodes them (FlexGS); none: no changes."""


@dataclass
class DeltasConfig:
    """Changes stored per Gaussian at a few ratios, the knots, and linear in log e between them."""

    knots: Annotated[tuple[Ratio, ...], Range(1, 64)] = (0.01, 0.032, 0.1, 0.32, 0.5)
    """Ratios, rising, at which changes are stored. Below the first they are constant; from the last to ratio
    1 they fade out."""
    rows: tuple[Ratio, ...] | None = None
    """Fraction of the Gaussians with a stored delta at each knot, rising. None: the knot itself, as many as
    its cut keeps. More at a single knot (knots 0.01, rows 0.32): one change per Gaussian, times log e."""
    start: Literal["nearest", "tree", "none"] = "nearest"
    """What the knots up to `merge` start from. nearest: the Gaussians kept, each merged with the dropped ones
    that it is nearest to; tree: the merge tree's clusters with order.kind tree, and else as nearest; none: no
    change."""
    merge: Fraction = 0.1
    """Knots above this ratio start from no change."""


@dataclass
class FieldConfig:
    """The spatial-ratio neural field of FlexGS: six feature planes per level and a multi-head predictor."""

    resolution: tuple[Cells, Cells, Cells, Cells] = (64, 64, 64, 100)
    """Grid cells along x, y, z and the ratio at level 1; the planes may hold 2^26 numbers in all."""
    levels: Annotated[tuple[Annotated[int, Range(1, 64)], ...], Range(1, 8)] = (1, 2, 4)
    """Factor of each level on the resolution along x, y and z."""
    box: Literal["means", "points"] = "means"
    """Box that the planes span. means: 1st to 99th percentile of the means when stage 2 begins; points: all
    points of the capture."""
    ratio_axis: Literal["linear", "log"] = "linear"
    """Coordinate along the ratio axis [-1, 1]. linear: the ratio itself, which uses half of it; log: its
    logarithm, [0.005, 1] onto the whole axis."""
    gate: bool = False
    """Multiply the changes by log e / log 0.005, at most 1, so that they fade out towards ratio 1."""
    channels: Annotated[int, Range(1, 256)] = 16
    """Features per cell of a plane."""
    width: Annotated[int, Range(1, 1024)] = 64
    """Hidden features of the predictor."""
    heads: Annotated[tuple[FieldHead, ...], Range(1, 5)] = ("means", "scales", "quats")
    """Attributes of the Gaussians that the field changes."""
    zero_init: bool = True
    """Start from a field that changes nothing. False: start from random heads."""
    scale_change: Literal["log", "activated"] = "log"
    """Whether changes are added to the log-scales (log) or to the scales (activated)."""
    ratio_smoothness: Weight = 1e-3
    """Weight of the squared second difference of the ratio planes along the ratio."""
    ratio_l1: Weight = 1e-4
    """Weight of the mean |plane - 1| of the ratio planes."""
    space_smoothness: Weight = 2e-4
    """Weight of the squared second differences of the spatial planes."""
    smooth_both: bool = True
    """Smooth the spatial planes along both of their axes. False: along the second one only."""

    @property
    def cells(self) -> int:
        """How many numbers all planes hold together."""
        levels = [(*(level * n for n in self.resolution[:3]), self.resolution[3]) for level in self.levels]
        return self.channels * sum(a * b for sizes in levels for a, b in itertools.combinations(sizes, 2))


@dataclass
class EvaluationConfig:
    """What is measured on the held-out test views."""

    ratios: Annotated[tuple[Ratio, ...], Range(1, 1000)] = (0.01, 0.05, 0.10, 0.15, 0.5, 1.0)
    """Fractions of the Gaussians at which cuts are measured."""
    cuts: Literal["own", "merged", "splat-transform"] = "own"
    """How the cuts are made. own: as the model was trained; merged: from the whole model, by merging;
    splat-transform: from the whole, by that program's --decimate, which needs Node.js."""
    format: Literal["ply", "compressed_ply", "spz", "spz4", "sog", "splat", "gltf", "gltf_spz", "vq",
                    "latents"] = "ply"
    """File format of the cuts: quality is measured after reading the file back, and its bytes are counted."""
    lpips: tuple[Literal["vgg", "alex"], ...] = ("vgg", "alex")
    """LPIPS backbones; one that cannot be loaded is reported as not computed, with the reason."""
    lpips_weights: str | None = None
    """Folder of the LPIPS backbones, where nothing may be downloaded. None: $FLEXGS_LPIPS_WEIGHTS."""
    lpips_range: Literal["[-1, 1]", "[0, 1]"] = "[-1, 1]"
    """Range of the images that LPIPS is given: [-1, 1] as published, [0, 1] as for FlexGS's figures."""
    views: Literal["all", "even", "odd"] = "all"
    """Which test views are measured: all, or every second one. A search over settings chooses by the even
    ones and reports the odd ones."""

    def check(self, prefix: str = "--") -> None:
        """Raise UserError for values outside of their ranges."""
        check_ranges(self, prefix)


@dataclass
class DistributedConfig:
    """What the workers of one scene send each other; docs/distributed.md says which setting pays where."""

    mode: Literal["replicated", "sharded"] = "replicated"
    """replicated: every worker holds all Gaussians, and gradients are summed; sharded: every worker holds a
    part of them, and sends the visible ones to the workers that render them."""
    rows: Literal["all", "seen"] = "all"
    """all: send the gradients of all Gaussians; seen: only of those that some worker saw in this step. The
    sums are the same."""
    sh_rest: Literal["float32", "bfloat16"] = "float32"
    """Type in which the gradients of shN, three quarters of the bytes, are sent. bfloat16: half the bytes,
    rounded to 3 digits."""


@dataclass
class Config:
    """All settings of a run. `Config.from_preset("paper")` makes those of a named preset."""

    preset: str = "default"
    """Settings to start from; other flags change them. default: the recommended ones; fast: cheaper; quality:
    dearer. FlexGS: paper, official, mended. Rivals: plain, lightgs, lightgs+, c3dgs, eagles, decimate,
    decimate-st, decimate-ft, gns, matryoshka, scratch, mcmc. For tests: smoke. --help-all says what each
    is."""
    seed: Annotated[int, Range(0, 10**18 - 1)] = 0
    """Seed of all random numbers."""
    steps: Views = 30_000
    """Training views in all, stage 1 and stage 2 (not optimizer steps, which use `batch` views each). A
    higher number continues a finished run."""
    batch: Annotated[int, Range(1, 1024)] = 1
    """Views per optimizer step. It changes the result; up to as many workers may share them, which does
    not."""
    background: tuple[Fraction, Fraction, Fraction] = (0.0, 0.0, 0.0)
    """Colour behind the Gaussians: red, green and blue, each 0 to 1."""
    antialiased: bool = False
    """Render as Mip-Splatting's 2D filter does, for models that are looked at from farther away than the
    photographs were taken; other viewers then need their anti-aliased mode too."""
    report_every: Views = 200
    """Views between two progress lines."""
    eval_every: Annotated[int, Range(0, 10**9)] = 0
    """Views between two measurements of the cuts while training, as at the end but without LPIPS; before
    stage 2, of the whole model only. The model does not depend on it. 0: none."""
    checkpoint_every: Views = 2000
    """Views between two checkpoints; there is one at the end in any case."""
    checkpoint_seconds: Annotated[float, Range(0, 10**9, "()")] = 300.0
    """Most seconds between two checkpoints: where training is slow, the next progress line after so long has
    one too."""
    check_every: Views = 500
    """Views between two checks that the workers hold the same model."""
    average: Fraction = 0.0
    """Last fraction of stage 2 over which the parameters are averaged: their mean is the model. 0: the last
    ones are."""
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
        """Number of views that stage 1 trains for."""
        return 0 if self.base.ply else round(self.steps * self.base.stage1_fraction)

    @staticmethod
    def from_preset(name: str, **settings: Any) -> "Config":
        """Make the configuration of a preset; settings replace top-level fields, for instance steps=7000."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS)
            guess = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--preset {name}: unknown; {guess}expected one of {', '.join(PRESETS)}")
        config = Config(preset=name)
        PRESETS[name](config)
        return dataclasses.replace(config, **settings)

    def check(self) -> "Config":
        """Return this configuration; UserError if a value is outside of its range or two conflict."""
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
        if any(a > b for a, b in itertools.pairwise(self.ratios.bands)):
            raise UserError(f"--ratios.bands: found {self.ratios.bands}, expected the lowest first; the one "
                            "above all bands begins at the end of the last")
        if self.ratios.bands and self.ratios.lowest >= self.ratios.bands[0][0]:
            raise UserError(f"--ratios.lowest: found {self.ratios.lowest}, expected 0, or less than all of "
                            f"--ratios.bands, which begin at {self.ratios.bands[0][0]}")
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
                            "whose order is known at the end only; "
                            "expected --order.kind importance, sampled or tree")
        able = (("--base.densify", self.base.densify, ("gradient",)),
                ("--order.kind", self.order.kind, ("sampled", "importance", "tree")),
                ("--transform.kind", self.transform.kind, ("deltas", "field", "none")),
                ("--distributed.rows", self.distributed.rows, ("all",)),
                ("--distributed.sh-rest", self.distributed.sh_rest, ("float32",)))
        for option, value, expected in able if self.distributed.mode == "sharded" else ():
            if value not in expected:
                raise UserError(f"{option}: found {value} with --distributed.mode sharded; expected "
                                f"{' or '.join(expected)}, or --distributed.mode replicated")
        if self.order.kind == "gns" and (self.transform.kind != "none" or self.ratios.renders):
            raise UserError(f"--order.kind gns: found --transform.kind {self.transform.kind} and "
                            f"{self.ratios.renders} cuts per view, expected none of either: it makes a model "
                            "of one ratio")
        if self.order.kind == "gns" and self.order.push + self.average > 1:
            raise UserError(f"--order.push {self.order.push:g}: with --average {self.average:g}, expected at "
                            f"most {1 - self.average:g}: only a fixed number of Gaussians can be averaged")
        if self.base.ply and self.transform.kind == "none":
            raise UserError("--transform.kind none: with --base.ply there is nothing to train; "
                            "expected deltas or field")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested dictionaries, as config.json holds them."""
        return asdict(self)

    def stage1(self) -> dict[str, Any]:
        """Return the settings that stage 1 depends on, except numbers of views, as JSON values.

        Runs that agree in them can share one stage 1.
        """
        tree = self.to_dict()
        return {**{key: tree[key] for key in ("seed", "background", "antialiased", "base")},
                "data": {key: value for key, value in tree["data"].items() if key != "cache_gb"},
                "lr": {key: tree["lr"][key]
                       for key in ("means", "quats", "scales", "opacities", "sh0", "shN")}}

    @staticmethod
    def from_dict(values: dict[str, Any], source: str = "config") -> "Config":
        """Make a configuration from what to_dict() returns.

        Raises:
            UserError: names the source and the unknown key or impossible value.
        """
        config: Config = typed(Config, old_names.config(values), source)
        try:
            return config.check()
        except UserError as e:
            raise UserError(f"{source}: {e}") from None

    @staticmethod
    def load(path: Path) -> "Config":
        """Read a config.json. UserError, naming the file, if it is not one."""
        return Config.from_dict(read_json(path), str(path))


def settings(tree: Any, prefix: str = "--") -> Iterator[tuple[str, Any, Any]]:
    """Yield (flag, such as --lr.delta-means, annotated type, value) of all settings below a dataclass."""
    kinds = get_type_hints(type(tree), include_extras=True)
    for f in dataclasses.fields(tree):
        flag, value = f"{prefix}{f.name.replace('_', '-')}", getattr(tree, f.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{flag}.")
        else:
            yield flag, kinds[f.name], value


def check_ranges(tree: Any, prefix: str = "--") -> None:
    """Raise UserError for the first setting of a tree of dataclasses that is outside of its range."""
    for flag, kind, value in settings(tree, prefix):
        typed(kind, value, flag)


def ratio_name(ratio: float) -> str:
    """Write a ratio as results.json and tables do: 0.05 -> "0.05". Reading the name gives the exact ratio."""
    return short if float(short := f"{ratio:g}") == ratio else repr(ratio)


def percent_name(ratio: float) -> str:
    """Write a ratio as names of files and folders do: 0.05 -> "5". Different ratios have different names."""
    return f"{(100 * Decimal(ratio_name(ratio))).normalize():f}"


def percent(ratio: float | str) -> str:
    """Write a ratio for people: 0.05 -> "5 %"."""
    return f"{100 * float(ratio):g} %"


def check_ratio(ratio: float, option: str = "ratio") -> float:
    """Return the ratio if it lies in (0, 1], else raise UserError naming the option."""
    if not 0 < ratio <= 1:
        raise UserError(f"{option}: found {ratio}, expected a ratio above 0 and at most 1 (0.05 keeps 5 %)")
    return ratio


def count_at(ratio: float, n: int) -> int:
    """Return floor(ratio n), at least 1: how many of n Gaussians a cut keeps (FlexGS supplementary, B.2).

    The 1e-9 makes up for ratios that binary floats round down.
    """
    return max(1, math.floor(check_ratio(ratio) * n + 1e-9))


def check_same_method(theirs: Config, ours: Config, elastic: bool, folder: Path) -> None:
    """Raise UserError if a run trained with one configuration cannot be continued with another.

    Args:
        theirs: the configuration that the run in `folder` was trained with.
        ours: the configuration to continue with.
        elastic: whether stage 2 has begun. Before, only the settings of stage 1 have to agree, so that many
            runs can start from one stage 1.
        folder: the run folder, for the message.
    """
    if elastic:
        was, now = ({**c.to_dict(), "data": c.stage1()["data"]} for c in (theirs, ours))
    else:
        was, now = theirs.stage1(), ours.stage1()
    if differing := [k for k in was if k not in _FREE and was[k] != now[k]]:
        raise UserError(f"{folder}: was trained with another {', '.join(differing)}; "
                        "use the same settings to continue or choose another output folder")


_FREE = ("steps", "preset", "batch", "report_every", "eval_every", "checkpoint_every",
         "checkpoint_seconds", "check_every", "distributed", "evaluation")
"""Settings that may differ between a run and its continuation."""


def _default(config: Config) -> None:
    """The recommended method: order of a merge tree, changes stored per Gaussian, four cuts per view."""
    config.ratios.bands = ((0.008, 0.035), (0.035, 0.18), (0.035, 0.18), (0.18, 0.6))
    config.ratios.upper_every, config.ratios.lowest = 8, 0.0015
    config.order = OrderConfig(kind="tree")
    config.deltas.knots = (0.002, 0.005, *config.deltas.knots)
    config.deltas.start, config.deltas.merge = "tree", 1.0
    config.lr.delta_fall, config.average = True, 0.15


def _quality(config: Config) -> None:
    """Like default, with every band twice per view, for a quarter more time."""
    _default(config)
    config.ratios.bands = tuple(band for band in dict.fromkeys(config.ratios.bands) for _ in range(2))


def _fast(config: Config) -> None:
    """Like default, with every band once, and the whole model and the largest cut take turns."""
    _default(config)
    config.ratios.bands = tuple(dict.fromkeys(config.ratios.bands))
    config.ratios.alternate = True


def _paper(config: Config) -> None:
    """FlexGS as its paper describes it, with unusable formulas replaced (see the rows of docs/method.md)."""
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
    """FlexGS as its released code does it, where that differs from its paper (see docs/method.md).

    The released code multiplies the learning rates of its networks by the scene scale; here they are fixed,
    at the values for a scene scale of 5.
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
    config.gsnet.detach = False                              # row 31: ... and gradients reach the Gaussians
    config.gsnet.order_noise = True                          # row 20
    config.field.resolution = (64, 64, 64, 150)              # row 13: 150 columns
    config.field.smooth_both = False                         # row 16
    config.field.scale_change = "activated"                  # row 17
    config.field.zero_init = False                           # row 19
    config.field.box = "points"                              # row 30
    config.lr.restart = True                                 # row 23


def _mended(config: Config) -> None:
    """FlexGS's architecture with its defects mended, one step after the other in docs/method.md."""
    _paper(config)
    config.ratios.sampling = "log_uniform"                   # row 12
    config.ratios.bands = ((0.008, 0.08), (0.08, 0.8))
    config.gsnet.noise = False                               # row 20: select as the final order does
    config.gsnet.inputs = ("means", "quats", "scales", "opacities", "importance")  # step 3
    config.field.ratio_axis = "log"                          # row 13
    config.field.resolution = (64, 64, 64, 32)               # row 13
    config.field.gate = True                                 # step 5
    config.field.heads = ("means", "scales", "quats", "opacities", "sh0")  # step 6
    config.lr.gsnet, config.lr.field, config.lr.planes = 4e-3, 4e-3, 4e-2  # step 7: five times


def _plain(config: Config) -> None:
    """Plain 3DGS trained as long: the yardstick at 100 %.

    Its cuts are pruned by LightGaussian's score and not fine-tuned (LightGS* in the FlexGS paper).
    """
    config.lr.shN_factor, config.ratios.half_above = 1.0, None
    config.ratios.bands = ()
    config.order = OrderConfig(kind="importance", score="lightgaussian")
    config.transform.kind = "none"


def _lightgs(config: Config) -> None:
    """LightGaussian (Fan et al. 2024): pruned by its score, then fine-tuned, one model per ratio.

    Left out: distillation of the spherical harmonics, and vector quantisation.
    """
    _plain(config)
    config.order.keep = 0.1  # below 1: `flexgs compare` trains one model per ratio


def _lightgs_plus(config: Config) -> None:
    """Lightgs at its best: rates that fall from 3 times to half, and averaged, as `default` has it."""
    _lightgs(config)
    config.lr.stage2, config.average = (3.0, 0.5), 0.15


def _c3dgs(config: Config) -> None:
    """Compressed 3DGS (Niedermayr et al. 2024): pruned by sensitivity, then fine-tuned, one model per ratio.

    The sensitivity is that of the images to a Gaussian's colour. Vector quantisation: --evaluation.format vq.
    Left out: fine-tuning the quantised model.
    """
    _lightgs(config)
    config.order.score = "c3dgs"


def _eagles(config: Config) -> None:
    """EAGLES (Girish et al. 2024): pruned by influence, then fine-tuned, one model per ratio.

    Quantised latents: --evaluation.format latents. Left out: training with them, and from coarse to fine
    images.
    """
    _lightgs(config)
    config.order.score = "eagles"


def _decimate(config: Config) -> None:
    """Plain 3DGS trained as long, merged to each ratio by model/merge_tree.py and not fine-tuned."""
    _plain(config)
    config.evaluation.cuts = "merged"


def _decimate_st(config: Config) -> None:
    """Plain 3DGS trained as long, merged to each ratio by splat-transform's --decimate; needs Node.js."""
    _plain(config)
    config.evaluation.cuts = "splat-transform"


def _decimate_ft(config: Config) -> None:
    """Stage 1's Gaussians merged by model/merge_tree.py, weighted by LightGaussian's score, then fine-tuned.

    One model per ratio.
    """
    _lightgs(config)
    config.order.kind = "tree"


def _gns(config: Config) -> None:
    """GNS (Deng et al. 2025): all opacities are pushed, what gives way is pruned, one model per ratio."""
    _lightgs_plus(config)
    config.order.kind = "gns"


def _matryoshka(config: Config) -> None:
    """Matryoshka Gaussian Splatting (Guo et al. 2026): Gaussians sorted by opacity at every step.

    Each view renders the whole model and one random prefix. Left out: densification as in 3DGS-MCMC, and
    training with prefixes from the first step.
    """
    _plain(config)
    config.order.kind = "opacity"
    config.ratios.sampling = "uniform"
    config.ratios.bands = ((0.01, 1.0),)  # 0.01: the smallest ratio measured; the paper's is not published
    config.loss.elastic_l1, config.loss.elastic_ssim = config.loss.full_l1, config.loss.full_ssim


def _scratch(config: Config) -> None:
    """Plain 3DGS trained small, one model per ratio: as many views, densified to floor(e N) Gaussians only.

    There are no opacity resets: each would prune a model at its limit, which then has to grow again.
    """
    _plain(config)
    config.base.stage1_fraction = 1.0  # no stage 2: `flexgs compare` trains one model per ratio from scratch
    config.base.reset_every = 2.0


def _mcmc(config: Config) -> None:
    """3DGS as Markov Chain Monte Carlo (Kheradmand et al. 2024), one model per ratio, of floor(e N)."""
    _scratch(config)
    config.base.densify, config.base.refine_every = "mcmc", 25
    config.base.init_opa, config.base.init_scale = 0.5, 0.1
    config.base.opacity_reg = config.base.scale_reg = 0.001


def _smoke(config: Config) -> None:
    """A run of seconds on any machine, for tests."""
    _default(config)
    config.steps, config.report_every, config.checkpoint_every, config.check_every = 200, 50, 100, 50
    config.base.max_splats, config.base.refine_every, config.base.sh_degree = 4_000, 40, 1


PRESETS = {f.__name__[1:].replace("_plus", "+").replace("_", "-"): f for f in (
    _default, _fast, _quality, _paper, _official, _mended, _plain, _lightgs, _lightgs_plus, _c3dgs, _eagles,
    _decimate, _decimate_st, _decimate_ft, _gns, _matryoshka, _scratch, _mcmc, _smoke)}

METHODS = ("plain", "lightgs", "lightgs+", "c3dgs", "eagles", "decimate", "decimate-ft", "gns", "matryoshka",
           "scratch", "mcmc", "official", "paper", "default", "fast", "quality")
"""What `flexgs compare` compares by default: the rivals of FlexGS's paper, seven more, and FlexGS."""
