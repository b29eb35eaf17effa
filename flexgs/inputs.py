"""Checked reading of everything from outside: files, JSON and tensors.

Whatever is wrong with them is a UserError of one line that names the file, what was found and what was
expected.
"""

import json
import re
import stat
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexgs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor  # takes a second to import, which readers of JSON alone do not need

MOST_JSON = 256 << 20
"""The most bytes of a JSON file; the cameras of 100,000 photographs take a fifth of that."""
MOST_DEPTH = 32
"""The most lists and objects nested in each other."""
MOST_DIGITS = 18
"""The most digits of an integer; all such integers fit into 64 bits."""

Layout = Mapping[str, tuple[str, tuple[str | int, ...]]]
"""Name of a tensor -> dtype and shape. A dimension is a number, or a name that stands for the same number
wherever it occurs."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, or of the number of entries: Annotated[int, Range(1, 10**9)]. NaN is outside."""

    low: float
    high: float
    ends: str = "[]"
    """Square brackets include an end, round ones, as in "(]", exclude it."""

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.ends[0] == "(" else self.low <= value) and (
            value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        least, most = ("above" if self.ends[0] == "(" else "at least",
                       "below" if self.ends[1] == ")" else "at most")
        return f"{low} to {high}" if self.ends == "[]" else f"{least} {low} and {most} {high}"


class Name:
    """The words that a field accepts: the built-in ones, or module:name of an extension (extensions.py)."""

    def __init__(self, *built_in: str):
        self.built_in = built_in

    def __contains__(self, value: str) -> bool:
        return value in self.built_in or re.fullmatch(r"[\w.]+:\w+", value) is not None

    def __str__(self) -> str:
        return f"one of {', '.join(self.built_in)}, or module:name"


def limits(kind: Any) -> str:
    """Describe the Ranges and Names of an annotated type in words; empty if it has none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is not Annotated:
        return next(filter(None, map(limits, args)), "")
    entries = " entries" if typing.get_origin(args[0]) is tuple else ""
    own = [f"{bounds}{entries}" for bounds in args[1:] if isinstance(bounds, Range | Name)]
    return "; ".join(filter(None, [limits(args[0]), *own]))


def regular_file(path: Path | str, expected: str = "a file") -> Path:
    """Return the path if it is a file or a link to one, else raise UserError.

    Folders, devices and pipes are refused, since reading them fails, hangs or never ends.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected {expected}") from None
    except (OSError, ValueError) as e:  # ValueError: a null character in the name
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be read ({reason}), expected {expected}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: {'is a folder' if stat.S_ISDIR(mode) else 'is not a regular file'}, "
                        f"expected {expected}")
    return path


def read_bytes(path: Path | str, most: int, expected: str = "a file") -> bytes:
    """Return the contents of a file; UserError if it has more than `most` bytes."""
    path = regular_file(path, expected)
    try:
        if (size := path.stat().st_size) > most:
            raise UserError(f"{path}: found {size:,} bytes, expected at most {most:,} in {expected}")
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}), expected {expected}") from None


def read_json(path: Path | str, kind: Any = dict,
              advice: str = "it is damaged, write or export it again") -> Any:
    """Read a JSON file as an annotated type (see typed); `advice` says what to do about a bad file."""
    return typed(kind, parse_json(read_bytes(path, MOST_JSON, "a JSON file"), str(path), advice), str(path))


