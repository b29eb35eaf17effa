"""The search space: every setting that is searched, with its range, its scale and the reason.

A parameter has the name of its flag, so that typing a trial's parameters behind `flexgs train` repeats it. A
setting without meaning unless another one is chosen is suggested only with that one. The settings that the
search starts from, trial 0, are always in the space.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.options import fill

Value = str | int | float | None
V = TypeVar("V", str, int, float, None)
Params = Mapping[str, Value]

STRUCTURES = ("sampled deltas", "importance deltas", "sampled field", "gsnet field")
"""Pairs of order and transform; GsNet needs the field, which changes a Gaussian wherever it is ranked."""
BANDS = ("0.008 0.035 0.035 0.18 0.035 0.18 0.18 0.6", "0.008 0.035 0.035 0.14 0.14 0.6",
         "0.008 0.035 0.035 0.14 0.14 0.9", "0.008 0.08 0.08 0.8", "0.008 0.02 0.02 0.05 0.05 0.14 0.14 0.6")
SHAPE = "structure"
"""The one parameter that is no flag: a pair of order.kind and transform.kind from STRUCTURES."""
AXES = ("x", "y", "z", "e")


class Trial(Protocol):
    """An object that suggests values: a trial of Optuna, or Own."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return one of the choices."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number between low and high, drawn on a logarithmic scale with `log`."""


class Own:
    """A trial that suggests the values which a configuration has, and collects them: trial 0."""

    def __init__(self, config: Config):
        self.config = config
        self.params: dict[str, Value] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return the configuration's value."""
        return self._note(name)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return the configuration's value."""
        return self._note(name)

    def _note(self, name: str) -> Any:
        self.params[name] = value = own(self.config, name)
        return value


def own(config: Config, name: str) -> Any:
    """Return the value of a parameter of the space in a configuration."""
    if name == SHAPE:
        return f"{config.order.kind} {config.transform.kind}"
    part, _, axis = name.rpartition(".")
    if part == "field.resolution":
        return config.field.resolution[AXES.index(axis)]
    value: Any = config
    for key in name.split("."):
        value = getattr(value, key)
    return _text(value) if isinstance(value, tuple) else value


def check_only(start: Config, size: bool, only: Sequence[str]) -> None:
    """Raise UserError for a word of --only that names no setting which is searched from `start`."""
    every = Own(start)
    space(every, start, size)
    for word in only:
        if not any(_named(name, (word,)) for name in every.params):
            groups = sorted({name.rpartition(".")[0] if name.startswith("field.resolution") else name
                             for name in every.params})
            raise UserError(f"--only {word}: found no such setting in the search from --order.kind "
                            f"{start.order.kind} --transform.kind {start.transform.kind}; expected of "
                            f"{', '.join(groups)}, or a group of them such as loss; or start from another "
                            "--preset")


def _named(name: str, only: Sequence[str]) -> bool:
    """Whether a parameter, or a group that it is in, is in a list; the axes of a resolution go together."""
    name = name.rpartition(".")[0] if name.startswith("field.resolution.") else name
    return any(name == word or name.startswith(f"{word}.") for word in only)


