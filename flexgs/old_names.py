"""Former names of settings, so that old flags, config files and runs go on working.

When a setting is renamed, add a line to SETTINGS; when a value is, add one to VALUES.
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
"""The old path of a setting, or of a group of settings, -> the new one; applied from first to last."""
VALUES = {("--protocol", "field"): "standard"}


def setting(path: str) -> str:
    """Return the current path of a setting: "lr.means" for "rates.means"."""
    for old, new in SETTINGS.items():
        if path == old or path.startswith(f"{old}."):
            path = new + path.removeprefix(old)
    return path


def config(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the settings in a tree from a config file to their current names.

    Where old and new name both occur, the old one is left in place, so that the check of names refuses it.
    """
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for old, new in SETTINGS.items():
        *group, name = old.split(".")
        at: Any = tree if not group else tree.get(group[0])
        to = new.split(".")[-1]
        if isinstance(at, dict) and name in at and to not in at:
            at[to] = at.pop(name)
    if tree.get("batch", 1) is None:  # once: a view for each worker
        del tree["batch"]
    if isinstance(order := tree.get("order"), dict):
        order.pop("head", None)  # once: the part of a tree's order that was drawn, which stage 2 began with
    return tree


def flags(args: Sequence[str]) -> list[str]:
    """Rename the settings in the words of a command line to their current names."""
    words: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        path = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and (today := setting(path)) != path:
            arg = f"--{today.replace('_', '-')}{equals}{value}"
        if (name, value) in VALUES:
            arg = f"{name}={VALUES[name, value]}"
        words.append(VALUES.get((words[-1] if words else "", arg), arg))
    return words