def parse_json(raw: bytes, where: str, advice: str = "it is damaged, write or export it again") -> Any:
    """Parse UTF-8 JSON, with finite numbers and bounded depth only; UserError names `where`."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_int=_integer, parse_float=_finite,
                           parse_constant=_finite)
        _check_depth(value)
        return value
    except UnicodeDecodeError:
        raise UserError(f"{where}: found bytes that are not UTF-8, expected JSON; {advice}") from None
    except (ValueError, RecursionError) as e:
        reason = "too many brackets within each other" if isinstance(e, RecursionError) else e
        raise UserError(f"{where}: not valid JSON ({reason}); {advice}") from None


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {text[:40]}, which is not finite")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, dict | list)]
        if not level:
            return
    raise RecursionError


def typed(kind: Any, value: Any, where: str) -> Any:
    """Check a JSON value against an annotated type and return it as that type.

    Args:
        kind: a dataclass, tuple, list, dict, Literal, optional or plain type, or one of these Annotated with
            a Range or a Name.
        value: the value. An integer is accepted as a float, a boolean is not accepted as a number, and an
            object may have no keys but the fields of its dataclass.
        where: the place of the value, for messages.

    Raises:
        UserError: the value is of another type or out of range; names `where` and the key.
    """
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = typed(args[0], value, where)
        for bounds in args[1:]:
            if isinstance(bounds, Name) and value not in bounds:
                raise UserError(f"{where}: found {shown(value)}, expected {bounds}")
            number, entries = (len(value), " entries") if isinstance(value, tuple) else (value, "")
            if isinstance(bounds, Range) and number not in bounds:
                raise UserError(f"{where}: found {shown(number)}{entries}, expected {bounds}{entries}")
        return value
    if is_dataclass(kind):
        known = typing.get_type_hints(kind, include_extras=True)
        if not isinstance(value, dict) or set(value) - {f.name for f in fields(kind)}:
            unknown = sorted(set(value) - set(known)) if isinstance(value, dict) else value
            raise UserError(f"{where}: unknown setting {shown(unknown)}, expected some of {', '.join(known)}")
        needed = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
        if missing := next((name for name in needed if name not in value), None):
            raise UserError(f"{where}: found no {missing}, expected {', '.join(known)}")
        return typing.cast(Any, kind)(**{k: typed(known[k], v, f"{where}: {k}") for k, v in value.items()})
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(typed(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif origin is list and isinstance(value, list):
        return [typed(args[0], v, f"{where}: entry {i}") for i, v in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {k: typed(args[1], v, f"{where}: {shown(k)}") for k, v in value.items()}
    elif origin is typing.Literal:
        if not isinstance(value, list | dict) and value in args:
            return value
    elif type(None) in args:
        return None if value is None else typed(args[0], value, where)
    elif kind is float and not isinstance(value, bool) and (isinstance(value, float) or (
            isinstance(value, int) and abs(value) < 2**1023)):  # larger ones do not fit into a float
        return float(value)
    elif not origin and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: found {shown(value)}, expected {_words(kind)}")


def _words(kind: Any) -> str:
    """Describe a type in a message."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _words(args[0])
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} values ({', '.join(map(_words, args))})"
    if origin in (tuple, list):
        return f"any number of ({_words(args[0])})"
    if type(None) in args:
        return f"{_words(args[0])} or null"
    return getattr(kind, "__name__", str(kind))


def shown(value: Any) -> str:
    """Quote a value from outside in a message: short, on one line."""
    text = repr(value)
    return f"{text[:57]}..." if len(text) > 60 else text


def check_tensors(tensors: "Mapping[str, Tensor]", layout: Layout, where: str,
                  numbers: dict[str, int] | None = None) -> None:
    """Raise UserError unless the tensors have exactly the names, dtypes and shapes of a layout, all finite.

    Kernels do not check sizes again: they would read beyond the end of a tensor with too few rows. Values on
    the meta device, for tensors that are not read yet, are not checked. `numbers` has the sizes of named
    dimensions where they are known; those found are added.
    """
    import torch

    numbers = {} if numbers is None else numbers

    def fits(size: int, dimension: str | int) -> bool:
        return size == (numbers.setdefault(dimension, size) if isinstance(dimension, str) else dimension)

    if missing := sorted(set(layout) - set(tensors)):
        raise UserError(f"{where}: found no {shown(missing[0])}, expected {', '.join(layout)}; the file "
                        "is of something else or damaged")
    if unknown := sorted(set(tensors) - set(layout)):
        raise UserError(f"{where}: found {shown(unknown[0])}, expected nothing but "
                        f"{', '.join(layout)}; the file is of something else or damaged")
    for name, (dtype, shape) in layout.items():
        t = tensors[name]
        if t.dtype != getattr(torch, dtype) or t.ndim != len(shape) or not all(map(fits, t.shape, shape)):
            wanted = [numbers.get(d, d) if isinstance(d, str) else d for d in shape]
            raise UserError(f"{where}: found {name} of {str(t.dtype).removeprefix('torch.')} "
                            f"{list(t.shape)}, expected {dtype} {wanted}; the file is damaged")
        if t.is_floating_point() and not t.is_meta and not bool(torch.isfinite(t).all()):
            raise UserError(f"{where}: found NaN or infinite numbers in {name}, expected finite "
                            "ones; the file is damaged")
