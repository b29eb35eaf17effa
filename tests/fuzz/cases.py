"""Numbered cases: which file of which reader, and what is done to it."""

import contextlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tests.fuzz.mutate import changed
from tests.fuzz.readers import READERS, flaw
from tests.fuzz.workers import Outcome, outcome

Files = dict[str, bytes]
"""What a file or folder holds, by paths; the first part of all is its own name."""


class FlawError(AssertionError):
    """What was read is not sound."""


def write_seeds(readers: Sequence[str], folder: Path) -> None:
    """The valid files of each reader, which it has to read, into folder/NAME."""
    for name in readers:
        (folder / name).mkdir()
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            READERS[name].seeds(folder / name)
            for path in sorted((folder / name).iterdir()):
                with tempfile.TemporaryDirectory() as other:
                    found = outcome_of(name, _write(_files(path, folder / name), Path(other)))
                assert found.how == "read", f"{path}, not changed: {found}"


def outcome_of(name: str, path: Path) -> Outcome:
    """What the reader of this name makes of path; what it has read has to be sound."""
    def read() -> None:
        if wrong := flaw(READERS[name].read(path)):
            raise FlawError(wrong)

    return outcome(read, path.name if READERS[name].names_file else "")


class Cases:
    """Those of a seed over some readers. The same seed and readers make the same cases in every process."""

    def __init__(self, seed: str, readers: Sequence[str], folder: Path):
        """folder: where write_seeds has put the valid files of these readers."""
        self.seed, self.readers = seed, list(readers)
        self.seeds = {name: [_files(path, folder / name) for path in sorted((folder / name).iterdir())]
                      for name in readers}

    def reader(self, number: int) -> str:
        return self._draw(number).choices(self.readers, [READERS[name].share for name in self.readers])[0]

    def make(self, number: int, folder: Path) -> tuple[str, Path, str]:
        """(reader, path of its file or folder, what was done to it), in this folder."""
        draw, name = self._draw(number), self.reader(number)
        draw.random()  # which the reader was chosen with
        files = draw.choice(self.seeds[name])
        target = draw.choice([file for file in sorted(files) if re.search(READERS[name].changed, file)])
        if draw.random() > 0.04 or not READERS[name].names_file:
            return name, _write({**files, target: changed(files[target], draw)}, folder), f"{target} changed"
        path = _write(files, folder)
        return name, path, f"{target} {_replace(folder / target, draw, self.seeds)}"

    def __call__(self, number: int, folder: Path) -> Outcome:
        name, path, _ = self.make(number, folder)
        return outcome_of(name, path)

    def _draw(self, number: int) -> Random:
        return Random(f"{self.seed} {number}")


def _files(path: Path, folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in [path, *sorted(path.rglob("*"))]
            if file.is_file()}


def _write(files: Files, folder: Path) -> Path:
    """The files below folder; the path of what they are together."""
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder / next(iter(files)).partition("/")[0]


def _replace(file: Path, draw: Random, others: dict[str, list[Files]]) -> str:
    """Something else than it was in the place of a file; what."""
    file.unlink()
    how = draw.choice(("absent", "a folder", "a pipe", "empty", "a link to itself", "a link to nowhere",
                       "an endless file", "a file of another kind", "a file of another kind"))
    match how:
        case "a folder":
            file.mkdir()
        case "a pipe":
            os.mkfifo(file)
        case "empty":
            file.touch()
        case "a link to itself":
            file.symlink_to(file.name)
        case "a link to nowhere":
            file.symlink_to("nowhere")
        case "an endless file":
            file.symlink_to("/dev/zero")
        case "a file of another kind":
            files = draw.choice(draw.choice(list(others.values())))
            file.write_bytes(files[draw.choice(sorted(files))])
    return how
