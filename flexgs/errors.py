"""The two ways a command ends badly: the user can mend it (exit code 2), or something failed (exit code
1)."""

import errno
import shlex
from pathlib import Path


class UserError(Exception):
    """One line for the user: the file or option, what was found, what was expected, what to do. Exit code 2.

    It is a line whatever is quoted in it; see one_line().
    """

    def __init__(self, text: str):
        super().__init__(one_line(text))


class MissingDependencyError(UserError):
    """An optional package is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, needed_for: str):
        super().__init__(f"{needed_for} needs the package {package}, which is not installed: "
                         f"pip install 'flexgs[{extra}]'")


def cure(error: BaseException) -> str | None:
    """What to do about an error that says that the machine has too little memory or disk; None for any
    other."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return "out of memory: lower --base.max-splats or raise --data.factor"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in text:
        return "the disk is full: free some of it"
    return None


def one_line(text: str) -> str:
    """text on a line that does nothing to a terminal: names of files, which come from anybody, may hold any
    character."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in text.strip())


def pasted(path: Path | str) -> str:
    """path as it is typed in a shell, where a leading dash would make it an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


_NO_MEMORY = ("out of memory", "low on memory", "can't allocate memory", "cannot allocate memory")
"""As CUDA, Ray, PyTorch on the CPU, and the system say it."""
