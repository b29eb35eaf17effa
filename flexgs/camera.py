"""A pinhole camera, the only kind the rasterizer knows; lenses are undistorted when a scene is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flexgs.errors import UserError

Origin = tuple[float, float, float]
"""Where (0, 0, 0) of some coordinates lies in those of the capture, exact to float64."""
WORLD: Origin = (0.0, 0.0, 0.0)
"""The origin of coordinates that are the capture's own."""
MOST_AWAY = 4
"""Extents that a scene may lie away from (0, 0, 0) and keep its coordinates: Adam's last steps, 1.6e-6 of an
extent, are still several times what float32 rounds to there."""

FARTHEST = 1e15
"""Units from (0, 0, 0) that cameras and points may be: float32 can still square it."""
MOST_PIXELS = 1 << 17
"""Of a camera, across or down."""


@dataclass(frozen=True, eq=False)
class Camera:
    """World-to-camera pose and intrinsics in the OpenCV convention: x right, y down, z forward.

    Pixel (row 0, column 0) covers [0, 1) x [0, 1); its centre is (0.5, 0.5), as in COLMAP.
    """

    viewmat: Tensor
    """[4, 4] float32 or float64, world to camera; float64 where the camera is far from (0, 0, 0) for its
    scene."""
    K: Tensor
    """[3, 3] float32, focal lengths and principal point in pixels."""
    width: int
    height: int
    near: float = 0.01
    """Depth below which nothing is drawn, in world units."""
    origin: Origin = WORLD
    """Where (0, 0, 0) of viewmat's world is in the capture's own coordinates."""

    @property
    def center(self) -> Tensor:
        """[3] the camera's position in the world, from its origin."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    def to(self, device: torch.device | str) -> "Camera":
        if self.viewmat.device == torch.device(device):
            return self
        return replace(self, viewmat=self.viewmat.to(device), K=self.K.to(device))

    def scaled(self, width: int, height: int) -> "Camera":
        """The same view at another size in pixels."""
        K = self.K.clone()
        K[0] *= width / self.width
        K[1] *= height / self.height
        return replace(self, K=K, width=width, height=height)

    def at(self, origin: Origin) -> "Camera":
        """The same camera in coordinates about another origin, in float64; itself where that is its own."""
        if origin == self.origin:
            return self
        viewmat = self.viewmat.double().clone()
        viewmat[:3, 3] += viewmat[:3, :3] @ viewmat.new_tensor(offset(self.origin, origin))
        return replace(self, viewmat=viewmat, origin=origin)


def offset(start: Origin, end: Origin) -> Origin:
    """[3] from one origin to another."""
    return end[0] - start[0], end[1] - start[1], end[2] - start[2]


def local_origin(places: np.ndarray, extent: float) -> Origin:
    """The origin about which float32 is enough for places [N, 3] float64 that are spread over this extent.

    WORLD where it is enough already. Else their median, rounded to a power of two below the extent, so that
    few digits are needed to write it and to add it.
    """
    middle = np.median(places, axis=0)
    if np.linalg.norm(middle) <= MOST_AWAY * extent:
        return WORLD
    step = unit_of(extent) / 16
    x, y, z = (np.rint(middle / step) * step).tolist()
    return x, y, z


def unit_of(scene_scale: float) -> float:
    """The power of two nearest to a fifth of a scene's scale: 1 in scenes as COLMAP leaves them.

    A length for what would otherwise be an absolute number of world units.
    """
    return 2.0 ** round(math.log2(scene_scale / 5)) if scene_scale > 0 else 1.0


def look_at(eye: Tensor, target: Tensor, up: Tensor, width: int, height: int, fov: float = 60.0,
            near: float = 0.01, origin: Origin = WORLD) -> Camera:
    """The camera at eye [3] that has target [3] in its middle and up [3] upwards; fov is vertical, in
    degrees.

    It looks along z where target is eye, and any way is up where up is along its view. The pose is of the
    dtype of eye.
    """
    forward, up = target - eye, up.to(eye)
    forward = forward / forward.norm() if bool(forward.any()) else eye.new_tensor([0, 0, 1])
    right = torch.linalg.cross(forward, up)
    if float(right.norm()) < 1e-6 * float(up.norm()):  # it looks along up
        right = torch.linalg.cross(forward, up.roll(1))
    right = right / right.norm()
    viewmat = torch.eye(4, dtype=eye.dtype)
    viewmat[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    viewmat[:3, 3] = -viewmat[:3, :3] @ eye
    focal = height / 2 / math.tan(math.radians(fov) / 2)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(viewmat, K, width, height, near, origin)


def focus(viewmats: Sequence[np.ndarray]) -> np.ndarray:
    """[3] the point nearest to the optical axes of cameras with these [4, 4] poses, all of them together."""
    R = np.stack([viewmat[:3, :3] for viewmat in viewmats])
    centres = -np.einsum("nji,nj->ni", R, np.stack([viewmat[:3, 3] for viewmat in viewmats]))
    axes = R[:, 2]
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    # the pull towards the mean settles it when they are parallel
    mean, pull = centres.mean(0), 1e-3 * np.eye(3)
    return np.linalg.solve(across.mean(0) + pull,
                           np.einsum("nij,nj->i", across, centres) / len(axes) + pull @ mean)


def check_cameras(viewmats: Tensor, Ks: Tensor, sizes: Tensor, where: str) -> None:
    """UserError, which names the file that they come from, for cameras that see nothing.

    The pose [C, 4, 4] has to be a rotation and a translation so short that float32 can square it, focal
    lengths in K [C, 3, 3] above 0, width and height [C, 2] numbers of pixels.
    """
    R, moved, last = (viewmats[:, :3, :3].double(), viewmats[:, :3, 3].abs(),
                      viewmats.new_tensor([0.0, 0.0, 0.0, 1.0]))
    sound = torch.isfinite(viewmats).flatten(1).all(dim=1) & torch.isfinite(Ks).flatten(1).all(dim=1)
    sound &= ((R @ R.mT - torch.eye(3, dtype=R.dtype)).abs()
              < 0.01).flatten(1).all(dim=1) & (torch.linalg.det(R) > 0)
    sound &= (moved < FARTHEST).all(dim=1) & ((viewmats[:, 3] - last).abs() < 1e-3).all(dim=1)
    sound &= (Ks.diagonal(dim1=1, dim2=2)[:, :2]
              > 0).all(dim=1) & ((sizes >= 1) & (sizes <= MOST_PIXELS)).all(dim=1)
    if not sound.all():
        bad = int((~sound).nonzero()[0])
        raise UserError(f"{where}: found camera {bad + 1} of "
                        f"{'x'.join(map(str, sizes[bad].tolist()))} pixels with focal lengths "
                        f"{Ks[bad, 0, 0]:g} and {Ks[bad, 1, 1]:g}, expected sizes of 1 to {MOST_PIXELS:,}, "
                        "lengths above 0, a rotation and a translation; the file is damaged")
