"""Writing files so that a kill or a power cut leaves either the old or the new, never half of one.

What is written lies beside its place, in a folder with a lock, until it is whole and on the disk, and is then
renamed. What a kill leaves of that has a lock that nobody holds: whoever writes to the same place next
removes it. Several things change together by one rename too: staged() collects them, publish() renames the
collection, and only then each takes its place. A kill in between is made good by the next owner of the folder
(tidy), and newest() finds them until then.

Folders come from others too. A link is never followed to what is moved, replaced or removed.
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
    """A temporary file of path's name, in a folder beside it, that takes its place when the block ends well.
    UserError if path is a folder, or cannot be written."""
    if os.path.isdir(path):  # False for a name that is too long
        raise UserError(f"{path}: is a folder; expected the name of a file")
    with _workplace(path) as out:
        yield out  # many writers go by the suffix
        _sync(out)
        os.replace(out, path)
        _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside path that takes its place when the block ends well. UserError if it cannot be
    written.

    A folder that is replaced is away for a moment, and a kill in that moment leaves neither; see publish()
    for what may not be.
    """
    with _workplace(path) as out:
        out.mkdir()
        yield out
        _sync_tree(out)
        _replace(out, path)


def staged(folder: Path) -> Path:
    """Where the owner of folder collects the files and folders that publish() puts into it together."""
    place = folder / STAGED
    if place.is_symlink() or not place.is_dir():
        _remove(place)
        place.mkdir()
    return place


def publish(folder: Path) -> None:
    """Put all that is staged into folder at once, in the place of what has the same names."""
    _sync_tree(folder / STAGED)
    os.rename(folder / STAGED, folder / PUBLISHED)  # from here on the new ones count
    _sync_folder(folder)
    _settle(folder)


def newest(folder: Path, name: str) -> Path:
    """The path of a file or folder that is published in folder: its place, or where a kill has left it on the
    way there."""
    waiting = folder / PUBLISHED / name
    return waiting if waiting.exists() and not waiting.parent.is_symlink() else folder / name


def tidy(folder: Path) -> None:
    """Make good what kills have left in folder and below, for its owner: end what publish() began, remove
    half-written ones."""
    _settle(folder)
    _remove(folder / STAGED)
    for where, folders, files in os.walk(folder):
        for path in (Path(where, name) for name in [*files, *folders] if _TEMPORARY.fullmatch(name)):
            if not _in_use(path):
                _remove(path)
        folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    with atomic_file(path) as out:
        out.write_text(json.dumps(value, indent=1) + "\n")


def read_jsonl(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that have these keys. Other lines are left out: another process may
    be writing to the file, or a kill has cut a line off."""
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
        raise _refusal(path, e) from None
    return path


def _refusal(path: Path, error: OSError) -> Exception:
    """What to raise where path cannot be written: a full disk stays what it is, all else is for the user to
    mend."""
    return error if cure(error) else UserError(f"{path}: cannot be written "
                                               f"({error.strerror or error}); choose another output folder")


@contextmanager
def only_one(folder: Path, wait: bool = False) -> Iterator[None]:
    """Own folder while the block runs: other processes are kept from working in it, and what killed ones have
    left is tidied.

    A kill ends that too. If another process works there, wait for its end, or UserError.
    """
    lock = FileLock(make_folder(folder) / _LOCK)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise UserError(f"{folder}: another process works here now; wait, or choose another output folder") from None
    except OSError as e:
        raise _refusal(folder / _LOCK, e) from None
    try:
        tidy(folder)
        try:
            yield
        finally:
            tidy(folder)  # it may have been interrupted, or one of its workers killed
    finally:
        lock.release()


def _settle(folder: Path) -> None:
    """Put what publish() has renamed into its places. Files, which describe folders, go first and come last,
    so that no new folder ever stands beside an old description. May be interrupted and done again."""
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
    """Rename new to path; what is there is put aside and removed, unless both are files."""
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
    """Wait until the file is on the disk: else a power cut after a rename may leave its name with nothing in
    it."""
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
    """A new name in path's folder, which is made if need be, for what is to take its place or has had it."""
    return make_folder(path.parent) / f"{_stem(path)}{uuid4().hex[:8]}"


def _stem(path: Path) -> str:
    """What names in its folder begin with that are for path, whose own name may be as long as the disk
    takes."""
    return f".{os.fsencode(path.name)[:200].decode(errors='ignore')}."


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A new name like path's, in a locked folder beside it, which is removed in the end. What killed
    processes have left of such folders for path is removed first."""
    place = _beside(path)
    for left in path.parent.glob(f"{glob.escape(_stem(path))}*"):
        if _TEMPORARY.fullmatch(left.name) and (left / _LOCK).exists() and not _in_use(left):
            _remove(left)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name that is too long is found out before the work
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
    except OSError:  # a disk that cannot be written or is full: it stays where it is
        return True


def _remove(path: Path) -> None:
    """What is at path, if anything is; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
