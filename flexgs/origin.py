"""Origins: local coordinates for captures so far from (0, 0, 0) that float32 is too coarse there."""

import math

import numpy as np

Origin = tuple[float, float, float]
"""Position of the (0, 0, 0) of local coordinates in the capture's own coordinates, in float64."""
WORLD: Origin = (0.0, 0.0, 0.0)
"""Origin of the capture's own coordinates."""
MOST_AWAY = 4
"""Largest distance of a scene from (0, 0, 0), in scene scales, at which it keeps the capture's coordinates.

The last steps of Adam, 1.6e-6 of a scene scale, are still several times the rounding error of float32 there.
"""


def offset(start: Origin, end: Origin) -> Origin:
    """Compute the vector from one origin to another."""
    return end[0] - start[0], end[1] - start[1], end[2] - start[2]


def local_origin(places: np.ndarray, scene_scale: float) -> Origin:
    """Choose the origin of coordinates in which float32 is precise enough for a scene.

    It is WORLD where that is enough already, else the median of the positions places [N, 3] float64, rounded
    to multiples of a power of two below scene_scale so that few digits are needed to write it and to add it.
    """
    middle = np.median(places, axis=0)
    if np.linalg.norm(middle) <= MOST_AWAY * scene_scale:
        return WORLD
    step = unit_of(scene_scale) / 16
    x, y, z = (np.rint(middle / step) * step).tolist()
    return x, y, z


def unit_of(scene_scale: float) -> float:
    """Compute the unit of length of a scene: the power of two nearest to a fifth of its scale.

    It is about 1 world unit in the coordinates that COLMAP chooses. Lengths that would be absolute numbers of
    world units are multiples of it instead.
    """
    return 2.0 ** round(math.log2(scene_scale / 5)) if scene_scale > 0 else 1.0
