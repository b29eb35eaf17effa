"""Presets, JSON round trip and the errors of wrong settings."""

import json

import pytest

from flexgs.config import PRESETS, Config, check_ratio, count_at
from flexgs.errors import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = Config.from_preset(name).check()
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_unknown_preset_and_setting_are_named():
    with pytest.raises(UserError, match=r"papr.*expected one of"):
        Config.from_preset("papr")
    with pytest.raises(UserError, match="stepz"):
        Config.from_dict({"stepz": 3})
    with pytest.raises(UserError, match=r"base: share: found 'half'"):
        Config.from_dict({"base": {"share": "half"}})


@pytest.mark.parametrize("values", [{"steps": 0}, {"evaluation": {"ratios": [0.1, 1.5]}}, {"deltas": {"knots": [0.1, 0.1]}},
                                    {"ratios": {"bands": [[0.2, 0.1]]}}, {"base": {"sh_degree": 4}}])
def test_impossible_values_are_refused(values):
    with pytest.raises(UserError, match="expected"):
        Config.from_dict(values)


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
