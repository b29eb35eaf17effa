"""Headers and rows of PLY files, checked against the size of the file before memory is taken."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from flexgs.errors import UserError
from flexgs.inputs import regular_file, shown

MOST_HEAD = 1 << 20
"""The most bytes of a header; compressed PLY with all harmonics has four thousand."""
BLOCK = 1 << 16
"""The most rows that are read at once."""
TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
         "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4",
         "uint32": "u4", "float32": "f4", "float64": "f8"}
Order = Literal["", "<", ">"]
ORDERS: dict[str, Order] = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass(frozen=True)
class Element:
    """An element of a PLY header, such as "vertex"."""
    name: str
    count: int
    properties: dict[str, str]
    """Name -> numpy type of each property of fixed size, in the order of the file."""
    lists: bool = False
    """Whether the element also has list properties, which `properties` leaves out."""


@dataclass(frozen=True)
class PlyHead:
    """The header of a PLY file."""
    order: Order
    """The byte order of the body: "<" or ">"; empty for a text file."""
    elements: tuple[Element, ...]
    bytes: int
    """The size of the header, and so the offset of the body."""

    def element(self, name: str) -> Element | None:
        """Return the element of this name, or None."""
        return next((e for e in self.elements if e.name == name), None)


def read_head(path: Path | str) -> PlyHead:
    """Read the header of a PLY file; UserError if it is not one.

    Comments may be of any encoding; lines may be blank, or end in CR LF.
    """
    path = regular_file(path, "a PLY file")
    with path.open("rb") as file:
        start = file.read(MOST_HEAD)
    end = re.search(rb"(?:^|\n)[ \t]*end_header[ \t]*(?:\r\n|\n|\r|$)", start)
    if not re.match(rb"ply\s", start) or not end:
        raise UserError(f"{path}: not a readable PLY file (its head does not start with ply or has no "
                        "end); export it again")
    order: Order | None = None
    elements: list[Element] = []
    for number, raw in enumerate(start[:end.start()].splitlines()[1:], 2):
        words = raw.decode("ascii", "replace").split()
        match words:
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", kind, "1.0"] if kind in ORDERS and order is None:
                order = ORDERS[kind]
            case ["element", name, count] if count.isdecimal() and len(count) < 16:
                elements.append(Element(name, int(count), {}))
            case ["property", "list", first, second, _] if elements and first in TYPES and second in TYPES:
                elements[-1] = replace(elements[-1], lists=True)
            case ["property", kind, name] if (elements and kind in TYPES
                                              and name not in elements[-1].properties):
                elements[-1].properties[name] = TYPES[kind]
            case _:
                raise UserError(f"{path}: not a readable PLY file (line {number} of its head is "
                                f"{shown(' '.join(words))}); export it again")
    if order is None or len({e.name for e in elements}) < len(elements):
        raise UserError(f"{path}: not a readable PLY file (found no format line, or two elements of one "
                        "name); export it again")
    return PlyHead(order, tuple(elements), end.end())


@dataclass(frozen=True)
class Rows:
    """The rows of one element of a PLY file, which are read in blocks."""
    dtype: np.dtype
    """The structured type of a row, in native byte order."""
    count: int
    _blocks: Callable[[], Iterator[np.ndarray]]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Read the rows as structured arrays of at most BLOCK rows, or of all of a text file."""
        return self._blocks()

    def all(self) -> np.ndarray:
        """Read all rows as one structured array."""
        out, first = np.empty(self.count, self.dtype), 0
        for block in self:
            out[first:first + len(block)] = block
            first += len(block)
        return out


def open_element(path: Path | str, name: str) -> Rows:
    """Find the rows of one element.

    UserError if there is no such element, the file is too short for it, or lists occur in it or, in a binary
    file, before it.
    """
    path = Path(path)
    head = read_head(path)
    wanted = head.element(name)
    if wanted is None or not wanted.properties:
        found = ", ".join(shown(e.name) for e in head.elements[:8]) or "none"
        raise UserError(f"{path}: not a readable PLY file of {name}: found the elements {found}, "
                        f"expected one called {name} with properties")
    before = head.elements[:head.elements.index(wanted)]
    if wanted.lists or (head.order and any(e.lists for e in before)):
        raise UserError(f"{path}: not a readable PLY file of {name}: found lists in or before them, "
                        "expected numbers alone")
    plain = np.dtype([(p, t) for p, t in wanted.properties.items()])
    size = path.stat().st_size
    if not head.order:
        if wanted.count * 2 * len(wanted.properties) > size:  # each number is a digit and a blank at least
            raise UserError(f"{path}: not a readable PLY file: found {size:,} bytes, too few for its "
                            f"{wanted.count:,} {name} rows; it is cut off or damaged")
        return Rows(plain, wanted.count, lambda: iter([_text(path, head, before, wanted, plain)]))
    stored = plain.newbyteorder(head.order)
    start = head.bytes + sum(e.count * sum(np.dtype(t).itemsize for t in e.properties.values())
                             for e in before)
    end = start + wanted.count * stored.itemsize
    if end > size:
        raise UserError(f"{path}: not a readable PLY file: found {size:,} bytes, expected {end:,} for its"
                        f" {wanted.count:,} {name} rows; it is cut off or damaged")

    def blocks() -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            file.seek(start)
            for first in range(0, wanted.count, BLOCK):
                rows = np.fromfile(file, stored, most := min(BLOCK, wanted.count - first))
                if len(rows) < most:
                    raise UserError(f"{path}: became shorter while it was read; read it again")
                yield rows.astype(plain, copy=False)

    return Rows(plain, wanted.count, blocks)


def _text(path: Path, head: PlyHead, before: tuple[Element, ...], wanted: Element,
          plain: np.dtype) -> np.ndarray:
    """Return an element's rows from a text file: one row per line, after those of earlier elements."""
    with path.open("rb") as file:
        file.seek(head.bytes)
        lines = [line for line in file.read().splitlines() if line.strip()]
    skipped = sum(e.count for e in before)
    rows = lines[skipped:skipped + wanted.count]
    if len(rows) < wanted.count:
        raise UserError(f"{path}: not a readable PLY file: found {len(rows):,} lines, expected "
                        f"{wanted.count:,} of {wanted.name}; it is cut off or damaged")
    out = np.empty(len(rows), plain)
    try:
        values = np.array([line.split() for line in rows], np.float64).reshape(len(rows), -1)
        columns = dict(zip(wanted.properties, values.T, strict=True))
    except ValueError:
        raise UserError(f"{path}: not a readable PLY file: found a line that is not "
                        f"{len(wanted.properties)} numbers; export it again") from None
    for name, column in columns.items():
        if (kind := plain[name]).kind in "iu" and not ((np.iinfo(kind).min <= column)
                                                       & (column <= np.iinfo(kind).max)).all():
            raise UserError(f"{path}: not a readable PLY file: found a {shown(name)} that {kind} cannot "
                            "hold; export it again")
        with np.errstate(over="ignore"):  # doubles beyond float32 become infinite
            out[name] = column
    return out
