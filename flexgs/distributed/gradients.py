"""The sum of a step's gradients over the workers, sent in full or in fewer bytes."""

import torch
from torch import Tensor

from flexgs.config import DistributedConfig
from flexgs.distributed.group import Group


def summed_gradients(named: dict[str, Tensor], group: Group, options: DistributedConfig) -> dict[str, Tensor]:
    """Sum each gradient over the workers; every worker gets the same bits.

    Args:
        named: this worker's gradients, by the name of the parameter; those of Gaussians, named splats.*,
            have a row per Gaussian.
        group: the workers, all of which call this.
        options: with rows = seen, the rows of Gaussians whose gradients are 0 on every worker are not sent;
            with sh_rest = bfloat16, the gradient of shN is rounded before and after the sum.

    Returns:
        The sums, by the same names, with the shapes and dtypes of the gradients.
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
            # A new tensor, since the worker's own gradient may hold -0.0 and replicas must be bit-equal.
            totals[name] = torch.zeros_like(named[name]).index_copy_(0, rows, total.to(named[name].dtype))
        elif total.dtype != named[name].dtype:
            totals[name] = total.to(named[name].dtype)
    return totals


def _seen(named: dict[str, Tensor], group: Group) -> Tensor | None:
    """Return the rows of the Gaussians with a gradient on any worker; None if no Gaussians are trained."""
    gradients = [g for name, g in named.items() if name.startswith("splats.")]
    if not gradients:
        return None
    seen = torch.stack([g.flatten(1).any(dim=1) if g.dim() > 1 else g.bool() for g in gradients
                        if g.numel()]).any(dim=0)
    return group.summed([seen.int()])[0].nonzero()[:, 0]


def totals(named: dict[str, Tensor]) -> dict[str, float]:
    """Return the sum of each tensor, which is not finite if any of its values is not.

    All sums are read from the GPU at once, since each reading makes the CPU wait for it.
    """
    return dict(zip(named, torch.stack([t.sum() for t in named.values()]).tolist(), strict=True))
