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
    area = splats.scales.detach().sort(dim=1).values[:, 1:].clamp(-40, 40).sum(dim=1).exp()
    if cameras:
        chosen = cameras[::1 + len(cameras) // MOST_CAMERAS]
        shares = torch.zeros_like(area)
        for camera in chosen:
            shares += _share(splats, area, camera)
        seen = shares[shares > 0].sort().values
        area = shares.clamp(min=float(seen[int(UNSEEN * len(seen))]) if len(seen) else 1.0)
    opacities = torch.sigmoid(splats.opacities.detach()).clamp(min=1e-4)
    return (opacities * area.sqrt()).double().numpy()


def _share(splats: Splats, area: torch.Tensor, camera: Camera) -> torch.Tensor:
    """The share of an image that an area covers at each Gaussian, at most 1; 0 outside of the image."""
    view = camera.at(splats.origin).viewmat.to(area.dtype)
    x, y, z = view[:3, :3] @ splats.means.detach().T + view[:3, 3:]
    fx, fy = float(camera.K[0, 0]), float(camera.K[1, 1])
    inside = ((z > camera.near) & (x.abs() < BORDER * camera.width / 2 / fx * z)
              & (y.abs() < BORDER * camera.height / 2 / fy * z))
    share = area * (fx * fy / (camera.width * camera.height)) / z.clamp(min=camera.near).square()
    return torch.where(inside, share.clamp(max=1), 0.0)
