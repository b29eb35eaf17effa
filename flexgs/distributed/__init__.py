"""Training one scene with several worker processes: their group, and the sums of their gradients."""

from flexgs.distributed.group import Group

__all__ = ["Group"]
