"""A small share of the study tests/kills.py: killed at a file operation, in this process."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kills import SETTINGS, Hook, leftovers, state

from flexgs import cli
from flexgs.errors import UserError
from flexgs.files import atomic_file, newest, only_one, publish, staged, tidy, write_json


class Killed(BaseException):
    """At each file operation from the k-th on, so that whatever cleans up comes to nothing, as after
    SIGKILL."""


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
    """Killed at every file operation: all old or all new, at once for whoever uses newest(), and for all
    after tidy()."""
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
        found = {newest(folder, name.split("/")[0]) / "file" if "/" in name else newest(folder, name)
                 for name in names}
        what, = {path.read_text().strip().strip('"') for path in found}
        plain = {path.read_text().strip().strip('"') for name in names if (path := folder / name).exists()}
        assert not (folder / "results.json").exists() or len(plain) == 1
        tidy(folder)
        assert {(folder / name).read_text().strip().strip('"')
                for name in names} == {what} and not leftovers(folder)
        assert {path.name for path in folder.iterdir()} == {"model", "cuts", "results.json"}
        seen.add(what)
        if whole:
            break
    assert seen == {"old", "new"} and k > 15


def test_an_owner_removes_what_killed_ones_have_left(tmp_path):
    for name in (".results.json.0a1b2c3d", "checkpoints/.step_00000040.0a1b2c3d/state.json", ".hidden",
                 "a/.x.12345678/.y"):
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


def killed(folder: Path, code: str) -> None:
    """Run code, which writes below folder, in a process of its own that ends as by SIGKILL."""
    done = subprocess.run([sys.executable, "-c",
                           f"import os\nfrom pathlib import Path\nfrom flexgs.files import *\n{code}"],
                          cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                          check=False)
    assert done.returncode == 9


def test_what_a_killed_command_leaves_goes_with_the_next_to_the_same_output(tmp_path):
    """But not what belongs to one that is still at work, which the owner of the folder leaves alone too."""
    for output in ("a b.ply", "[x].ply"):
        killed(tmp_path, f"with atomic_file(Path({output!r})) as out: out.write_text('half'); os._exit(9)")
        killed(tmp_path, f"with atomic_folder(Path({output!r})) as out: (out / "
                         "'x').write_text('half'); os._exit(9)")
    assert len(list(tmp_path.iterdir())) == 2  # the second has removed what the first has left
    with atomic_file(tmp_path / "a b.ply") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "a b.ply") as second:
            second.write_text("second")
            tidy(tmp_path)
            assert first.read_text() == "first" and second.read_text() == "second"
    with atomic_file(tmp_path / "[x].ply") as out:
        out.write_text("whole")
    assert {path.name: path.read_text()
            for path in tmp_path.iterdir()} == {"a b.ply": "first", "[x].ply": "whole"}


def test_names_as_long_as_a_disk_takes(tmp_path):
    for name in ("x" * 251 + ".ply", "é" * 125 + ".ply", os.fsdecode(b"\xff.ply")):
        with atomic_file(tmp_path / name) as out:
            out.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    with pytest.raises(UserError, match="cannot be written"), atomic_file(tmp_path / ("x" * 256)) as out:
        out.write_text("too long")


@pytest.mark.parametrize("name", [".published", ".staged", ".x.0123abcd", "model", "results.json"])
def test_links_in_a_run_lead_nowhere(name, tmp_path):
    """A run that somebody else has made: what a link in it leads to is neither moved nor changed nor read in
    its place."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run, outside):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "file").write_text(folder.name)
        (folder / "results.json").write_text(folder.name)
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / name if (outside / name).exists() else outside)
    if name.startswith("."):
        assert (newest(run, "model") / "file").read_text() == "run"
    with only_one(run):
        written(run, "new")
    assert {path.name for path in run.iterdir()} == {"model", "cuts", "results.json", ".lock"}
    assert not any(path.is_symlink() for path in run.iterdir())
    assert {path.relative_to(outside).as_posix(): path.read_text() for path in outside.rglob("*")
            if path.is_file()} == {
"model/file": "outside", "results.json": "outside"}


def test_what_stands_where_a_folder_belongs_is_replaced(tmp_path):
    for name in ("model", ".staged", ".published"):
        run = tmp_path / name
        run.mkdir()
        (run / name).write_text("a file")
        with only_one(run):
            written(run, "new")
        assert (run / "model" / "file").read_text() == "new" and not leftovers(run)
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock: cannot be written"), only_one(tmp_path):
        pass
