"""The order of the Gaussians: cuts are prefixes of one permutation, so they are nested and repeatable.

Training asks an Order for the Gaussians that stage 2 begins with, for those of each elastic render, and at
the end for the final permutation. ORDERS lists the built-in ones; docs/extending.md shows how to write one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexgs.config import Config, count_at
from flexgs.errors import UserError
from flexgs.extensions import named
from flexgs.model.gsnet import GsNet
from flexgs.model.merge_tree import MergeTree
from flexgs.model.push import alive_at, push
from flexgs.model.selection import Selection
from flexgs.seeds import generator
from flexgs.splats import Splats


class Order(nn.Module):
    """By descending importance when stage 2 begins, fixed from then on; the base class of all orders.

    State between steps has to be parameters and buffers, which checkpoints hold under their names.
    """

    fixed = True
    """Whether training keeps the first Gaussians at every ratio, so that a transform may store rows."""
    refresh_every: int | None = None
    """Views between two calls of refresh() in stage 2; None: only one call, when stage 2 begins."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def begin(self, splats: Splats, scores: Tensor) -> tuple[Tensor, Splats] | None:
        """Return what stage 2 begins with, of N Gaussians and their importance [N].

        Returns:
            The rows [M] that stage 2 keeps, in order, and the M Gaussians that take their places; None: all
            Gaussians, as they are.
        """
        rows = self.permutation(splats, scores)[:count_at(self.config.order.keep, len(splats))]
        return rows, splats[rows]

    def permutation(self, splats: Splats, scores: Tensor) -> Tensor:
        """Return the permutation [N] of N Gaussians of importance [N], those that stay longest first."""
        return sampled_order(scores, 0.0, self.config.seed)

    def build(self, splats: Splats, unit: float = 1.0) -> None:
        """Make parameters and buffers for these Gaussians; unit is a length in world units."""

    def refresh(self, scores: Tensor) -> None:
        """Take in the current importance [N] of the Gaussians."""

    def select(self, splats: Splats, ratio: float, progress: float, draw: tuple[int, int]) -> Selection:
        """Select the Gaussians of one elastic render.

        Args:
            splats: all Gaussians.
            ratio: fraction of them to keep.
            progress: how far stage 2 is, 0 to 1.
            draw: index of the training view and of the render within it, the key of random numbers (see
                flexgs/seeds.py).
        """
        return Selection(slice(0, count_at(ratio, len(splats))))

    def survivors(self, splats: Splats, start: float, end: float) -> Tensor | None:
        """Return the rows [M] that stay after a step of stage 2 from progress start to end; None: all."""
        return None

    def final(self, splats: Splats, scores: Callable[[], Tensor]) -> Tensor | None:
        """Return the permutation [N] of the trained model; None: it is in order already.

        scores() computes the current importance [N].
        """
        if self.config.ratios.renders or self.config.transform.kind != "none":
            return None
        return self.permutation(splats, scores())  # no cut was trained in the order that stage 2 began with

    def groups(self, config: Config) -> list[dict[str, Any]]:
        """Return the parameter groups for Adam; see Transform.groups."""
        return []

    def figures(self, progress: float) -> dict[str, float]:
        """Return numbers to log with the losses; progress says how far stage 2 is, 0 to 1."""
        return {}


class Sampled(Order):
    """By weighted sampling without replacement, with the importance as weight."""

    def permutation(self, splats: Splats, scores: Tensor) -> Tensor:
        """Draw the permutation [N], seeded, with noise scaled by order.temperature."""
        return sampled_order(scores, self.config.order.temperature, self.config.seed)


class Tree(Order):
    """By the merge tree, weighted by importance: its merges in reverse, where the heavier one stays."""

    def begin(self, splats: Splats, scores: Tensor) -> tuple[Tensor, Splats] | None:
        """Merge the Gaussians to as many as stage 2 keeps."""
        tree = MergeTree(splats, True, scores.cpu().numpy())
        count = count_at(self.config.order.keep, len(splats))
        merged, kept = tree.cut(count), torch.as_tensor(tree.kept(count), device=scores.device)
        rows = self.permutation(merged, scores[kept])
        return kept[rows], merged[rows]

    def permutation(self, splats: Splats, scores: Tensor) -> Tensor:
        """Return the merges in reverse."""
        return torch.as_tensor(MergeTree(splats, True, scores.cpu().numpy()).order(), device=scores.device)


