"""Ctrl-C and SIGTERM during training: the first one keeps a checkpoint, a second one ends at once."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send to end a run."""


_came: list[KeyboardInterrupt] = []


def listen() -> list[KeyboardInterrupt]:
    """Make SIGTERM end this process as Ctrl-C does, and return the list of signals that have come.

    Libraries that are being imported may turn the exception of a signal into another error; the list tells.
    Call this again after a library has set a handler of its own: the one of Ray prints a stack trace and
    aborts.
    """
    if threading.current_thread() is threading.main_thread():  # Python allows handlers to be set there only
        signal.signal(signal.SIGTERM, _raise)
        # any other handler of SIGINT stays: it is ignored (nohup), or a program has set its own
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _raise)
    return _came


def _raise(number: int, frame: object) -> None:
    _came.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
    raise _came[-1]


@contextmanager
def held() -> Iterator[Callable[[], KeyboardInterrupt | None]]:
    """Hold back the first signal while the block runs; a second one takes effect at once.

    Yields a function that returns the exception of that signal, for the caller to raise once its work is
    saved, or None. Only the main thread receives signals; in other threads it always returns None.
    """
    noted: list[KeyboardInterrupt] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        noted.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        restore()
        print("flexgs: ends after this step, with a checkpoint; once more ends at once", file=sys.stderr,
              flush=True)

    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):  # ignored (nohup), or not set from Python
            signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        restore()
