"""Budgets in the units people have: "5%", "500k", "20MB", "quest", "16ms", 0.05 -> a number of Gaussians."""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from flexgs.config import check_ratio, count_at
from flexgs.errors import UserError
from flexgs.ply import is_wide, ply_bytes
from flexgs.splats import Splats

DEVICES = {"quest": 500_000, "visionpro": 750_000, "android": 1_000_000, "iphone": 1_500_000,
           "desktop": 2_500_000}
"""Gaussians that the web renderer Spark draws at most on each kind of device (its documented defaults,
version 2.2)."""

_UNITS = {"": 1, "gaussian": 1, "gaussians": 1, "k": 1e3, "m": 1e6, "kb": 1e3, "mb": 1e6, "gb": 1e9, "ms": 1}


class Budget(NamedTuple):
    amount: float
    unit: Literal["ratio", "count", "bytes", "ms"]
    """ms is per frame."""


class Kept(NamedTuple):
    gaussians: int
    """Of Gaussians that stay."""
    ratio: float
    """At which the transform is taken."""


def parse(budget: str | float) -> Budget:
    """A number up to 1 is a ratio, a whole number above 1 is that many Gaussians, and both may be text:
    "0.05", "1", "20000". Text may also be a percentage ("5%"), Gaussians in words ("500k", "1.2M", "1
    Gaussian"), a file size ("20MB"), a frame time ("16ms"), or a name in DEVICES."""
    if not isinstance(budget, str):
        budget = repr(float(budget)) if isinstance(budget, float) else str(budget)
    text = budget.strip().lower()
    if text in DEVICES:
        return Budget(DEVICES[text], "count")
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%|[a-z]*)", text)
    if not match or (match[2] != "%" and match[2] not in _UNITS):
        raise UserError(f"budget {budget!r}: expected something like 5%, 0.05, 500k, 20MB "
                        f"or 16ms, or a device: {', '.join(DEVICES)}")
    value, unit = float(match[1]), match[2]
    if unit == "%":
        return Budget(check_ratio(value / 100), "ratio")
    if not unit and (value <= 1 or value % 1):
        return Budget(check_ratio(value, f"budget {budget}"), "ratio")
    amount = value * _UNITS[unit]
    if not amount < 1e18:  # more digits than the number of Gaussians has room for, or infinite
        raise UserError(f"budget {budget!r}: found more than any model has, expected something "
                        "like 5%, 500k or 20MB")
    if amount <= 0 or (unit in ("gaussian", "gaussians", "k", "m") and amount < 1):
        raise UserError(f"budget {budget!r}: not enough for one Gaussian")
    return Budget(amount, "ms" if unit == "ms" else "bytes" if unit.endswith("b") else "count")


def resolve(budget: str | float, n: int, sh_degree: int, wide: bool = False) -> Kept:
    """What a budget leaves of n Gaussians, where no measurement is needed; bytes are those of a PLY, of one
    with positions in float64 where wide. More than n is n."""
    amount, unit = parse(budget)
    if unit == "ratio":
        return Kept(count_at(amount, n), amount)
    if unit == "ms":
        raise UserError(f"budget {budget!r}: a frame time has to be measured; `flexgs cut` does it")
    if unit == "bytes":
        header = ply_bytes(0, sh_degree, wide) + len(str(n)) - 1
        amount = (amount - header) // (ply_bytes(1, sh_degree, wide) - ply_bytes(0, sh_degree, wide))
    if amount < 1:
        raise UserError(f"budget {budget!r}: not enough for one Gaussian")
    count = min(n, int(amount))
    return Kept(count, count / n)


def fitting(budget: str | float, n: int, sh_degree: int, cut: Callable[[int, float], Splats]) -> Splats:
    """The cut(Gaussians, ratio) that a budget asks for; one in bytes holds for the PLY that write_ply makes
    of it."""
    made = cut(*resolve(budget, n, sh_degree))
    if parse(budget).unit == "bytes" and is_wide(made):
        made = cut(*resolve(budget, n, sh_degree, wide=True))
    return made


def largest(n: int, limit: float, cost: Callable[[int], float], slack: float = 0.01) -> int:
    """The most Gaussians, of n, whose measured cost stays within limit, to a share of slack; 0 if not even
    one does.

    A few measurements do: cost rises with the number, and nearly in proportion to it.
    """
    fits, beyond, count = 0, n + 1, min(n, 4096)
    while beyond - fits > max(1, slack * fits):
        measured = cost(count)
        if measured <= limit:
            fits = count
            if measured >= (1 - slack) * limit:
                break
        else:
            beyond = count
        aim = min(n, round(count * (1 - slack / 2) * limit / measured))
        count = aim if fits < aim < beyond else (fits + beyond) // 2
    return fits
