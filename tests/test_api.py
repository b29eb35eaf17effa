"""flexgs as a library: the examples of its docstrings, and what a program relies on."""

import doctest
import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import flexgs
import flexgs.callbacks
from flexgs.callbacks.progress import Bar, Lines, progress
from flexgs.gaussians import TENSORS
from flexgs.model import elastic
from tests.tiny import tiny_config, tiny_scene

EXAMPLES = doctest.DocTestFinder()


@pytest.fixture
def desk(capture, trained, tmp_path, monkeypatch) -> Path:
    """A folder with captures/garden and runs/flexgs/garden, as the docstrings have it."""
    for link, to in (("captures/garden", capture), ("runs/flexgs/garden", trained)):
        (tmp_path / link).parent.mkdir(parents=True)
        (tmp_path / link).symlink_to(to)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("example", [
    test for module in (flexgs, flexgs.callbacks, elastic, flexgs.config) for test in EXAMPLES.find(module)
    if test.examples], ids=lambda test: test.name)
def test_examples_of_docstrings_run(example, desk, capsys):
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(example, out=said.write).failed == 0, said.getvalue()


def test_the_notebook_runs(tmp_path):
    """docs/tour.ipynb, each cell, in a kernel of Jupyter."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import nbclient
    import nbformat

    book = nbformat.read(Path(__file__).parents[1] / "docs" / "tour.ipynb", 4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    texts = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    assert re.search(r" ([\d,]+) of \1 Gaussians", texts)
    assert "small.obj: expected a name that ends in one of" in texts
    assert {path.name for path in tmp_path.iterdir()} == {"studio", "small.ply", "small.spz", "small.glb",
                                                          "studio.fgs"}


def test_all_public_names_are_listed_and_explained():
    assert set(flexgs.__all__) <= set(dir(flexgs))
    for name in flexgs.__all__:
        assert getattr(flexgs, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = flexgs.trian


def test_what_is_saved_is_loaded(desk):
    """By suffix, as the format that it names."""
    model = flexgs.load("runs/flexgs/garden")
    heads = {"a.ply": b"ply", "a.spz": b"\x1f\x8b", "a.glb": b"glTF", "a.sog": b"PK", "a.fgs": b"FLEXGS"}
    for name, head in heads.items():
        read = flexgs.save(model, name)
        assert Path(name).read_bytes().startswith(head)
        assert len(read) == len(flexgs.load(name)) == len(model)
    model.save("copy")
    copy = flexgs.ElasticModel.load("copy")
    assert all(torch.equal(getattr(copy.cut(0.3), name), getattr(model.cut(0.3), name)) for name in TENSORS)
    with pytest.raises(flexgs.UserError, match=r"a\.txt: expected a name that ends in one of \.ply "):
        flexgs.save(model.cut(0.5), "a.txt")
    with pytest.raises(flexgs.UserError, match=r"b\.fgs: found a cut, expected a trained model"):
        flexgs.save(model.cut(0.5), "b.fgs")
    assert not Path("a.txt").exists() and not Path("b.fgs").exists()


def test_a_time_per_frame_is_measured(desk):
    model = flexgs.load("runs/flexgs/garden")
    assert len(model.cut("1000000ms")) == len(model)
    with pytest.raises(flexgs.UserError, match="even 8 Gaussians take"):
        model.cut("0.00001ms")


class Noted(flexgs.Callback):
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def begin(self, trainer):
        self.told.append(f"begin {trainer.step}")

    def step(self, step):
        self.told.append(step)

    def report(self, step, metrics):
        self.told.append(f"report {step} {metrics['stage']}")

    def trained(self, model):
        self.told.append(f"trained {len(model)}")

    def end(self):
        self.told.append("end")


def test_callbacks_are_told_in_turn_and_of_the_end_of_a_failure(capsys):
    config, noted = tiny_config(steps=4), Noted()
    config.report_every = 2
    flexgs.train(tiny_scene(), config, "cpu", [noted])
    assert noted.told == ["begin 0", 1, "report 2 1", 2, 3, "report 4 2", 4, "trained 40", "end"]
    assert not capsys.readouterr().out

    class Broken(flexgs.Callback):
        def step(self, step):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        flexgs.train(tiny_scene(), config, "cpu", [noted := Noted(), Broken()])
    assert noted.told == ["begin 0", 1, "end"]


def terminal(**options) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, **options)


@pytest.mark.parametrize("colours", [True, False])
def test_a_terminal_gets_one_bar(colours, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    (monkeypatch.delenv if colours else monkeypatch.setenv)("NO_COLOR", *([False] if colours else ["1"]))
    config, console = tiny_config(steps=6), terminal()
    config.report_every = 3
    bar = progress("tiny", console)
    assert isinstance(bar, Bar)
    flexgs.train(tiny_scene(), config, "cpu", [bar])
    said = console.file.getvalue()
    assert ("\x1b[36m" in said) == colours
    last = said.rpartition("\x1b[2K")[2] if "\x1b[2K" in said else said
    assert "tiny" in last and "6/6 views" in last and "40 Gaussians" in last
    assert "test PSNR 1 % " in last and "100 % " in last and " dB" in last


def test_elsewhere_there_are_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress("tiny", terminal()), Lines)
    config = tiny_config(steps=6)
    config.report_every = 3
    flexgs.train(tiny_scene(), config, "cpu")  # pytest's stdout is no terminal
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny ") and "stage 1" in first and "3/6" in first and "\x1b" not in first
    assert "stage 2" in last and "test PSNR 1 % " in last
