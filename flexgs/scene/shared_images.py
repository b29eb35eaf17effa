"""Decoded photographs in a memory that the workers of one machine share, so that each is decoded once."""

import fcntl
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexgs.distributed import Group
from flexgs.scene import Scene
from flexgs.scene.views import ROOM_AHEAD, Key, View

ROOM = Path("/dev/shm")
WAIT_SECONDS = 0.005
"""Time between two looks whether another worker has decoded a photograph."""


class Slot(NamedTuple):
    """A place for one array in the shared memory."""

    number: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class SharedImages:
    """Arrays in a file of /dev/shm without a name, which ends with the processes that have it open.

    The first bytes of the file say which slots are filled. Who fills one has a lock on its byte, which the
    system takes back from a process that dies.
    """

    def __init__(self, file: Path, slots: Mapping[Key, Slot]):
        self.slots = slots
        self._fd = os.open(file, os.O_RDWR)
        self._memory = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
        self._full = False

    def get(self, key: Key, make: Callable[[], np.ndarray]) -> np.ndarray | None:
        """Return the array of a slot, which make() fills if nobody has yet.

        None if the array has no slot, or its slot is empty and memory has become short.
        """
        if (slot := self.slots.get(key)) is None:
            return None
        array = np.frombuffer(self._memory, slot.dtype, int(np.prod(slot.shape)), slot.offset)
        while not self._memory[slot.number]:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot.number)
            except OSError:  # another worker has it; to wait for the lock would be taken for a deadlock
                time.sleep(WAIT_SECONDS)
                continue
            try:
                if not self._memory[slot.number]:
                    if not self._reserved(slot):
                        return None
                    array[:] = make().reshape(-1)
                    self._memory[slot.number] = 1
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, slot.number)
        return array.reshape(slot.shape)

    def _reserved(self, slot: Slot) -> bool:
        """Reserve the memory of a slot, since writing to what is not there would end the process."""
        with suppress(OSError):
            if not self._full:
                os.posix_fallocate(self._fd, slot.offset, slot.nbytes)
                return True
        self._full = True
        return False


def share_images(scene: Scene, group: Group) -> None:
    """Let the workers on each machine have one copy of every photograph; all workers call this together.

    What does not fit into the limits of their caches, taken together, stays with each worker. Without
    /dev/shm, and for a worker that is alone on its machine, everything does.
    """
    cache = scene.train[0].cache
    # Whatever a worker finds on its machine, it must not leave while others wait for its messages.
    if group.world == 1 or any(group.gather(cache.shared is not None)):
        return
    mine = _made()
    try:
        folders = group.gather(mine)
        # Of the workers here, the one of the lowest rank makes the file.
        leader = next((r for r, folder in enumerate(folders) if folder and folder.is_dir()), group.rank)
        here = [limit for rank, limit in group.gather((leader, cache.limit)) if rank == leader]
        room = group.gather(shutil.disk_usage(mine).free * 9 // 10 if mine else 0)[leader]
        slots, size, left = arranged([*scene.train, *scene.test], sum(here), len(here), room)
        wanted, folder = len(here) > 1 and bool(slots), folders[leader]
        if wanted and leader == group.rank and mine:
            with (mine / "images").open("wb") as file:
                file.truncate(size)
        group.gather(None)  # the file is there
        if wanted and folder:
            cache.shared, cache.limit = SharedImages(folder / "images", slots), left
        group.gather(None)  # all have opened it, so its name can go: a kill leaves nothing
    finally:
        if mine:
            shutil.rmtree(mine, ignore_errors=True)


def _made() -> Path | None:
    """Make a folder in the memory, or return None where there is none."""
    with suppress(OSError):
        return Path(tempfile.mkdtemp(prefix="flexgs-images-", dir=ROOM))
    return None


def arranged(views: list[View], limit: int, workers: int, room: int) -> tuple[dict[Key, Slot], int, int]:
    """Give photographs and masks their slots, in order, as far as memory goes.

    With random permutations, the same photographs in memory all the time are as good as the most recent.

    Args:
        views: the views whose arrays are wanted.
        limit: most bytes that the workers may take together.
        workers: the number of workers.
        room: most bytes of the file.

    Returns:
        The slots, the size of the file in bytes, and the bytes that each of the workers has left for itself.
    """
    wanted = {key: (shape, np.dtype(kind)) for view in views for key, shape, kind in view.arrays()}
    sizes = {key: -(-int(np.prod(shape)) * kind.itemsize // 64) * 64 for key, (shape, kind) in wanted.items()}
    offset = -(-len(wanted) // 64) * 64
    end = min(limit, room)
    if offset + sum(sizes.values()) > end:  # each worker decodes some ahead for itself
        end = min(room, limit - workers * ROOM_AHEAD * max(sizes.values()))
    slots: dict[Key, Slot] = {}
    for key, (shape, kind) in wanted.items():
        if offset + sizes[key] > end:
            break
        slots[key] = Slot(len(slots), offset, shape, kind)
        offset += sizes[key]
    return slots, offset, 0 if len(slots) == len(wanted) else (limit - offset) // workers
