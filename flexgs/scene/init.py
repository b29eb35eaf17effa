"""Initial Gaussians: one per point of the capture."""

import math

import numpy as np
import torch

from flexgs.gaussians import SH_C0
from flexgs.origin import WORLD, Origin
from flexgs.scene.capture import Points
from flexgs.splats import Splats


def initial_splats(points: Points, sh_degree: int, *, opacity: float = 0.1, size: float = 1.0,
                   alone: float = 1.0, origin: Origin = WORLD) -> Splats:
    """Create an isotropic Gaussian at each point, in the colour of the point.

    The standard deviation is `size` times the root mean square distance to the 3 nearest other points (Kerbl
    et al. 2023), which is at least 1e-4 of the median so that duplicates do not vanish.

    Args:
        points: At least one point.
        sh_degree: Degree of the spherical harmonics, whose coefficients above degree 0 start at zero.
        opacity: Opacity of every Gaussian, above 0 and below 1.
        size: Factor on the standard deviations.
        alone: Distance, in world units, of a point without others at another position.
        origin: Origin of the coordinates of the points.
    """
    from scipy.spatial import cKDTree

    xyz = points.xyz.double().numpy()
    neighbours = min(3, len(xyz) - 1)
    if neighbours:
        distances = cKDTree(xyz).query(xyz, neighbours + 1, workers=-1)[0][:, 1:]
        spread = np.sqrt(np.square(distances).mean(1))
    else:
        spread = np.full(1, alone)
    positive = spread[spread > 0]
    spread = np.maximum(spread, 1e-4 * np.median(positive) if len(positive) else alone)
    n = len(points)
    return Splats(
        means=points.xyz.float().clone(),
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(n, 1),
        scales=torch.from_numpy(np.log(size * spread)).float()[:, None].repeat(1, 3),
        opacities=torch.full((n,), math.log(opacity / (1 - opacity))),
        sh0=(points.rgb.float() / 255 - 0.5) / SH_C0,
        shN=torch.zeros(n, (sh_degree + 1) ** 2 - 1, 3),
        origin=origin,
    )
