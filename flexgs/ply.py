"""PLY files: Gaussians as every 3DGS viewer reads them, and the point clouds of captures."""

import io
import re
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.lib.recfunctions import structured_to_unstructured
from plyfile import PlyData, PlyElement  # writes only; ply_rows.py reads

from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.origin import WORLD, local_origin
from flexgs.ply_rows import open_element

if TYPE_CHECKING:
    from flexgs.splats import Splats
from flexgs.gaussians import SH_C0, TENSORS, Attributes, Gaussians, unit_quaternions

AXES = ("x", "y", "z")
COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
HARMONICS = ("f_dc_0", "f_dc_1", "f_dc_2")
G = TypeVar("G", bound=Attributes)
GREY = 128
MOST_LOGIT = 16.0
"""Largest opacity logit that is read: opacity 1 to seven digits. 8-bit formats store 0 and 1 themselves."""


def ply_properties(sh_degree: int) -> list[str]:
    """Property names in the order of the 3DGS release, on which viewers rely."""
    rest = 3 * ((sh_degree + 1) ** 2 - 1)
    return ["x", "y", "z", "nx", "ny", "nz",
            *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(rest)),
            "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]


def ply_bytes(n: int, sh_degree: int, wide: bool = False) -> int:
    """Size in bytes of the file that write_ply makes of n Gaussians; wide: with float64 positions."""
    return len(_header(n, sh_degree, wide)) + (4 * len(ply_properties(sh_degree)) + 12 * wide) * n


def is_wide(gaussians: Attributes) -> bool:
    """Whether the capture's own coordinates need float64.

    They do if float32 would move more than 1 % of the Gaussians by over 5 % of the median of their three
    standard deviations.
    """
    if gaussians.origin == WORLD:
        return False
    g = gaussians.arrays()
    world = g.means.astype(np.float64) + np.array(g.origin)
    moved = np.abs(world - world.astype(np.float32)).max(1)
    tolerated = 0.05 * np.exp(np.median(g.scales.astype(np.float64), axis=1).clip(max=700))  # finite
    return bool((moved > tolerated).mean() > 0.01)


def in_world(gaussians: G, path: Path | str) -> G:
    """Return the Gaussians in the capture's coordinates; UserError names path if they need float64."""
    if is_wide(gaussians):
        raise UserError(f"{path}: positions about {place(gaussians)} need float64, which this format "
                        "cannot hold; expected NAME.ply, or --local for positions from there")
    return gaussians.at(WORLD)


def local(gaussians: G) -> G:
    """Return the Gaussians with (0, 0, 0) at their origin, wherever that is in the capture."""
    return replace(gaussians, origin=WORLD)


def place(gaussians: Attributes) -> str:
    """Format the origin of the Gaussians as options and messages write it."""
    return " ".join(f"{value:.12g}" for value in gaussians.origin)


def write_ply(gaussians: Attributes, path: Path | str) -> None:
    """Write a binary 3DGS PLY file in the capture's own coordinates.

    Scales are logarithms, opacities logits, quaternions unit, spherical harmonics channel by channel, normals
    zero. All values are float32; x y z are double where float32 is too coarse (is_wide).
    """
    with atomic_file(Path(path)) as out:
        _ply(gaussians.arrays()).write(str(out))


def to_ply(gaussians: Attributes) -> bytes:
    """Return the bytes of the file that write_ply writes."""
    out = io.BytesIO()
    _ply(gaussians.arrays()).write(out)
    return out.getvalue()


def _ply(g: Gaussians) -> PlyData:
    n, names = len(g), ply_properties(g.sh_degree)
    world = g.means.astype(np.float64) + np.array(g.origin)
    rows, first = np.zeros((n, len(names)), np.float32), 6  # after the positions, normals of zero
    rows[:, :3] = world
    for values in (g.sh0, g.shN.transpose(0, 2, 1).reshape(n, -1), g.opacities[:, None], g.scales,
                   unit_quaternions(g.quats)):
        rows[:, first:first + values.shape[1]] = values
        first += values.shape[1]
    vertex = rows.view([(name, "<f4") for name in names])[:, 0]
    if is_wide(g):
        vertex = vertex.astype([(name, "<f8" if name in AXES else "<f4") for name in names])
        for name, values in zip(AXES, world.T, strict=True):
            vertex[name] = values
    return PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<")


