"""Camera models: the intrinsics of a photograph, and the pinhole camera it is undistorted to."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexgs.camera import Camera
from flexgs.errors import UserError
from flexgs.origin import WORLD, Origin
from flexgs.scene.polynomial import POLYNOMIAL, Polynomial
from flexgs.scene.pycolmap_library import library
from flexgs.scene.undistort import widest_pinhole

if TYPE_CHECKING:
    import pycolmap

LENSES = {
    **dict.fromkeys(("SIMPLE_PINHOLE", "PINHOLE"), None),
    **dict.fromkeys(("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV", "SIMPLE_DIVISION", "DIVISION"),
                    "colmap"),
    **dict.fromkeys(("OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE",
                     "RAD_TAN_THIN_PRISM_FISHEYE", "SIMPLE_FISHEYE", "FISHEYE", "FOV", "EUCM", POLYNOMIAL),
                    "flexgs"),
}
"""Camera models that can be trained on, by COLMAP name (only POLYNOMIAL is from transforms.json), and how
their images are undistorted: None for not at all, "colmap" for COLMAP's image_undistorter, "flexgs" for
undistort.py where the pinhole view of image_undistorter would be too wide."""
NARROWEST = 0.04
"""Least focal length of a camera that is not wide, as a fraction of the image size: a view of 170 degrees."""


@dataclass(frozen=True)
class CameraModel:
    """Intrinsics of one camera for images of width x height pixels; hashable and picklable."""

    model: str
    """COLMAP's name of the camera model, or POLYNOMIAL."""
    width: int
    height: int
    params: tuple[float, ...]
    """Parameters in COLMAP's order for the camera model, lengths in pixels."""

    def colmap(self) -> "pycolmap.Camera | Polynomial":
        """Return the object that projects points with this camera model."""
        if self.model == POLYNOMIAL:
            return Polynomial(self.width, self.height, self.params)
        return library().Camera(model=self.model, width=self.width, height=self.height, params=self.params)

    def scaled(self, width: int, height: int) -> "CameraModel":
        """Return this camera model for images of another size in pixels."""
        if (width, height) == (self.width, self.height):
            return self
        camera = self.colmap()
        camera.rescale(width, height)
        return from_colmap(camera)

    @property
    def distorted(self) -> bool:
        """Whether images have to be undistorted to become those of a pinhole camera."""
        # pycolmap's is_undistorted is true for a fisheye without coefficients, which is no pinhole.
        return self.wide or (LENSES[self.model] is not None and not self.colmap().is_undistorted())

    @property
    def wide(self) -> bool:
        """Whether undistortion cuts the field of view."""
        return LENSES[self.model] == "flexgs"

    def pinhole(self) -> "CameraModel":
        """Return the PINHOLE model of an undistorted image, which has no blank pixel.

        The view of a wide camera model is limited to undistort.MAX_FOV.
        """
        return _pinhole(self)

    def camera(self, viewmat: np.ndarray, origin: Origin = WORLD) -> Camera:
        """Build a Camera with these intrinsics, without distortion.

        viewmat ([4, 4], world to camera) is its pose in coordinates about origin.
        """
        K = self.colmap().calibration_matrix()
        return Camera(torch.from_numpy(viewmat).float(), torch.from_numpy(K).float(), self.width, self.height,
                      origin=origin)

    def check(self, file: Path) -> None:
        """Raise a UserError that names file if the camera model is unsupported or its numbers are invalid."""
        if self.model not in LENSES:
            raise UserError(f"{file}: the camera model {self.model} is not supported; expected one of "
                            f"{', '.join(LENSES)}: cut the images into pinhole views before COLMAP")
        # The comparisons are false for NaN.
        sane = 0 < self.width < 1 << 17 and 0 < self.height < 1 << 17 and np.abs(self.params).max() < 1e12
        if not (sane and (np.diag(self.colmap().calibration_matrix()) > 0).all()):
            raise UserError(f"{file}: found a {self.model} camera of {self.width}x{self.height} "
                            f"pixels with parameters {', '.join(f'{p:g}' for p in self.params)}; expected "
                            "positive sizes and focal lengths: the file is damaged, copy or compute it again")
        fx, fy = np.diag(self.colmap().calibration_matrix())[:2]
        if not self.wide and (fx < NARROWEST * self.width or fy < NARROWEST * self.height):
            raise UserError(f"{file}: found a {self.model} camera of {self.width}x{self.height} pixels "
                            f"with focal lengths of {fx:g} and {fy:g}, a view of 170 degrees or more; "
                            "expected them in pixels: they may be fractions of the size")
        if self.wide and not min(self.pinhole().width, self.pinhole().height) > 1:
            raise UserError(f"{file}: found a {self.model} camera with parameters "
                            f"{', '.join(f'{p:g}' for p in self.params)}, which show no clear view around "
                            "the optical axis; expected a calibrated lens: compute it again")


def from_colmap(camera: "pycolmap.Camera | Polynomial") -> CameraModel:
    """Convert a COLMAP camera of any model to a CameraModel."""
    return CameraModel(camera.model_name, camera.width, camera.height, tuple(float(p) for p in camera.params))


@cache
def _pinhole(lens: CameraModel) -> CameraModel:
    if not lens.distorted:
        (fx, _, cx), (_, fy, cy), _ = lens.colmap().calibration_matrix().tolist()
        return CameraModel("PINHOLE", lens.width, lens.height, (fx, fy, cx, cy))
    if lens.wide:
        return CameraModel("PINHOLE", *widest_pinhole(lens.colmap()))
    return from_colmap(library().undistort_camera(library().UndistortCameraOptions(), lens.colmap()))
