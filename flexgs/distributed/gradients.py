"""The gradients of a step, added up over the workers, whole or in fewer bytes."""

import torch
from torch import Tensor

from flexgs.config import DistributedConfig
from flexgs.distributed.group import Group


def summed_gradients(named: dict[str, Tensor], group: Group, options: DistributedConfig) -> dict[str, Tensor]:
    """Each gradient summed over the workers, by the name of its parameter.

    rows = seen: where all of a Gaussian's gradients are 0 on every worker, so are the sums, and its row stays
    at home. sh_rest = bfloat16: the gradient of shN is rounded before and after the sum, alike on all
    workers.
    """
    if group.world == 1:
        return named
    rows = _seen(named, group) if options.rows == "seen" else None
    sent = {}
    for name, whole in named.items():
        part = whole[rows] if rows is not None and name.startswith("splats.") else whole
        sent[name] = part.bfloat16() if options.sh_rest == "bfloat16" and name == "splats.shN" else part
    totals = dict(zip(sent, group.summed(list(sent.values())), strict=True))
    for name, total in totals.items():
        if rows is not None and name.startswith("splats."):
            # Not into the worker's own gradient: its zeros may be negative, and replicas are compared bit for
            # bit.
            totals[name] = torch.zeros_like(named[name]).index_copy_(0, rows, total.to(named[name].dtype))
        elif total.dtype != named[name].dtype:
            totals[name] = total.to(named[name].dtype)
    return totals


def _seen(named: dict[str, Tensor], group: Group) -> Tensor | None:
    """The rows of the Gaussians that have a gradient on any worker; None if the Gaussians are not trained."""
    gradients = [g for name, g in named.items() if name.startswith("splats.")]
    if not gradients:
        return None
    seen = torch.stack([g.flatten(1).any(dim=1) if g.dim() > 1 else g.bool() for g in gradients
                        if g.numel()]).any(dim=0)
    return group.summed([seen.int()])[0].nonzero()[:, 0]


def totals(named: dict[str, Tensor]) -> dict[str, float]:
    """The sum of each tensor; not finite if any of its values is not. Read at once, since a GPU waits at each
    reading."""
    return dict(zip(named, torch.stack([t.sum() for t in named.values()]).tolist(), strict=True))
