"""A pinhole camera, the only kind the rasterizer knows; lenses are undistorted when a scene is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Camera:
    """World-to-camera pose and intrinsics in the OpenCV convention: x right, y down, z forward.

    Pixel (row 0, column 0) covers [0, 1) x [0, 1); its centre is (0.5, 0.5), as in COLMAP.
    """

    viewmat: Tensor
    """[4, 4] float32, world to camera."""
    K: Tensor
    """[3, 3] float32, focal lengths and principal point in pixels."""
    width: int
    height: int

    @property
    def center(self) -> Tensor:
        """[3] the camera's position in the world."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    def to(self, device: torch.device | str) -> "Camera":
        if self.viewmat.device == torch.device(device):
            return self
        return Camera(self.viewmat.to(device), self.K.to(device), self.width, self.height)

    def scaled(self, width: int, height: int) -> "Camera":
        """The same view at another size in pixels."""
        K = self.K.clone()
        K[0] *= width / self.width
        K[1] *= height / self.height
        return Camera(self.viewmat, K, width, height)


def look_at(eye: Tensor, target: Tensor, up: Tensor, width: int, height: int, fov: float = 60.0) -> Camera:
    """The camera at eye [3] that has target [3] in its middle and up [3] upwards; fov is vertical, in degrees."""
    forward = torch.nn.functional.normalize(target - eye, dim=0)
    right = torch.linalg.cross(forward, up)
    if float(right.norm()) < 1e-6:  # it looks along up
        right = torch.linalg.cross(forward, up.roll(1))
    right = right / right.norm()
    viewmat = torch.eye(4)
    viewmat[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    viewmat[:3, 3] = -viewmat[:3, :3] @ eye
    focal = height / 2 / math.tan(math.radians(fov) / 2)
    return Camera(viewmat, torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]), width, height)


def focus(viewmats: Sequence[np.ndarray]) -> np.ndarray:
    """[3] the point nearest to the optical axes of cameras with these [4, 4] poses, all of them together."""
    R = np.stack([viewmat[:3, :3] for viewmat in viewmats])
    centres = -np.einsum("nji,nj->ni", R, np.stack([viewmat[:3, 3] for viewmat in viewmats]))
    axes = R[:, 2]
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    mean, pull = centres.mean(0), 1e-3 * np.eye(3)  # the pull towards the mean settles it when they are parallel
    return np.linalg.solve(across.mean(0) + pull, np.einsum("nij,nj->i", across, centres) / len(axes) + pull @ mean)
