"""Import of pycolmap without its signal handler."""

import signal
import threading
from types import ModuleType


def library() -> ModuleType:
    """Import pycolmap and undo its handler of SIGTERM, which prints a stack trace when a run is ended."""
    import pycolmap

    if threading.current_thread() is threading.main_thread():  # other threads may not set signal handlers
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    return pycolmap
