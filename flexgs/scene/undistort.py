"""Photographs of wide lenses become those of a pinhole camera: which one, and where each of its pixels comes
from."""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexgs.scene.pycolmap_library import library

if TYPE_CHECKING:
    import pycolmap

    from flexgs.scene.camera_model import CameraModel
    from flexgs.scene.polynomial import Polynomial

MAX_FOV = 110
"""Degrees, across and down. A pinhole stretches an equidistant image by 1 / cos^2 along the radius: 3 times
at the middle of an edge of this view, and pixels without detail are dear to train on. What the lens saw
beyond is lost."""
GRID = 17  # points along each side of a view that are tested; lenses are smooth

Array = np.ndarray


def widest_pinhole(camera: "pycolmap.Camera | Polynomial") -> tuple[int, int,
                                                                    tuple[float, float, float, float]]:
    """(width, height, (fx, fy, cx, cy)) of the pinhole view that a wide lens is undistorted to.

    Of the rectangles around the optical axis that show no blank pixel, and are no wider or higher than
    MAX_FOV, the one of the largest area. The focal lengths are those of the lens in the middle of its image,
    so no detail is lost there. (1, 1, ...) where there is no such rectangle.
    """
    step = 1e-4
    right, left, down, up = camera.img_from_cam(np.array([[step, 0, 1], [-step, 0, 1], [0, step, 1],
                                                          [0, -step, 1]]))
    fx, fy = float(right[0] - left[0]) / (2 * step), float(down[1] - up[1]) / (2 * step)
    most = np.tan(np.radians(MAX_FOV / 2))
    best = (0.0, 0.0)
    if fx > 0 and fy > 0:
        for x in np.linspace(most / 24, most, 24):
            if x * most > best[0] * best[1] and (y := _highest(camera, x, most)) * x > best[0] * best[1]:
                best = x, y
    width, height = (max(1, int(2 * half * f)) for half, f in zip(best, (fx, fy), strict=True))
    return width, height, (fx, fy, width / 2, height / 2)


def _highest(camera: "pycolmap.Camera | Polynomial", x: float, most: float) -> float:
    """The largest y up to most so that the lens sees all of [-x, x] x [-y, y] at depth 1; 0 if there is
    none."""
    if _sees(camera, x, most):
        return most
    low, high = 0.0, most
    for _ in range(11):
        middle = (low + high) / 2
        low, high = (middle, high) if _sees(camera, x, middle) else (low, middle)
    return low


def _sees(camera: "pycolmap.Camera | Polynomial", x: float, y: float) -> bool:
    """Whether [-x, x] x [-y, y] at depth 1 falls into the image, and the lens does not fold there."""
    side = np.linspace(-1, 1, GRID)
    grid = np.stack([*np.meshgrid(x * side, y * side), np.ones((GRID, GRID))], -1)
    at = np.asarray(camera.img_from_cam(grid.reshape(-1, 3))).reshape(GRID, GRID, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        # false for NaN: the lens does not see it
        inside = ((at >= 0) & (at <= (camera.width, camera.height))).all()
        across, down = np.diff(at, axis=1)[:-1], np.diff(at, axis=0)[:, :-1]
        return bool(inside and (across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0] > 0).all())


def straightened(pixels: Array, lens: "CameraModel") -> Array:
    """uint8 [h, w, 3] as a narrow lens took it -> uint8 [H, W, 3] of lens.pinhole(), by COLMAP's
    image_undistorter."""
    pycolmap = library()
    bitmap, _ = pycolmap.undistort_image(pycolmap.UndistortCameraOptions(),
                                         pycolmap.Bitmap.from_array(pixels), lens.colmap())
    return bitmap.to_array()


def remap(pixels: Array, lens: "CameraModel", mode: str) -> Array:
    """uint8 [h, w, c] as lens took it -> uint8 [H, W, c] of lens.pinhole(). mode: "bilinear", or "nearest"
    for masks."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    found = torch.nn.functional.grid_sample(image, _sources(lens), mode, "border", align_corners=False)
    return found[0].round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


@lru_cache(4)  # 8 bytes per pixel each; captures have one camera, or few
def _sources(lens: "CameraModel") -> Tensor:
    """[1, H, W, 2] where the centre of each pinhole pixel is in the photograph, whose sides are at -1 and
    1."""
    pinhole, camera = lens.pinhole(), lens.colmap()
    fx, fy, cx, cy = pinhole.params
    x = (np.arange(pinhole.width) + 0.5 - cx) / fx
    found = np.empty((pinhole.height, pinhole.width, 2), np.float32)
    for row in range(pinhole.height):  # row by row: rays are three doubles
        ray = np.stack([x, np.full_like(x, (row + 0.5 - cy) / fy), np.ones_like(x)], 1)
        found[row] = camera.img_from_cam(ray) * (2 / lens.width, 2 / lens.height) - 1
    return torch.from_numpy(found)[None]