class Gns(Order):
    """Natural selection of the whole down to order.keep; see push.py."""

    first: Tensor
    """[] number of Gaussians that the selection began with."""

    def begin(self, splats: Splats, scores: Tensor) -> tuple[Tensor, Splats] | None:
        """Keep all Gaussians: the selection takes its time."""
        return None

    def build(self, splats: Splats, unit: float = 1.0) -> None:
        """Note the number of Gaussians."""
        self.register_buffer("first", torch.tensor(len(splats)))

    @torch.no_grad()
    def survivors(self, splats: Splats, start: float, end: float) -> Tensor | None:
        """Push all opacity logits down at the end of a round, and return the rows that are alive then."""
        first = int(self.first)
        alive = alive_at(first, count_at(self.config.order.keep, first), end / self.config.order.push)
        if alive >= len(splats):
            return None
        fall, order = push(splats.opacities, alive)
        splats.opacities.sub_(fall)
        return order[:alive]


class Opacity(Order):
    """By descending opacity, sorted anew at every step."""

    fixed = False

    def select(self, splats: Splats, ratio: float, progress: float, draw: tuple[int, int]) -> Selection:
        """Select the floor(ratio N) most opaque Gaussians."""
        count = count_at(ratio, len(splats))
        return Selection(torch.topk(splats.opacities.detach(), count, sorted=False).indices)

    def final(self, splats: Splats, scores: Callable[[], Tensor]) -> Tensor | None:
        """Sort by descending opacity."""
        return splats.opacities.argsort(descending=True, stable=True)


class Learned(Order):
    """By descending margin of GsNet, which learns from global importance and the image losses."""

    fixed = False
    gsnet: GsNet
    rank: Tensor
    """[N] place of each Gaussian by global importance, 0 the most important; it teaches GsNet."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.refresh_every = config.gsnet.refresh

    def begin(self, splats: Splats, scores: Tensor) -> tuple[Tensor, Splats] | None:
        """Keep all Gaussians as they are: the order is known at the end only."""
        return None

    def build(self, splats: Splats, unit: float = 1.0) -> None:
        """Make GsNet and the ranks."""
        self.gsnet = GsNet(self.config.gsnet, splats, unit)
        self.register_buffer("rank", torch.zeros(len(splats), dtype=torch.int64))

    def refresh(self, scores: Tensor) -> None:
        """Rank the Gaussians by their current importance [N]."""
        order = torch.argsort(scores, descending=True, stable=True)
        places = torch.arange(len(order), device=order.device)
        self.rank = torch.empty_like(order).index_copy_(0, order, places)

    def select(self, splats: Splats, ratio: float, progress: float, draw: tuple[int, int]) -> Selection:
        """Select by GsNet, with Gumbel noise keyed by the seed and the draw."""
        random = generator(self.config.seed, "gumbel", *draw, device=splats.means.device)
        return self.gsnet.select(splats, ratio, self.rank, progress, random)

    def final(self, splats: Splats, scores: Callable[[], Tensor]) -> Tensor | None:
        """Sort by descending margin."""
        return self.gsnet.order(splats, self.rank, self.config.seed)

    def groups(self, config: Config) -> list[dict[str, Any]]:
        """Return the parameter groups of GsNet."""
        return self.gsnet.groups(config)

    def figures(self, progress: float) -> dict[str, float]:
        """Return the temperature of the Gumbel-softmax."""
        return {"gsnet_temperature": self.gsnet.temperature(progress)}


ORDERS: Mapping[str, type[Order]] = {"sampled": Sampled, "importance": Order, "tree": Tree,
                                     "opacity": Opacity, "gsnet": Learned, "gns": Gns}


def make_order(config: Config) -> Order:
    """Make the order that config.order.kind names.

    Raises:
        UserError: there is no such order, or it conflicts with the transform or with order.keep.
    """
    order = named("--order.kind", config.order.kind, ORDERS, Order)(config)
    if not order.fixed and config.transform.kind == "deltas":
        raise UserError("--transform.kind deltas: needs a fixed order, found --order.kind "
                        f"{config.order.kind}; expected field or none")
    if not order.fixed and config.order.keep < 1:
        raise UserError(f"--order.keep: found {config.order.keep} with --order.kind {config.order.kind}, "
                        "whose order is known at the end only; "
                        "expected --order.kind importance, sampled or tree")
    return order


def sampled_order(score: Tensor, temperature: float, seed: int) -> Tensor:
    """Sort by log score plus Gumbel noise: weighted sampling without replacement.

    See Efraimidis and Spirakis 2006. Gaussians with score 0, which no view sees, come last.

    Args:
        score: [N] float64, at least 0, the weight of each Gaussian.
        temperature: scale of the noise; 0 sorts by descending score.
        seed: seed of the noise.
    """
    logs = score.double().clamp(min=1e-300).log()
    uniform = torch.rand(len(score), generator=generator(seed, "order"), dtype=torch.float64).to(score.device)
    noise = -(-uniform.clamp(1e-300).log()).clamp(1e-300).log()
    return torch.argsort(logs + temperature * noise, descending=True, stable=True)
