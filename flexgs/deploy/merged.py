"""A file of Gaussians as a model that is cut by merging; torch is imported when it is rendered."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.gaussians import Attributes, Gaussians
from flexgs.model.budget import cut_to

if TYPE_CHECKING:  # torch takes seconds to import, numba half a second
    from flexgs.camera import Camera
    from flexgs.model.elastic import Cuttable
    from flexgs.model.merge_tree import MergeTree
    from flexgs.splats import Splats

SEARCHED = 20_000
"""Gaussians that viewpoints are searched with."""


@dataclass(eq=False)
class MergedModel:
    """A model that is not elastic: its Gaussians are merged to a cut (model/merge_tree.py)."""

    gaussians: Gaussians
    config: Config
    cameras: Sequence["Camera"] = ()
    source: Path = Path("the model")
    """The file, for messages."""

    @cached_property
    def _tree(self) -> "MergeTree[Gaussians]":
        from flexgs.model.merge_tree import MergeTree

        return MergeTree(self.gaussians)

    @cached_property
    def splats(self) -> "Splats":
        """The Gaussians as tensors."""
        from flexgs.splats import Splats

        return Splats.of(self.gaussians)

    @cached_property
    def viewpoints(self) -> Sequence["Camera"]:
        """The cameras, or else some that are searched for, at the size that shows the model's detail."""
        from flexgs.model.viewpoints import at_detail, viewpoints

        try:
            return at_detail(self.splats,
                             self.cameras or viewpoints(self.splats.like(self._tree.cut(SEARCHED))))
        except UserError as e:
            raise UserError(f"{self.source}: {e}") from None

    @property
    def sh_degree(self) -> int:
        """The degree of the spherical harmonics, 0 to 3."""
        return self.gaussians.sh_degree

    def __len__(self) -> int:
        """The number of Gaussians of the whole."""
        return len(self.gaussians)

    def merged(self, budget: str | float) -> Gaussians:
        """Return exactly as many Gaussians as a budget says (see ElasticModel.cut); cuts are not nested."""
        return cut_to(budget, self, lambda kept, ratio: self._tree.cut(kept))

    def cut(self, budget: str | float) -> "Splats":
        """Return the Gaussians of merged() as tensors."""
        return self.splats.like(self.merged(budget))


def cut_of(model: "Cuttable", budget: str | float) -> Attributes:
    """Return a cut to be written to a file: of merged Gaussians as arrays, which need no torch."""
    return model.merged(budget) if isinstance(model, MergedModel) else model.cut(budget)
