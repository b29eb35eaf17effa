"""Budgets such as "5%", "500k", "20MB", "quest", "16ms" or 0.05, and the number of Gaussians they allow."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from flexgs.config import check_ratio, count_at
from flexgs.errors import UserError
from flexgs.gaussians import Attributes
from flexgs.ply import is_wide, ply_bytes

if TYPE_CHECKING:
    from flexgs.model.elastic import Cuttable

G = TypeVar("G", bound=Attributes)
DEVICES = {"quest": 500_000, "visionpro": 750_000, "android": 1_000_000, "iphone": 1_500_000,
           "desktop": 2_500_000}
"""Most Gaussians that the web renderer Spark 2.2 draws on each kind of device, by its documentation."""

FRAME = (1280, 720)
"""Width and height in pixels of the frames that a time is for."""

_UNITS = {"": 1, "gaussian": 1, "gaussians": 1, "k": 1e3, "m": 1e6, "kb": 1e3, "mb": 1e6, "gb": 1e9, "ms": 1}


class Budget(NamedTuple):
    """A limit on a cut, as a number and its unit."""

    amount: float
    unit: Literal["ratio", "count", "bytes", "ms"]
    """ratio of the Gaussians, number of Gaussians, size of the file, milliseconds per frame."""


class Kept(NamedTuple):
    """What a budget keeps of a model."""

    gaussians: int
    """Number of Gaussians kept."""
    ratio: float
    """Ratio at which the transform is evaluated."""


def parse(budget: str | float) -> Budget:
    """Read a budget; UserError if it is none.

    A number up to 1 is a ratio, a whole number above 1 is that many Gaussians, and both may be text: "0.05",
    "1", "20000". Text may also be a percentage ("5%"), a number of Gaussians ("500k", "1.2M", "1 Gaussian"),
    a file size ("20MB"), a time per frame ("16ms"), or a name in DEVICES.
    """
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
    if not amount < 1e18:  # also infinity, and what an int64 has no room for
        raise UserError(f"budget {budget!r}: found more than any model has, expected something "
                        "like 5%, 500k or 20MB")
    if amount <= 0 or (unit in ("gaussian", "gaussians", "k", "m") and amount < 1):
        raise UserError(f"budget {budget!r}: not enough for one Gaussian")
    return Budget(amount, "ms" if unit == "ms" else "bytes" if unit.endswith("b") else "count")


def resolve(budget: str | float, n: int, sh_degree: int, wide: bool = False) -> Kept:
    """Work out how many of n Gaussians a budget keeps, at most n.

    Args:
        budget: see parse(); a size in bytes is that of a PLY file.
        n: number of Gaussians of the whole model.
        sh_degree: degree of the spherical harmonics, which the size of a PLY depends on.
        wide: whether the PLY holds positions in float64.

    Raises:
        UserError: the budget is a frame time, which has to be measured, or too small for one Gaussian.
    """
    amount, unit = parse(budget)
    if unit == "ratio":
        return Kept(count_at(amount, n), amount)
    if unit == "ms":
        raise UserError(f"budget {budget!r}: a frame time has to be measured, as model.cut() does")
    if unit == "bytes":
        header = ply_bytes(0, sh_degree, wide) + len(str(n)) - 1
        amount = (amount - header) // (ply_bytes(1, sh_degree, wide) - ply_bytes(0, sh_degree, wide))
    if amount < 1:
        raise UserError(f"budget {budget!r}: not enough for one Gaussian")
    count = min(n, int(amount))
    return Kept(count, count / n)


def cut_to(budget: str | float, model: "Cuttable", cut: Callable[[int, float], G]) -> G:
    """Call cut(number of Gaussians, ratio) as a budget asks of a model.

    Bytes are those of the PLY of the result; milliseconds are measured now, on this machine, in frames of
    FRAME pixels.
    """
    amount, unit = parse(budget)
    if unit == "ms":
        from flexgs.device import pick_device  # torch takes seconds to import
        from flexgs.model.frame_time import measure_frames

        budget = f"{measure_frames(model, FRAME, pick_device('auto')).most(amount)} Gaussians"
    made = cut(*resolve(budget, len(model), model.sh_degree))
    if unit == "bytes" and is_wide(made):
        made = cut(*resolve(budget, len(model), model.sh_degree, wide=True))
    return made


def largest(n: int, limit: float, cost: Callable[[int], float], slack: float = 0.01) -> int:
    """Find the most Gaussians whose measured cost stays within a limit; 0 if one already costs more.

    A few measurements suffice, since the cost rises with the number, and nearly in proportion.

    Args:
        n: the most Gaussians there are.
        limit: the highest cost allowed.
        cost: measures the cost of a number of Gaussians.
        slack: relative error allowed in the result.
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
