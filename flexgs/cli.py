"""The command line `flexgs COMMAND`: a table of the commands, and the function that runs one."""

import contextlib
import difflib
import functools
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Literal, Union

import tyro

from flexgs.commands.capture import CaptureCommand
from flexgs.commands.compare import Compare, Eval
from flexgs.commands.data import Data
from flexgs.commands.deploy import Cut, Info, Pack, Render, Serve, ViewCommand
from flexgs.commands.guard import guard
from flexgs.commands.machine import Bench, Doctor
from flexgs.commands.train import Adapt, Train
from flexgs.errors import UserError
from flexgs.options import parse, readable


@dataclass
class Completion:
    """Print a script that makes a shell complete commands and flags: source <(flexgs completion bash)."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]

    def __call__(self) -> None:
        """Print the script, which tyro writes."""
        kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
        script = io.StringIO()
        with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit), readable():
            tyro.cli(Union[tuple(kinds)], prog="flexgs",  # type: ignore[call-overload]  # noqa: UP007
                     args=["--tyro-print-completion", self.shell])
        # bash: names of files where there is no flag to complete
        print(script.getvalue().replace("\ncomplete -F", "\ncomplete -o default -F"))


COMMANDS: dict[str, type] = {"capture": CaptureCommand, "train": Train, "adapt": Adapt, "compare": Compare,
                             "eval": Eval,
                             "cut": Cut, "pack": Pack, "serve": Serve, "view": ViewCommand, "render": Render,
                             "info": Info, "data": Data, "bench": Bench, "doctor": Doctor,
                             "completion": Completion}


def main() -> None:
    """Run the command of sys.argv, or print the list of commands, and exit."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print("usage: flexgs COMMAND ... (flexgs COMMAND --help; flexgs --version)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {(command.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    if args[0] == "--version":
        print(f"flexgs {version('flexgs')}")
        sys.exit(0)
    if args[0] not in COMMANDS:
        sys.exit(guard(functools.partial(_unknown, args[0])))
    sys.exit(guard(lambda: parse(COMMANDS[args[0]], args[1:], f"flexgs {args[0]}")()))


def _unknown(command: str) -> None:
    raise UserError(f"{command}: no such command, {nearest(command, COMMANDS)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return advice about a word that is not among the known ones: those nearest to it, or all."""
    near = difflib.get_close_matches(word, list(known))
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
