"""Gaussians as tensors, in the parametrisation that is optimised and stored."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from flexgs.gaussians import TENSORS, Attributes, Gaussians
from flexgs.origin import Origin, offset


@dataclass(eq=False)
class Splats(Attributes[Tensor]):
    """Gaussians as tensors, which are rendered and trained."""

    @staticmethod
    def of(gaussians: Attributes) -> "Splats":
        """Return Gaussians as tensors: arrays on the CPU, in the same memory; splats as they are."""
        if isinstance(gaussians, Splats):
            return gaussians
        return Splats(**{name: torch.from_numpy(a) for name, a in gaussians.items()}, origin=gaussians.origin)

    def arrays(self) -> Gaussians:
        """Return these Gaussians as NumPy arrays, without gradients."""
        return Gaussians(**{name: t.detach().cpu().contiguous().numpy() for name, t in self.items()},
                         origin=self.origin)

    def like(self, other: Gaussians) -> "Splats":  # type: ignore[override]
        """Return the other Gaussians as tensors on the device of these."""
        return Splats.of(other).to(self.means.device)

    def at(self, origin: Origin) -> Self:
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


def rotation_matrices(quats: Tensor) -> Tensor:
    """Convert quaternions [N, 4] (w, x, y, z) of any length to rotation matrices [N, 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=1).unbind(1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
                       dim=1).view(-1, 3, 3)
