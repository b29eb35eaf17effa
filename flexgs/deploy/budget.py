"""Budgets in the units people have: "5%", "500k", "20MB", "quest", 0.05 -> a number of Gaussians."""

import re

from flexgs.config import count_at
from flexgs.deploy.export import ply_bytes
from flexgs.errors import UserError

DEVICES = {"quest": 500_000, "visionpro": 750_000, "android": 1_000_000, "iphone": 1_500_000, "desktop": 2_500_000}
"""Gaussians that the web renderer Spark draws at most on each kind of device (its documented defaults, version 2.2)."""

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "kb": 1e3, "mb": 1e6, "gb": 1e9}


def resolve(budget: str | float, n: int, sh_degree: int) -> int:
    """Number of Gaussians out of n that a budget allows.

    A float is a ratio in (0, 1]; a string is a percentage ("5%"), a number of Gaussians ("500k", "1.2M", "20000"),
    the size of a PLY file ("20MB"), a ratio with a decimal point ("0.05"), or a name in DEVICES. More than n is n.
    """
    if not isinstance(budget, str):
        return count_at(budget, n)
    if (device := budget.strip().lower()) in DEVICES:
        return min(n, DEVICES[device])
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%|[a-z]*)", budget.strip().lower())
    if not match or (match[2] != "%" and match[2] not in _UNITS):
        raise UserError(f"budget {budget!r}: expected something like 5%, 0.05, 500k or 20MB, or a device: {', '.join(DEVICES)}")
    value, unit = float(match[1]), match[2]
    if unit == "%":
        return count_at(value / 100, n)
    if not unit and "." in match[1]:
        return count_at(value, n)
    amount = value * _UNITS[unit]
    if unit.endswith("b"):
        header = ply_bytes(0, sh_degree) + len(str(n)) - 1
        amount = (amount - header) // (ply_bytes(1, sh_degree) - ply_bytes(0, sh_degree))
    if amount < 1:
        raise UserError(f"budget {budget!r}: not enough for one Gaussian")
    return min(n, int(amount))
