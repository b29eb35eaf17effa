"""The points of a PLY file, as nerfstudio and photogrammetry programs write them beside their cameras."""

import mmap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexgs.errors import UserError
from flexgs.inputs import regular_file, shown
from flexgs.splats import SH_C0

TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
         "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
         "float32": "f4", "float64": "f8"}
ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
HARMONICS = ("f_dc_0", "f_dc_1", "f_dc_2")
LONGEST_HEAD = 1 << 20
GREY = 128

Array = np.ndarray


class _Element(NamedTuple):
    name: str
    rows: int
    fields: list[tuple[str, str]]
    """(name, type); the type of a list is ""."""


def read_points(file: Path, doubts: list[str] | None = None) -> tuple[Array, Array]:
    """(xyz float64 [M, 3], rgb uint8 [M, 3]) of the vertices of a PLY file.

    Colours are those of COLOURS or HARMONICS: bytes as they are, integers of 16 bits as 0 to 65535, and floats as 0 to 1, or to
    255 if any is above 1; grey if there are none. Points whose position is no number are left out.
    doubts: where to put what had to be assumed, a line each; without it, each is a warning.
    UserError if the file is absent, no regular file, not such a PLY or shorter than its head says.
    """
    regular_file(file, "the point cloud that transforms.json names; or delete ply_file_path to start from random points")
    try:
        with file.open("rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
        rows = _vertices(data)
    except OSError as e:
        raise UserError(f"{file}: the point cloud named in transforms.json cannot be read ({e.strerror}): copy it again") from e
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as e:
        raise UserError(f"{file}: damaged, or not a PLY file of points with x, y, z ({e}): export it again, or delete "
                        "ply_file_path from transforms.json to start from random points") from e
    said: list[str] = []
    xyz = np.stack([rows[axis] for axis in "xyz"], 1).astype(np.float64)
    rgb = _colours(file, rows, said)
    finite = np.isfinite(xyz).all(1)
    if not finite.all():
        said.append(f"{file}: {np.sum(~finite)} of {len(xyz)} points have a position that is no number and are left out")
    if doubts is None:
        for line in said:
            warnings.warn(line, stacklevel=2)
    else:
        doubts += said
    return xyz[finite], rgb[finite]


def _vertices(data: mmap.mmap | bytes) -> Array:
    """A structured array of the vertices; ValueError and others for what is no such file."""
    order, elements, at = _head(data)
    before = []
    for element in elements:
        if element.name == "vertex":
            break
        before.append(element)
    else:
        raise ValueError("no element named vertex")
    if "" in (form for _, form in element.fields):
        raise ValueError("the vertices have lists")
    names = [name for name, _ in element.fields]
    if len(set(names)) < len(names) or not {"x", "y", "z"} <= set(names):
        raise ValueError(f"the vertices have {shown(names)}")
    kind = np.dtype([(name, order + form) for name, form in element.fields])
    if not order:
        lines = [line for line in data[at:].decode("ascii").splitlines() if line.strip()]
        start = sum(e.rows for e in before)
        rows = [tuple(map(float, line.split())) for line in lines[start:start + element.rows]]
        if len(rows) < element.rows or any(len(row) != len(names) for row in rows):
            raise ValueError(f"{len(rows)} whole lines of {element.rows} points")
        table = np.array(rows, np.float64).reshape(-1, len(names))
        found = np.empty(len(table), kind)
        for i, (name, form) in enumerate(element.fields):
            if form[0] in "iu" and not ((np.iinfo(form).min <= table[:, i]) & (table[:, i] <= np.iinfo(form).max)).all():
                raise ValueError(f"a {name} that its type does not hold")
            found[name] = table[:, i]
        return found
    for e in before:
        if e.rows and "" in (form for _, form in e.fields):
            raise ValueError(f"lists before the vertices, in the element {shown(e.name)}")
        at += e.rows * sum(np.dtype(form).itemsize for _, form in e.fields if form)
    if element.rows * kind.itemsize > len(data) - at:
        raise ValueError(f"{max(len(data) - at, 0):,} bytes for {element.rows:,} points of {kind.itemsize}")
    return np.frombuffer(data, kind, element.rows, at)


def _head(data: mmap.mmap | bytes) -> tuple[str, list[_Element], int]:
    """(byte order, "" for text; the elements; where they start)."""
    order, elements, at = None, [], 0
    while True:
        end = data.find(b"\n", at, LONGEST_HEAD)
        if end < 0:
            raise ValueError("its head has no end_header")
        words = data[at:end].decode("latin-1").split()
        if at == 0 and words != ["ply"]:
            raise ValueError("its first line is not ply")
        at = end + 1
        if words == ["end_header"]:
            break
        if words[:1] == ["format"]:
            order = ORDERS[words[1]]
        elif words[:1] == ["element"]:
            if not words[2].isdecimal() or len(words[2]) > 18:
                raise ValueError(f"an element of {shown(words[2])}")
            elements.append(_Element(words[1], int(words[2]), []))
        elif words[:1] == ["property"]:
            elements[-1].fields.append((words[-1], "" if words[1] == "list" else TYPES[words[1]]))
        elif words and words[0] not in ("ply", "comment", "obj_info"):
            raise ValueError(f"its head says {shown(' '.join(words))}")
    if order is None:
        raise ValueError("its head says no format")
    return order, elements, at


def _colours(file: Path, rows: Array, doubts: list[str]) -> Array:
    names = {name.lower(): name for name in rows.dtype.names or ()}
    if found := next((triple for triple in COLOURS if set(triple) <= set(names)), None):
        columns = [rows[names[name]] for name in found]
        values = np.stack(columns, 1)
        forms = {column.dtype.kind + str(column.dtype.itemsize) for column in columns}
        most = float(np.nanmax(values, initial=0)) if len(values) else 0.0
        if forms == {"u1"}:
            scale = 1.0
        elif forms <= {"f4", "f8"}:
            scale = 255.0 if most <= 1 else 1.0
        else:
            scale = 1.0 if most <= 255 else 1 / 257
            if forms == {"u2"} and most <= 255:
                doubts.append(f"{file}: its colours have 16 bits and none is above 255: taken as 0 to 255")
        values = values.astype(np.float64) * scale
    elif set(HARMONICS) <= set(names):
        values = 255 * (0.5 + SH_C0 * np.stack([rows[names[name]] for name in HARMONICS], 1).astype(np.float64))
        values = np.clip(values, 0, 255)
    else:
        doubts.append(f"{file}: has no colours (red, green, blue), so grey points are assumed; it has "
                      f"{', '.join(names.values())}")
        return np.full((len(rows), 3), GREY, np.uint8)
    wrong = ~np.all((values > -1) & (values < 256), axis=1)  # true for NaN
    if wrong.any():
        doubts.append(f"{file}: {wrong.sum()} of {len(rows)} points have colours that are none of 0 to 255, 0 to 65535 or 0 to "
                      "1, so grey is assumed for them")
    values = np.where(wrong[:, None], GREY, values)
    return np.clip(values.round(), 0, 255).astype(np.uint8)
