"""Writing files so that a kill or a power cut leaves either the old or the new, never half of one.

What is written lies beside its place until it is whole and on the disk, and is then renamed. Several things change together
by one rename too: staged() collects them, publish() renames the collection, and only then each takes its place. A kill in
between is made good by the next owner of the folder (tidy), and newest() finds them until then.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from flexgs.errors import UserError
from flexgs.inputs import parse_json

STAGED, PUBLISHED = ".staged", ".published"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file of path's name, in a folder beside it, that takes its place when the block ends well. UserError if path
    is a folder."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a file")
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary / path.name  # many writers go by the suffix
        _sync(temporary / path.name)
        os.replace(temporary / path.name, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside path that takes its place when the block ends well.

    A folder that is replaced is away for a moment, and a kill in that moment leaves neither; see publish() for what may not be.
    """
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def staged(folder: Path) -> Path:
    """Where the owner of folder collects the files and folders that publish() puts into it together."""
    (folder / STAGED).mkdir(exist_ok=True)
    return folder / STAGED


def publish(folder: Path) -> None:
    """Put all that is staged into folder at once, in the place of what has the same names."""
    _sync_tree(folder / STAGED)
    os.rename(folder / STAGED, folder / PUBLISHED)  # from here on the new ones count
    _sync_folder(folder)
    _settle(folder)


def newest(folder: Path, name: str) -> Path:
    """The path of a file or folder that is published in folder: its place, or where a kill has left it on the way there."""
    return waiting if (waiting := folder / PUBLISHED / name).exists() else folder / name


def tidy(folder: Path) -> None:
    """Make good what kills have left in folder and below, for its owner: end what publish() began, remove half-written ones."""
    _settle(folder)
    shutil.rmtree(folder / STAGED, ignore_errors=True)
    for where, folders, files in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, files):
            Path(where, name).unlink(missing_ok=True)
        for name in filter(_TEMPORARY.fullmatch, folders):
            shutil.rmtree(Path(where, name), ignore_errors=True)
        folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    with atomic_file(path) as out:
        out.write_text(json.dumps(value, indent=1) + "\n")


def read_jsonl(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that have these keys. Other lines are left out: another process may be writing to the
    file, or a kill has cut a line off."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(UserError):
            row = parse_json(line, str(path))
            if isinstance(row, dict) and all(key in row for key in keys):
                rows.append(row)
    return rows


def make_folder(path: Path) -> Path:
    """path as a folder that can be written to, or UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("permission denied")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}); choose another output folder") from None
    return path


@contextmanager
def only_one(folder: Path, wait: bool = False) -> Iterator[None]:
    """Own folder while the block runs: other processes are kept from working in it, and what killed ones have left is tidied.

    A kill ends that too. If another process works there, wait for its end, or UserError.
    """
    lock = FileLock(make_folder(folder) / ".lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise UserError(f"{folder}: another process works here now; wait, or choose another output folder") from None
    try:
        tidy(folder)
        yield
        tidy(folder)  # of its workers one may have been killed
    finally:
        lock.release()


def _settle(folder: Path) -> None:
    """Put what publish() has renamed into its places. Files, which describe folders, go first and come last, so that no new
    folder ever stands beside an old description. May be interrupted and done again."""
    new = folder / PUBLISHED
    if not new.is_dir():
        return
    names = sorted((path.name for path in new.iterdir()), key=lambda name: (not (new / name).is_dir(), name))
    for name in names:
        if (new / name).is_file():
            (folder / name).unlink(missing_ok=True)
    for name in names:
        _replace(new / name, folder / name)
    new.rmdir()
    _sync_folder(folder)


def _replace(new: Path, path: Path) -> None:
    """Rename new to path; a folder that is there is put aside and removed."""
    old = _beside(path)
    if path.is_dir():
        os.rename(path, old)
    os.rename(new, path)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(where, name))
        _sync_folder(Path(where))


def _sync(path: Path) -> None:
    """Wait until the file is on the disk: else a power cut after a rename may leave its name with nothing in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """The same for the names in a folder, where the file system can."""
    with contextlib.suppress(OSError):
        _sync(path)


def _beside(path: Path) -> Path:
    return make_folder(path.parent) / f".{path.name}.{uuid4().hex[:8]}"
