"""How much each Gaussian counts in the pictures, estimated from its projections, without rendering."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flexgs.camera import Camera
from flexgs.splats import Splats

MOST_CAMERAS = 64
BORDER = 1.3
"""A Gaussian counts while its centre is within the image or beside it, by 0.3 of half its width or height."""
UNSEEN = 0.02
"""Gaussians that no camera sees, and those that are hardly seen, count as this quantile of all others."""


def worth(splats: Splats, cameras: Sequence[Camera]) -> NDArray[np.floating]:
    """Estimate the weight of each Gaussian's colour in the pictures that it is in.

    It is the opacity times the square root of the area, in shares of an image and averaged over the cameras.
    The area is that of the ellipse of the two larger axes, seen from the front; hiding is left out. Where
    there are no cameras, all Gaussians are taken to be equally far away.

    Returns:
        values above 0, [N], of which only the ratios mean something.
    """
    axes = splats.scales.detach().double().sort(dim=1).values[:, 1:].clamp(-80, 80)
    area = axes.sum(dim=1).exp()
    if cameras:
        chosen = cameras[::1 + len(cameras) // MOST_CAMERAS]
        area = torch.stack([_share(splats, area, camera) for camera in chosen]).mean(dim=0)
        seen = area[area > 0].sort().values
        area = area.clamp(min=float(seen[int(UNSEEN * len(seen))]) if len(seen) else 1.0)
    opacities = torch.sigmoid(splats.opacities.detach().double()).clamp(min=1e-4)
    return (opacities * area.sqrt()).numpy()


def _share(splats: Splats, area: torch.Tensor, camera: Camera) -> torch.Tensor:
    """The share of an image that an area covers at each Gaussian, at most 1; 0 outside of the image."""
    camera = camera.at(splats.origin)
    x, y, z = (splats.means.detach() @ camera.viewmat[:3, :3].T.to(splats.means.dtype)
               + camera.viewmat[:3, 3].to(splats.means.dtype)).double().T
    fx, fy = float(camera.K[0, 0]), float(camera.K[1, 1])
    depth = z.clamp(min=camera.near)
    inside = ((z > camera.near) & ((fx * x).abs() < BORDER * camera.width / 2 * depth)
              & ((fy * y).abs() < BORDER * camera.height / 2 * depth))
    return inside * (area * fx * fy / depth.square() / (camera.width * camera.height)).clamp(max=1)
