"""Dataclasses filled from command-line flags: how every command, job and search reads its settings."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from flexgs import old_names
from flexgs.config import PRESETS, BaseConfig, Config, DataConfig
from flexgs.errors import UserError
from flexgs.inputs import limits, typed
from flexgs.urls import public

T = TypeVar("T")
AnyConfig = Annotated[Config, tyro.conf.arg(name="")]
"""The type of a field of settings whose flags have no prefix: --steps, not --config.steps."""
ConfigFile = Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE")]
"""The type of a field that is the flag --config."""
Capture = Annotated[Path, tyro.conf.arg(metavar="CAPTURE")]
"""The type of a field that is the folder of a capture; help texts call it CAPTURE."""
OptionalCapture = Annotated[Path | None, tyro.conf.arg(metavar="CAPTURE")]
"""As Capture, where it may be left out."""
Run = Annotated[str, tyro.conf.arg(metavar="RUN")]
"""The type of a field that is a trained model: a run folder, a packed file or URL, or a file of splats."""
Budget = Annotated[str | None, tyro.conf.arg(metavar="BUDGET")]
"""The type of a field that is a budget (model/budget.py)."""
RARE = "shown by --help-all"
"""Annotated[kind, RARE] is the type of a field that --help leaves out and --help-all shows."""
SHORT: Mapping[type, tuple[str, ...]] = {Config: ("preset", "steps", "data", "base"),
                                         DataConfig: ("factor",), BaseConfig: ("max_splats",)}
"""The settings that --help shows of these dataclasses; --help-all shows all."""


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
    about = inspect.getdoc(command)
    if _wants_all(args):
        about = f"{about}\n\nPresets:\n{presets()}"
    filled: Any = fill(command, args, prog, start, about)
    filled.typed = Typed(tuple(args))
    return filled


def _wants_all(args: Sequence[str]) -> bool:
    return any(word.replace("_", "-") == "--help-all" for word in args)


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
    everything, complaint = _wants_all(args), io.StringIO()
    short = not everything and not {"-h", "--help"}.isdisjoint(args)
    try:
        with contextlib.redirect_stderr(complaint), readable(short):
            filled = tyro.cli(kind, args=["--help"] if everything else old_names.flags(args), prog=prog,
                              description=description or inspect.getdoc(kind), default=start)
    except SystemExit as e:
        if not e.code:
            if short and _has_rare(kind):
                print(f"{prog} --help-all shows every flag")
            raise
        # tyro prints a frame that holds a title, the complaint, a line of dashes and advice; without UTF-8
        # there is a line of dashes below the title too.
        lines = [text for line in complaint.getvalue().splitlines()[1:] if (text := line.strip("│╭╮╰╯ "))]
        body = itertools.dropwhile(_is_rule, lines)
        what = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
        advice = complaint.getvalue().partition("Perhaps you meant:")[2]
        near = dict.fromkeys(word for word in advice.split()
                             if re.fullmatch("--[a-zA-Z][-.a-zA-Z0-9]*", word) and word != "--help")
        choices = re.findall(r"[\w.+-]+", what.partition("xpected one of")[2]) or _subcommands(kind)
        near |= dict.fromkeys(one for word in args for one in difflib.get_close_matches(word, choices, 1))
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{what}; {guess}{prog} --help-all has all") from None
    for f in dataclasses.fields(filled):  # type: ignore[arg-type]
        if limits(hint := get_type_hints(type(filled), include_extras=True)[f.name]):
            typed(hint, getattr(filled, f.name), f"--{f.name.replace('_', '-')}")
    return filled


def _subcommands(kind: type) -> list[str]:
    """Return the names of the commands within a command, such as list and get of `flexgs data`."""
    unions = [get_args(hint)[0] for hint in get_type_hints(kind, include_extras=True).values()
              if hasattr(hint, "__metadata__")]
    return [mark.name for union in unions for one in get_args(union)
            for mark in getattr(one, "__metadata__", ()) if isinstance(getattr(mark, "name", None), str)]


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-")


def _has_rare(kind: type) -> bool:
    hints = get_type_hints(kind, include_extras=True).values()
    return any(hint == AnyConfig or RARE in getattr(hint, "__metadata__", ()) for hint in hints)


def readable(short: bool = False) -> tyro.constructors.ConstructorRegistry:
    """Return tyro's rules for help texts.

    Optional values are shown as (FLOAT|None) and ranges as (default: 4; expected: 1 to 64). A short one
    leaves out ranges and rare flags, which are then refused.
    """
    rules = tyro.constructors.ConstructorRegistry()
    within: set[type] = set()  # the dataclasses for which tyro's own rule is being asked

    @rules.struct_rule
    def struct(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in within:
            return None
        within.add(info.type)
        try:
            spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
        finally:
            within.remove(info.type)
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return None
        shown = SHORT.get(info.type)
        return dataclasses.replace(spec, fields=tuple(
            _readable_field(f, short, short and shown is not None and f.name not in shown)
            for f in spec.fields))

    rules.primitive_rule(_optional)
    return rules


def _readable_field(f: tyro.constructors.StructFieldSpec, short: bool,
                    hidden: bool) -> tyro.constructors.StructFieldSpec:
    """Join the lines of a field's help, and add the numbers that the field takes, unless it is hidden."""
    f = dataclasses.replace(f, helptext=functools.partial(_joined, f.helptext))
    if short and dataclasses.is_dataclass(f.type):
        f = dataclasses.replace(f, helptext="")  # without it tyro shows the docstring of the group
    if hidden or (short and RARE in getattr(f.type, "__metadata__", ())):
        return dataclasses.replace(f, type=tyro.conf.Suppress[f.type])  # type: ignore[name-defined, misc]
    if (words := limits(f.type)) and not short:
        hint = tyro.conf.arg(help_behavior_hint=functools.partial(_hint, words))
        f = dataclasses.replace(f, type=Annotated[f.type, hint])  # type: ignore[arg-type]
    elif f.default in (None, ()):
        f = dataclasses.replace(f, type=Annotated[f.type, tyro.conf.arg(help_behavior_hint="")])  # type: ignore[arg-type]
    return f


def _joined(helptext: Callable[[], str | None] | str | None) -> str | None:
    text = helptext() if callable(helptext) else helptext
    return text and " ".join(text.split())


def _hint(expected: str, default: str) -> str:
    return f"(default: {default}; expected: {expected})"


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
