"""Old names of settings, in flags, config files and searches, go on working."""

import json

import pytest

from flexgs import old_names
from flexgs.commands.train import Train
from flexgs.config import Config, settings
from flexgs.errors import UserError
from flexgs.options import parse
from ray_jobs.train_all import TrainAll
from tuning.trial import Record

WAS = {"base": {"share": 0.25, "grow_from": 0.1, "grow_until": 0.7, "grow_every": 50, "grow_gradient": 1e-3,
                "split_scale": 0.02, "prune_opacity": 0.01, "prune_scale": 0.2},
       "rates": {"selector": 1e-3, "means": 2e-4}}


def flat(values: dict) -> list[str]:
    return [word for group, own in values.items() for name, value in own.items()
            for word in (f"--{group}.{name.replace('_', '-')}", str(value))]


def test_every_old_name_is_one_of_today():
    known = {flag.removeprefix("--").replace("-", "_") for flag, _, _ in settings(Config())}
    today = {old_names.setting(old) for old in old_names.SETTINGS}
    assert all(name in known or any(k.startswith(f"{name}.") for k in known) for name in today)
    assert not known & set(old_names.SETTINGS)


def test_flags_and_files(tmp_path):
    config = Config.from_dict(WAS)
    assert (config.base.stage1_fraction, config.base.grow_grad2d, config.lr.gsnet, config.lr.means) == (
        0.25, 1e-3, 1e-3, 2e-4)
    typed = parse(Train, ["x", "--lr.no-delta-fall", *flat(WAS)], "train").config  # as it was then
    assert (typed.base, typed.lr) == (config.base, config.lr)
    (tmp_path / "old.json").write_text(json.dumps(WAS))
    assert parse(Train, ["x", "--config", str(tmp_path / "old.json")], "train").config == config
    assert not parse(Train, ["x", "--rates.no-restart", "--base.share=1"], "train").config.lr.restart
    for words in (["--protocol", "field"], ["--protocol=field"]):
        assert parse(TrainAll, words, "train_all.py").protocol == "standard"


def test_both_names_at_once_are_refused():
    with pytest.raises(UserError, match=r"base: .*share"):
        Config.from_dict({"base": {"share": 0.25, "stage1_fraction": 0.5}})


def test_a_trial_of_an_old_search(tmp_path):
    (tmp_path / "trial.json").write_text(json.dumps({"params": {"rates.selector": 1e-3, "deltas.merge": 0.1},
                                                     "number": 3}))
    assert Record.load(tmp_path).params == {"lr.gsnet": 1e-3, "deltas.merge": 0.1}
