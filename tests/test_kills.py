"""A small share of the study tests/kills.py: killed at a file operation, in this process."""

import contextlib
import random
from pathlib import Path

import pytest
from kills import SETTINGS, Hook, leftovers, state

from flexgs import cli
from flexgs.files import newest, only_one, publish, staged, tidy, write_json


class Killed(BaseException):
    """At each file operation from the k-th on, so that whatever cleans up comes to nothing, as after SIGKILL."""


@pytest.fixture(scope="module")
def hook():
    hook = Hook()
    yield hook
    hook.watch(None)


def kill() -> None:
    raise Killed


def written(folder: Path, what: str) -> None:
    """Stage a model, cuts and results, and publish them."""
    for name in ("model", "cuts"):
        (staged(folder) / name).mkdir()
        (staged(folder) / name / "file").write_text(what)
    write_json(staged(folder) / "results.json", what)
    publish(folder)


def test_what_is_published_together_is_never_seen_apart(hook, tmp_path):
    """Killed at every file operation: all old or all new, at once for whoever uses newest(), and for all after tidy()."""
    names, seen, k = ("model/file", "cuts/file", "results.json"), set(), 0
    while True:
        k, folder = k + 1, tmp_path / str(k)
        folder.mkdir()
        written(folder, "old")
        hook.watch(folder, k, kill)
        try:
            written(folder, "new")
            whole = True
        except Killed:
            whole = False
        hook.watch(None)
        found = {newest(folder, name.split("/")[0]) / "file" if "/" in name else newest(folder, name) for name in names}
        what, = {path.read_text().strip().strip('"') for path in found}
        plain = {path.read_text().strip().strip('"') for name in names if (path := folder / name).exists()}
        assert not (folder / "results.json").exists() or len(plain) == 1
        tidy(folder)
        assert {(folder / name).read_text().strip().strip('"') for name in names} == {what} and not leftovers(folder)
        assert {path.name for path in folder.iterdir()} == {"model", "cuts", "results.json"}
        seen.add(what)
        if whole:
            break
    assert seen == {"old", "new"} and k > 15


def test_an_owner_removes_what_killed_ones_have_left(tmp_path):
    for name in (".results.json.0a1b2c3d", "checkpoints/.step_00000040.0a1b2c3d/state.json", ".hidden", "a/.x.12345678/.y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with only_one(tmp_path):
        assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.name != ".lock") == [
            ".hidden", "a", "checkpoints"]


def test_killed_at_file_operations_a_run_ends_as_if_nothing_had_happened(hook, capture, tmp_path):
    def train(output: Path, steps: int) -> int:
        args = [str(capture), "--output", str(output), "--steps", str(steps), *SETTINGS]
        return cli.guard(lambda: cli.parse(cli.Train, args, "flexgs train")())

    draw, good = random.Random(0), {}
    for steps in (40, 80):
        hook.watch(tmp_path / "whole")
        assert train(tmp_path / "whole", steps) == 0
        operations, good[steps] = hook.count, state(tmp_path / "whole/studio")
        for k in sorted(draw.sample(range(1, operations), 3)) + [operations - 2]:
            hook.watch(tmp_path / "killed", k, kill)
            with contextlib.suppress(Killed):  # or there is less to do than k operations, after earlier kills
                assert train(tmp_path / "killed", steps) == 0
        hook.watch(None)
        assert train(tmp_path / "killed", steps) == 0
        assert state(tmp_path / "killed/studio") == good[steps] and not leftovers(tmp_path / "killed/studio")
