"""An order, a score and a transform of somebody else's: the page of the docs runs as it stands."""

import re
import sys
from pathlib import Path

import pytest
import torch

from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.extensions import VARIABLE, named
from flexgs.model.elastic import ElasticModel
from flexgs.model.order import ORDERS, Order, make_order
from tests.test_cli import SMALL, flexgs

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
CODE = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
FLAGS = ["--order.kind", "mine:Large", "--order.score", "mine:brightness", "--transform.kind", "mine:Fade"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(VARIABLE, "other,mine")
    yield
    sys.modules.pop("mine", None)


def test_the_page_trains_and_cuts(mine, capture, tmp_path, monkeypatch, capsys):
    assert CODE.count("\n") <= 40 and all(flag in PAGE for flag in FLAGS)
    assert flexgs("train", capture, "--output", tmp_path, *SMALL, *FLAGS, "--evaluation.lpips") == 0
    [run] = [path.parent for path in tmp_path.glob("*/config.json")]
    model = ElasticModel.load(run)
    growth = float(model.transform.growth)
    assert type(model.transform).__name__ == "Fade" and growth != 0
    n = len(model)
    cut = model.cut(0.1)
    torch.testing.assert_close(cut.scales, model.splats.scales[:len(cut)] + growth * 0.9)
    order = make_order(model.config)
    rows = order.permutation(model.splats, torch.arange(float(n)))
    assert rows.tolist()[:n // 2] == [*range(n - 1, n - 1 - n // 2, -1)]
    capsys.readouterr()
    monkeypatch.delenv(VARIABLE)
    assert flexgs("cut", run, "--budget", "5%", "-o", tmp_path / "x.ply") == 2
    assert ("--transform.kind mine:Fade" in (said := capsys.readouterr().err)
            and "set FLEXGS_EXTENSIONS=mine" in said)


def test_what_is_none(mine, tmp_path):
    for name, what in {"largest": "unknown; expected one of sampled", "mine:Small": "cannot be imported",
                       "mine:Fade": "found a type, expected a subclass of flexgs.model.order.Order",
                       "other:Large": "cannot be imported", "os:getcwd": "none of the modules"}.items():
        with pytest.raises(UserError, match=f"--order.kind {name}: .*{what}"):
            named("--order.kind", name, ORDERS, Order)
    config = Config()
    config.order.kind = "anything"
    with pytest.raises(UserError, match=r"--order\.kind: found 'anything', expected one of "
                                        r"sampled, .*or module:name"):
        config.check()
    config.order.kind = "mine:Large"
    assert isinstance(make_order(config.check()), Order)


@pytest.mark.parametrize("flag", ["--order.kind", "--order.score", "--transform.kind"])
def test_what_is_not_there_is_refused_before_the_first_step(mine, flag, capture, tmp_path, capsys):
    assert flexgs("train", capture, "--output", tmp_path, *SMALL, flag, "mine:Nothing") == 2
    assert f"{flag} mine:Nothing: cannot be imported" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/metrics.jsonl")) and not list(tmp_path.glob("*/checkpoints/*"))
