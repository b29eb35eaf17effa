"""The same Gaussians with their axes named anew, so that no rotation is by more than 63 degrees.

An ellipsoid has 24 right-handed frames: which axis is called x, y and z, and which way it points, is free.
In the frame nearest to the world's, w of the unit quaternion is the largest number and above 0.85: it need
not be stored, and x, y and z are small.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Values = NDArray[np.floating]


class Turn:
    """The change of frame of each Gaussian."""

    def __init__(self, quats: Values):
        """Choose the frames for quaternions (w, x, y, z) of any length, [N, 4]; length 0 is no turn."""
        length = np.linalg.norm(quats, axis=1, keepdims=True)
        quats = np.where(length > 1e-12, quats, [1.0, 0, 0, 0])
        group = Rotation.create_group("O")
        frames, matrices = group.as_quat(scalar_first=True), group.as_matrix()
        near = quats @ frames.T
        chosen = np.abs(near).argmax(axis=1)
        sign = np.where(np.take_along_axis(near, chosen[:, None], 1) < 0, -1, 1)
        self._after = frames[chosen] * [1, -1, -1, -1] * sign / np.maximum(length, 1e-12)
        self._axes = np.abs(matrices[chosen]).argmax(axis=2)

    def quats(self, values: Values, rows: slice) -> Values:
        """Return the quaternions of the Gaussians at rows, or changes of these, in the new frames.

        Cuts add changes to quaternions and normalise the sum: the quaternion of a Gaussian and all its
        changes are divided by the same length.
        """
        return _product(values, self._after[rows])

    def scales(self, values: Values, rows: slice) -> Values:
        """Return the log-scales of the Gaussians at rows, or changes of these, in the new frames."""
        return np.take_along_axis(values, self._axes[rows], 1)


def _product(a: Values, b: Values) -> Values:
    """Multiply quaternions (w, x, y, z), [N, 4]."""
    w, x, y, z = a.T
    W, X, Y, Z = b.T
    return np.stack([w * W - x * X - y * Y - z * Z, w * X + x * W + y * Z - z * Y,
                     w * Y - x * Z + y * W + z * X, w * Z + x * Y - y * X + z * W], axis=1)
