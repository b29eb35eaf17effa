"""Version 1 of the packed file, which is exact to the bit: tensors, their bytes transposed, deflated.

    header    JSON: config, splats (number of Gaussians), sh_degree; optionally origin, unit and near
              (Place in model/elastic.py); cameras to look from (width, height, world to camera, K);
              and for each chunk: ratio, bytes, crc32, parts [name, first, last]
    chunks    for each part, rows first : last of a tensor, bytes transposed (the first byte of every
              value, then the second of every value, ...); each chunk is deflated as a whole

What is before the header, and what belongs into a chunk, packed.py describes.
"""

import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from flexgs.config import Config
from flexgs.deploy.packed import (
    AGAIN,
    MOST_CHUNKS,
    camera_numbers,
    cameras_from,
    check_parts,
    dtype_of,
    outline,
    parts_of,
    restored,
    tensors_of,
    transposed,
    with_memory,
    write_file,
)
from flexgs.errors import UserError
from flexgs.inputs import Range, check_tensors, parse_json, typed
from flexgs.model.elastic import ElasticModel, Place

VERSION = 1
MOST_DEFLATED = 1032
"""The largest factor by which deflate can shrink data."""


@dataclass(frozen=True)
class Chunk:
    """One chunk, as the header describes it."""

    ratio: Annotated[float, Range(0, 1, "(]")]
    bytes: Annotated[int, Range(1, 1 << 50)]
    crc32: Annotated[int, Range(0, 2**32 - 1)]
    parts: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Header(Place):
    """The header of a file, with the coordinates (Place) of its model."""

    config: dict[str, Any]
    splats: Annotated[int, Range(1, 1 << 40)]
    sh_degree: Annotated[int, Range(0, 3)]
    chunks: Annotated[tuple[Chunk, ...], Range(1, MOST_CHUNKS)]
    cameras: tuple[Annotated[tuple[float, ...], Range(27, 27)], ...] = ()


def write(model: ElasticModel, path: Path, ratios: Sequence[float]) -> None:
    """Write the model to a file with one chunk per ratio; ratios rise, and the last is 1."""
    tensors, chunks, bodies = tensors_of(model), [], []
    for parts, ratio in zip(parts_of(model, ratios), ratios, strict=True):
        raw = b"".join(transposed(tensors[part.name][part.first:part.last]) for part in parts)
        body = zlib.compress(raw, 6)
        chunks.append({"ratio": ratio, "bytes": len(body), "crc32": zlib.crc32(body),
                       "parts": [part[:3] for part in parts]})
        bodies.append(body)
    header = json.dumps({"config": model.config.to_dict(), "splats": len(model.splats),
                         "sh_degree": model.sh_degree, **model.place.to_dict(),
                         "cameras": camera_numbers(model), "chunks": chunks}).encode()
    write_file(path, VERSION, header, bodies)


class PackedV1:
    """A packed model of version 1; see Packed in packed.py."""

    def __init__(self, raw: bytes, where: str):
        """Read the header; UserError if it is not one."""
        self._where = where
        self.last, self.bounds = (0, 0), dict[str, float]()
        self._header: Header = typed(Header, parse_json(raw, where, AGAIN), where)
        self.chunks = self._header.chunks

    def prepare(self) -> None:
        """Make the model; UserError unless the chunks have its parts, and sizes that deflate can reach."""
        header, where = self._header, self._where
        config = Config.from_dict(header.config, f"{where}: config")
        model = outline(header.splats, header.sh_degree, header, config, exact=True)
        tensors = tensors_of(model)
        for chunk, parts in zip(self.chunks, check_parts(model, self.chunks, where), strict=True):
            size = sum(tensors[name][first:last].nbytes for name, first, last, _ in parts)
            if chunk.parts != tuple(part[:3] for part in parts):
                raise UserError(f"{where}: the header makes no sense (the chunks are not those of such a "
                                f"model); {AGAIN}")
            if not chunk.bytes - size // 1000 - 64 <= size <= MOST_DEFLATED * chunk.bytes:
                raise UserError(f"{where}: the header makes no sense ({size:,} bytes in {chunk.bytes:,}, "
                                f"which is no size that they deflate to); {AGAIN}")
        cameras = cameras_from(header.cameras, header, where)
        self.model = with_memory(model)
        self.model.cameras = cameras

    def room(self, index: int) -> int:
        """Return the bytes of memory that fill() takes for a chunk."""
        return self.chunks[index].bytes + 2 * sum(rows.nbytes for rows in self._rows(index))

    def fill(self, index: int, body: bytes, what: str) -> None:
        """Write what a chunk holds into the model; UserError, and nothing written, if it is damaged."""
        wanted = self._rows(index)
        size = sum(rows.nbytes for rows in wanted)
        inflater = zlib.decompressobj()
        try:
            raw = inflater.decompress(body, size + 1)
        except zlib.error as e:
            raise UserError(f"{what} is not deflated ({e}); {AGAIN}") from None
        if len(raw) != size or not inflater.eof or inflater.unused_data:
            raise UserError(f"{what} is of another length than its {size:,} bytes deflated; {AGAIN}")
        ends = list(itertools.accumulate(rows.nbytes for rows in wanted))
        stored = [restored(raw[end - rows.nbytes:end], rows) for rows, end in zip(wanted, ends, strict=True)]
        for (name, _, _), rows in zip(self.chunks[index].parts, stored, strict=True):
            check_tensors({name: rows}, {name: (dtype_of(rows), tuple(rows.shape))}, what)
        for mine, rows in zip(wanted, stored, strict=True):
            mine.copy_(rows)

    def complete(self, body: bytes) -> None:
        """Do nothing: the header has said all."""

    def _rows(self, index: int) -> list[Tensor]:
        tensors = tensors_of(self.model)
        return [tensors[name][first:last] for name, first, last in self.chunks[index].parts]
