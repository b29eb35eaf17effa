"""Atomic writes: a kill or a power cut leaves either the old file or folder or the new one, never a half.

New content is written beside its target, in a temporary folder with a lock, until it is whole and on the
disk; then it is renamed. If a kill leaves a temporary folder behind, its lock is free, and whoever writes to
the same target next removes it. Several files and folders can also change together by one rename: staged()
collects them, publish() renames the collection, and only then does each move to its place. After a kill in
between, newest() finds them, and tidy() by the next owner of the folder moves them.

Folders may come from strangers: a link is never followed to something that is moved, replaced or removed.
"""

import contextlib
import glob
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

from flexgs.errors import UserError, cure
from flexgs.inputs import parse_json

STAGED, PUBLISHED = ".staged", ".published"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")
_LOCK = ".lock"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; it replaces `path` when the block ends without an error.

    The temporary file has the same name in another folder, since many writers go by the suffix. UserError if
    path is a folder or cannot be written.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        raise UserError(f"{path}: is a folder; expected the name of a file")
    with _workplace(path) as out:
        yield out
        _sync(out)
        os.replace(out, path)
        _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` when the block ends without an error.

    A folder that is replaced is absent for a moment, and a kill in that moment leaves neither old nor new;
    publish() avoids that. UserError if the folder cannot be written.
    """
    with _workplace(path) as out:
        out.mkdir()
        yield out
        _sync_tree(out)
        _replace(out, path)


def staged(folder: Path) -> Path:
    """Return the subfolder in which the owner of `folder` collects what publish() puts in place together."""
    place = folder / STAGED
    if place.is_symlink() or not place.is_dir():
        _remove(place)
        place.mkdir()
    return place


def publish(folder: Path) -> None:
    """Put everything in staged(folder) into folder at once, replacing what has the same names."""
    _sync_tree(folder / STAGED)
    os.rename(folder / STAGED, folder / PUBLISHED)  # from here on, newest() returns the new ones
    _sync_folder(folder)
    _settle(folder)


def newest(folder: Path, name: str) -> Path:
    """Return the path of a published file or folder: its place, or where a kill left it on the way there."""
    waiting = folder / PUBLISHED / name
    return waiting if waiting.exists() and not waiting.parent.is_symlink() else folder / name


def tidy(folder: Path) -> None:
    """Repair what kills left in a folder the caller owns: finish publish(), remove half-written files."""
    _settle(folder)
    _remove(folder / STAGED)
    for where, folders, files in os.walk(folder):
        for path in (Path(where, name) for name in [*files, *folders] if _TEMPORARY.fullmatch(name)):
            if not _in_use(path):
                _remove(path)
        folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_file(path) as out:
        out.write_text(json.dumps(value, indent=1) + "\n")


def read_jsonl(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines that have all these keys.

    Other lines are left out: another process may be writing to the file, or a kill has cut a line off.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(UserError):
            row = parse_json(line, str(path))
            if isinstance(row, dict) and all(key in row for key in keys):
                rows.append(row)
    return rows


def make_folder(path: Path) -> Path:
    """Make the folder if it is missing, and return its path; UserError if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("permission denied")
    except OSError as e:
        raise _refusal(path, e) from None
    return path


def _refusal(path: Path, error: OSError) -> Exception:
    """Return the error to raise where path cannot be written: UserError, but a full disk stays an OSError."""
    return error if cure(error) else UserError(f"{path}: cannot be written "
                                               f"({error.strerror or error}); choose another output folder")


@contextmanager
def only_one(folder: Path, wait: bool = False) -> Iterator[None]:
    """Own a folder while the block runs: other processes are kept out, and it is tidied before and after.

    The lock ends with the process, however that ends. If another process owns the folder: wait for it with
    wait=True, else UserError.
    """
    lock = FileLock(make_folder(folder) / _LOCK)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise UserError(f"{folder}: another process works here now; wait, or choose another output "
                        "folder") from None
    except OSError as e:
        raise _refusal(folder / _LOCK, e) from None
    try:
        tidy(folder)
        try:
            yield
        finally:
            tidy(folder)  # the block may have been interrupted, or a worker of it killed
    finally:
        lock.release()


def _settle(folder: Path) -> None:
    """Move what publish() has renamed into its places; may be interrupted and repeated.

    Old files, which describe folders, are removed before any folder is replaced, and new ones come last: a
    new folder never stands beside an old description.
    """
    new = folder / PUBLISHED
    if new.is_symlink() or not new.is_dir():
        return _remove(new)
    names = sorted((path.name for path in new.iterdir()), key=lambda name: (not (new / name).is_dir(), name))
    for name in names:
        if (new / name).is_file():
            (folder / name).unlink(missing_ok=True)
    for name in names:
        _replace(new / name, folder / name)
    new.rmdir()
    _sync_folder(folder)


def _replace(new: Path, path: Path) -> None:
    """Rename new to path; what is there is moved aside and then removed, unless both are files."""
    old = _beside(path)
    if path.is_dir() or (new.is_dir() and os.path.lexists(path)):
        os.rename(path, old)
    os.rename(new, path)
    _sync_folder(path.parent)
    _remove(old)


def _sync_tree(folder: Path) -> None:
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(where, name))
        _sync_folder(Path(where))


def _sync(path: Path) -> None:
    """Wait until the file is on the disk; else a power cut after a rename may leave an empty file."""
    # Windows synchronises only what may be written.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system supports that."""
    with contextlib.suppress(OSError):
        _sync(path)


def _beside(path: Path) -> Path:
    """Make up a new name beside path, for its replacement or its predecessor; make the parent folder."""
    return make_folder(path.parent) / f"{_stem(path)}{uuid4().hex[:8]}"


def _stem(path: Path) -> str:
    """Return the common start of the temporary names for path, cut to fit the longest name a disk takes."""
    return f".{os.fsencode(path.name)[:200].decode(errors='ignore')}."


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a new locked folder beside `path`, which is removed at the end.

    Such folders that killed processes have left for the same path are removed first.
    """
    place = _beside(path)
    for left in path.parent.glob(f"{glob.escape(_stem(path))}*"):
        if _TEMPORARY.fullmatch(left.name) and (left / _LOCK).exists() and not _in_use(left):
            _remove(left)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # fails for a name that is too long, before the work is done
        place.mkdir()
        lock = FileLock(place / _LOCK)
        lock.acquire(blocking=False)
    except OSError as e:
        _remove(place)
        raise _refusal(path, e) from None
    try:
        yield place / path.name
    finally:
        lock.release()
        _remove(place)


def _in_use(place: Path) -> bool:
    """Whether a living process holds the lock of a folder made by _workplace()."""
    if place.is_symlink() or not (place / _LOCK).exists():
        return False
    try:
        with FileLock(place / _LOCK).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # the disk is full or read-only: leave the folder alone
        return True


def _remove(path: Path) -> None:
    """Remove the file, folder or link at path, if there is one; the target of a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
