"""Ctrl-C and SIGTERM while training: the first one is noted, so that a checkpoint can be kept; a second one
ends at once."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM: what schedulers send to end a run."""


_came: list[KeyboardInterrupt] = []


def listen() -> list[KeyboardInterrupt]:
    """From now on SIGTERM ends this process as Ctrl-C does; the list of those that come, since libraries that
    are being imported turn them into errors of other kinds.

    To be said again after a library has set a handler of its own, as the start of Ray does: its prints the
    stack and aborts.
    """
    if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
        signal.signal(signal.SIGTERM, _raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else nohup, or somebody's own
            signal.signal(signal.SIGINT, _raise)
    return _came


def _raise(number: int, frame: object) -> None:
    _came.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
    raise _came[-1]


@contextmanager
def held() -> Iterator[Callable[[], KeyboardInterrupt | None]]:
    """While the block runs, what it is given tells which signal has come, as the exception to raise when all
    is kept.

    Only the main thread of a process hears signals; elsewhere none comes.
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
        if handler not in (signal.SIG_IGN, None):  # nohup, or not set from Python
            signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        restore()
