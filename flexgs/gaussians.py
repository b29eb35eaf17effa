"""Gaussians as files hold them: NumPy arrays. splats.py has them as tensors, to render and to train."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np

from flexgs.origin import WORLD, Origin, offset

SH_C0 = 0.28209479177387814
"""Constant basis function of the real spherical harmonics, 1 / (2 sqrt(pi))."""
TENSORS = ("means", "quats", "scales", "opacities", "sh0", "shN")

A = TypeVar("A", bound=Any)
"""The kind of array: numpy.ndarray or torch.Tensor."""


@dataclass(eq=False)
class Attributes(Generic[A]):
    """N Gaussians of 3D Gaussian Splatting (Kerbl et al. 2023), as raw values before activation."""

    means: A
    """Positions in world units relative to origin, [N, 3]."""
    quats: A
    """Rotations as quaternions (w, x, y, z) of any length, [N, 4]."""
    scales: A
    """Natural logarithms of the standard deviations in world units, [N, 3]."""
    opacities: A
    """Logits of the opacities, [N]."""
    sh0: A
    """Spherical-harmonics coefficients of degree 0 of r, g, b, [N, 3]; colour = 0.5 + SH_C0 * sh0 + ..."""
    shN: A
    """Coefficients of the higher degrees, [N, K, 3] with K = 0, 3, 8 or 15 for degree 0 to 3."""
    origin: Origin = WORLD
    """Position of means (0, 0, 0) in the capture's own coordinates, where float32 may be too coarse."""

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return int((self.shN.shape[1] + 1) ** 0.5) - 1

    def items(self) -> Iterator[tuple[str, A]]:
        """Iterate over the names and arrays of the attributes, in the order of TENSORS."""
        return ((name, getattr(self, name)) for name in TENSORS)

    def map(self, fn: Callable[[A], A]) -> Self:
        """Return new Gaussians with fn applied to each array."""
        return self.changed(**{name: fn(a) for name, a in self.items()})

    def changed(self, **arrays: A) -> Self:
        """Return new Gaussians with these arrays in place of those of the same names."""
        return replace(self, **cast(Any, arrays))

    def __getitem__(self, index: A | slice) -> Self:
        """Return the Gaussians at index (a slice, a boolean mask or int64 indices), in that order."""
        return self.map(lambda a: a[index])

    def at(self, origin: Origin) -> Self:
        """Return these Gaussians about another origin; means are shifted in float64 and keep their dtype."""
        raise NotImplementedError

    def arrays(self) -> "Gaussians":
        """Return these Gaussians as NumPy arrays, which share their memory where that is possible."""
        raise NotImplementedError

    def like(self, other: "Gaussians") -> Self:
        """Return the other Gaussians as arrays of the kind, and on the device, of these."""
        raise NotImplementedError


@dataclass(eq=False)
class Gaussians(Attributes[np.ndarray]):
    """Gaussians as NumPy arrays, float32."""

    def arrays(self) -> "Gaussians":
        """Return these Gaussians themselves."""
        return self

    def like(self, other: "Gaussians") -> "Gaussians":  # type: ignore[override]
        """Return the other Gaussians themselves."""
        return other

    def at(self, origin: Origin) -> Self:
        """Return these Gaussians about another origin; means are shifted in float64 and keep their dtype."""
        if origin == self.origin:
            return self
        means = self.means.astype(np.float64) + np.array(offset(origin, self.origin))
        return replace(self, means=means.astype(self.means.dtype), origin=origin)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Compute 1 / (1 + exp(-values)) without overflow, in the dtype of the values."""
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1, small) / (1 + small)


def unit_quaternions(quats: np.ndarray) -> np.ndarray:
    """Normalize quaternions [N, 4]; one of length 0 becomes the identity, as which it is rendered."""
    length = np.linalg.norm(quats, axis=1, keepdims=True)
    unit = quats / np.maximum(length, np.finfo(quats.dtype).tiny)
    return np.where(length > 1e-12, unit, np.array([1, 0, 0, 0], quats.dtype))


def rotation_matrices(quats: np.ndarray) -> np.ndarray:
    """Convert quaternions [N, 4] (w, x, y, z) of any length to rotation matrices [N, 3, 3]."""
    from scipy.spatial.transform import Rotation  # takes a tenth of a second to import

    return Rotation.from_quat(unit_quaternions(quats), scalar_first=True).as_matrix()
