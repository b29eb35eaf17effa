"""Whether a file holds the Gaussians that it was made of: compared in their parameters, one by one.

An error is a number per Gaussian, counted in what can be seen: of the position in the extent of the model, of
the shape in the Gaussian's own size, of opacity and colour as displayed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flexgs.config import percent
from flexgs.splats import SH_C0, Splats, quantile, rotation_matrices

ANY = float("inf")


class Bounds(NamedTuple):
    """Largest error of each kind that a format may make. By default what 8 bits leave, and 10 of a
    position."""

    positions: float = 1e-3
    shapes: float = 0.05
    opacities: float = 0.01
    colours: float = 0.02
    harmonics: float = 0.05


BITS = Bounds()
OUTLIERS = 0.01
"""Of the Gaussians, those that may be beyond a bound."""
GROSS = 10.0
"""Times a bound, a position or a shape that no Gaussian may have: one in a million covers the whole
picture."""


def damage(given: Splats, stored: Splats, bounds: Bounds) -> str | None:
    """What is wrong with Gaussians that were read back from a file, in words; None if they are those that
    were given."""
    if len(stored) != len(given) or stored.sh_degree != given.sh_degree:
        return (f"{len(stored):,} Gaussians of degree {stored.sh_degree} came back, of "
                f"{len(given):,} of degree {given.sh_degree}")
    for name, error in errors(given, stored).items():
        bound = getattr(bounds, name)
        beyond = ~(error <= bound)  # NaN is beyond
        gross = ~(error <= GROSS * bound) if name in ("positions", "shapes") else torch.zeros_like(beyond)
        if int(beyond.sum()) > OUTLIERS * len(given) or bool(gross.any()):
            return (f"{name} of {int(beyond.sum()):,} of {len(given):,} Gaussians come back changed by "
                    f"over {percent(bound)}")
    return None


def errors(given: Splats, stored: Splats) -> dict[str, Tensor]:
    """The error [N] of each kind, the stored Gaussians in the given order, or else matched to them."""
    extent = _extent(given)
    stored = stored.at(given.origin)
    means = given.means.double()
    far, size = (means - means.median(0).values).norm(dim=1), given.scales.double().amax(1).clamp(max=100).exp()
    tolerated = extent + far + 50 * size  # what is far away or large may be further off

    def moved(other: Splats) -> Tensor:
        return (other.means.double() - means).norm(dim=1) / tolerated.clamp(min=1e-30)

    if bool((moved(stored) > BITS.positions).double().mean() > OUTLIERS):
        stored = stored[_match(given, stored)]  # SOG sorts
    mine, its = _halves(given), _halves(stored)
    seen = (mine.flatten(1).norm(dim=1) + 4e-4 * extent).clamp(min=1e-30)
    return {"positions": moved(stored), "shapes": (its - mine).flatten(1).norm(dim=1) / seen,
            "opacities": (torch.sigmoid(stored.opacities) - torch.sigmoid(given.opacities)).abs(),
            "colours": SH_C0 * (stored.sh0 - given.sh0).abs().amax(1),
            "harmonics": torch.cat([torch.zeros(len(given), 1), (stored.shN - given.shN).abs().flatten(1)],
                                   dim=1).amax(1)}


def _extent(splats: Splats) -> float:
    """The largest side of the box around the Gaussians but for some far ones: 1 % at each end, and three
    where they are few."""
    left = min(0.25, max(0.01, 3 / len(splats)))
    sides = quantile(splats.means.double(), 1 - left) - quantile(splats.means.double(), left)
    return float(sides.max())


def _halves(splats: Splats) -> Tensor:
    """[N, 3, 3] square roots of the covariances: the same however axes are named. Beyond e^100 sizes are all
    alike."""
    axes = rotation_matrices(splats.quats.double())
    return axes * splats.scales.double().clamp(max=100).exp()[:, None, :] @ axes.mT


def _match(given: Splats, stored: Splats) -> Tensor:
    """For each given Gaussian the stored one nearest to it that is most like it."""
    from scipy.spatial import cKDTree  # most formats keep the order

    tree, nearest = cKDTree(stored.means.double().numpy()), list(range(1, min(8, len(stored)) + 1))
    near = torch.from_numpy(tree.query(given.means.double().numpy(), k=nearest)[1])

    def appearance(s: Splats) -> Tensor:
        return torch.cat([torch.sigmoid(s.opacities)[:, None], SH_C0 * s.sh0, s.scales], dim=1)

    unlike = (appearance(stored)[near] - appearance(given)[:, None]).abs().sum(2)
    return near.gather(1, unlike.argmin(1, keepdim=True))[:, 0]
