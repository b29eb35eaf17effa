"""Whether a file holds the Gaussians that it was made of: their parameters are compared one by one.

Errors are numbers per Gaussian in visible units: an error of the position is relative to the size of the
model, of the shape to the size of the Gaussian; opacity and colour are compared as displayed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flexgs.config import percent
from flexgs.splats import SH_C0, Splats, quantile, rotation_matrices

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


def damage(given: Splats, stored: Splats, bounds: Bounds) -> str | None:
    """Say what is wrong with the Gaussians read back from a file; None if they are those given."""
    if len(stored) != len(given) or stored.sh_degree != given.sh_degree:
        return (f"{len(stored):,} Gaussians of degree {stored.sh_degree} came back, of "
                f"{len(given):,} of degree {given.sh_degree}")
    for name, error in errors(given, stored).items():
        bound = getattr(bounds, name)
        beyond = ~(error <= bound)  # also true for NaN
        gross = ~(error <= GROSS * bound) if name in ("positions", "shapes") else torch.zeros_like(beyond)
        if int(beyond.sum()) > OUTLIERS * len(given) or bool(gross.any()):
            return (f"{name} of {int(beyond.sum()):,} of {len(given):,} Gaussians come back changed by "
                    f"over {percent(bound)}")
    return None


def errors(given: Splats, stored: Splats) -> dict[str, Tensor]:
    """Return the error [N] of each kind of the stored Gaussians, which are in the order of those given."""
    side = _side(given)
    stored = stored.at(given.origin)
    means = given.means.double()
    far = (means - means.median(0).values).norm(dim=1)
    size = given.scales.double().amax(1).clamp(max=100).exp()
    tolerated = side + far + 50 * size  # a Gaussian that is far away or large may be further off
    moved = (stored.means.double() - means).norm(dim=1) / tolerated.clamp(min=1e-30)
    roots, stored_roots = _roots(given), _roots(stored)
    visible = (roots.flatten(1).norm(dim=1) + 4e-4 * side).clamp(min=1e-30)
    harmonics = (stored.shN - given.shN).abs().flatten(1)
    return {"positions": moved, "shapes": (stored_roots - roots).flatten(1).norm(dim=1) / visible,
            "opacities": (torch.sigmoid(stored.opacities) - torch.sigmoid(given.opacities)).abs(),
            "colours": SH_C0 * (stored.sh0 - given.sh0).abs().amax(1),
            "harmonics": torch.cat([torch.zeros(len(given), 1), harmonics], dim=1).amax(1)}


def _side(splats: Splats) -> float:
    """Return the largest side of the bounding box without the outermost 1 % (or 3 Gaussians) at each end."""
    left = min(0.25, max(0.01, 3 / len(splats)))
    sides = quantile(splats.means.double(), 1 - left) - quantile(splats.means.double(), left)
    return float(sides.max())


def _roots(splats: Splats) -> Tensor:
    """Return the square roots [N, 3, 3] of the covariances, the same in any order of a Gaussian's axes."""
    axes = rotation_matrices(splats.quats.double())
    return axes * splats.scales.double().clamp(max=100).exp()[:, None, :] @ axes.mT  # e^100: finite
