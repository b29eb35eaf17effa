"""An elastic model as one file that is read from the front: the smallest cut first, behind it what larger ones add.

    6, 2      b"FLEXGS", and the version of the format as a little-endian integer
    4, 4      length and CRC-32 of the header
    header    JSON: config, splats (their number), sh_degree, origin, unit, near (see Place in model/elastic.py; optional), some
              cameras to look from (width, height, world to camera, K), and of each chunk: ratio, bytes, crc32, parts
              [name, first, last]
    chunks    for each part the rows first : last of a tensor, bytes transposed (all first bytes, all second, ...); all deflated

Cuts are nested: a chunk has the Gaussians that enter up to its ratio, and of the transform the rows that cuts up to this ratio
read and smaller ones do not. So each byte is sent once, and whoever has the chunks up to a ratio makes every cut up to there as
the model itself does, bit for bit. Chunks follow each other, so their offsets are sums, and a client over HTTP asks for ranges.
"""

import contextlib
import itertools
import json
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.config import Config, check_ratio, count_at
from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.model.budget import fitting
from flexgs.model.elastic import ElasticModel, Place, make_transform
from flexgs.splats import Splats

MAGIC, VERSION = b"FLEXGS", 1
HEAD = struct.Struct("<6sHII")
RATIOS = (0.01, 0.05, 0.15, 0.5, 1.0)
CAMERAS = 8
"""At most, that a file has."""
MOST_HEADER = 1 << 20
MOST_DEFLATED = 1032
"""Deflate makes nothing smaller than by this factor."""

Read = Callable[[int, int], bytes]
"""(offset, length) -> that many bytes, or fewer where the file ends."""


