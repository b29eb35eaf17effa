"""Undistortion of photographs: the pinhole camera of a wide camera model, and resampling to it."""

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
"""Largest field of view of an undistorted wide image, in degrees, across and down; the rest is cut off.

A pinhole view stretches an equidistant image by 1 / cos^2 along the radius, 3 times at the middle of an edge
of this view, and such pixels cost training time without holding detail.
"""
GRID = 17
"""Points tested along each side of a view; few are enough since camera models are smooth."""

Array = np.ndarray


def widest_pinhole(camera: "pycolmap.Camera | Polynomial"
                   ) -> tuple[int, int, tuple[float, float, float, float]]:
    """Compute the pinhole view that images of a wide camera model are undistorted to.

    The view is the rectangle of the largest area around the optical axis that has no blank pixel and is
    within MAX_FOV. Its focal lengths are those at the centre of the photograph, so no detail is lost there.

    Returns:
        width, height, (fx, fy, cx, cy), in pixels; width and height are 1 if there is no such rectangle.
    """
    step = 1e-4
    around = np.array([[step, 0, 1], [-step, 0, 1], [0, step, 1], [0, -step, 1]])
    right, left, down, up = camera.img_from_cam(around)
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
    """Find the largest y up to most for which _sees(camera, x, y) holds; 0 if there is none."""
    if _sees(camera, x, most):
        return most
    low, high = 0.0, most
    for _ in range(11):
        middle = (low + high) / 2
        low, high = (middle, high) if _sees(camera, x, middle) else (low, middle)
    return low


def _sees(camera: "pycolmap.Camera | Polynomial", x: float, y: float) -> bool:
    """Tell whether [-x, x] x [-y, y] at depth 1 projects into the image, without folding over."""
    side = np.linspace(-1, 1, GRID)
    grid = np.stack([*np.meshgrid(x * side, y * side), np.ones((GRID, GRID))], -1)
    at = np.asarray(camera.img_from_cam(grid.reshape(-1, 3))).reshape(GRID, GRID, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        # False for NaN, which is a point that the camera cannot see.
        inside = ((at >= 0) & (at <= (camera.width, camera.height))).all()
        across, down = np.diff(at, axis=1)[:-1], np.diff(at, axis=0)[:, :-1]
        return bool(inside and (across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0] > 0).all())


def straightened(pixels: Array, lens: "CameraModel") -> Array:
    """Undistort an image [h, w, 3] uint8 to lens.pinhole() [H, W, 3] as COLMAP's image_undistorter does."""
    pycolmap = library()
    bitmap, _ = pycolmap.undistort_image(pycolmap.UndistortCameraOptions(),
                                         pycolmap.Bitmap.from_array(pixels), lens.colmap())
    return bitmap.to_array()


def remap(pixels: Array, lens: "CameraModel", mode: str) -> Array:
    """Undistort an image [h, w, c] uint8 of a wide camera model to lens.pinhole() [H, W, c].

    mode is the interpolation of grid_sample: "bilinear", or "nearest" for masks.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    found = torch.nn.functional.grid_sample(image, _sources(lens), mode, "border", align_corners=False)
    return found[0].round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


@lru_cache(4)  # an entry has 8 bytes per pixel, and captures have one camera or few
def _sources(lens: "CameraModel") -> Tensor:
    """Compute where the centre of each pinhole pixel is in the photograph, [1, H, W, 2] from -1 to 1."""
    pinhole, camera = lens.pinhole(), lens.colmap()
    fx, fy, cx, cy = pinhole.params
    x = (np.arange(pinhole.width) + 0.5 - cx) / fx
    found = np.empty((pinhole.height, pinhole.width, 2), np.float32)
    for row in range(pinhole.height):  # row by row, to save memory
        ray = np.stack([x, np.full_like(x, (row + 0.5 - cy) / fy), np.ones_like(x)], 1)
        found[row] = camera.img_from_cam(ray) * (2 / lens.width, 2 / lens.height) - 1
    return torch.from_numpy(found)[None]
