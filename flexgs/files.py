"""Writing files so that a kill leaves either the old or the new, never half of one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from flexgs.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside path that takes its place when the block ends well. UserError if path is a folder."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a file")
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside path that takes its place when the block ends well."""
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            old = _beside(path)
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    with atomic_file(path) as out:
        out.write_text(json.dumps(value, indent=1) + "\n")


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
    """Keep other processes from working in folder while the block runs; a kill ends that too.

    If another one does, wait for its end, or UserError.
    """
    lock = FileLock(make_folder(folder) / ".lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise UserError(f"{folder}: another process works here now; wait, or choose another output folder") from None
    try:
        yield
    finally:
        lock.release()


def _beside(path: Path) -> Path:
    return make_folder(path.parent) / f".{path.name}.{uuid4().hex[:8]}"
