"""How every command ends: the exit code, and one line for what went wrong."""

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from flexgs import telemetry
from flexgs.errors import UserError, cure, one_line
from flexgs.signals import Terminated, listen
from flexgs.urls import first_line, public


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"flexgs: warning: {one_line(' '.join(str(message).split()))}", file=sys.stderr)


def guard(main: Callable[[], int | None]) -> int:
    """Run main, whose warnings are a line each. The exit code: what it returns or 0; 2 with one line for what
    the user can mend, 1 with one line where memory or disk ran out, 130 for Ctrl-C, 143 for SIGTERM, and 1
    with a stack trace, which has lost its secrets, for a mistake of flexgs."""
    telemetry.turn_off()
    came = listen()
    came.clear()
    warnings.showwarning = _warn
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main() or 0
    except BrokenPipeError:  # the reader, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as e:
        code, said = _ending(came[-1] if came and not isinstance(e, KeyboardInterrupt) else e)
        print(said, file=sys.stderr)
        return code


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code, and what is said, of a command that an error has ended."""
    if isinstance(error, UserError):
        return 2, f"flexgs: {one_line(public(str(error)))}"
    if isinstance(error, KeyboardInterrupt):
        return (143 if isinstance(error, Terminated) else 130,
                f"flexgs: interrupted{f'; {error}' if str(error) else ''}")
    if advice := cure(error):
        return 1, f"flexgs: {advice}, and give the same command again ({one_line(first_line(error))})"
    # no such folder, no permission, another kind of file
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"flexgs: {one_line(public(f'{error.filename}: {error.strerror}'))}"
    return 1, public("".join(traceback.format_exception(error)))
