"""The size of a run: what the user chose stays, the rest fits the machine and the capture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexgs import sizes
from flexgs.config import Config, DataConfig
from flexgs.options import Typed
from flexgs.sizes import Size, fitting


def test_laptop_size_leaves_what_the_user_chose(capsys):
    config, size = Config(), Size(steps=400, splats=3000)
    small = fitting(config, False, Typed(), size)
    assert (small.steps, small.base.max_splats) == (400, 3000) and "no GPU" in capsys.readouterr().out
    assert fitting(config, False, Typed(("--steps", "30000")), size).steps == config.steps
    assert fitting(config, False, Typed(("--base.max_splats=9",)),
                   size).base.max_splats == config.base.max_splats
    assert fitting(config, False, Typed(("--config", "x.json")),
                   size) == config == fitting(config, True, Typed(), size)
    capsys.readouterr()
    assert fitting(Config(steps=10), False, Typed(("--base.max-splats", "4")), size).steps == 10
    assert not capsys.readouterr().out  # nothing was changed


@pytest.mark.parametrize(("pixels", "gpu", "factor"), [
    ((64, 48), False, 1), ((776, 512), False, 2), ((1920, 1080), False, 4), ((4032, 3024), False, 8),
    ((1500, 1000), True, 1), ((3115, 2076), True, 2), ((4946, 3286), True, 4), ((40_000, 30_000), True, 8)])
def test_images_are_reduced_to_fit(pixels, gpu, factor, monkeypatch, capsys):
    """Without a GPU to 200,000 pixels, with one to 1,600 along a side, as Mip-NeRF 360's are in the field."""
    monkeypatch.setattr(sizes, "photograph_size", lambda path, model: pixels)
    assert fitting(Config(), gpu, Typed(), capture=Path("a/garden")).data.factor == factor
    if factor != Config().data.factor:
        assert f"garden: {'' if gpu else 'no '}GPU: " in (said := capsys.readouterr().out)
        assert f"images at 1/{factor} ({round(pixels[0] / factor)}x" in said and ("minutes" in said) != gpu
    for words in (("--data.factor", "4"), ("--preset", "paper"), ("--dataset", "mipnerf360")):
        assert fitting(Config(), gpu, Typed(words), capture=Path("a")).data.factor == 4


def test_a_run_that_has_begun_keeps_its_size(capture, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(
        replace(Config(steps=77, data=DataConfig(factor=16)), preset="paper").to_dict()))
    for gpu in (False, True):
        again = fitting(Config(), gpu, Typed(), capture=capture, run=tmp_path)
        assert (again.steps, again.base.max_splats, again.data.factor) == (77, 3_000_000, 16)
        assert "as begun: 77 views" in capsys.readouterr().out
    assert fitting(Config(steps=99), False, Typed(("--steps", "99")), run=tmp_path).steps == 99
