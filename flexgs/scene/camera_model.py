"""Camera models: the intrinsics of a photograph, and the pinhole camera that it becomes."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexgs.camera import WORLD, Camera, Origin
from flexgs.errors import UserError
from flexgs.scene.polynomial import POLYNOMIAL, Polynomial
from flexgs.scene.pycolmap_library import library
from flexgs.scene.undistort import widest_pinhole

if TYPE_CHECKING:
    import pycolmap

# Every lens that can be trained on, by its COLMAP name (POLYNOMIAL is of transforms.json alone), and who
# chooses the pinhole camera that its images become: nobody
# where lines are straight, "colmap" as image_undistorter does, or "flexgs" (undistort.py) where that would be
# too wide.
LENSES = {
    **dict.fromkeys(("SIMPLE_PINHOLE", "PINHOLE"), None),
    **dict.fromkeys(("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV", "SIMPLE_DIVISION", "DIVISION"),
                    "colmap"),
    **dict.fromkeys(("OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE",
                     "RAD_TAN_THIN_PRISM_FISHEYE", "SIMPLE_FISHEYE", "FISHEYE", "FOV", "EUCM", POLYNOMIAL),
                    "flexgs"),
}

NARROWEST = 0.04
"""Of the size of the image, the least focal length of a lens with straight lines: 170 degrees are seen."""


@dataclass(frozen=True)
class CameraModel:
    """Intrinsics of one camera as a COLMAP model or POLYNOMIAL: hashable, picklable, in pixels of a width x
    height image."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]

    def colmap(self) -> "pycolmap.Camera | Polynomial":
        """What projects points through this lens."""
        if self.model == POLYNOMIAL:
            return Polynomial(self.width, self.height, self.params)
        return library().Camera(model=self.model, width=self.width, height=self.height, params=self.params)

    def scaled(self, width: int, height: int) -> "CameraModel":
        """The same lens for images of another size."""
        if (width, height) == (self.width, self.height):
            return self
        camera = self.colmap()
        camera.rescale(width, height)
        return from_colmap(camera)

    @property
    def distorted(self) -> bool:
        # pycolmap calls a fisheye lens without coefficients undistorted; it is no pinhole.
        return self.wide or (LENSES[self.model] is not None and not self.colmap().is_undistorted())

    @property
    def wide(self) -> bool:
        """Whether undistortion cuts the field of view."""
        return LENSES[self.model] == "flexgs"

    def pinhole(self) -> "CameraModel":
        """The PINHOLE lens that an image has after undistortion: as large as shows no blank pixel, and no
        wider than undistort.MAX_FOV for a wide lens."""
        return _pinhole(self)

    def camera(self, viewmat: np.ndarray, origin: Origin = WORLD) -> Camera:
        """A Camera with the calibration of this lens, distortion left out, at the pose viewmat ([4, 4], world
        to camera) in coordinates about origin."""
        K = self.colmap().calibration_matrix()
        return Camera(torch.from_numpy(viewmat).float(), torch.from_numpy(K).float(), self.width, self.height,
                      origin=origin)

    def check(self, file: Path) -> None:
        """UserError naming file if the lens cannot be trained on or is nonsense."""
        if self.model not in LENSES:
            raise UserError(f"{file}: the camera model {self.model} is not supported; expected one of "
                            f"{', '.join(LENSES)}: cut the images into pinhole views before COLMAP")
        # false for NaN
        sane = 0 < self.width < 1 << 17 and 0 < self.height < 1 << 17 and np.abs(self.params).max() < 1e12
        if not (sane and (np.diag(self.colmap().calibration_matrix()) > 0).all()):
            raise UserError(f"{file}: found a {self.model} camera of {self.width}x{self.height} "
                            f"pixels with parameters {', '.join(f'{p:g}' for p in self.params)}; expected "
                            "positive sizes and focal lengths: the file is damaged, copy or compute it again")
        fx, fy = np.diag(self.colmap().calibration_matrix())[:2]
        if not self.wide and (fx < NARROWEST * self.width or fy < NARROWEST * self.height):
            raise UserError(f"{file}: found a {self.model} camera of {self.width}x{self.height} pixels "
                            f"with focal lengths of {fx:g} and {fy:g}, a view of 170 degrees or more; "
                            "expected them in pixels: they may be shares of the size")
        if self.wide and not min(self.pinhole().width, self.pinhole().height) > 1:
            raise UserError(f"{file}: found a {self.model} camera with parameters "
                            f"{', '.join(f'{p:g}' for p in self.params)}, which show no clear view around "
                            "the optical axis; expected a calibrated lens: compute it again")


def from_colmap(camera: "pycolmap.Camera | Polynomial") -> CameraModel:
    """The lens of a COLMAP camera of any model."""
    return CameraModel(camera.model_name, camera.width, camera.height, tuple(float(p) for p in camera.params))


@cache
def _pinhole(lens: CameraModel) -> CameraModel:
    if not lens.distorted:
        (fx, _, cx), (_, fy, cy), _ = lens.colmap().calibration_matrix().tolist()
        return CameraModel("PINHOLE", lens.width, lens.height, (fx, fy, cx, cy))
    if lens.wide:
        return CameraModel("PINHOLE", *widest_pinhole(lens.colmap()))
    return from_colmap(library().undistort_camera(library().UndistortCameraOptions(), lens.colmap()))
