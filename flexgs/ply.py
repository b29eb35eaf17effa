"""PLY files: Gaussians as every 3DGS viewer reads them, and the point clouds of captures."""

import io
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement  # writes only; ply_rows.py reads

from flexgs.camera import WORLD, local_origin
from flexgs.errors import UserError
from flexgs.files import atomic_file
from flexgs.ply_rows import read_element
from flexgs.splats import SH_C0, Splats, unit_quaternions

AXES = ("x", "y", "z")
COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
HARMONICS = ("f_dc_0", "f_dc_1", "f_dc_2")
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


def is_wide(splats: Splats) -> bool:
    """Whether the capture's own coordinates need float64.

    They do if float32 would move more than 1 % of the Gaussians by over 5 % of the median of their three
    standard deviations.
    """
    if splats.origin == WORLD:
        return False
    world = splats.detach().means.double() + splats.means.new_tensor(splats.origin, dtype=torch.float64)
    moved = (world - world.float()).abs().amax(1)
    tolerated = 0.05 * splats.scales.detach().double().median(1).values.exp()
    return bool((moved > tolerated).double().mean() > 0.01)


def in_world(splats: Splats, path: Path | str) -> Splats:
    """Return the Gaussians in the capture's coordinates; UserError names path if they need float64."""
    if is_wide(splats):
        raise UserError(f"{path}: positions about {place(splats)} need float64, which this format "
                        "cannot hold; expected NAME.ply, or --local for positions from there")
    return splats.at(WORLD)


def local(splats: Splats) -> Splats:
    """Return the Gaussians with (0, 0, 0) at their origin, wherever that is in the capture."""
    return replace(splats, origin=WORLD)


def place(splats: Splats) -> str:
    """Format the origin of the Gaussians as options and messages write it."""
    return " ".join(f"{value:.12g}" for value in splats.origin)


def write_ply(splats: Splats, path: Path | str) -> None:
    """Write a binary 3DGS PLY file in the capture's own coordinates.

    Scales are logarithms, opacities logits, quaternions unit, spherical harmonics channel by channel, normals
    zero. All values are float32; x y z are double where float32 is too coarse (is_wide).
    """
    with atomic_file(Path(path)) as out:
        _ply(splats).write(str(out))


def to_ply(splats: Splats) -> bytes:
    """Return the bytes of the file that write_ply writes."""
    out = io.BytesIO()
    _ply(splats).write(out)
    return out.getvalue()


def _ply(splats: Splats) -> PlyData:
    s = splats.detach().to("cpu")
    n = len(s)
    quats = unit_quaternions(s.quats)
    wide = is_wide(s)
    world = (s.means.double() + torch.tensor(s.origin, dtype=torch.float64)).numpy()
    columns = torch.cat([torch.from_numpy(world).float(), torch.zeros(n, 3), s.sh0,
                         s.shN.transpose(1, 2).reshape(n, -1), s.opacities[:, None], s.scales, quats],
                        dim=1).contiguous().numpy()
    rows = columns.view([(name, "<f4") for name in ply_properties(s.sh_degree)])[:, 0]
    if wide:
        rows = rows.astype([(name, "<f8" if name in AXES else "<f4") for name in ply_properties(s.sh_degree)])
        for name, values in zip(AXES, world.T, strict=True):
            rows[name] = values
    return PlyData([PlyElement.describe(rows, "vertex")], byte_order="<")


def read_ply(path: Path | str) -> Splats:
    """Read the Gaussians of a 3DGS PLY file, with spherical harmonics of degree 0 to 3.

    The f_rest_* properties may be numbered from 0 or 1, and point colours (red, green, blue) may replace
    f_dc_*. Logits of opacity are clamped to +-MOST_LOGIT, also infinite ones. Positions of type double get an
    origin where float32 is too coarse. UserError for any other file.
    """
    vertex = read_element(path, "vertex")
    names = set(vertex.dtype.names or ())
    rgb = None if set(HARMONICS) <= names else colours(vertex, Path(path), [])
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

    def column(*wanted: str) -> torch.Tensor:
        if not wanted:
            return torch.zeros(len(vertex), 0)
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond float32 become infinite
            return torch.from_numpy(np.stack([np.asarray(vertex[w], np.float32) for w in wanted], axis=1))

    shN = column(*rest).reshape(len(vertex), 3, len(rest) // 3).transpose(1, 2).contiguous()
    with np.errstate(over="ignore", invalid="ignore"):  # checked() refuses what is not finite
        world, origin = np.stack([np.asarray(vertex[axis], np.float64) for axis in AXES], axis=1), WORLD
        if any(vertex[axis].dtype.itemsize > 4 for axis in AXES) and len(world) and np.isfinite(world).all():
            origin = local_origin(world, float(np.median(np.abs(world - np.median(world, axis=0)).max(1))))
        means = (world - np.array(origin)).astype(np.float32)
    splats = Splats(means=torch.from_numpy(means), origin=origin,
                    quats=column(*(f"rot_{i}" for i in range(4))),
                    scales=column(*(f"scale_{i}" for i in range(3))),
                    opacities=column("opacity")[:, 0].clamp(-MOST_LOGIT, MOST_LOGIT),
                    sh0=column(*HARMONICS) if rgb is None
                    else torch.from_numpy(((rgb / 255 - 0.5) / SH_C0).astype(np.float32)),
                    shN=shN)
    return checked(splats, path)


def checked(splats: Splats, path: Path | str) -> Splats:
    """Return the Gaussians read from path; UserError if there are none or a value is not finite."""
    if not len(splats):
        raise UserError(f"{path}: found no Gaussians, expected at least one")
    broken = [name for name, t in splats.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise UserError(f"{path}: found NaN or infinite {', '.join(broken)}, expected finite "
                        "numbers; export it again")
    return splats


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
        rows = read_element(file, "vertex")
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
