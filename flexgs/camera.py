"""Pinhole cameras, the only kind that the rasterizer draws: loading a scene undistorts its photographs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flexgs.errors import UserError
from flexgs.origin import WORLD, Origin, offset

FARTHEST = 1e15
"""Largest distance of cameras and points from (0, 0, 0), in world units: float32 can still square it."""
MOST_PIXELS = 1 << 17
"""Largest width or height of an image in pixels."""


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole camera: pose and intrinsics in the OpenCV convention (x right, y down, z forward).

    Pixel (row 0, column 0) covers [0, 1) x [0, 1); its centre is (0.5, 0.5), as in COLMAP.
    """

    viewmat: Tensor
    """Pose, world to camera, [4, 4] float32, or float64 where a distant origin needs its digits."""
    K: Tensor
    """Focal lengths and principal point in pixels, [3, 3] float32."""
    width: int
    height: int
    near: float = 0.01
    """Depth below which nothing is drawn, in world units."""
    origin: Origin = WORLD
    """Origin of the world coordinates of viewmat."""

    @property
    def center(self) -> Tensor:
        """Position of the camera [3] in world units, relative to origin."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    def to(self, device: torch.device | str) -> "Camera":
        """Return this camera with its tensors on device."""
        if self.viewmat.device == torch.device(device):
            return self
        return replace(self, viewmat=self.viewmat.to(device), K=self.K.to(device))

    def scaled(self, width: int, height: int) -> "Camera":
        """Return this camera for an image of another size in pixels."""
        K = self.K.clone()
        K[0] *= width / self.width
        K[1] *= height / self.height
        return replace(self, K=K, width=width, height=height)

    def at(self, origin: Origin) -> "Camera":
        """Return this camera in coordinates about another origin, with a float64 viewmat if that differs."""
        if origin == self.origin:
            return self
        viewmat = self.viewmat.double().clone()
        viewmat[:3, 3] += viewmat[:3, :3] @ viewmat.new_tensor(offset(self.origin, origin))
        return replace(self, viewmat=viewmat, origin=origin)


def scene_scale_of(cameras: Sequence["Camera"]) -> float:
    """Return the scene scale: 1.1 times the largest distance of a camera from the mean of all."""
    centres = torch.stack([camera.center for camera in cameras])
    return 1.1 * float((centres - centres.mean(0)).norm(dim=1).max())


def look_at(eye: Tensor, target: Tensor, up: Tensor, width: int, height: int, fov: float = 60.0,
            near: float = 0.01, origin: Origin = WORLD) -> Camera:
    """Build a camera at eye [3] that looks at target [3], with the direction up [3] upwards in its image.

    fov is the vertical field of view in degrees; width and height are in pixels. The camera looks along z if
    target equals eye, and takes another direction as up if up is parallel to its view. The pose has the dtype
    of eye.
    """
    forward, up = target - eye, up.to(eye)
    forward = forward / forward.norm() if bool(forward.any()) else eye.new_tensor([0, 0, 1])
    right = torch.linalg.cross(forward, up)
    if float(right.norm()) < 1e-6 * float(up.norm()):  # the camera looks along up
        right = torch.linalg.cross(forward, up.roll(1))
    right = right / right.norm()
    viewmat = torch.eye(4, dtype=eye.dtype)
    viewmat[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    viewmat[:3, 3] = -viewmat[:3, :3] @ eye
    focal = height / 2 / math.tan(math.radians(fov) / 2)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(viewmat, K, width, height, near, origin)


def focus(viewmats: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the point [3] with the least squared distance to the optical axes of world-to-camera poses."""
    R = np.stack([viewmat[:3, :3] for viewmat in viewmats])
    centres = -np.einsum("nji,nj->ni", R, np.stack([viewmat[:3, 3] for viewmat in viewmats]))
    axes = R[:, 2]
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    # A weak pull towards the mean position decides where the axes are parallel.
    mean, pull = centres.mean(0), 1e-3 * np.eye(3)
    return np.linalg.solve(across.mean(0) + pull,
                           np.einsum("nij,nj->i", across, centres) / len(axes) + pull @ mean)


def check_cameras(viewmats: Tensor, Ks: Tensor, sizes: Tensor, where: str) -> None:
    """Raise a UserError if any of C cameras from the file where is invalid.

    Args:
        viewmats: Poses [C, 4, 4], each a rotation and a translation below FARTHEST.
        Ks: Intrinsics [C, 3, 3] with focal lengths above 0.
        sizes: Width and height [C, 2], from 1 to MOST_PIXELS.
        where: File that the error names.
    """
    R, moved = viewmats[:, :3, :3].double(), viewmats[:, :3, 3].abs()
    last = viewmats.new_tensor([0.0, 0.0, 0.0, 1.0])
    skewed, focal = (R @ R.mT - torch.eye(3, dtype=R.dtype)).abs(), Ks.diagonal(dim1=1, dim2=2)[:, :2]
    sound = torch.isfinite(viewmats).flatten(1).all(dim=1) & torch.isfinite(Ks).flatten(1).all(dim=1)
    sound &= (skewed < 0.01).flatten(1).all(dim=1) & (torch.linalg.det(R) > 0)
    sound &= (moved < FARTHEST).all(dim=1) & ((viewmats[:, 3] - last).abs() < 1e-3).all(dim=1)
    sound &= (focal > 0).all(dim=1) & ((sizes >= 1) & (sizes <= MOST_PIXELS)).all(dim=1)
    if not sound.all():
        bad = int((~sound).nonzero()[0])
        raise UserError(f"{where}: found camera {bad + 1} of "
                        f"{'x'.join(map(str, sizes[bad].tolist()))} pixels with focal lengths "
                        f"{Ks[bad, 0, 0]:g} and {Ks[bad, 1, 1]:g}, expected sizes of 1 to {MOST_PIXELS:,}, "
                        "lengths above 0, a rotation and a translation; the file is damaged")
