"""Which Gaussians an elastic render takes."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Selection:
    """The Gaussians of one elastic render."""

    index: slice | Tensor
    """Rows of the splats."""
    mask: Tensor | None = None
    """Factor on their opacities: ones, through which the selector is differentiated (supplementary eq. 8)."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The selector's own terms, weighted."""
