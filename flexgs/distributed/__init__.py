"""The workers that train one scene together."""

from flexgs.distributed.group import Group

__all__ = ["Group"]
