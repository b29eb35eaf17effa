"""The answer of an order to one elastic render: which Gaussians it renders."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Selection:
    """The Gaussians that one elastic render keeps."""

    index: slice | Tensor
    """Their rows in the splats."""
    mask: Tensor | None = None
    """Factor on their opacities: ones that carry the gradient to GsNet (FlexGS supplementary, eq. 8)."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Weighted losses of the order itself, by name, added to that of the image."""