def read_ply(path: Path | str) -> "Splats":
    """Read the Gaussians of a 3DGS PLY file as tensors on the CPU; see read_gaussians."""
    from flexgs.splats import Splats  # torch takes seconds to import

    return Splats.of(read_gaussians(path))


def read_gaussians(path: Path | str, attributes: Collection[str] = TENSORS) -> Gaussians:
    """Read the Gaussians of a 3DGS PLY file, with spherical harmonics of degree 0 to 3.

    The f_rest_* properties may be numbered from 0 or 1, and point colours (red, green, blue) may replace
    f_dc_*. Logits of opacity are clamped to +-MOST_LOGIT, also infinite ones. Positions of type double get an
    origin where float32 is too coarse.

    Args:
        path: the PLY file.
        attributes: the attributes whose values are wanted. The others are checked all the same, and are then
            zeros that take no memory.

    Raises:
        UserError: it is any other file, or holds no Gaussians or a value that is not finite.
    """
    vertex = open_element(path, "vertex")
    names, n = set(vertex.dtype.names or ()), vertex.count
    rgb = None if set(HARMONICS) <= names else colours(vertex.all(), Path(path), [])
    known = names if rgb is None else names | set(HARMONICS)
    rest = sorted((name for name in names if re.fullmatch(r"f_rest_\d{1,3}", name)),
                  key=lambda name: int(name[7:]))
    if len(rest) not in (0, 9, 24, 45) or (missing := set(ply_properties(0)) - {"nx", "ny", "nz"} - known):
        found = (f"{len(rest)} f_rest properties" if len(rest) not in (0, 9, 24, 45)
                 else f"no property {sorted(missing)[0]}")
        raise UserError(f"{path}: not a 3DGS PLY: found {found}, expected x y z f_dc_* f_rest_* "
                        "opacity scale_* rot_*")
    numbers = [int(name[7:]) for name in rest]
    if rest and numbers != list(range(numbers[0], numbers[0] + len(rest))):
        raise UserError(f"{path}: not a 3DGS PLY: found f_rest properties with gaps, expected "
                        f"{len(rest)} in a row")
    columns = {"quats": [f"rot_{i}" for i in range(4)], "scales": [f"scale_{i}" for i in range(3)],
               "opacities": ["opacity"], "sh0": list(HARMONICS) if rgb is None else [], "shN": rest}
    shapes = {"quats": (n, 4), "scales": (n, 3), "opacities": (n,), "sh0": (n, 3),
              "shN": (n, len(rest) // 3, 3)}
    values = {name: np.empty(shape, np.float32) if name in attributes
              else np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    world, broken, first = np.empty((n, 3)), set[str](), 0
    for block in vertex:
        rows = slice(first, first := first + len(block))
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond float32 become infinite
            world[rows] = structured_to_unstructured(block[list(AXES)], np.float64)
            for name, wanted in columns.items():
                if not wanted:
                    continue
                part = structured_to_unstructured(block[wanted], np.float32)
                if name == "opacities":
                    part = part[:, 0].clip(-MOST_LOGIT, MOST_LOGIT)
                elif name == "shN":
                    part = part.reshape(len(part), 3, -1).transpose(0, 2, 1)
                if not np.isfinite(part).all():
                    broken.add(name)
                if name in attributes:
                    values[name][rows] = part
    if rgb is not None and "sh0" in attributes:
        values["sh0"][:] = (rgb / 255 - 0.5) / SH_C0
    origin = WORLD
    with np.errstate(over="ignore", invalid="ignore"):  # checked() refuses what is not finite
        if any(vertex.dtype[axis].itemsize > 4 for axis in AXES) and n and np.isfinite(world).all():
            origin = local_origin(world, float(np.median(np.abs(world - np.median(world, axis=0)).max(1))))
        means = (world - np.array(origin)).astype(np.float32)
    return checked(Gaussians(means=means, origin=origin, **values), path, broken)


def checked(gaussians: G, path: Path | str, broken: Collection[str] = ()) -> G:
    """Return the Gaussians of path; UserError if there are none or a value is not finite.

    Args:
        gaussians: what path holds, or is to hold.
        path: the file.
        broken: attributes that are known to have had values that are not finite.
    """
    if not len(gaussians):
        raise UserError(f"{path}: found no Gaussians, expected at least one")
    broken = [name for name, values in gaussians.arrays().items()
              if name in broken or not np.isfinite(values).all()]
    if broken:
        raise UserError(f"{path}: found NaN or infinite {', '.join(broken)}, expected finite "
                        "numbers; export it again")
    return gaussians


def _header(n: int, sh_degree: int, wide: bool) -> bytes:
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {n}",
             *(f"property {'double' if wide and name in AXES else 'float'} {name}"
               for name in ply_properties(sh_degree)),
             "end_header", ""]
    return "\n".join(lines).encode()


@np.errstate(invalid="ignore")  # a file may hold signalling NaNs
def read_points(file: Path, doubts: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read the points of a PLY file: (xyz float64 [M, 3], rgb uint8 [M, 3]).

    Points without a known colour become grey; points without a finite position are left out.

    Args:
        file: the PLY file, with an element "vertex".
        doubts: receives a line for each assumption made; without it, each is a warning.

    Raises:
        UserError: the file is missing, not a PLY file of points, or shorter than its header says.
    """
    said: list[str] = []
    try:
        rows = open_element(file, "vertex").all()
        if missing := set(AXES).difference(rows.dtype.names or ()):
            raise UserError(f"{file}: not a PLY of points: found no property {min(missing)}, expected x "
                            "y z; export it again")
    except UserError as e:
        raise UserError(f"{e}; or delete ply_file_path from transforms.json to start from random "
                        "points") from e
    xyz = np.stack([rows[axis] for axis in AXES], 1).astype(np.float64)
    rgb = colours(rows, file, said)
    if rgb is None:
        said.append(f"{file}: has no colours (red, green, blue), so grey points are assumed; it has "
                    f"{', '.join(rows.dtype.names or ())}")
        rgb = np.full(xyz.shape, float(GREY))
    elif (wrong := np.isnan(rgb).any(1)).any():
        said.append(f"{file}: {wrong.sum()} of {len(rows)} points have colours that are none of 0 to "
                    "255, 0 to 65535 or 0 to 1, so grey is assumed for them")
        rgb = np.nan_to_num(rgb, nan=GREY)
    finite = np.isfinite(xyz).all(1)
    if not finite.all():
        said.append(f"{file}: {np.sum(~finite)} of {len(xyz)} points have a position that is no "
                    "number and are left out")
    if doubts is None:
        for line in said:
            warnings.warn(line, stacklevel=2)
    else:
        doubts += said
    return xyz[finite], rgb[finite].round().astype(np.uint8)


@np.errstate(invalid="ignore")  # a file may hold signalling NaNs
def colours(rows: np.ndarray, file: Path, doubts: list[str]) -> np.ndarray | None:
    """Return the colours of PLY rows, float64 [N, 3] from 0 to 255; None if there are none.

    Colours are the properties COLOURS, else the degree-0 HARMONICS. Bytes are taken as they are; 16-bit
    integers range to 65535; floats to 1, or to 255 if any is above 1. A colour out of range is NaN. `doubts`
    receives a line for each assumption made.
    """
    names = {name.lower(): name for name in rows.dtype.names or ()}
    if triple := next((triple for triple in COLOURS if set(triple) <= set(names)), None):
        columns = [rows[names[name]] for name in triple]
        values = np.stack(columns, 1)
        kinds = {column.dtype.kind + str(column.dtype.itemsize) for column in columns}
        most = float(np.nanmax(values, initial=0)) if len(values) else 0.0
        if kinds == {"u1"}:
            scale = 1.0
        elif kinds <= {"f4", "f8"}:
            scale = 255.0 if most <= 1 else 1.0
        else:
            scale = 1.0 if most <= 255 else 1 / 257
            if kinds == {"u2"} and most <= 255:
                doubts.append(f"{file}: its colours have 16 bits and none is above 255: taken as 0 to 255")
        values = values.astype(np.float64) * scale
    elif set(HARMONICS) <= set(names):
        values = np.stack([rows[names[name]] for name in HARMONICS], 1).astype(np.float64)
        values = np.clip(255 * (0.5 + SH_C0 * values), 0, 255)
    else:
        return None
    known = np.all((values > -1) & (values < 256), axis=1, keepdims=True)  # False for NaN
    return np.where(known, np.clip(values, 0, 255), np.nan)
