"""Whether a file holds the Gaussians that it was made of: their parameters are compared one by one.

Errors are numbers per Gaussian in visible units: an error of the position is relative to the size of the
model, of the shape to the size of the Gaussian; opacity and colour are compared as displayed.
"""

from typing import NamedTuple

import numpy as np

from flexgs.config import percent
from flexgs.gaussians import SH_C0, Gaussians, rotation_matrices, sigmoid

ANY = float("inf")


class Bounds(NamedTuple):
    """Largest error of each kind that a format may make; by default that of 8 bits, 10 for a position."""

    positions: float = 1e-3
    shapes: float = 0.05
    opacities: float = 0.01
    colours: float = 0.02
    harmonics: float = 0.05


BITS = Bounds()
OUTLIERS = 0.01
"""Fraction of the Gaussians whose error may exceed a bound."""
GROSS = 10.0
"""Multiple of the bound that no position or shape may exceed: a single Gaussian can cover the whole image."""


def damage(given: Gaussians, stored: Gaussians, bounds: Bounds) -> str | None:
    """Say what is wrong with the Gaussians read back from a file; None if they are those given."""
    if len(stored) != len(given) or stored.sh_degree != given.sh_degree:
        return (f"{len(stored):,} Gaussians of degree {stored.sh_degree} came back, of "
                f"{len(given):,} of degree {given.sh_degree}")
    for name, error in errors(given, stored).items():
        bound = getattr(bounds, name)
        beyond = ~(error <= bound)  # also true for NaN
        gross = ~(error <= GROSS * bound) if name in ("positions", "shapes") else np.zeros_like(beyond)
        if beyond.sum() > OUTLIERS * len(given) or gross.any():
            return (f"{name} of {beyond.sum():,} of {len(given):,} Gaussians come back changed by "
                    f"over {percent(bound)}")
    return None


def errors(given: Gaussians, stored: Gaussians) -> dict[str, np.ndarray]:
    """Return the error [N] of each kind of the stored Gaussians, which are in the order of those given."""
    side, n = _side(given), len(given)
    stored = stored.at(given.origin)
    means = given.means.astype(np.float64)
    far = np.linalg.norm(means - np.median(means, axis=0), axis=1)
    size = np.exp(given.scales.astype(np.float64).max(1).clip(max=100))
    tolerated = side + far + 50 * size  # a Gaussian that is far away or large may be further off
    roots, stored_roots = (_roots(g).reshape(n, 9) for g in (given, stored))
    visible = (np.linalg.norm(roots, axis=1) + 4e-4 * side).clip(1e-30)
    return {"positions": np.linalg.norm(stored.means - means, axis=1) / tolerated.clip(1e-30),
            "shapes": np.linalg.norm(stored_roots - roots, axis=1) / visible,
            "opacities": np.abs(sigmoid(stored.opacities) - sigmoid(given.opacities)),
            "colours": SH_C0 * np.abs(stored.sh0 - given.sh0).max(1),
            "harmonics": np.abs(stored.shN - given.shN).reshape(n, -1).max(1, initial=0)}


def summary(given: Gaussians, stored: Gaussians) -> str:
    """Say in words how far the Gaussians read back are from those given: the error that 99 % stay below."""
    def percentage(error: np.ndarray) -> str:
        value = 100 * float(np.quantile(error, 1 - OUTLIERS))
        return f"{value:.2g} %" if value >= 0.001 else "less than 0.001 %"

    most = {name: percentage(error) for name, error in errors(given, stored).items()}
    return (f"99 % of the Gaussians keep their position to {most['positions']} of the model's size, their "
            f"shape to {most['shapes']}, opacity to {most['opacities']}, colour to {most['colours']}, and "
            f"coefficients of the harmonics to {most['harmonics']}")


def _side(gaussians: Gaussians) -> float:
    """Return the largest side of the bounding box without the outermost 1 % (or 3 Gaussians) at each end."""
    left = min(0.25, max(0.01, 3 / len(gaussians)))
    low, high = np.quantile(gaussians.means.astype(np.float64), (left, 1 - left), axis=0)
    return float((high - low).max())


def _roots(gaussians: Gaussians) -> np.ndarray:
    """Return the square roots [N, 3, 3] of the covariances, the same in any order of a Gaussian's axes."""
    axes = rotation_matrices(gaussians.quats.astype(np.float64))
    scales = np.exp(gaussians.scales.astype(np.float64).clip(max=100))  # e^100: finite
    return axes * scales[:, None, :] @ axes.transpose(0, 2, 1)