def write(model: ElasticModel, path: Path, ratios: Sequence[float] = RATIOS) -> None:
    """model as a file, with a chunk for each of these rising ratios, the last of which is 1."""
    for ratio in ratios:
        check_ratio(ratio, "--ratios")
    if not ratios or any(a >= b for a, b in itertools.pairwise(ratios)) or ratios[-1] != 1:
        raise UserError(f"--ratios: found {' '.join(f'{r:g}' for r in ratios)}, expected rising ones, the last of them 1")
    tensors, chunks, bodies = _tensors(model), [], []
    for parts, ratio in zip(_parts(model, ratios), ratios, strict=True):
        body = zlib.compress(b"".join(_transposed(tensors[name][first:last]) for name, first, last in parts), 6)
        chunks.append({"ratio": ratio, "bytes": len(body), "crc32": zlib.crc32(body), "parts": parts})
        bodies.append(body)
    cameras = [_numbers(camera.at(model.splats.origin)) for camera in model.cameras[::1 + len(model.cameras) // CAMERAS]]
    header = json.dumps({"config": model.config.to_dict(), "splats": len(model.splats), "sh_degree": model.sh_degree,
                         **model.place.to_dict(),
                         "cameras": cameras, "chunks": chunks}).encode()
    with atomic_file(path) as out, out.open("wb") as file:
        file.write(HEAD.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header)
        file.writelines(bodies)


@dataclass
class Progressive:
    """A file of write(), on disk or behind a URL, of which as much is read as the cuts need that are asked for."""

    source: str
    model: ElasticModel
    """With zeros for what has not been read."""
    chunks: list[dict[str, Any]]
    offset: int
    """Of the first chunk that has not been read; what has been transferred so far."""
    read: Read
    loaded: int = 0
    """Chunks that have been read."""

    @staticmethod
    def open(source: str | Path) -> "Progressive":
        """Read the header of a file, or of an http(s) URL; UserError if it is none of ours, broken or cut off."""
        where = str(source)
        read = _http(where) if where.startswith(("http://", "https://")) else _file(Path(source))
        head = read(0, HEAD.size)
        if len(head) < HEAD.size or head[:6] != MAGIC:
            raise UserError(f"{where}: not a progressive model of flexgs; expected a file of `flexgs pack`")
        _, version, length, crc = HEAD.unpack(head)
        if version != VERSION:
            raise UserError(f"{where}: format {version}, this version reads {VERSION}")
        raw = read(HEAD.size, length) if length <= MOST_HEADER else b""
        if len(raw) != length or zlib.crc32(raw) != crc:
            raise UserError(f"{where}: the header is cut off or damaged; get the file again")
        try:
            about = json.loads(raw)
            config, n, degree, chunks = (about[key] for key in ("config", "splats", "sh_degree", "chunks"))
            row = 4 * (14 + 3 * ((degree + 1) ** 2 - 1))
            if not 0 < n * row <= MOST_DEFLATED * sum(chunk["bytes"] for chunk in chunks):
                raise ValueError(f"{n} Gaussians in a file that is too small for them")
            model = _empty(Config.from_dict(config, where), n, degree, place := Place.of(about, where))
            model.cameras = [_camera(numbers, place) for numbers in about.get("cameras", ())]
            expected = _parts(model, [chunk["ratio"] for chunk in chunks])
            if [chunk["parts"] for chunk in chunks] != [[list(part) for part in parts] for parts in expected]:
                raise ValueError("the chunks are not those of such a model")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as e:
            raise UserError(f"{where}: the header makes no sense ({e}); get the file again") from None
        return Progressive(where, model, chunks, HEAD.size + length, read)

    def load(self, ratio: float) -> int:
        """Read the chunks that cuts up to this ratio need; the bytes of the file that have been read in all."""
        check_ratio(ratio)
        while self.loaded < len(self.chunks) and (not self.loaded or self.chunks[self.loaded - 1]["ratio"] < ratio):
            self._load(self.chunks[self.loaded])
            self.loaded += 1
        return self.offset

    def cut(self, budget: str | float) -> Splats:
        """As ElasticModel.cut, after reading what it needs."""
        def read(count: int, ratio: float) -> Splats:
            self.load(max(ratio, count / len(self)))
            return self.model.first(count, ratio)

        return fitting(budget, len(self), self.sh_degree, read)

    def __len__(self) -> int:
        """The number of Gaussians of the whole."""
        return len(self.model)

    @property
    def sh_degree(self) -> int:
        return self.model.sh_degree

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def cameras(self) -> Sequence[Camera]:
        return self.model.cameras

    def _load(self, chunk: dict[str, Any]) -> None:
        body = self.read(self.offset, chunk["bytes"])
        if len(body) != chunk["bytes"] or zlib.crc32(body) != chunk["crc32"]:
            raise UserError(f"{self.source}: the chunk of {100 * chunk['ratio']:g} % is cut off or damaged; get the file again")
        tensors = _tensors(self.model)
        wanted = [tensors[name][first:last] for name, first, last in chunk["parts"]]
        size = sum(t.nbytes for t in wanted)
        raw = zlib.decompressobj().decompress(body, size + 1)
        if len(raw) != size:
            raise UserError(f"{self.source}: the chunk of {100 * chunk['ratio']:g} % has {len(raw)} bytes, expected {size}")
        at = 0
        for rows in wanted:
            rows.copy_(_restored(raw[at:at + rows.nbytes], rows))
            at += rows.nbytes
        self.offset += chunk["bytes"]


def _tensors(model: ElasticModel) -> dict[str, Tensor]:
    return {**{f"splats.{name}": t for name, t in model.splats.items()},
            **{f"transform.{name}": t for name, t in model.transform.state_dict().items()}}


def _parts(model: ElasticModel, ratios: Sequence[float]) -> Iterator[list[tuple[str, int, int]]]:
    """For each of the rising ratios, the rows (name, first, last) that no smaller one of them needs."""
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


def _empty(config: Config, n: int, sh_degree: int, place: Place) -> ElasticModel:
    """A model of zeros, which take no memory until they are written to."""
    def zeros(*shape: int) -> Tensor:
        return torch.from_numpy(np.zeros(shape, np.float32))

    splats = Splats(zeros(n, 3), zeros(n, 4), zeros(n, 3), zeros(n), zeros(n, 3), zeros(n, (sh_degree + 1) ** 2 - 1, 3),
                    place.origin)
    return ElasticModel(splats, make_transform(config, splats, unit=place.unit).stored(), config)


def _numbers(camera: Camera) -> list[float]:
    values = torch.cat([camera.viewmat.float().flatten(), camera.K.flatten()]).tolist()
    return [camera.width, camera.height, *(float(f"{value:.9g}") for value in values)]


def _camera(numbers: list[float], place: Place) -> Camera:
    width, height, *rest = numbers
    values = torch.tensor(rest, dtype=torch.float32)
    return Camera(values[:16].view(4, 4), values[16:].view(3, 3), int(width), int(height), place.near, place.origin)


def _transposed(rows: Tensor) -> bytes:
    """The bytes of the rows, those of equal weight beside each other, which deflate better."""
    plain = rows.detach().cpu().contiguous().numpy()
    return plain.reshape(-1).view(np.uint8).reshape(-1, plain.itemsize).T.tobytes()


def _restored(raw: bytes, like: Tensor) -> Tensor:
    plain = np.frombuffer(raw, np.uint8).reshape(like.element_size(), -1).T.copy()
    return torch.from_numpy(plain.reshape(-1)).view(like.dtype).view(like.shape)


def _file(path: Path) -> Read:
    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return read


def _http(url: str) -> Read:
    def read(offset: int, length: int) -> bytes:
        request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-{offset + length - 1}"})
        try:
            with contextlib.closing(urllib.request.urlopen(request, timeout=60)) as answer:
                if answer.status != 206:
                    raise UserError(f"{url}: the server sends whole files only; expected one that answers ranges")
                return answer.read(length)
        except urllib.error.HTTPError as e:
            if e.code == 416:  # behind the end
                return b""
            raise UserError(f"{url}: {e}") from None
        except (urllib.error.URLError, OSError) as e:
            raise UserError(f"{url}: no answer ({getattr(e, 'reason', e)})") from None

    return read
