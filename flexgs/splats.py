"""Gaussians as plain tensors, in the parametrisation that is optimised and stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flexgs.camera import WORLD, Origin, offset

SH_C0 = 0.28209479177387814
"""Constant basis function of the real spherical harmonics, 1 / (2 sqrt(pi))."""
TENSORS = ("means", "quats", "scales", "opacities", "sh0", "shN")


@dataclass(eq=False)
class Splats:
    """N Gaussians of 3D Gaussian Splatting (Kerbl et al. 2023), as raw values before activation."""

    means: Tensor
    """Positions in world units relative to origin, [N, 3]."""
    quats: Tensor
    """Rotations as quaternions (w, x, y, z) of any length, [N, 4]."""
    scales: Tensor
    """Natural logarithms of the standard deviations in world units, [N, 3]."""
    opacities: Tensor
    """Logits of the opacities, [N]."""
    sh0: Tensor
    """Spherical-harmonics coefficients of degree 0 of r, g, b, [N, 3]; colour = 0.5 + SH_C0 * sh0 + ..."""
    shN: Tensor
    """Coefficients of the higher degrees, [N, K, 3] with K = 0, 3, 8 or 15 for degree 0 to 3."""
    origin: Origin = WORLD
    """Position of means (0, 0, 0) in the capture's own coordinates, where float32 may be too coarse."""

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return int((self.shN.shape[1] + 1) ** 0.5) - 1

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and tensors of the attributes, in the order of TENSORS."""
        return ((name, getattr(self, name)) for name in TENSORS)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Splats":
        """Return new splats with fn applied to each tensor."""
        return self.changed(**{name: fn(t) for name, t in self.items()})

    def changed(self, **tensors: Tensor) -> "Splats":
        """Return new splats with these tensors in place of those of the same names."""
        return replace(self, **cast(Any, tensors))

    def __getitem__(self, index: Tensor | slice) -> "Splats":
        """Return the Gaussians at index (a slice, a boolean mask or int64 indices), in that order."""
        return self.map(lambda t: t[index])

    def at(self, origin: Origin) -> "Splats":
        """Return these Gaussians about another origin; means are shifted in float64 and keep their dtype."""
        if origin == self.origin:
            return self
        shift = torch.tensor(offset(origin, self.origin), dtype=torch.float64, device=self.means.device)
        return replace(self, means=(self.means.double() + shift).to(self.means.dtype), origin=origin)

    def detach(self) -> "Splats":
        """Return splats that share the memory but not the gradients of these."""
        return self.map(lambda t: t.detach())

    def clone(self) -> "Splats":
        """Return a copy that is detached from the gradients of these."""
        return self.map(lambda t: t.detach().clone())

    def to(self, device: torch.device | str) -> "Splats":
        """Return splats with all tensors on device."""
        return self.map(lambda t: t.to(device))

    def requires_grad_(self, wanted: bool = True) -> "Splats":
        """Set in place whether gradients of all tensors are computed."""
        for _, t in self.items():
            t.requires_grad_(wanted)
        return self


def cat(parts: list[Splats]) -> Splats:
    """Concatenate the Gaussians of all parts, about the origin of the first part."""
    parts = [part.at(parts[0].origin) for part in parts]
    return parts[0].changed(**{name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS})


def quantile(values: Tensor, q: float) -> Tensor:
    """Compute the quantile q (0 to 1) over the first dimension, linear between two values.

    torch.quantile refuses tensors of more than 2^24 elements.
    """
    ordered, place = values.sort(dim=0).values, q * (len(values) - 1)
    below = int(place)
    return torch.lerp(ordered[below], ordered[min(below + 1, len(values) - 1)], place - below)


def unit_quaternions(quats: Tensor) -> Tensor:
    """Normalize quaternions [N, 4]; one of length 0 becomes the identity, as which it is rendered."""
    identity = quats.new_tensor([1.0, 0, 0, 0])
    unit = torch.nn.functional.normalize(quats, dim=1)
    return torch.where(quats.norm(dim=1, keepdim=True) > 1e-12, unit, identity)


def rotation_matrices(quats: Tensor) -> Tensor:
    """Convert quaternions [N, 4] (w, x, y, z) of any length to rotation matrices [N, 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=1).unbind(1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
                       dim=1).view(-1, 3, 3)
