"""Conversion between the coordinate axes of file formats.

Three letters name the directions of x, y and z: Right or Left, Up or Down, Back or Front. A PLY of 3DGS is
RDF, as cameras of COLMAP are; SPZ is RUB, as three.js is; glTF is LUF.
"""

import math
from dataclasses import replace

from flexgs.splats import Splats

PLY = "RDF"
ODD = ("y", "z", "x", "xy", "yz", "", "xz", "", "y", "xyz", "y", "z", "x", "z", "x")
"""The axes along which each harmonic above degree 0 is odd: its sign changes when one of them is mirrored."""


def turned(splats: Splats, axes: str) -> Splats:
    """Convert splats from the axes of a PLY to other ones, or back: both ways change the same signs."""
    x, y, z = (1.0 if mine == other else -1.0 for mine, other in zip(PLY, axes, strict=True))
    odd = [math.prod({"x": x, "y": y, "z": z}[axis] for axis in names) for names in ODD[:splats.shN.shape[1]]]
    ox, oy, oz = splats.origin
    return replace(splats, origin=(x * ox, y * oy, z * oz),
                   means=splats.means * splats.means.new_tensor([x, y, z]),
                   quats=splats.quats * splats.quats.new_tensor([1.0, y * z, x * z, x * y]),
                   shN=splats.shN * splats.shN.new_tensor(odd)[:, None])
