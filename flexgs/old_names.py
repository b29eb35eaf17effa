"""What settings were called before: old flags, config files and runs go on working.

A setting that gets another name is a line of SETTINGS; a value that gets another name is one of VALUES.
"""

from collections.abc import Sequence
from typing import Any

SETTINGS = {
    "base.share": "base.stage1_fraction",
    "base.grow_from": "base.refine_start",
    "base.grow_until": "base.refine_stop",
    "base.grow_every": "base.refine_every",
    "base.grow_gradient": "base.grow_grad2d",
    "base.split_scale": "base.grow_scale3d",
    "base.prune_opacity": "base.prune_opa",
    "base.prune_scale": "base.prune_scale3d",
    "rates.selector": "rates.gsnet",
    "rates": "lr",
}
"""The old path of a setting, or of a group of them, and the new one; applied from the first to the last."""
VALUES = {("--protocol", "field"): "standard"}


def setting(path: str) -> str:
    """The path of a setting today, such as "lr.means" for "rates.means"."""
    for old, new in SETTINGS.items():
        if path == old or path.startswith(f"{old}."):
            path = new + path.removeprefix(old)
    return path


def config(values: dict[str, Any]) -> dict[str, Any]:
    """A tree of settings, as JSON has it, under the names of today.

    An old name beside the new one stays, so that whoever checks the names refuses it.
    """
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for old, new in SETTINGS.items():
        *group, name = old.split(".")
        at: Any = tree if not group else tree.get(group[0])
        to = new.split(".")[-1]
        if isinstance(at, dict) and name in at and to not in at:
            at[to] = at.pop(name)
    return tree


def flags(args: Sequence[str]) -> list[str]:
    """The words of a command line under the names of today."""
    words: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        path = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and (today := setting(path)) != path:
            arg = f"--{today.replace('_', '-')}{equals}{value}"
        words.append(VALUES.get((words[-1] if words else "", arg), arg))
    return words
