"""Import of pycolmap without its signal handler and its log."""

import signal
import threading
from types import ModuleType


def library() -> ModuleType:
    """Import pycolmap and undo its handler of SIGTERM, which prints a stack trace when a run is ended.

    Its log, of hundreds of lines on standard error, is turned off; errors are exceptions as well.
    """
    import pycolmap

    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value

    if threading.current_thread() is threading.main_thread():  # other threads may not set signal handlers
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    return pycolmap
