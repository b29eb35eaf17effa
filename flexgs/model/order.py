"""The order: which Gaussians stay. Cuts at all ratios are prefixes of one permutation, so they are nested and
repeatable.

An order is an object beside the transform. Training asks it for the rows that stage 2 begins with, for the
Gaussians of each elastic render, and at the end for the final permutation. ORDERS has those that are built
in; docs/extending.md writes one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexgs.config import Config, count_at
from flexgs.errors import UserError
from flexgs.extensions import named
from flexgs.model.gsnet import GsNet
from flexgs.model.selection import Selection
from flexgs.seeds import generator
from flexgs.splats import Splats


class Order(nn.Module):
    """By descending importance as of the beginning of stage 2, and fixed from then on; the base of the
    others.

    What it keeps between steps are its parameters and buffers, which checkpoints hold under their own names.
    """

    fixed = True
    """Whether the Gaussians that stay are always the first ones, so that a transform may store rows for
    them."""
    refresh_every: int | None = None
    """Views between two calls of refresh() during stage 2; None: it is called when stage 2 begins only."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def begin(self, scores: Tensor) -> Tensor | None:
        """Rows [M] of the Gaussians, in the order that stage 2 trains them in, by importance [N]; None: all,
        as they are."""
        return self.permutation(scores)[:count_at(self.config.order.keep, len(scores))]

    def permutation(self, scores: Tensor) -> Tensor:
        """[N] permutation, the first to stay first, by importance [N]."""
        return sampled_order(scores, 0.0, self.config.seed)

    def build(self, splats: Splats, unit: float = 1.0) -> None:
        """Make parameters and buffers for these Gaussians, in stage 2 or from a checkpoint; unit is a length
        in world units."""

    def refresh(self, scores: Tensor) -> None:
        """Take the importance [N] of the Gaussians as they are now."""

    def select(self, splats: Splats, ratio: float, progress: float, draw: tuple[int, int]) -> Selection:
        """The Gaussians of one elastic render at ratio.

        Args:
            progress: how far stage 2 is, 0 to 1.
            draw: number of the training view and of the render within it, to key random numbers with (see
            flexgs/seeds.py).
        """
        return Selection(slice(0, count_at(ratio, len(splats))))

    def final(self, splats: Splats, scores: Callable[[], Tensor]) -> Tensor | None:
        """[N] permutation for the trained model; None: it is in its order already. scores() is the importance
        as it is now."""
        if self.config.ratios.renders or self.config.transform.kind != "none":
            return None
        return self.permutation(scores())  # nothing was trained for the order of the beginning

    def groups(self, config: Config) -> list[dict[str, Any]]:
        """Parameter groups for Adam, as those of a transform."""
        return []


class Sampled(Order):
    """Weighted sampling without replacement, the importance as weight."""

    def permutation(self, scores: Tensor) -> Tensor:
        return sampled_order(scores, self.config.order.temperature, self.config.seed)


class Opacity(Order):
    """By descending opacity, as training changes it."""

    fixed = False

    def select(self, splats: Splats, ratio: float, progress: float, draw: tuple[int, int]) -> Selection:
        return Selection(torch.topk(splats.opacities.detach(), count_at(ratio, len(splats)),
                                    sorted=False).indices)

    def final(self, splats: Splats, scores: Callable[[], Tensor]) -> Tensor | None:
        return splats.opacities.argsort(descending=True, stable=True)


class Learned(Order):
    """By the margins of GsNet, which global importance teaches."""

    fixed = False
    gsnet: GsNet
    rank: Tensor
    """[N] place of each Gaussian by global importance, 0 the most important: the teacher of GsNet."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.refresh_every = config.gsnet.refresh

    def begin(self, scores: Tensor) -> Tensor | None:
        return None

    def build(self, splats: Splats, unit: float = 1.0) -> None:
        self.gsnet = GsNet(self.config.gsnet, splats, unit)
        self.register_buffer("rank", torch.zeros(len(splats), dtype=torch.int64))

    def refresh(self, scores: Tensor) -> None:
        order = torch.argsort(scores, descending=True, stable=True)
        self.rank = torch.empty_like(order).index_copy_(0, order,
                                                        torch.arange(len(order), device=order.device))

    def select(self, splats: Splats, ratio: float, progress: float, draw: tuple[int, int]) -> Selection:
        random = generator(self.config.seed, "gumbel", *draw, device=splats.means.device)
        return self.gsnet.select(splats, ratio, self.rank, progress, random)

    def final(self, splats: Splats, scores: Callable[[], Tensor]) -> Tensor | None:
        return self.gsnet.order(splats, self.rank, self.config.seed)

    def groups(self, config: Config) -> list[dict[str, Any]]:
        return self.gsnet.groups(config)


ORDERS: Mapping[str, type[Order]] = {"sampled": Sampled, "importance": Order, "opacity": Opacity,
                                     "gsnet": Learned}


def make_order(config: Config) -> Order:
    """The order that config.order.kind names. UserError if it is unknown, or at odds with the transform or
    with order.keep."""
    order = named("--order.kind", config.order.kind, ORDERS, Order)(config)
    if not order.fixed and config.transform.kind == "deltas":
        raise UserError("--transform.kind deltas: needs a fixed order, found --order.kind "
                        f"{config.order.kind}; expected field or none")
    if not order.fixed and config.order.keep < 1:
        raise UserError(f"--order.keep: found {config.order.keep} with --order.kind {config.order.kind}, "
                        "whose order is known at the end only; expected --order.kind importance or sampled")
    return order


def sampled_order(score: Tensor, temperature: float, seed: int) -> Tensor:
    """[N] permutation by log score plus Gumbel noise: weighted sampling without replacement (Efraimidis and
    Spirakis 2006).

    score [N] >= 0, float64. Temperature 0 sorts by score; Gaussians that no view sees come last either way.
    """
    logs = score.double().clamp(min=1e-300).log()
    uniform = torch.rand(len(score), generator=generator(seed, "order"), dtype=torch.float64).to(score.device)
    noise = -(-uniform.clamp(1e-300).log()).clamp(1e-300).log()
    return torch.argsort(logs + temperature * noise, descending=True, stable=True)