def space(trial: Trial, start: Config, size: bool = False, only: Sequence[str] = ()) -> None:
    """Let a trial suggest a value for each parameter.

    Args:
        trial: the trial of Optuna, or Own.
        start: the settings that the search starts from, which every range includes.
        size: whether to suggest also the settings that the bytes of a model depend on.
        only: names of parameters, or of groups of them, that are searched; the others stay as they are in
            `start`. Empty: all.
    """

    def one_of(name: str, *choices: V) -> V:
        mine: V = own(start, name)
        if only and not _named(name, only):
            return mine
        return trial.suggest_categorical(name, [mine, *(c for c in choices if c != mine)])

    def between(name: str, low: float, high: float, log: bool = True) -> float:
        mine = own(start, name)
        if only and not _named(name, only):
            return float(mine)
        return trial.suggest_float(name, min(low, mine), max(high, mine), log=log)

    structure = one_of(SHAPE, *STRUCTURES)
    order, transform = structure.split()

    # What is trained how much. Only the ratio to the terms of the whole model counts, so those stay.
    between("loss.elastic_l1", 0.1, 1.0)
    # the paper weighs structure less in the cuts than in the whole
    between("loss.elastic_ssim", 0.025, 0.4)
    # 1 protects the whole model and costs the smallest cuts 0.2 to 0.6 dB
    between("loss.elastic_fade", 0.0, 1.0, log=False)
    if start.ratios.sampling == "log_uniform":
        one_of("ratios.bands", *BANDS)             # how much of each view's work goes to which ratios
    between("lr.shN_factor", 1.0, 8.0)          # one set of harmonics serves all ratios, and learns slowly

    # Which Gaussians stay.
    if order == "sampled":
        between("order.temperature", 0.0, 1.5, log=False)  # 0 is the order by importance; large: any Gaussian
    if order == "gsnet":
        # low: gradients of few Gaussians at the margin; high: of all, and biased
        between("gsnet.temperature", 0.3, 3.0)
        between("gsnet.temperature_end", 0.1, 3.0)  # its decay
        between("gsnet.gi_weight", 0.03, 10.0)     # towards global importance
        between("gsnet.sparsity_weight", 1e-3, 1.0)  # towards the right number
        between("lr.gsnet", 2e-4, 8e-3)      # five times the paper's was better (docs/ablations.md)

    # How those that stay change.
    if transform == "deltas":
        between("lr.delta_means", 0.5, 10.0)    # changes of a cut may be larger than those of training
        # up to which ratio Gaussians begin merged with the dropped ones
        one_of("deltas.merge", 0.0, 0.032, 0.1, 0.32)
        if size:
            # their rows are bytes
            one_of("deltas.knots", "0.01 0.1", "0.01 0.032 0.1 0.32", "0.01 0.032 0.1 0.32 0.5")
    if transform == "field":
        for axis in AXES[:3]:
            # captures are wider than high, and detail differs by axis
            one_of(f"field.resolution.{axis}", 32, 64, 128)
        # the paper's table and its code disagree: 100 or 150
        one_of("field.resolution.e", 16, 32, 64, 100, 150)
        one_of("field.levels", "1", "1 2", "1 2 4")
        # linear gives the ratios below 15 % a tenth of the columns
        one_of("field.ratio_axis", "linear", "log")
        between("lr.field", 2e-4, 8e-3)
        between("lr.planes", 2e-3, 8e-2)
        between("field.ratio_smoothness", 1e-5, 1e-1)
        between("field.ratio_l1", 1e-6, 1e-2)
        between("field.space_smoothness", 1e-6, 1e-2)

    if size:
        one_of("base.sh_degree", 0, 1, 2, 3)       # 3 bytes of 4 are harmonics; a stage 1 of its own for each


def flags(params: Params) -> list[str]:
    """Return the flags and values to type for these parameters."""
    found: dict[str, str] = {}
    for name, value in params.items():
        part = name.rpartition(".")[0]
        if name == SHAPE:
            found["order.kind"], found["transform.kind"] = str(value).split()
        elif part == "field.resolution":
            found[part] = " ".join(str(params[f"{part}.{a}"]) for a in AXES)
        else:
            found[name] = f"{value:.6g}" if isinstance(value, float) else str(value)
    return [word for name, value in found.items() for word in (f"--{name.replace('_', '-')}", *value.split())]


def applied(params: Params, start: Config) -> Config:
    """Return the settings `start` with these parameters in place; UserError for impossible ones."""
    return fill(Config, flags(params), "trial", start).check()


def _text(values: tuple) -> str:
    """Return a tuple as it is typed: its numbers, also of nested tuples, with blanks between."""
    return " ".join(_text(v) if isinstance(v, tuple) else f"{v:g}" for v in values)
