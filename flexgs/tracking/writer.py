"""One thread that calls MLflow, so that a server that is slow or away holds up nobody else."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from flexgs.urls import first_line

log = logging.getLogger("flexgs.tracking")

MOMENT = 2.0
"""Seconds that calls may take without a word."""
SLOW = "MLflow is slow or away, waits up to {:.0f} s for it; Ctrl-C ends at once"


class Writer:
    """A queue of calls, done one after the other in a thread, which ends with the process."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]]] = queue.SimpleQueue()
        self._left = 0
        """Calls that are waiting or being made."""
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="MLflow", daemon=True).start()

    def __reduce__(self) -> tuple[type["Writer"], tuple[()]]:
        """Let Ray Tune pickle a callback that has a writer: a copy has no calls."""
        return Writer, ()

    def put(self, call: Callable[..., object], *args: Any) -> None:
        """Let the thread call call(*args); what that raises is a warning, and the calls after it are made."""
        with self._changed:
            self._left += 1
        self._calls.put((call, args))

    @property
    def idle(self) -> bool:
        """Whether all calls have been made."""
        return not self._left

    def wait(self, seconds: float) -> bool:
        """Wait until all calls have been made, for each at most so long; return whether they have."""
        with self._changed:
            while self._left:
                if not self._changed.wait(seconds):
                    return False
        return True

    def drain(self, seconds: float) -> bool:
        """Wait like wait(), but say so once that takes longer than a moment."""
        if self.wait(MOMENT):
            return True
        print(SLOW.format(seconds), flush=True)
        return self.wait(seconds)

    def _work(self) -> None:
        while True:
            call, args = self._calls.get()
            try:
                call(*args)
            except Exception as e:  # else the thread would end, and with it all that is still to be sent
                log.warning("MLflow: %s", first_line(e))
            finally:
                with self._changed:
                    self._left -= 1
                    self._changed.notify_all()
