"""Presets, JSON round trip and the errors of wrong settings."""

import itertools
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgs import cli
from flexgs.config import METHODS, PRESETS, Config, check_ratio, count_at, settings
from flexgs.config import SCORES as NAMES
from flexgs.errors import UserError
from flexgs.inputs import Range
from flexgs.model.importance import SCORES


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = Config.from_preset(name).check()
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_every_preset_says_what_it_is():
    assert all(PRESETS[name].__doc__ for name in PRESETS) and set(METHODS) < set(PRESETS)


def test_unknown_preset_and_setting_are_named():
    with pytest.raises(UserError, match=r"papr.*expected one of"):
        Config.from_preset("papr")
    with pytest.raises(UserError, match="stepz"):
        Config.from_dict({"stepz": 3})
    with pytest.raises(UserError, match=r"base: stage1_fraction: found 'half'"):
        Config.from_dict({"base": {"stage1_fraction": "half"}})


@pytest.mark.parametrize("values",
                         [{"steps": 0}, {"evaluation": {"ratios": [0.1, 1.5]}},
                          {"deltas": {"knots": [0.1, 0.1]}}, {"ratios": {"bands": [[0.2, 0.1]]}},
                          {"base": {"sh_degree": 4}}, {"gsnet": {"inputs": []}},
                          {"gsnet": {"inputs": ["means", "means"]}},
                          {"gsnet": {"temperature_end": 0}}, {"order": {"kind": "gsnet"}},
                          {"order": {"kind": "opacity"}},
                          {"order": {"kind": "gsnet", "keep": 0.1}, "transform": {"kind": "field"}},
                          {"base": {"ply": "x.ply"}, "transform": {"kind": "none"}},

                          {"deltas": {"knots": [0.1], "rows": [0.2, 0.3]}}, {"order": {"keep": 0}}])
def test_impossible_values_are_refused(values):
    with pytest.raises(UserError, match="expected"):
        Config.from_dict(values)


def kinds_in(kind) -> Iterator[tuple]:
    """(plain type, range or None) of a setting and of what is in it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        yield args[0], args[1]
        if typing.get_origin(args[0]) is tuple:
            yield from kinds_in(typing.get_args(args[0])[0])
    elif origin is tuple or type(None) in args:
        for inner in args:
            yield from kinds_in(inner)
    else:
        yield kind, None


def test_every_number_has_a_range():
    """Also one that is added later, and those in tuples."""
    without = [flag for flag, kind, _ in settings(Config()) for plain, limits in kinds_in(kind)
               if plain in (int, float) and not isinstance(limits, Range)]
    assert not without


@pytest.mark.parametrize(("part", "name", "value"), [
    ("lr", "means", math.nan), ("lr", "delta_means", math.inf), ("field", "width", 0),
    ("field", "channels", -1), ("field", "resolution", (4000, 4000, 4000, 4000)), ("field", "levels", ()),
    ("base", "prune_scale3d", math.nan), ("deltas", "knots", ()), ("base", "max_splats", 10**12),
    ("gsnet", "temperature", 1e-300), ("base", "refine_every", 2.5),
    ("evaluation", "ratios", (0.1, math.nan)), ("order", "score", "beauty"), ("ratios", "values", ()),
    ("ratios", "lowest", 0.01), ("ratios", "bands", ((0.1, 0.2), (0.01, 0.1)))])
def test_a_setting_outside_is_refused_by_its_flag(part, name, value):
    config = Config()
    setattr(getattr(config, part), name, value)
    with pytest.raises(UserError, match=rf"^--{part}\.{name.replace('_', '-')}\S* .*found .*expected") as e:
        config.check()
    assert "\n" not in str(e.value)


def test_scores_are_those_that_are_computed():
    assert set(NAMES.built_in) == set(SCORES)


def test_every_preset_but_the_untrained_ones_renders_cuts():
    """Also where only the sampling of ratios is changed."""
    for name in set(PRESETS) - {"plain", "lightgs", "lightgs+", "c3dgs", "eagles", "decimate", "decimate-st",
                                "decimate-ft", "scratch", "mcmc", "gns"}:
        config = Config.from_preset(name)
        assert config.ratios.renders > 0
        config.ratios.sampling = "log_uniform"
        assert config.ratios.renders > 0


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_ratio_outside_is_refused(ratio):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        check_ratio(ratio)


def test_count_is_floor_of_the_decimal_ratio():
    assert count_at(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996 in binary floats
    assert count_at(0.155, 1000) == 155
    assert count_at(0.0999, 1000) == 99
    assert count_at(0.001, 100) == 1
    assert count_at(1.0, 12345) == 12345


METHOD = (Path(__file__).parents[1] / "docs" / "method.md").read_text()


def with_flags(preset: str, flags: list[str]) -> Config:
    return cli.parse(cli.Train, ["capture", "--preset", preset, *flags], "flexgs train").config.check()


def steps_of(section: str) -> list[list[str]]:
    """The settings in the rows of docs/method.md between one heading and the next."""
    text = METHOD.split(f"## {section}\n")[1].split("\n## ")[0]
    return [word.split() for line in text.splitlines() if line.startswith("| ")
            for word in re.findall(r"`(--.*?)`", line)]


def test_mending_one_by_one_ends_at_the_preset():
    steps = steps_of("Mending the architecture one by one")
    repairs, mends = itertools.chain(*steps[:6]), itertools.chain(*steps[6:])
    mended = with_flags("paper", [*mends])
    mended.preset = "mended"
    assert mended == Config.from_preset("mended")
    config = with_flags("official", [*repairs])
    paper = Config.from_preset("paper")
    paper.preset, paper.steps, paper.base.stage1_fraction, paper.ratios = ("official", config.steps,
                                                                           config.base.stage1_fraction,
                                                                           config.ratios)
    paper.order.score, paper.gsnet.shape, paper.field.resolution = "opacity_t", "code", (64, 64, 64, 150)
    paper.base.l1 = 1.0
    assert config == paper  # what is left is the code's choice, not its defect


@pytest.mark.parametrize("preset", ["paper", "official", "mended"])
def test_every_piece_can_be_switched_off(preset):
    start = Config.from_preset(preset)
    switches = [s for s in steps_of("Switching the pieces off") if preset == "paper"
                or s[0] != "--gsnet.shape"]
    assert len(switches) > 10
    for switch in switches:
        assert with_flags(preset, switch) != start, switch
