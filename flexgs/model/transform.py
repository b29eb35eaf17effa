"""The transform: what changes in the Gaussians that stay at ratio e. Nothing changes at e = 1."""

from typing import Any

from torch import Tensor, nn

from flexgs.config import Config
from flexgs.splats import Splats


class Transform(nn.Module):
    """No change at all; the base of the others.

    Changes of positions and sizes are counted in `unit`, a length in world units (see unit_of in camera.py):
    parameters and their rates are then of one size in every scene, and float16 holds them. It is stored
    beside the tensors.

    A subclass changes the first floor(e N) Gaussians in forward() and lists its parameters for the optimizer
    in groups().
    """

    def __init__(self, unit: float = 1.0):
        super().__init__()
        self.unit = unit

    @classmethod
    def make(cls, config: Config, splats: Splats, points: Tensor | None, unit: float) -> "Transform":
        """One for these Gaussians [N], that changes nothing yet; points [M, 3] are those of the capture while
        it is trained."""
        return cls(unit)

    def forward(self, kept: Splats, ratio: float, index: Tensor | None = None) -> Splats:
        """The kept Gaussians at this ratio, changed; index gives their places in the order (None: the first
        ones)."""
        return kept

    def start(self, splats: Splats, score: Tensor) -> None:
        """Take the values to begin stage 2 with, given the ordered Gaussians and their importance [N]."""

    def groups(self, config: Config, scene_scale: float) -> list[dict[str, Any]]:
        """Parameter groups for Adam: name, params, lr at the start and decay (lr at the end / at the
        start)."""
        return []

    def rows(self, ratio: float, n: int) -> dict[str, list[tuple[int, int]]]:
        """Of each tensor of its state, the rows (first, last) that cuts of n Gaussians up to this ratio read.

        A larger ratio reads the same ranges, longer, and perhaps others. Here: all of every tensor.
        """
        return {name: [(0, len(t) if t.dim() else 1)] for name, t in self.state_dict().items()}

    def stored(self) -> "Transform":
        """The transform in the precision in which it is saved and makes cuts, so that what is measured is
        what is stored."""
        return self

    def regulariser(self) -> Tensor | float:
        """Loss on the transform's own parameters, added once per elastic render."""
        return 0.0
