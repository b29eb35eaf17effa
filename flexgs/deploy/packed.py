"""What all versions of the packed file have in common: how it begins, its chunks, and the model they fill.

    6, 2      b"FLEXGS", and the version of the format as a little-endian integer
    4, 4      length and CRC-32 of the header
    header    as the version says: what is in the model, and the ratio, size and CRC-32 of each chunk
    chunks    without gaps; version 2 has a last part behind them

Cuts are nested. A chunk holds the Gaussians that enter between the previous chunk's ratio and its own, and
the rows of the transform's tensors that cuts up to its ratio read and smaller cuts do not. So each byte is
sent once, and a client that has the chunks up to a ratio makes every cut up to that ratio.
"""

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flexgs.camera import Camera, check_cameras
from flexgs.config import Config, count_at
from flexgs.deploy import MAGIC
from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.model.deltas import Deltas
from flexgs.model.elastic import ElasticModel, Place, make_transform
from flexgs.splats import Splats

HEAD = struct.Struct("<6sHII")
CAMERAS = 8
"""The most cameras that a file stores."""
MOST_HEADER, MOST_CHUNKS = 1 << 20, 200
AGAIN = "get the file again"


class Part(NamedTuple):
    """Rows of a tensor that a chunk holds."""

    name: str
    """splats.means, for instance, or transform.planes.0."""
    first: int
    last: int
    """One behind the last row."""
    start: int
    """The row of the first Gaussian: rows of the tensor less this are Gaussians."""


class Chunk(Protocol):
    """One chunk, as the header describes it."""

    @property
    def ratio(self) -> float:
        """The largest ratio that can be cut with the chunks up to this one."""
    @property
    def bytes(self) -> int:
        """Size in the file."""
    @property
    def crc32(self) -> int:
        """Checksum of these bytes."""


class Packed(Protocol):
    """A packed model of some version, of which the header is known."""

    last: tuple[int, int]
    """Size and CRC-32 of the part behind the chunks."""
    model: ElasticModel
    """The model, with zeros in the rows that have not been read; prepare() makes it."""
    bounds: dict[str, float]
    """The largest error of each attribute in the chunks that have been read; empty if they are exact."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The chunks, by rising ratio."""
    def prepare(self) -> None:
        """Make the model; UserError if its chunks cannot be those of such a model."""
    def room(self, index: int) -> int:
        """Return the bytes of memory that fill() takes for a chunk."""
    def fill(self, index: int, body: bytes, what: str) -> None:
        """Write what a chunk holds into the model; UserError, and nothing written, if it is damaged."""
    def complete(self, body: bytes) -> None:
        """Read the last part: all settings, and cameras."""


def write_file(path: Path, version: int, header: bytes, bodies: Sequence[bytes]) -> None:
    """Write a packed file, or none if that fails."""
    with atomic_file(path) as out, out.open("wb") as file:
        file.write(HEAD.pack(MAGIC, version, len(header), zlib.crc32(header)) + header)
        file.writelines(bodies)


def tensors_of(model: ElasticModel) -> dict[str, Tensor]:
    """Return all tensors of a model by the names that parts have."""
    return {**{f"splats.{name}": t for name, t in model.splats.items()},
            **{f"transform.{name}": t for name, t in model.transform.state_dict().items()}}


def parts_of(model: ElasticModel, ratios: Sequence[float]) -> Iterator[list[Part]]:
    """Yield, for each of the rising ratios, the rows that no smaller ratio needs."""
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
                    parts.append(Part(name, first, end, start))
                    have[name, start] = end
        yield parts


def outline(n: int, degree: int, place: Place, config: Config, exact: bool) -> ElasticModel:
    """Make a model of n Gaussians that has shapes, but no memory for values.

    Deltas are of float32 unless the file holds them exactly; other transforms as they are stored.
    """
    with torch.device("meta"):
        splats = Splats(torch.empty(n, 3), torch.empty(n, 4), torch.empty(n, 3), torch.empty(n),
                        torch.empty(n, 3), torch.empty(n, (degree + 1) ** 2 - 1, 3), place.origin)
        transform = make_transform(config, splats, unit=place.unit)
    keep = isinstance(transform, Deltas) and not exact
    return ElasticModel(splats, transform if keep else transform.stored(), config)


def with_memory(model: ElasticModel) -> ElasticModel:
    """Give an outline zeros, which take no memory until they are written to."""
    transform = model.transform
    transform.load_state_dict({name: _zeros(t) for name, t in transform.state_dict().items()}, assign=True)
    return ElasticModel(model.splats.map(_zeros), transform, model.config)


def _zeros(like: Tensor) -> Tensor:
    return torch.from_numpy(np.zeros(like.shape, dtype_of(like)))


def dtype_of(t: Tensor) -> str:
    """Return the name of the type of a tensor, which numpy knows too."""
    return str(t.dtype).removeprefix("torch.")


def rise_to_all(ratios: Sequence[float]) -> bool:
    """Whether ratios rise, and the last of them is 1."""
    return bool(ratios) and ratios[-1] == 1 and all(a < b for a, b in itertools.pairwise(ratios))


def check_parts(model: ElasticModel, chunks: Sequence[Chunk], where: str) -> list[list[Part]]:
    """Return the parts of each chunk; UserError unless the chunks rise to all of the model."""
    if not rise_to_all(ratios := [chunk.ratio for chunk in chunks]):
        raise UserError(f"{where}: the header makes no sense (the chunks do not rise to all of the model); "
                        f"{AGAIN}")
    return list(parts_of(model, ratios))


def camera_numbers(model: ElasticModel) -> list[list[float]]:
    """Return some of a model's cameras: width, height, world to camera and K of each."""
    chosen = [camera.at(model.splats.origin) for camera in model.cameras[::1 + len(model.cameras) // CAMERAS]]
    values = [torch.cat([camera.viewmat.float().flatten(), camera.K.flatten()]).tolist() for camera in chosen]
    return [[camera.width, camera.height, *(float(f"{value:.9g}") for value in row)]
            for camera, row in zip(chosen, values, strict=True)]


def cameras_from(rows: Sequence[Sequence[float]], place: Place, where: str) -> list[Camera]:
    """Read what camera_numbers() has written."""
    numbers = torch.tensor(rows, dtype=torch.float64).view(-1, 27)
    sizes, viewmats, Ks = (numbers[:, :2].long(), numbers[:, 2:18].float().view(-1, 4, 4),
                           numbers[:, 18:].float().view(-1, 3, 3))
    check_cameras(viewmats, Ks, sizes, where)
    return [Camera(viewmat, K, width, height, place.near, place.origin)
            for viewmat, K, (width, height) in zip(viewmats, Ks, sizes.tolist(), strict=True)]


def transposed(rows: Tensor) -> bytes:
    """Return the bytes of the rows with bytes of equal significance side by side, which pack better."""
    plain = rows.detach().cpu().contiguous().numpy()
    return plain.reshape(-1).view(np.uint8).reshape(-1, plain.itemsize).T.tobytes()


def restored(raw: bytes, like: Tensor) -> Tensor:
    """Read what transposed() has written, for a tensor of the shape and type of another."""
    plain = np.frombuffer(raw, np.uint8).reshape(like.element_size(), -1).T.copy()
    return torch.from_numpy(plain.reshape(-1)).view(like.dtype).view(like.shape)
