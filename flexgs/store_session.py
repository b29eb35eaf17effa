"""The session of a run whose folder is in a Store, which another process watches and may stop.

A file named `stop` in the run folder makes the workers write a checkpoint at their next report and end, so
that a run gets another number of workers, or leaves a machine, without losing a view.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from flexgs.distributed import Group
from flexgs.run import LocalSession
from flexgs.store import Store

STOP = "stop"
"""The file in a run folder that ends its workers early."""
PUSH_SECONDS = 10.0
"""Time between two messages of the workers to an object store, which all workers wait for."""
SEND_SECONDS = 60.0
"""Time between two checkpoints that are sent to an object store, each the newest by then."""


class StoreSession(LocalSession):
    """A LocalSession whose files go to the store, and which stops when the run folder or the machine says so.

    Training does not wait for an object store while a checkpoint is sent there. However often checkpoints are
    written, one at a time is sent, every SEND_SECONDS at most; the last one always is.
    """

    def __init__(self, store: Store, group: Group, leaving: Callable[[], bool] = lambda: False,
                 start: Path | None = None):
        """Open the session.

        Args:
            store: the run folder, or this worker's copy of it.
            group: the workers of the run.
            leaving: whether this worker's machine is about to go.
            start: a checkpoint to begin with where the run has none.
        """
        super().__init__(store.folder, group, start=start)
        self.store, self.leaving = store, leaving
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._sent: Future[None] | None = None
        self._newest: str | None = None
        """The newest checkpoint that an object store has not got yet."""
        self._at = self._sent_at = -math.inf

    def checkpoints(self) -> Iterator[Path]:
        """Yield the folders of the checkpoints that the first worker sees, the newest first, then `start`.

        A checkpoint in an object store is pulled when it is asked for, by the first worker of each machine;
        the others of the machine read that worker's copy. All workers ask together.
        """
        # Another machine may see an older state of a shared folder, so all take the first worker's list.
        steps = self.group.gather(self.store.steps())[0]
        folders = self.group.gather(self.store.folder)
        copy = next((folder for folder in folders if folder.is_dir()), self.store.folder)
        for step in steps:
            name = f"checkpoints/step_{step:08d}"
            if copy == self.store.folder:
                self.store.pull(name)
            self.group.gather(None)  # it is there for all
            yield copy / name
        if self.start:
            yield self.start

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a checkpoint, and begin to send it if it is time."""
        super().checkpoint(step, write)
        if self.store.remote and self.group.rank == 0:
            self._newest = f"step_{step:08d}"
            self._send_newest()

    def stop(self, reported: bool) -> bool:
        """Whether to stop now: after a report, if there is the file `stop` or the machine is about to leave.

        An object store gets the history then, and is asked, at most every PUSH_SECONDS.
        """
        if not reported:
            return False
        self._send_newest()
        stop = self.leaving()
        if self.group.rank == 0 and not (self.store.remote and time.monotonic() - self._at < PUSH_SECONDS):
            self.store.push("metrics.jsonl")
            stop, self._at = stop or self.store.exists(STOP), time.monotonic()
        return any(self.group.gather(stop))

    def close(self) -> None:
        """Send what has not been sent."""
        if self._sent:
            self._sent.result()
        self._uploads.shutdown()
        if self.group.rank == 0:
            self._send(self._newest)

    def _send_newest(self) -> None:
        """Begin to send the newest checkpoint, unless it, or another, is being sent or was just sent."""
        if self._sent and self._sent.done():
            self._sent, self.sending = self._sent.result(), None  # raises what has gone wrong
        if self._newest and not self._sent and time.monotonic() - self._sent_at >= SEND_SECONDS:
            self.sending, self._newest, self._sent_at = self._newest, None, time.monotonic()
            self._sent = self._uploads.submit(self._send, self.sending)

    def _send(self, checkpoint: str | None) -> None:
        self.store.push("metrics.jsonl")  # a checkpoint without the lines up to it would leave a gap
        if checkpoint:
            self.store.push_checkpoint(checkpoint)
