"""Camera model of photogrammetry programs that COLMAP lacks: a radial polynomial up to r^8."""

from dataclasses import dataclass

import numpy as np

POLYNOMIAL = "POLYNOMIAL"

Array = np.ndarray


@dataclass
class Polynomial:
    """Brown's camera model with four radial coefficients, as nerfstudio and Metashape use it.

    Methods are named as those of pycolmap.Camera. params are fx, fy, cx, cy, k1, k2, p1, p2, k3, k4. A point
    at (x, y) and depth 1 falls to x (1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8) + 2 p1 x y + p2 (r^2 + 2 x^2),
    and likewise y with p1 and p2 exchanged; p1 and p2 are in OpenCV's order.
    """

    width: int
    height: int
    params: tuple[float, ...]
    model_name = POLYNOMIAL

    def calibration_matrix(self) -> Array:
        """Return K [3, 3]."""
        fx, fy, cx, cy = self.params[:4]
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])

    def is_undistorted(self) -> bool:
        """Tell whether all distortion coefficients are 0."""
        return not any(self.params[4:])

    def rescale(self, width: int, height: int) -> None:
        """Change in place to the intrinsics of an image of this size in pixels."""
        scales = (width / self.width, height / self.height) * 2
        self.params = (*(p * s for p, s in zip(self.params, scales, strict=False)), *self.params[4:])
        self.width, self.height = width, height

    def img_from_cam(self, rays: Array) -> Array:
        """Project points [n, 3] in camera coordinates to pixels [n, 2]; NaN for points behind the camera."""
        fx, fy, cx, cy, k1, k2, p1, p2, k3, k4 = self.params
        with np.errstate(all="ignore"):
            x, y = np.where(rays[:, 2:] > 0, rays[:, :2] / rays[:, 2:], np.nan).T
            r2 = x * x + y * y
            radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
            return np.stack([fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx,
                             fy * (y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)) + cy], 1)
