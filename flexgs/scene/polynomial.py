"""The lens of photogrammetry programs that COLMAP has no model for: a radial polynomial up to r^8."""

from dataclasses import dataclass

import numpy as np

POLYNOMIAL = "POLYNOMIAL"

Array = np.ndarray


@dataclass
class Polynomial:
    """Brown's model with four radial coefficients, as nerfstudio and Metashape use it; what a pycolmap.Camera
    can do that is needed of it, by the same names.

    params: fx, fy, cx, cy, k1, k2, p1, p2, k3, k4; a point at (x, y) and depth 1 falls to x (1 + k1 r^2 + k2
    r^4 + k3 r^6 + k4 r^8) + 2 p1 x y + p2 (r^2 + 2 x^2), and likewise y with p1 and p2 exchanged, as OpenCV
    defines p1 and p2.
    """

    width: int
    height: int
    params: tuple[float, ...]
    model_name = POLYNOMIAL

    def calibration_matrix(self) -> Array:
        fx, fy, cx, cy = self.params[:4]
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])

    def is_undistorted(self) -> bool:
        return not any(self.params[4:])

    def rescale(self, width: int, height: int) -> None:
        scales = (width / self.width, height / self.height) * 2
        self.params = (*(p * s for p, s in zip(self.params, scales, strict=False)), *self.params[4:])
        self.width, self.height = width, height

    def img_from_cam(self, rays: Array) -> Array:
        """[n, 3] in the camera's coordinates -> [n, 2] pixels; NaN behind the camera."""
        fx, fy, cx, cy, k1, k2, p1, p2, k3, k4 = self.params
        with np.errstate(all="ignore"):
            x, y = np.where(rays[:, 2:] > 0, rays[:, :2] / rays[:, 2:], np.nan).T
            r2 = x * x + y * y
            radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
            return np.stack([fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx,
                             fy * (y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)) + cy], 1)
