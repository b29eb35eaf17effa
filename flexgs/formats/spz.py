"""Heads of Niantic's SPZ files: the bits of a position, the axes, and a check before a library reads them.

Without a tag that names other axes, those of a file are RUB (right, up, back), as the standard says. Files of
older converters, also of flexgs 0.1, are along the axes of a PLY without a tag, and are read rotated by 180
degrees about x.
"""

import math
import struct
import zlib
from pathlib import Path

import numpy as np

from flexgs.errors import UserError
from flexgs.gaussians import Gaussians

AXES = "RUB"
MAGIC = 0x5053474E
VERSIONS = (1, 2, 3, 4)
TAGGED, TAG = 2, 0xADBE0003
"""The flag in the head of a file with records, and the record of the axes (SPZ_ADOBE_coordinate_system)."""
TAGS = ("RUB", "LDB", "RDB", "LUB", "RUB", "LDF", "RDF", "LUF", "RUF")
"""The axes by their number in the record; 0 is unspecified. Larger numbers have z up and are refused."""
_HEAD, _HEAD_4 = struct.Struct("<IIIBBBB"), struct.Struct("<IIIBBBBI12x")


def bits(gaussians: Gaussians, path: Path) -> int:
    """Return how many of a position's 24 bits are fractional: 12, as in other writers, where that fits.

    A larger scene has fewer; a scene of small Gaussians has more, so that a step is an eighth of their median
    size at most. UserError if the scene is too large even for one.
    """
    far = max(float(np.abs(gaussians.means).max()), 0.25)
    most = math.floor(math.log2((2**23 - 1) / far))
    if most < 1:
        raise UserError(f"{path}: SPZ holds positions up to {2**22:,} units, found {far:.3g}; expected "
                        "NAME.ply, or --local")
    step = float(np.exp(np.median(gaussians.scales.max(1).astype(np.float64)).clip(max=700))) / 8
    return min(most, max(12, math.ceil(-math.log2(max(step, 1e-9)))), 24)


def axes(path: Path) -> str:
    """Return the axes of a file; UserError for an unknown version, or a head that contradicts the file."""
    raw = path.read_bytes()
    records = _records(raw, path)
    at = 0
    while at + 8 <= len(records):
        kind, length = struct.unpack_from("<II", records, at)
        if kind == TAG and length >= 4 and at + 12 <= len(records):
            tag = struct.unpack_from("<I", records, at + 8)[0]
            if tag >= len(TAGS):
                raise UserError(f"{path}: found axes number {tag}, expected one up to {len(TAGS) - 1}; "
                                f"export it with other axes, such as {AXES}, whose z is not up")
            return TAGS[tag]
        at += 8 + length
    return AXES


def _records(raw: bytes, path: Path) -> bytes:
    """Return the records of a file: after the Gaussians, or from version 4 on before them."""
    modern = raw[:4] == struct.pack("<I", MAGIC)
    start = raw if modern else _inflated(raw, _HEAD.size, path)
    if len(start) < (_HEAD_4 if modern else _HEAD).size:
        raise _broken(path, "it ends in its head")
    magic, version, n, degree, fraction, flags, _ = _HEAD.unpack_from(start)
    if magic != MAGIC:
        raise _broken(path, "it does not begin as one")
    if version not in VERSIONS or (version > 3) != modern:
        raise UserError(f"{path}: found SPZ of version {version}, expected 1 to 4; export it as one of these")
    if degree > 3 or fraction > 24 or not n:
        raise _broken(path, f"found {n:,} Gaussians of degree {degree}, {fraction} fractional bits")
    row = (6 if version == 1 else 9) + 7 + (4 if version > 2 else 3) + 3 * ((degree + 1) ** 2 - 1)
    if n * row > 1032 * len(raw) + 64:  # DEFLATE packs by a factor of 1032 at most
        raise _broken(path, f"found {len(raw):,} bytes, too few for {n:,} Gaussians")
    if not flags & TAGGED:
        return b""
    if modern:
        return raw[_HEAD_4.size:_HEAD_4.unpack_from(raw)[7]]
    return _inflated(raw, _HEAD.size + n * row + 4096, path)[_HEAD.size + n * row:]


def _inflated(raw: bytes, most: int, path: Path) -> bytes:
    try:
        return zlib.decompressobj(31).decompress(raw, most)
    except zlib.error as e:
        raise _broken(path, str(e)) from None


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a readable spz file ({why}); get or export it again")
