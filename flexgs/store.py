"""Store: a run folder on a disk that all machines share, or in an object store with a copy per process.

The job, which watches, and the workers, which train, communicate by files (see store_session.py). On a shared
disk that needs nothing more. With S3 or Google Cloud Storage, a process pushes what it has written and pulls
what it is about to read.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeGuard

import pyarrow.fs as pafs

from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.training.checkpoint import checkpoints
from flexgs.urls import first_line, public

log = logging.getLogger("flexgs.store")

DESCRIPTION = "state.json"
"""The file of a checkpoint that is pushed last: where it exists, the checkpoint is whole."""


@dataclass(frozen=True)
class Store:
    """A run folder, and the file system that keeps it: this machine's, or an object store."""

    folder: Path
    """The run folder, or the local copy of one in an object store."""
    files: pafs.FileSystem = field(default_factory=pafs.LocalFileSystem)
    root: str = ""
    """The path of the run folder in an object store; empty without one."""

    @staticmethod
    def open(uri: str, folder: Path) -> "Store":
        """Open an object store.

        Args:
            uri: s3://bucket/path or gs://bucket/path, optionally with options of pyarrow.fs, such as
                ?endpoint_override=host:port&scheme=http. Keys come from the environment.
            folder: the local copy.

        Raises:
            UserError: the object store cannot be written to.
        """
        try:
            files, root = pafs.FileSystem.from_uri(uri)
            probe = f"{root}/.flexgs"
            with files.open_output_stream(probe) as out:
                out.write(b"flexgs")
            files.delete_file(probe)
        except (OSError, ValueError) as e:
            raise UserError(f"--storage {public(uri).partition('?')[0]}: cannot be "
                            f"written ({first_line(e)}); expected a bucket that exists, and keys for "
                            "it in the environment") from None
        return Store(folder, files, root.rstrip("/"))

    @property
    def remote(self) -> bool:
        """Whether the run folder is kept in an object store."""
        return bool(self.root)

    def place(self, name: str = "") -> str:
        """Return the path in `files` of a file or folder of the run folder, by default of itself."""
        return f"{self.root or self.folder}/{name}".rstrip("/")

    def __truediv__(self, name: str) -> "Store":
        return replace(self, folder=self.folder / name, root=(self.remote and self.place(name)) or "")

    def copied_to(self, folder: Path) -> "Store":
        """Return the store with its local copy in another folder; without an object store, itself."""
        return replace(self, folder=folder) if self.remote else self

    def push(self, *names: str) -> None:
        """Make files and folders of the object store equal to the copy's, in the order of the names.

        The description of a checkpoint comes after the rest of its folder.
        """
        for name in names if self.remote else ():
            mine = {str(p.relative_to(self.folder)) for p in _files(self.folder / name)}
            for there in sorted(mine, key=lambda there: (there.endswith(f"/{DESCRIPTION}"), there)):
                pafs.copy_files(str(self.folder / there), self.place(there), pafs.LocalFileSystem(),
                                self.files)
            for there in self._kept(name).keys() - mine:
                self.files.delete_file(self.place(there))

    def pull(self, *names: str) -> None:
        """Make files and folders of the copy equal to the object store's; equal files are not downloaded."""
        for name in names if self.remote else ():
            kept = self._kept(name)
            for there, info in kept.items():
                self._download(self.folder / there, info)
            for file in _files(self.folder / name):
                if str(file.relative_to(self.folder)) not in kept:
                    file.unlink()

    def find(self, pattern: str) -> list[str]:
        """Return the files of a pattern such as trials/*/trial.json where the run folder is kept."""
        if not self.remote:
            return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(pattern))
        return sorted(there for there in self._kept(pattern.partition("*")[0].rstrip("/"))
                      if there.count("/") == pattern.count("/") and fnmatch(there, pattern))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name where the run folder is kept."""
        return self.files.get_file_info(self.place(name)).type == pafs.FileType.File

    def push_checkpoint(self, name: str) -> None:
        """Push a checkpoint, and delete the older ones that the copy has no longer."""
        if self.remote:
            self.push(f"checkpoints/{name}")
            for there in sorted(self._kept("checkpoints")):  # DESCRIPTION is deleted before the tensors
                if not (self.folder / there).exists():
                    self.files.delete_file(self.place(there))

    def steps(self) -> list[int]:
        """Return the numbers of views that the checkpoints were written after, the newest first."""
        if self.remote:
            names = [Path(there).parent.name for there in self._kept("checkpoints")
                     if there.endswith(f"/{DESCRIPTION}")]
        else:
            names = [path.name for path in checkpoints(self.folder / "checkpoints")]
        return sorted((int(name.removeprefix("step_")) for name in names), reverse=True)

    def latest_step(self) -> int:
        """Return the number of views that the newest checkpoint was written after; 0 without one."""
        return next(iter(self.steps()), 0)

    def delete(self, name: str) -> None:
        """Delete a file in the object store, but not in the copy."""
        if self.remote and self.exists(name):
            self.files.delete_file(self.place(name))

    def _kept(self, name: str) -> dict[str, pafs.FileInfo]:
        """Return the files that the object store has of a file or folder, by their path in the run folder."""
        found = [self.files.get_file_info(self.place(name))]
        if found[0].type != pafs.FileType.File:
            found = self.files.get_file_info(pafs.FileSelector(self.place(name), recursive=True,
                                                               allow_not_found=True))
        return {f.path.removeprefix(f"{self.place()}/"): f for f in found if f.type == pafs.FileType.File}

    def _download(self, file: Path, info: pafs.FileInfo) -> None:
        if file.exists() and (file.stat().st_size, file.stat().st_mtime_ns) == (info.size, info.mtime_ns):
            return
        with atomic_file(file) as out:
            pafs.copy_files(info.path, str(out), self.files, pafs.LocalFileSystem())
            os.utime(out, ns=(info.mtime_ns, info.mtime_ns))


def is_remote(storage: str | None) -> TypeGuard[str]:
    """Whether --storage is an object store, not a folder."""
    return storage is not None and storage.startswith(("s3://", "gs://"))


@contextmanager
def storage_may_be_away() -> Iterator[None]:
    """Turn an error of the storage into a warning, for a process that only watches: workers would fail."""
    try:
        yield
    except OSError as e:
        log.warning("the storage does not answer: %s", str(e).splitlines()[0][:300])


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
