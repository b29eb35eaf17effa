"""A pinhole camera, the only kind the rasterizer knows; lenses are undistorted when a scene is loaded."""

from dataclasses import dataclass

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
