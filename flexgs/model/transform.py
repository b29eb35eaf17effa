"""The transform: how the Gaussians that a cut at ratio e keeps are changed. At e = 1 nothing changes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from flexgs.config import Config
from flexgs.splats import Splats


class Transform(nn.Module):
    """A transform that changes nothing; the base class of all transforms.

    Changes of positions and sizes are counted in `unit`, a length in world units (see unit_of in camera.py)
    that is stored beside the tensors. Parameters and learning rates are then of similar size in every scene,
    and float16 can hold the changes.

    A subclass changes Gaussians in forward() and lists its parameters for the optimizer in groups().
    """

    counts: Sequence[int] = ()
    """Rows that each parameter has for the first Gaussians of the order, block after block; none: every
    parameter is shared by all Gaussians."""

    def __init__(self, unit: float = 1.0):
        super().__init__()
        self.unit = unit

    @classmethod
    def make(cls, config: Config, splats: Splats, points: Tensor | None, unit: float) -> "Transform":
        """Make a transform; make_transform() in elastic.py describes the arguments."""
        return cls(unit)

    def forward(self, kept: Splats, ratio: float, index: Tensor | None = None) -> Splats:
        """Change the kept Gaussians for a cut at this ratio; index has their rows (None: the first ones)."""
        return kept

    def start(self, splats: Splats, score: Tensor) -> None:
        """Set the parameters that stage 2 begins with, from ordered Gaussians and their importance [N]."""

    def groups(self, config: Config, scene_scale: float) -> list[dict[str, Any]]:
        """Return parameter groups for Adam: name, params, lr at the start, decay (last lr / first lr).

        Optionally rows: which rows of the parameters, and factors on their lr at the start and at the end.
        """
        return []

    def rows(self, ratio: float, n: int) -> dict[str, list[tuple[int, int]]]:
        """Return the row ranges (start, stop) of each tensor that a cut at `ratio` of n Gaussians reads.

        A larger ratio reads the same ranges, perhaps longer, and perhaps others. By default all rows.
        """
        return {name: [(0, len(t) if t.dim() else 1)] for name, t in self.state_dict().items()}

    def stored(self) -> "Transform":
        """Return the transform in the precision of its file, so that what is measured is what is stored."""
        return self

    def regulariser(self) -> Tensor | float:
        """Return the loss on the transform's own parameters, added once per elastic render."""
        return 0.0
