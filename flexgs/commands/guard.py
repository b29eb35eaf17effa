"""How every command ends: with an exit code, and one line that says what went wrong."""

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
    """Run main with warnings of one line each, print how it failed, and return the exit code.

    The exit code is what main returns, or 0; 2, with one line, for what the user can mend; 1, with one line,
    where memory or disk ran out; 130 for Ctrl-C; 143 for SIGTERM; and 1 for any other error, with a stack
    trace from which passwords and tokens are removed.
    """
    telemetry.turn_off()
    came = listen()
    came.clear()
    warnings.showwarning = _warn
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may hold characters that the terminal cannot encode.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main() or 0
    except BrokenPipeError:  # the reader of a pipe, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as e:
        code, said = _ending(came[-1] if came and not isinstance(e, KeyboardInterrupt) else e)
        print(said, file=sys.stderr)
        return code


def _ending(error: BaseException) -> tuple[int, str]:
    """Return the exit code of a command that ended with this error, and the text to print."""
    if isinstance(error, UserError):
        return 2, f"flexgs: {one_line(public(str(error)))}"
    if isinstance(error, KeyboardInterrupt):
        return (143 if isinstance(error, Terminated) else 130,
                f"flexgs: interrupted{f'; {error}' if str(error) else ''}")
    if advice := cure(error):
        return 1, f"flexgs: {advice}, and give the same command again ({one_line(first_line(error))})"
    # The file is missing, may not be read or written, or is of another kind.
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"flexgs: {one_line(public(f'{error.filename}: {error.strerror}'))}"
    return 1, public("".join(traceback.format_exception(error)))
