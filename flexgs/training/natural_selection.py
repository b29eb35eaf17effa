"""Natural selection of the Gaussians of small cuts, on a copy that is trained beside the whole model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexgs.config import LearningRatesConfig
from flexgs.distributed import Shard
from flexgs.model.push import push
from flexgs.splats import Splats
from flexgs.training.densify import replace_rows
from flexgs.training.optim import Optimizer, splat_groups

RATE = 3.0
"""Factor on the learning rates of the Gaussians that are selected from."""


PLACES = "selected_places"
"""Name in a checkpoint of NaturalSelection.places; those of its Gaussians begin with "selection."."""


class NaturalSelection:
    """A copy of the first Gaussians of an elastic model, of which fewer and fewer stay while it is trained.

    It begins with a cut. At the number of Gaussians of a smaller cut it is a start of that cut, which has
    learned to do without the others. Harmonics above degree 0 are not trained: all cuts share them.
    """

    def __init__(self, splats: Splats, places: Tensor, shard: Shard):
        """Begin with this worker's Gaussians; see `places` and `shard` for the others."""
        self.splats = splats.clone().requires_grad_()
        self.splats.shN.requires_grad_(False)
        self.places = places
        """[k] the places in the model's order of the Gaussians that were alive at the last knot: those that
        still are, and then the others, the last one to die first."""
        self.shard = shard
        """How those that are alive are divided among the workers."""

    def groups(self, rates: LearningRatesConfig, scene_scale: float, unit: float) -> list[dict[str, Any]]:
        """Return the parameter groups for Adam, named selection.means and so on; see splat_groups()."""
        return [{**g, "name": g["name"].replace("splats", "selection"), "lr": RATE * g["lr"]}
                for g in splat_groups(self.splats, rates, scene_scale, unit=unit)]

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the state by name."""
        return {**{f"selection.{name}": t for name, t in self.splats.items()}, PLACES: self.places}

    @torch.no_grad()
    def thin(self, alive: int, optimizer: Optimizer) -> None:
        """Push all opacities down until at most `alive` Gaussians are left."""
        before = self.shard.n
        if alive >= before:
            return
        fall, order = push(self.shard.whole(self.splats.opacities.detach()), alive)
        self.splats.opacities.sub_(fall)
        self.places = torch.cat([self.places[:before][order], self.places[before:]])
        self._keep(order[:alive], optimizer)

    def renumber(self, order: Tensor, optimizer: Optimizer) -> Tensor:
        """Put those that are alive in an order, and take their places for the first ones of the model.

        Args:
            order: [alive] their rows on all workers together.
            optimizer: the one that trains them.

        Returns:
            [k] the place that each of the first k Gaussians of the model had before.
        """
        before = torch.cat([self.places[:len(order)][order], self.places[len(order):]])
        self.places = torch.arange(len(order), device=order.device)
        self._keep(order, optimizer)
        return before

    def _keep(self, rows: Tensor, optimizer: Optimizer) -> None:
        mine, move = self.shard.sorter(rows)
        self.splats = replace_rows(self.splats, optimizer, mine, self.splats.detach()[:0], move, "selection")
