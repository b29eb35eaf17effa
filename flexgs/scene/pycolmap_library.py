"""pycolmap, without what its import does to SIGTERM."""

import signal
import threading
from types import ModuleType


def library() -> ModuleType:
    """pycolmap. Its import makes SIGTERM, by which schedulers end a run, print a stack trace; that is undone
    here."""
    import pycolmap

    if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    return pycolmap
