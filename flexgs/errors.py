"""Errors that the user can mend (exit code 2), and their one-line form; any other failure exits with 1."""

import errno
import shlex
from pathlib import Path


class UserError(Exception):
    """One line for the user: the file or option, what was found, what was expected, what to do.

    The command line exits with code 2. one_line() keeps the message on one line, whatever it quotes.
    """

    def __init__(self, text: str):
        super().__init__(one_line(text))


class MissingDependencyError(UserError):
    """An optional package is not installed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, needed_for: str):
        super().__init__(f"{needed_for} needs the package {package}, which is not installed: "
                         f"pip install 'flexgs[{extra}]'")


def cure(error: BaseException) -> str | None:
    """Return what to do about too little memory or disk space; None if the error has another cause."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return "out of memory: lower --base.max-splats or raise --data.factor"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in text:
        return "the disk is full: free some of it"
    return None


def one_line(text: str) -> str:
    """Return the text on one line, with the control characters that file names may hold made harmless."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in text.strip())


def pasted(path: Path | str) -> str:
    """Quote a path for a shell, with "./" before a leading dash, which would make it an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def size_text(size: float) -> str:
    """Return a number of bytes as kB below a megabyte, and as MB from there on."""
    return f"{size / 1e3:.1f} kB" if size < 999_950 else f"{size / 1e6:.2f} MB"


_NO_MEMORY = ("out of memory", "low on memory", "can't allocate memory", "cannot allocate memory")
"""Words for it in the messages of CUDA, Ray, PyTorch on the CPU, and the system."""
