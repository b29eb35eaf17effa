"""An elastic model as one file that is read from the front: the smallest cut, then what larger cuts add.

    6, 2      b"FLEXGS", and the version of the format as a little-endian integer
    4, 4      length and CRC-32 of the header
    header    JSON: config, splats (number of Gaussians), sh_degree; optionally origin, unit and near
              (Place in model/elastic.py); cameras to look from (width, height, world to camera, K);
              and for each chunk: ratio, bytes, crc32, parts [name, first, last]
    chunks    for each part, rows first : last of a tensor, bytes transposed (the first byte of every
              value, then the second of every value, ...); each chunk is deflated as a whole

Cuts are nested. A chunk holds the Gaussians that enter between the previous chunk's ratio and its own, and
the rows of the transform's tensors that cuts up to its ratio read and smaller cuts do not. So each byte is
sent once, and a client that has the chunks up to a ratio makes every cut up to that ratio bit for bit as the
model itself does. Chunks follow each other without gaps: their offsets are sums of their sizes, and an HTTP
client asks for byte ranges.
"""

import itertools
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from flexgs.camera import Camera, check_cameras
from flexgs.config import Config, check_ratio, count_at, percent
from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.inputs import Range, check_tensors, parse_json, regular_file, typed
from flexgs.model.budget import fitting
from flexgs.model.elastic import ElasticModel, Place, make_transform
from flexgs.splats import Splats
from flexgs.urls import is_url, public

MAGIC, VERSION = b"FLEXGS", 1
HEAD = struct.Struct("<6sHII")
RATIOS = (0.01, 0.05, 0.15, 0.5, 1.0)
CAMERAS = 8
"""The most cameras that a file stores."""
MOST_HEADER, MOST_CHUNKS = 1 << 20, 200
MOST_DEFLATED = 1032
"""The largest factor by which deflate can shrink data."""
AGAIN = "get the file again"


class File(Protocol):
    """The file that a model is read from: on disk, or behind a URL (Remote in http.py)."""

    size: int | None
    """Size of the whole file in bytes; may be None before the first read()."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, or fewer where the file ends."""


@dataclass(frozen=True)
class Chunk:
    """One chunk, as the header describes it."""

    ratio: Annotated[float, Range(0, 1, "(]")]
    bytes: Annotated[int, Range(1, 1 << 50)]
    crc32: Annotated[int, Range(0, 2**32 - 1)]
    parts: tuple[tuple[str, int, int], ...]

    def check(self, size: int) -> None:
        """ValueError unless `size` bytes can deflate to the bytes of this chunk."""
        if not self.bytes - size // 1000 - 64 <= size <= MOST_DEFLATED * self.bytes:
            raise ValueError(f"{size:,} bytes in {self.bytes:,}, which is no size that they deflate to")


@dataclass(frozen=True, kw_only=True)
class Header(Place):
    """The header of a file, with the coordinates (Place) of its model."""

    config: dict[str, Any]
    splats: Annotated[int, Range(1, 1 << 40)]
    sh_degree: Annotated[int, Range(0, 3)]
    chunks: Annotated[tuple[Chunk, ...], Range(1, MOST_CHUNKS)]
    cameras: tuple[Annotated[tuple[float, ...], Range(27, 27)], ...] = ()


