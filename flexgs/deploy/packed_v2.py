"""Version 2 of the packed file: values rounded to steps that their Gaussians deserve, then entropy coded.

All numbers are little-endian.

    header    JSON, deflated (zlib): splats (number of Gaussians), sh_degree; config: the settings that the
              shapes of the tensors follow from; optionally origin, unit and near (Place in model/elastic.py);
              chunks [ratio, bytes, CRC-32 of them], and last [bytes, CRC-32] of what is behind them
    chunks    each a file of the format .lzma (coding.py), which holds

              head      steps, bounds: 6 float32 each, of scales, means, quats, opacities, sh0, shN; centre:
                        3 float32; finest: float32; basis: K x K int8, K = 0, 3, 8 or 15 for sh_degree 0 to 3
              widths    one byte per column: how many bytes a value has, 1 to 4
              columns   level of each Gaussian; then, of the Gaussians that enter, scales (3 columns), means
                        (3), quats (3), opacities (1), sh0 (3), shN (3 K); then, if the transform is "deltas",
                        for each of means (3), quats (4), scales (3), opacities (1), sh0 (3), and for each
                        knot from which the chunk has rows, the columns of these rows
              exact     with any other transform: quats of the Gaussians that enter, float32, and the rows of
                        its tensors, as in version 1. Frames are not turned: the transform knows those given

    last      JSON, deflated: config, all settings; cameras (width, height, world to camera, K)

A column lists its Gaussians by rising level, equal ones in their order; that of the levels is in order.
coding.py says how bytes become integers, and quantise.py how these become numbers. shN has K columns for each
of the three opponent colours, one after the other.

Of n Gaussians, a chunk that ends at ratio r brings those up to number floor(r n), at least 1. Knot j of
config.deltas has changes for the first floor(rows[j] n), or floor(knots[j] n) where rows is null. A chunk
brings those of them up to number floor(r n) that earlier chunks have not brought, if knots[j - 1] < r (the
first knot: always). They may belong to Gaussians of earlier chunks, but count in steps of their own chunk,
and in world units. model/deltas.py says how changes are added to a cut.

`bounds` are the largest differences between the numbers of the chunk and the model that was packed (its
frames turned, see turn.py): the writer has read the file back and found none that is larger.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexgs.config import Config, percent
from flexgs.deploy import coding
from flexgs.deploy.coding import Integers
from flexgs.deploy.packed import (
    AGAIN,
    MOST_CHUNKS,
    MOST_HEADER,
    Part,
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
from flexgs.deploy.quantise import LEVELS, NAMES, Quantiser, Values, head_type, levels_of, rounded
from flexgs.deploy.turn import Turn
from flexgs.deploy.worth import worth
from flexgs.errors import UserError
from flexgs.inputs import Range, check_tensors, parse_json, typed
from flexgs.model.deltas import Deltas
from flexgs.model.elastic import ElasticModel, Place
from flexgs.model.transform import Transform

VERSION = 2
Size = Annotated[int, Range(1, 1 << 50)]
Crc = Annotated[int, Range(0, 2**32 - 1)]


@dataclass(frozen=True)
class Chunk:
    """One chunk, as the header describes it."""

    ratio: float
    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Header(Place):
    """The header of a file, with the coordinates (Place) of its model."""

    config: dict[str, Any]
    splats: Annotated[int, Range(1, 1 << 40)]
    sh_degree: Annotated[int, Range(0, 3)]
    chunks: Annotated[tuple[tuple[Annotated[float, Range(0, 1, "(]")], Size, Crc], ...],
                      Range(1, MOST_CHUNKS)]
    last: tuple[Size, Crc]


@dataclass(frozen=True, kw_only=True)
class Last:
    """What stands behind the chunks."""

    config: dict[str, Any]
    cameras: tuple[Annotated[tuple[float, ...], Range(27, 27)], ...] = ()


@dataclass(frozen=True)
class Layout:
    """What a chunk holds, in the order of the file."""

    entering: slice
    """The Gaussians that enter."""
    parts: list[Part]
    """The rows that are rounded: of Gaussians, then of deltas."""
    exact: list[Part]
    """The rows that are kept as they are."""
    rows: list[int]
    """The number of rows of each column."""
    least: int
    """The fewest bytes of the chunk before it is compressed."""
    most: int

    @staticmethod
    def of(parts: Sequence[Part], model: ElasticModel) -> "Layout":
        """Work out the layout of a chunk that has these parts."""
        new = {part.name.removeprefix("splats."): part for part in parts if part.name.startswith("splats.")}
        rest = [part for part in parts if not part.name.startswith("splats.")]
        entering = slice(new["means"].first, new["means"].last) if new else slice(0, 0)
        rounded, exact = [new[name] for name in NAMES if name in new], []
        if _turnable(model):
            rounded += rest
        else:
            exact = [part for part in rounded if part.name == "splats.quats"] + rest
            rounded = [part for part in rounded if part.name != "splats.quats"]
        tensors = tensors_of(model)
        rows = [entering.stop - entering.start]
        for part in rounded:
            numbers = tensors[part.name][:1].numel() - (part.name == "splats.quats")
            rows += numbers * [part.last - part.first]
        least = (head_type(model.splats.shN.shape[1]).itemsize + len(rows)
                 + sum(tensors[part.name][part.first:part.last].nbytes for part in exact))
        return Layout(entering, rounded, exact, rows, least + sum(rows),
                      least + coding.MOST_WIDTH * sum(rows))


class PackedV2:
    """A packed model of version 2; see Packed in packed.py."""

    def __init__(self, raw: bytes, where: str):
        """Read the header; UserError if it is not one."""
        self._where = where
        self._header: Header = typed(Header, _parsed(raw, where), where)
        self.chunks = [Chunk(*chunk) for chunk in self._header.chunks]
        self.last = self._header.last
        self.bounds = dict.fromkeys(NAMES, 0.0)

    def prepare(self) -> None:
        """Make the model; UserError unless the chunks have sizes that are possible for it."""
        header, where = self._header, self._where
        config = Config.from_dict(header.config, f"{where}: config")
        model = outline(header.splats, header.sh_degree, header, config, exact=False)
        self._layouts = [Layout.of(parts, model) for parts in check_parts(model, self.chunks, where)]
        for chunk, layout in zip(self.chunks, self._layouts, strict=True):
            if not coding.possible(chunk.bytes, layout.least, layout.most):
                raise UserError(f"{where}: the header makes no sense ({layout.least:,} to {layout.most:,} "
                                f"bytes in {chunk.bytes:,}, which is no size that they compress to); {AGAIN}")
        self.model = with_memory(model)
        self._levels: Integers = np.zeros(header.splats, np.int8)

    def room(self, index: int) -> int:
        """Return the bytes of memory that fill() takes for a chunk."""
        return self.chunks[index].bytes + 3 * self._layouts[index].most

    def fill(self, index: int, body: bytes, what: str) -> None:
        """Write what a chunk holds into the model; UserError, and nothing written, if it is damaged."""
        try:
            with np.errstate(all="ignore"):  # what overflows is found below
                found = self._decoded(self._layouts[index], body)
        except ValueError as e:
            raise UserError(f"{what} is damaged ({e}); {AGAIN}") from None
        levels, bounds, tensors = found
        for part, rows in tensors:
            check_tensors({part.name: rows}, {part.name: (dtype_of(rows), tuple(rows.shape))}, what)
        mine = tensors_of(self.model)
        for part, rows in tensors:
            mine[part.name][part.first:part.last] = rows
        self._levels = levels
        self.bounds = {name: max(error, bounds[name]) for name, error in self.bounds.items()}

    def complete(self, body: bytes) -> None:
        """Read the last part: all settings, and cameras."""
        where = f"{self._where}: the part behind the chunks"
        last: Last = typed(Last, _parsed(body, where), where)
        config = Config.from_dict(last.config, f"{where}: config")
        if _shaping(config) != _shaping(self.model.config):
            raise UserError(f"{where}: found other settings than in the header, expected the same; {AGAIN}")
        self.model.cameras = cameras_from(last.cameras, self._header, where)
        self.model.config = config

    def _decoded(self, layout: Layout, body: bytes) -> tuple[Integers, dict[str, float],
                                                             list[tuple[Part, Tensor]]]:
        """Return the levels of all Gaussians, the bounds, and the rows of each part.

        ValueError if the body is damaged.
        """
        raw = coding.decompress(body, layout.most)
        kind, model = head_type(self.model.splats.shN.shape[1]), self.model
        at = kind.itemsize + len(layout.rows)
        widths = raw[kind.itemsize:at]
        end = at + sum(width * rows for width, rows in zip(widths, layout.rows, strict=False))
        tensors = tensors_of(model)
        exact = [tensors[part.name][part.first:part.last] for part in layout.exact]
        if (len(raw) != end + sum(rows.nbytes for rows in exact) or len(widths) < len(layout.rows)
                or not set(widths) <= {1, 2, 3, 4}):
            raise ValueError(f"{len(raw):,} bytes, which is not what its columns have")
        head = np.frombuffer(raw, kind, 1)[0]
        quantiser = Quantiser(head)
        columns = coding.columns_of(widths, raw[at:end], layout.rows)
        levels, entering = self._levels.copy(), next(columns)
        if (np.abs(entering) > LEVELS).any():
            raise ValueError("a level that is none")
        levels[layout.entering] = entering
        scales, found = model.splats.scales.numpy().copy(), []
        for part in layout.parts:
            own, like = _gaussians(part), tensors[part.name][part.first:part.last]
            order = np.argsort(levels[own], kind="stable")
            whole = np.empty((len(order), like[:1].numel() - (part.name == "splats.quats")), np.int32)
            for j in range(whole.shape[1]):
                whole[order, j] = next(columns)
            rows = _numbers(quantiser, part, whole, levels[own], scales[own], model.transform.unit)
            if part.name == "splats.scales":
                scales[own] = rows
            found.append((part, torch.from_numpy(rows).view(like.shape)))
        for part, like in zip(layout.exact, exact, strict=True):
            found.append((part, restored(raw[end:end + like.nbytes], like)))
            end += like.nbytes
        return levels, dict(zip(NAMES, head["bounds"].tolist(), strict=True)), found


def write(model: ElasticModel, path: Path, ratios: Sequence[float]) -> None:
    """Write the model to a file with one chunk per ratio; ratios rise, and the last is 1.

    What is written is read back first. UserError if it is further from the model than the bounds it states,
    or if a number cannot be held in the steps of its Gaussian.
    """
    model = model.to("cpu")
    packer = _Packer(model)
    layouts = [Layout.of(parts, model) for parts in parts_of(model, ratios)]
    try:
        bodies = [coding.compress(packer.chunk(layout, ratio))
                  for layout, ratio in zip(layouts, ratios, strict=True)]
    except OverflowError:
        raise UserError(f"{path}: found a number too large to be rounded in steps of its Gaussian, expected "
                        "a trained model; `flexgs pack --exact` keeps all as they are") from None
    bodies.append(_json({"config": model.config.to_dict(), "cameras": camera_numbers(model)}))
    ends = [(len(body), zlib.crc32(body)) for body in bodies]
    header = _json({"config": _shaping(model.config), "splats": len(model), "sh_degree": model.sh_degree,
                    **model.place.to_dict(), "last": ends[-1],
                    "chunks": [(ratio, *end) for ratio, end in zip(ratios, ends[:-1], strict=True)]})
    packed = PackedV2(header, str(path))
    packed.prepare()
    for i, layout in enumerate(layouts):
        what, packed.bounds = f"{path}: the chunk of {percent(ratios[i])}", dict.fromkeys(NAMES, 0.0)
        packed.fill(i, bodies[i], what)
        packer.check(packed, layout.parts, what)
    write_file(path, VERSION, header, bodies)


class _Packer:
    """What the chunks of one model are made from."""

    def __init__(self, model: ElasticModel):
        self.model, self.tensors = model, tensors_of(model)
        self.turn = Turn(model.splats.quats.detach().double().numpy()) if _turnable(model) else None
        self.levels = np.zeros(len(model), np.int8)
        self.scales = np.zeros((len(model), 3), np.float32)

    def given(self, part: Part) -> Values:
        """Return rows of the model as they are to be stored: turned, and in world units."""
        values = self.tensors[part.name][part.first:part.last].detach().cpu().double().numpy()
        if self.turn and part.name.endswith(".quats"):
            return self.turn.quats(values, _gaussians(part))
        if self.turn and part.name.endswith(".scales"):
            return self.turn.scales(values, _gaussians(part))
        return values * self.model.transform.unit if part.name == "transform.means" else values

    def chunk(self, layout: Layout, ratio: float) -> bytes:
        """Return the bytes of a chunk, not compressed yet; OverflowError if an integer is too large."""
        model, entering = self.model, layout.entering
        if entering.stop > entering.start:
            shown = model.first(entering.stop, ratio)[entering], model.splats[entering]
            self.levels[entering] = levels_of(*(worth(splats, model.cameras) for splats in shown))
        levels = self.levels[entering]
        head = Quantiser.head(model.splats.means[entering].detach().numpy(),
                              model.splats.shN[entering].detach().numpy(), levels)
        quantiser, bounds = Quantiser(head), dict.fromkeys(NAMES, 0.0)
        columns: list[Integers] = [levels]
        for part in layout.parts:
            own, name = _gaussians(part), part.name.partition(".")[2]
            whole = self._rounded(quantiser, part)
            rows = _numbers(quantiser, part, whole, self.levels[own], self.scales[own], model.transform.unit)
            if part.name == "splats.scales":
                self.scales[own] = rows
            bounds[name] = max(bounds[name], self.error(part, rows))
            columns += list(whole[np.argsort(self.levels[own], kind="stable")].T)
        errors = np.array(list(bounds.values()), np.float32)
        head["bounds"] = np.where(errors > 0, np.nextafter(errors, np.float32(np.inf)), 0)
        widths, raw = coding.planes(columns)
        return b"".join([head.tobytes(), widths, raw,
                         *(transposed(self.tensors[part.name][part.first:part.last])
                           for part in layout.exact)])

    def error(self, part: Part, rows: NDArray[np.float32]) -> float:
        """Return the largest difference of stored rows from the model."""
        most = 0.0
        for piece, here in _pieces(part):
            values = rows[here].astype(float)
            if part.name == "transform.means":
                values *= self.model.transform.unit
            given = self.given(piece)
            most = max(most, float(np.abs(values - given.reshape(values.shape)).max(initial=0)))
        return most

    def check(self, packed: PackedV2, parts: Sequence[Part], what: str) -> None:
        """Compare the parts of a chunk that was read back with the model; UserError beyond the bounds."""
        stored, bounds = tensors_of(packed.model), packed.bounds
        for part in parts:
            rows, name = stored[part.name][part.first:part.last], part.name.partition(".")[2]
            error = self.error(part, rows.numpy().reshape(len(rows), -1))
            if not error <= bounds[name]:
                raise UserError(f"{what}: found {part.name} off by {error:.3g}, expected at most "
                                f"{bounds[name]:.3g}, which is an error of flexgs; `flexgs pack --exact` "
                                "keeps all as they are")

    def _rounded(self, quantiser: Quantiser, part: Part) -> Integers:
        name, change = part.name.partition(".")[2], part.name.startswith("transform.")
        out = []
        for piece, _ in _pieces(part):
            own = _gaussians(piece)
            columns = quantiser.columns(name, self.given(piece), change)
            step = quantiser.step(name, self.levels[own], self.scales[own], change)
            out.append(rounded(name, columns, step))
        return np.concatenate(out)


def _numbers(quantiser: Quantiser, part: Part, whole: Integers, levels: Integers, scales: Values,
             unit: float) -> NDArray[np.float32]:
    """Return the rows [m, numbers] of a part, of which whole [m, columns] are the integers."""
    name, change = part.name.partition(".")[2], part.name.startswith("transform.")
    out = []
    for _, here in _pieces(part):
        columns = whole[here] * quantiser.step(name, levels[here], scales[here], change)
        values = quantiser.values(name, columns, change).reshape(len(columns), -1)
        out.append((values / unit if part.name == "transform.means" else values).astype(np.float32))
    return np.concatenate(out)


def _pieces(part: Part, most: int = 1 << 16) -> Iterator[tuple[Part, slice]]:
    """Split a part, so that its float64 values need little memory; yields slices of its rows beside."""
    for first in range(part.first, part.last, most):
        last = min(part.last, first + most)
        yield part._replace(first=first, last=last), slice(first - part.first, last - part.first)


def _turnable(model: ElasticModel) -> bool:
    """Whether frames may be turned: not if a transform changes quaternions and scales by what it computes."""
    return isinstance(model.transform, Deltas) or type(model.transform) is Transform


def _gaussians(part: Part) -> slice:
    return slice(part.first - part.start, part.last - part.start)


def _shaping(config: Config) -> dict[str, Any]:
    """Return the settings that the shapes of the tensors follow from; of a stranger's transform, all."""
    settings = config.to_dict()
    deltas = {name: settings["deltas"][name] for name in ("knots", "rows")}
    shaping = {"none": {}, "deltas": {"deltas": deltas}, "field": {"field": settings["field"]}}
    return {"transform": settings["transform"], **shaping.get(config.transform.kind, settings)}


def _json(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)


def _parsed(raw: bytes, where: str) -> Any:
    """Read what _json() has written."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(raw, MOST_HEADER + 1)
    except zlib.error as e:
        raise UserError(f"{where} is not deflated ({e}); {AGAIN}") from None
    if len(plain) > MOST_HEADER or not inflater.eof or inflater.unused_data:
        raise UserError(f"{where}: found JSON of another length than expected; {AGAIN}")
    return parse_json(plain, where, AGAIN)
