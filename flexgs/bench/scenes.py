"""Gaussians and cameras to time the rasterizer with."""

from pathlib import Path

import numpy as np
import torch

from flexgs.camera import Camera, check_cameras
from flexgs.errors import UserError
from flexgs.formats.arrays import load_arrays
from flexgs.gaussians import SH_C0
from flexgs.splats import Splats

FOV = 60.0  # degrees across the image


def random_splats(count: int, *, sh_degree: int = 3, seed: int = 0, points: np.ndarray | None = None,
                  size: float = 0.6) -> Splats:
    """Return `count` random Gaussians at `points` [M, 3], or in view of a camera at the origin along z.

    There may be more or fewer points than Gaussians. Standard deviations are `size` times the mean distance
    to the 3 nearest neighbours, log-normal per axis; opacities are uniform in [0.05, 0.95].
    """
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(seed)
    if points is None:
        # Clusters, ground and a far wall, half of them outside the image, as in a real capture.
        centres = rng.uniform([-6, -4, 4], [6, 2, 12], (40, 3))
        near = centres[rng.integers(40, size=count)] + 0.4 * rng.standard_normal((count, 3))
        ground = np.stack([rng.uniform(-14, 14, count), np.full(count, 2.0), rng.uniform(-2, 16, count)], 1)
        wall = np.stack([rng.uniform(-20, 20, count), rng.uniform(-12, 4, count), np.full(count, 18.0)], 1)
        xyz = np.choose(rng.choice(3, (count, 1), p=[0.5, 0.3, 0.2]), [near, ground, wall])
        xyz += 0.02 * rng.standard_normal((count, 3))
    else:
        xyz = points[rng.permutation(len(points))[np.arange(count) % len(points)]].astype(np.float64)
    spacing = cKDTree(xyz).query(xyz, 4)[0][:, 1:].mean(1).clip(1e-4)
    scales = size * spacing[:, None] * np.exp(0.4 * rng.standard_normal((count, 3)))
    opacity = rng.uniform(0.05, 0.95, count)
    arrays = {
        "means": xyz,
        "quats": rng.standard_normal((count, 4)),
        "scales": np.log(scales),
        "opacities": np.log(opacity / (1 - opacity)),
        "sh0": (rng.uniform(0, 1, (count, 3)) - 0.5) / SH_C0,
        "shN": 0.1 * rng.standard_normal((count, (sh_degree + 1) ** 2 - 1, 3)),
    }
    means, quats, scales, opacities, sh0, shN = (torch.from_numpy(a.astype(np.float32))
                                                 for a in arrays.values())
    return Splats(means, quats, scales, opacities, sh0, shN)


def front_camera(width: int, height: int) -> Camera:
    """Return a camera at the origin that looks along z, FOV degrees wide."""
    f = width / (2 * np.tan(np.radians(FOV / 2)))
    K = torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]], dtype=torch.float32)
    return Camera(torch.eye(4), K, width, height)


POINTS: dict[str, tuple[int, ...]] = {"means3d": (0, 3), "viewmats": (0, 4, 4), "Ks": (0, 3, 3), "width": (),
                                      "height": ()}
"""Shapes of the arrays that load_points reads; 0 is any number."""


def load_points(path: Path) -> tuple[np.ndarray, Camera]:
    """Read the points [M, 3] and the first camera of an .npz file of POINTS; UserError if it is not one."""
    arrays = load_arrays(path, POINTS, "points")
    for name, shape in POINTS.items():
        found = arrays[name]
        if (found.dtype.kind not in "fiu" or found.ndim != len(shape) or not found.size
                or not np.isfinite(found).all()
                or any(size and size != n for size, n in zip(shape, found.shape, strict=True))):
            raise UserError(f"{path}: found {name} of {found.dtype} {found.shape}, expected finite "
                            f"numbers {shape}, 0 for any")
    viewmats, Ks = (torch.from_numpy(arrays[name][:1].astype(np.float32)) for name in ("viewmats", "Ks"))
    width, height = int(arrays["width"]), int(arrays["height"])
    check_cameras(viewmats, Ks, torch.tensor([[width, height]]), str(path))
    return arrays["means3d"], Camera(viewmats[0], Ks[0], width, height)
