"""Splats: a bag of Gaussians as plain tensors, in the parametrisation that is optimised and stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flexgs.camera import WORLD, Origin, offset

SH_C0 = 0.28209479177387814  # the constant basis function of the real spherical harmonics
TENSORS = ("means", "quats", "scales", "opacities", "sh0", "shN")


@dataclass(eq=False)
class Splats:
    """N Gaussians of 3D Gaussian Splatting (Kerbl et al. 2023), raw values before activation."""

    means: Tensor
    """[N, 3] positions in world units, from the origin."""
    quats: Tensor
    """[N, 4] rotations, (w, x, y, z), not necessarily of unit length."""
    scales: Tensor
    """[N, 3] natural logarithm of the standard deviations in world units."""
    opacities: Tensor
    """[N] logit of the opacity."""
    sh0: Tensor
    """[N, 3] the constant spherical-harmonics coefficient of r, g, b; colour = 0.5 + SH_C0 * sh0 + ..."""
    shN: Tensor
    """[N, K, 3] the other coefficients, K = 0, 3, 8 or 15 for degree 0 to 3."""
    origin: Origin = WORLD
    """Where (0, 0, 0) of means is in the capture's own coordinates: float32 holds little far from 0."""

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        return int((self.shN.shape[1] + 1) ** 0.5) - 1

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each attribute, in the order of definition."""
        return ((name, getattr(self, name)) for name in TENSORS)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Splats":
        """A new bag with fn applied to each tensor."""
        return self.changed(**{name: fn(t) for name, t in self.items()})

    def changed(self, **tensors: Tensor) -> "Splats":
        """A new bag with these in the place of its own, about the same origin."""
        return replace(self, **cast(Any, tensors))

    def __getitem__(self, index: Tensor | slice) -> "Splats":
        """The Gaussians at index (a slice, a boolean mask or int64 indices), in its order."""
        return self.map(lambda t: t[index])

    def at(self, origin: Origin) -> "Splats":
        """The same Gaussians with positions from another origin, added in float64 and rounded to the dtype of
        means."""
        if origin == self.origin:
            return self
        shift = torch.tensor(offset(origin, self.origin), dtype=torch.float64, device=self.means.device)
        return replace(self, means=(self.means.double() + shift).to(self.means.dtype), origin=origin)

    def detach(self) -> "Splats":
        return self.map(lambda t: t.detach())

    def clone(self) -> "Splats":
        return self.map(lambda t: t.detach().clone())

    def to(self, device: torch.device | str) -> "Splats":
        return self.map(lambda t: t.to(device))

    def requires_grad_(self, wanted: bool = True) -> "Splats":
        for _, t in self.items():
            t.requires_grad_(wanted)
        return self


def cat(parts: list[Splats]) -> Splats:
    """The Gaussians of all parts, one after another, about the origin of the first."""
    parts = [part.at(parts[0].origin) for part in parts]
    return parts[0].changed(**{name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS})


def quantile(values: Tensor, q: float) -> Tensor:
    """The values [...] of [N, ...] that a share q of the N stay below, linear between two; torch.quantile
    refuses 2^24."""
    ordered, place = values.sort(dim=0).values, q * (len(values) - 1)
    below = int(place)
    return torch.lerp(ordered[below], ordered[min(below + 1, len(values) - 1)], place - below)


def unit_quaternions(quats: Tensor) -> Tensor:
    """Quaternions [N, 4] of length 1. One without a length is no rotation, which is how it is rendered."""
    none = quats.new_tensor([1.0, 0, 0, 0])
    return torch.where(quats.norm(dim=1, keepdim=True) > 1e-12, torch.nn.functional.normalize(quats, dim=1),
                       none)


def rotation_matrices(quats: Tensor) -> Tensor:
    """[N, 3, 3] from quaternions [N, 4] (w, x, y, z) of any length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=1).unbind(1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
                       dim=1).view(-1, 3, 3)
