"""Dataclasses filled from command-line flags: how every command, job and search reads its settings."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from flexgs import old_names
from flexgs.config import PRESETS, Config
from flexgs.errors import UserError
from flexgs.inputs import limits, typed
from flexgs.urls import public

T = TypeVar("T")
AnyConfig = Annotated[Config, tyro.conf.arg(name="")]
"""The type of a field of settings whose flags have no prefix: --steps, not --config.steps."""
ConfigFile = Annotated[Path | None, tyro.conf.arg(name="config")]
"""The type of a field that is the flag --config."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """The words of a command line, to tell what the user has chosen from what is a default."""

    words: tuple[str, ...] = ()

    def has(self, *flags: str) -> bool:
        """Whether one of these flags was typed, with - or _ between its words, under a new or old name."""
        return not set(flags).isdisjoint(
            word.split("=", 1)[0].replace("_", "-") for word in old_names.flags(self.words)
            if word.startswith("--"))

    def command(self, program: str) -> str:
        """Return the whole command, to be copied into a shell, without passwords and tokens."""
        return public(shlex.join(["python", program, *self.words]))


Recorded = tyro.conf.Suppress[tyro.conf.Fixed[Typed]]
"""The field of a command that parse() fills in; it is no flag."""


def parse(command: type[T], args: Sequence[str] | None, prog: str) -> T:
    """Make a command from the flags that were typed.

    A command with a field `config` starts from the settings of --config or --preset, and gets the typed words
    in its field `typed`.

    Args:
        command: the dataclass of the command.
        args: the words to read; None for those of sys.argv.
        prog: the name of the program in help and errors.

    Raises:
        UserError: a flag or value that the command does not take. Config.check checks the settings' ranges.
    """
    args = sys.argv[1:] if args is None else args
    fields = {f.name: f for f in dataclasses.fields(command)}  # type: ignore[arg-type]
    if "config" not in fields:
        return fill(command, args, prog)
    file, preset = _last_value("--config", args), _last_value("--preset", args)
    if file is not None and preset is not None:
        raise UserError("--config and --preset: expected one of them; both are a set of "
                        "settings to start from")
    config = (Config.load(Path(file)) if file is not None
              else Config.from_preset("default" if preset is None else preset))
    given = {name: _default_of(f) for name, f in fields.items() if f.init}
    start = command(**{**given, "config": config})
    filled: Any = fill(command, args, prog, start, f"{inspect.getdoc(command)}\n\nPresets:\n{presets()}")
    filled.typed = Typed(tuple(args))
    return filled


def presets() -> str:
    """Return a line for each preset: its name and what it is."""
    return "\n".join(f"  {name:11} {' '.join((f.__doc__ or '').split())}" for name, f in PRESETS.items())


def fill(kind: type[T], args: Sequence[str], prog: str, start: Any = tyro.MISSING_NONPROP,
         description: str | None = None) -> T:
    """Make a dataclass from flags.

    Args:
        kind: the dataclass.
        args: the words to read.
        prog: the name of the program in help and errors.
        start: an instance of kind, whose values are the defaults; without it, those of kind.
        description: the head of the help text; None for the docstring of kind.

    Raises:
        UserError: a flag or value that the dataclass does not take.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), READABLE:
            filled = tyro.cli(kind, args=old_names.flags(args), prog=prog,
                              description=description or inspect.getdoc(kind), default=start)
    except SystemExit as e:
        if not e.code:
            raise
        # tyro prints a frame that holds a title, the complaint, a line of dashes and advice; without UTF-8
        # there is a line of dashes below the title too.
        lines = [text for line in complaint.getvalue().splitlines()[1:] if (text := line.strip("│╭╮╰╯ "))]
        body = itertools.dropwhile(_is_rule, lines)
        what = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
        advice = complaint.getvalue().partition("Perhaps you meant:")[2]
        near = dict.fromkeys(word for word in advice.split()
                             if re.fullmatch("--[a-zA-Z][-.a-zA-Z0-9]*", word) and word != "--help")
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{what}; {guess}{prog} --help has all") from None
    for f in dataclasses.fields(filled):  # type: ignore[arg-type]
        if limits(hint := get_type_hints(type(filled), include_extras=True)[f.name]):
            typed(hint, getattr(filled, f.name), f"--{f.name.replace('_', '-')}")
    return filled


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-")


READABLE = tyro.constructors.ConstructorRegistry()
"""How help texts show optional values (FLOAT|None) and ranges (default: 4; expected: 1 to 64)."""
_within: set[type] = set()
"""The dataclasses for which _with_ranges is asking tyro's own rule, so that it does not ask itself."""


@READABLE.struct_rule
def _with_ranges(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    if not dataclasses.is_dataclass(info.type) or info.type in _within:
        return None
    _within.add(info.type)
    try:
        spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    finally:
        _within.remove(info.type)
    if not isinstance(spec, tyro.constructors.StructConstructorSpec):
        return None
    return dataclasses.replace(spec, fields=tuple(map(_readable, spec.fields)))


def _readable(f: tyro.constructors.StructFieldSpec) -> tyro.constructors.StructFieldSpec:
    """Join the lines of a field's help, and add the numbers that the field takes."""
    f = dataclasses.replace(f, helptext=functools.partial(_joined, f.helptext))
    if words := limits(f.type):
        hint = tyro.conf.arg(help_behavior_hint=functools.partial(_hint, words))
        f = dataclasses.replace(f, type=Annotated[f.type, hint])  # type: ignore[arg-type]
    return f


def _joined(helptext: Callable[[], str | None] | str | None) -> str | None:
    text = helptext() if callable(helptext) else helptext
    return text and " ".join(text.split())


def _hint(expected: str, default: str) -> str:
    return f"(default: {default}; expected: {expected})"


@READABLE.primitive_rule
def _optional(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    kinds = get_args(info.type)
    if len(kinds) != 2 or type(None) not in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    spec = tyro.constructors.ConstructorRegistry.get_primitive_spec(
        tyro.constructors.PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, tyro.constructors.PrimitiveConstructorSpec) or spec.choices:
        return None
    return dataclasses.replace(
        spec, metavar=f"{spec.metavar}|None",
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value))


def _last_value(flag: str, args: Sequence[str]) -> str | None:
    """Return the last value of a flag, typed as --flag value or --flag=value, with - or _ between words."""
    words = [*itertools.chain.from_iterable(a.split("=", 1) if a.startswith("--") else [a] for a in args)]
    values = [b for a, b in itertools.pairwise(words) if a.replace("_", "-") == flag]
    return values[-1] if values else None


def _default_of(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return tyro.MISSING if f.default is dataclasses.MISSING else f.default
