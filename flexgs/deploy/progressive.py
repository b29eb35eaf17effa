"""An elastic model as one file that is read from the front: the smallest cut, then what larger cuts add.

packed.py says what all versions have in common; version 2 (packed_v2.py) is small, version 1 (packed_v1.py)
exact to the bit. An HTTP client asks for byte ranges.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from flexgs.camera import Camera
from flexgs.config import Config, check_ratio, percent
from flexgs.deploy import MAGIC, packed_v1, packed_v2
from flexgs.deploy.packed import AGAIN, HEAD, MOST_HEADER, Chunk, Packed, check_ratios
from flexgs.deploy.packed_v1 import PackedV1
from flexgs.deploy.packed_v2 import PackedV2
from flexgs.errors import UserError
from flexgs.inputs import regular_file
from flexgs.model.budget import cut_to
from flexgs.model.elastic import ElasticModel
from flexgs.splats import Splats
from flexgs.urls import is_url, public

RATIOS = (0.01, 0.05, 0.15, 0.5, 1.0)
VERSIONS: Mapping[int, Callable[[bytes, str], Packed]] = {packed_v1.VERSION: PackedV1,
                                                          packed_v2.VERSION: PackedV2}


class File(Protocol):
    """The file that a model is read from: on disk, or behind a URL (Remote in http.py)."""

    size: int | None
    """Size of the whole file in bytes; may be None before the first read()."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, or fewer where the file ends."""


def write(model: ElasticModel, path: Path, ratios: Sequence[float] = RATIOS, exact: bool = False) -> None:
    """Write the model to a file with one chunk per ratio; ratios rise, and the last is 1.

    Args:
        model: the model.
        path: the file; it appears when it is whole.
        ratios: where the chunks end.
        exact: keep every bit (version 1), in five to six times as many bytes.

    Raises:
        UserError: the ratios are others, the model's cuts are not parts of it, or version 2 cannot hold it.
    """
    check_ratios(ratios)
    if (cuts := model.config.evaluation.cuts) != "own":
        raise UserError(f"{path}: found a model whose cuts are not parts of it (--evaluation.cuts {cuts}), "
                        "expected an elastic one; `flexgs pack` takes a PLY of all its Gaussians")
    (packed_v1 if exact else packed_v2).write(model, path, ratios)


@dataclass
class Progressive:
    """A packed file, on disk or behind a URL, of which only the chunks that a cut needs are read."""

    source: str
    packed: Packed
    file: File
    ends: int
    """Where the chunks that have been read end."""
    loaded: int = 0
    """The number of chunks that have been read."""
    completed: bool = False
    """Whether the part behind the chunks has been read."""

    @staticmethod
    def open(source: str | Path) -> "Progressive":
        """Read the header of a file or of an http(s) URL; UserError if it is not a whole packed model.

        No memory is taken for the model before its header is known to agree with the size of the file.
        """
        where, file = public(str(source)), _opened(source)
        head = file.read(0, HEAD.size)
        if len(head) < HEAD.size or head[:6] != MAGIC:
            raise UserError(f"{where}: not a progressive model of flexgs; expected a file of `flexgs pack`")
        _, version, length, crc = HEAD.unpack(head)
        if version not in VERSIONS:
            raise UserError(f"{where}: format {version}, expected one of {', '.join(map(str, VERSIONS))}, "
                            "which this version of flexgs reads")
        raw = file.read(HEAD.size, length) if length <= MOST_HEADER else b""
        if len(raw) != length or zlib.crc32(raw) != crc:
            raise UserError(f"{where}: the header is cut off or damaged; {AGAIN}")
        packed = VERSIONS[version](raw, where)
        size = HEAD.size + length + sum(chunk.bytes for chunk in packed.chunks) + packed.last[0]
        if file.size != size:
            raise UserError(f"{where}: found {file.size:,} bytes, expected {size:,} as its "
                            f"header says; {AGAIN}")
        packed.prepare()
        return Progressive(where, packed, file, HEAD.size + length)

    def load(self, ratio: float) -> int:
        """Read the chunks that a cut at `ratio` needs; return the bytes of the file read so far."""
        check_ratio(ratio)
        while self.loaded < len(self.chunks) and (not self.loaded
                                                  or self.chunks[self.loaded - 1].ratio < ratio):
            self._load(self.chunks[self.loaded])
            self.loaded += 1
        return self.offset

    def cut(self, budget: str | float) -> Splats:
        """Return the cut for a budget as ElasticModel.cut does, after reading the chunks that it needs."""
        def read(count: int, ratio: float) -> Splats:
            self.load(max(ratio, count / len(self)))
            return self.model.first(count, ratio)

        return cut_to(budget, self, read)

    def __len__(self) -> int:
        """Number of Gaussians of the whole model."""
        return len(self.model)

    @property
    def model(self) -> ElasticModel:
        """The model, with zeros in the rows that have not been read."""
        return self.packed.model

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The chunks, by rising ratio."""
        return self.packed.chunks

    @property
    def bounds(self) -> Mapping[str, float]:
        """The largest error of each attribute in what has been read; empty if the file is exact."""
        return self.packed.bounds

    @property
    def offset(self) -> int:
        """The number of bytes transferred so far."""
        return self.ends + (self.packed.last[0] if self.completed else 0)

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return self.model.sh_degree

    @property
    def config(self) -> Config:
        """The settings that the model was trained with."""
        self._complete()
        return self.model.config

    @property
    def cameras(self) -> Sequence[Camera]:
        """Training cameras to look from; may be empty."""
        self._complete()
        return self.model.cameras

    def _load(self, chunk: Chunk) -> None:
        what = f"{self.source}: the chunk of {percent(chunk.ratio)}"
        room = self.packed.room(self.loaded)
        if (free := psutil.virtual_memory().available) < room:
            raise UserError(f"{what} takes {room / 1e9:.1f} GB of memory, found "
                            f"{free / 1e9:.1f} GB free; ask for less of the model, or use a larger machine")
        self.packed.fill(self.loaded, self._checked(self.ends, (chunk.bytes, chunk.crc32), what), what)
        self.ends += chunk.bytes

    def _complete(self) -> None:
        """Read what stands behind the chunks, once; a cut does not need it."""
        if not self.completed:
            at = self.ends + sum(chunk.bytes for chunk in self.chunks[self.loaded:])
            self.packed.complete(self._checked(at, self.packed.last, f"{self.source}: the last part"))
            self.completed = True

    def _checked(self, offset: int, expected: tuple[int, int], what: str) -> bytes:
        """Read bytes of which the size and the checksum are known."""
        body = self.file.read(offset, expected[0])
        if len(body) != expected[0] or zlib.crc32(body) != expected[1]:
            raise UserError(f"{what} is cut off or damaged; {AGAIN}")
        return body


class _Local:
    def __init__(self, path: Path):
        self.path = regular_file(path, "a file of `flexgs pack`")
        self.size: int | None = self.path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as e:
            raise UserError(f"{self.path}: cannot be read ({e.strerror or e})") from None


def _opened(source: str | Path) -> File:
    if not is_url(str(source)):
        return _Local(Path(source))
    from flexgs.http import Remote  # takes a fifth of a second, which files on disk do not need

    return Remote(str(source))
