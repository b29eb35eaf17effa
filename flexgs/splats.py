"""Splats: a bag of Gaussians as plain tensors, in the parametrisation that is optimised and stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SH_C0 = 0.28209479177387814  # the constant basis function of the real spherical harmonics


@dataclass(eq=False)
class Splats:
    """N Gaussians of 3D Gaussian Splatting (Kerbl et al. 2023), raw values before activation."""

    means: Tensor
    """[N, 3] positions in world units."""
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

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        return int((self.shN.shape[1] + 1) ** 0.5) - 1

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each attribute, in the order of definition."""
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Splats":
        """A new bag with fn applied to each tensor."""
        return replace(self, **{name: fn(t) for name, t in self.items()})

    def __getitem__(self, index: Tensor | slice) -> "Splats":
        """The Gaussians at index (a slice, a boolean mask or int64 indices), in its order."""
        return self.map(lambda t: t[index])

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
    """The Gaussians of all parts, one after another."""
    return Splats(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Splats)})
