"""The push of natural selection (GNS, Deng et al. 2025, arXiv 2511.16980): which Gaussians die, and when.

A uniform push lowers all opacity logits while the images pull at them; those that give way die. The paper
adapts the push so that the number wanted is left; here it is, in each of ROUNDS rounds, what the next ones to
die lack to DEATH, so that the number falls exponentially.
"""

import math

import torch
from torch import Tensor

DEATH = math.log(0.005 / 0.995)
"""Logit of the opacity at which a Gaussian dies: that at which 3DGS removes it."""
ROUNDS = 100
"""Rounds of a selection."""


def alive_at(first: int, last: int, progress: float) -> int:
    """Return how many of `first` Gaussians are alive at progress, where `last` are from 1 on."""
    done = min(ROUNDS, int(ROUNDS * progress))
    return last if done == ROUNDS else round(first * (last / first) ** (done / ROUNDS))


def push(logits: Tensor, alive: int) -> tuple[Tensor, Tensor]:
    """Return how far logits [n] of opacities fall [] for `alive` < n to be left, and who dies when.

    The order [n] has the rows of those that stay, rising, and then the others, the last one to die first.
    """
    ascending = logits.argsort(stable=True)
    dying = len(logits) - alive
    fall = (logits[ascending[dying - 1]] - DEATH).clamp(min=0)
    return fall, torch.cat([ascending[dying:].sort().values, ascending[:dying].flip(0)])
