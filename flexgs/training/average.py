"""The mean of the parameters over the end of the training, which is a better model than the last ones."""

from collections.abc import Iterable

import torch
from torch import Tensor

EVERY = 5
"""Views between two values that the mean counts."""


class Average:
    """The running mean of named parameters, in the style of Polyak and Juditsky (1992)."""

    def __init__(self) -> None:
        self._count = 0
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Count the current values."""
        self._count += 1
        for name, p in parameters:
            if self._count == 1:
                self._means[name] = p.detach().clone()
            else:
                self._means[name].lerp_(p, 1 / self._count)

    @torch.no_grad()
    def apply(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Set the parameters to their means, and start anew; without any values, leave them."""
        if self._count:
            for name, p in parameters:
                p.copy_(self._means[name])
        self._count, self._means = 0, {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name: the means, and how many values they count."""
        return {**self._means, "count": torch.tensor(float(self._count))} if self._count else {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what tensors() returned."""
        means = dict(tensors)
        self._count = int(means.pop("count", 0))
        self._means = means