def write(model: ElasticModel, path: Path, ratios: Sequence[float] = RATIOS) -> None:
    """Write the model to a file with one chunk per ratio; ratios rise, and the last is 1."""
    for ratio in ratios:
        check_ratio(ratio, "--ratios")
    if len(ratios) > MOST_CHUNKS:
        raise UserError(f"--ratios: found {len(ratios)}, expected at most {MOST_CHUNKS}")
    if not _rise_to_all(ratios):
        raise UserError(f"--ratios: found {' '.join(f'{r:g}' for r in ratios)}, expected rising "
                        "ones, the last of them 1")
    tensors, chunks, bodies = _tensors(model), [], []
    for parts, ratio in zip(_parts(model, ratios), ratios, strict=True):
        raw = b"".join(_transposed(tensors[name][first:last]) for name, first, last in parts)
        body = zlib.compress(raw, 6)
        chunks.append({"ratio": ratio, "bytes": len(body), "crc32": zlib.crc32(body), "parts": parts})
        bodies.append(body)
    cameras = [_numbers(camera.at(model.splats.origin))
               for camera in model.cameras[::1 + len(model.cameras) // CAMERAS]]
    header = json.dumps({"config": model.config.to_dict(), "splats": len(model.splats),
                         "sh_degree": model.sh_degree, **model.place.to_dict(),
                         "cameras": cameras, "chunks": chunks}).encode()
    with atomic_file(path) as out, out.open("wb") as file:
        file.write(HEAD.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header)
        file.writelines(bodies)


@dataclass
class Progressive:
    """A packed file, on disk or behind a URL, of which only the chunks that a cut needs are read."""

    source: str
    model: ElasticModel
    """The model, with zeros in the rows that have not been read."""
    chunks: Sequence[Chunk]
    offset: int
    """Where the first unread chunk begins; equally, the number of bytes transferred so far."""
    file: File
    loaded: int = 0
    """The number of chunks that have been read."""

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
        if version != VERSION:
            raise UserError(f"{where}: format {version}, this version reads {VERSION}")
        raw = file.read(HEAD.size, length) if length <= MOST_HEADER else b""
        if len(raw) != length or zlib.crc32(raw) != crc:
            raise UserError(f"{where}: the header is cut off or damaged; {AGAIN}")
        header: Header = typed(Header, parse_json(raw, where, AGAIN), where)
        size = HEAD.size + length + sum(chunk.bytes for chunk in header.chunks)
        if file.size != size:
            raise UserError(f"{where}: found {file.size:,} bytes, expected {size:,} as its "
                            f"header says; {AGAIN}")
        return Progressive(where, _model(header, where), header.chunks, HEAD.size + length, file)

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

        return fitting(budget, len(self), self.sh_degree, read)

    def __len__(self) -> int:
        """Number of Gaussians of the whole model."""
        return len(self.model)

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return self.model.sh_degree

    @property
    def config(self) -> Config:
        """The settings that the model was trained with."""
        return self.model.config

    @property
    def cameras(self) -> Sequence[Camera]:
        """Training cameras to look from; may be empty."""
        return self.model.cameras

    def _load(self, chunk: Chunk) -> None:
        what = f"{self.source}: the chunk of {percent(chunk.ratio)}"
        tensors = _tensors(self.model)
        wanted = [tensors[name][first:last] for name, first, last in chunk.parts]
        size = sum(rows.nbytes for rows in wanted)
        if (free := psutil.virtual_memory().available) < chunk.bytes + 2 * size:
            raise UserError(f"{what} takes {(chunk.bytes + 2 * size) / 1e9:.1f} GB of memory, found "
                            f"{free / 1e9:.1f} GB free; ask for less of the model, or use a larger machine")
        body = self.file.read(self.offset, chunk.bytes)
        if len(body) != chunk.bytes or zlib.crc32(body) != chunk.crc32:
            raise UserError(f"{what} is cut off or damaged; {AGAIN}")
        inflater = zlib.decompressobj()
        try:
            raw = inflater.decompress(body, size + 1)
        except zlib.error as e:
            raise UserError(f"{what} is not deflated ({e}); {AGAIN}") from None
        if len(raw) != size or not inflater.eof or inflater.unused_data:
            raise UserError(f"{what} is of another length than its {size:,} bytes deflated; {AGAIN}")
        ends = list(itertools.accumulate(rows.nbytes for rows in wanted))
        stored = [_restored(raw[end - rows.nbytes:end], rows) for rows, end in zip(wanted, ends, strict=True)]
        for (name, _, _), rows in zip(chunk.parts, stored, strict=True):
            check_tensors({name: rows}, {name: (_dtype(rows), tuple(rows.shape))}, what)
        for mine, rows in zip(wanted, stored, strict=True):
            mine.copy_(rows)
        self.offset += chunk.bytes


def _tensors(model: ElasticModel) -> dict[str, Tensor]:
    return {**{f"splats.{name}": t for name, t in model.splats.items()},
            **{f"transform.{name}": t for name, t in model.transform.state_dict().items()}}


def _parts(model: ElasticModel, ratios: Sequence[float]) -> Iterator[list[tuple[str, int, int]]]:
    """Yield, for each of the rising ratios, the rows (name, first, last) that no smaller ratio needs."""
    n = len(model.splats)
    have: dict[tuple[str, int], int] = {}
    for ratio in ratios:
        need = {f"splats.{name}": [(0, count_at(ratio, n))] for name, _ in model.splats.items()}
        need |= {f"transform.{name}": ranges for name, ranges in model.transform.rows(ratio, n).items()}
        parts = []
        for name, ranges in need.items():
            for start, end in ranges:
                first = have.get((name, start), start)
                if end > first:
                    parts.append((name, first, end))
                    have[name, start] = end
        yield parts


def _model(header: Header, where: str) -> ElasticModel:
    """Make the model that a header describes, of zeros that take no memory until they are written to.

    UserError unless the chunks have the parts of such a model, and sizes that deflate can reach.
    """
    n, rest = header.splats, (header.sh_degree + 1) ** 2 - 1
    config = Config.from_dict(header.config, f"{where}: config")
    with torch.device("meta"):
        splats = Splats(torch.empty(n, 3), torch.empty(n, 4), torch.empty(n, 3), torch.empty(n),
                        torch.empty(n, 3), torch.empty(n, rest, 3), header.origin)
        model = ElasticModel(splats, make_transform(config, splats, unit=header.unit).stored(), config)
    try:
        if not _rise_to_all(ratios := [chunk.ratio for chunk in header.chunks]):
            raise ValueError("the chunks do not rise to all of the model")
        tensors = _tensors(model)
        for chunk, parts in zip(header.chunks, _parts(model, ratios), strict=True):
            if chunk.parts != tuple(parts):
                raise ValueError("the chunks are not those of such a model")
            chunk.check(sum(tensors[name][first:last].nbytes for name, first, last in parts))
    except ValueError as e:
        raise UserError(f"{where}: the header makes no sense ({e}); {AGAIN}") from None
    model.splats = splats.map(_zeros)
    model.transform.load_state_dict({name: _zeros(t) for name, t in model.transform.state_dict().items()},
                                    assign=True)
    model.cameras = _cameras(header, where)
    return model


def _zeros(like: Tensor) -> Tensor:
    return torch.from_numpy(np.zeros(like.shape, _dtype(like)))


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _rise_to_all(ratios: Sequence[float]) -> bool:
    return bool(ratios) and ratios[-1] == 1 and all(a < b for a, b in itertools.pairwise(ratios))


def _numbers(camera: Camera) -> list[float]:
    values = torch.cat([camera.viewmat.float().flatten(), camera.K.flatten()]).tolist()
    return [camera.width, camera.height, *(float(f"{value:.9g}") for value in values)]


def _cameras(header: Header, where: str) -> list[Camera]:
    """Read the cameras of the header, which _numbers() has written; the pose is world to camera."""
    numbers = torch.tensor(header.cameras, dtype=torch.float64).view(-1, 27)
    sizes, viewmats, Ks = (numbers[:, :2].long(), numbers[:, 2:18].float().view(-1, 4, 4),
                           numbers[:, 18:].float().view(-1, 3, 3))
    check_cameras(viewmats, Ks, sizes, where)
    return [Camera(viewmat, K, width, height, header.near, header.origin)
            for viewmat, K, (width, height) in zip(viewmats, Ks, sizes.tolist(), strict=True)]


def _transposed(rows: Tensor) -> bytes:
    """Return the bytes of the rows with bytes of equal significance side by side, which deflate better."""
    plain = rows.detach().cpu().contiguous().numpy()
    return plain.reshape(-1).view(np.uint8).reshape(-1, plain.itemsize).T.tobytes()


def _restored(raw: bytes, like: Tensor) -> Tensor:
    plain = np.frombuffer(raw, np.uint8).reshape(like.element_size(), -1).T.copy()
    return torch.from_numpy(plain.reshape(-1)).view(like.dtype).view(like.shape)


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
