"""Training one scene with several worker processes: their group, its sums, and who holds what."""

from flexgs.distributed.group import Group
from flexgs.distributed.shards import Shard

__all__ = ["Group", "Shard"]
