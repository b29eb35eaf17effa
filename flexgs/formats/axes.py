"""Conversion between the coordinate axes of file formats.

Three letters name the directions of x, y and z: Right or Left, Up or Down, Back or Front. A PLY of 3DGS is
RDF, as cameras of COLMAP are; SPZ is RUB, as three.js is; glTF is LUF.
"""

import math
from dataclasses import replace

import numpy as np

from flexgs.gaussians import Gaussians

PLY = "RDF"
ODD = ("y", "z", "x", "xy", "yz", "", "xz", "", "y", "xyz", "y", "z", "x", "z", "x")
"""The axes along which each harmonic above degree 0 is odd: its sign changes when one of them is mirrored."""


def turned(gaussians: Gaussians, axes: str) -> Gaussians:
    """Convert Gaussians from the axes of a PLY to other ones, or back: both ways change the same signs."""
    x, y, z = (1.0 if mine == other else -1.0 for mine, other in zip(PLY, axes, strict=True))
    odd = [math.prod({"x": x, "y": y, "z": z}[axis] for axis in names)
           for names in ODD[:gaussians.shN.shape[1]]]
    ox, oy, oz = gaussians.origin

    def signs(*values: float) -> np.ndarray:
        return np.array(values, np.float32)

    return replace(gaussians, origin=(x * ox, y * oy, z * oz), means=gaussians.means * signs(x, y, z),
                   quats=gaussians.quats * signs(1, y * z, x * z, x * y),
                   shN=gaussians.shN * signs(*odd)[:, None])
