"""SharedMemory: workers of one machine add up by reading each other's memory, which costs a third of gloo's
TCP on loopback."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOM = Path("/dev/shm")


class SharedMemory:
    """Two boxes of `size` bytes per worker, that all workers can read.

    A worker fills its box of this turn, waits for the others, and adds up all boxes in the order of ranks:
    the sum is bit-equal everywhere. Nobody can be two turns ahead, so a box that is filled again has been
    read by all.
    """

    def __init__(self, rank: int, files: list[Path], size: int):
        self.rank, self.size, self._turn = rank, size, 0
        self.boxes = [torch.from_file(str(file), shared=True, size=2 * size, dtype=torch.uint8).split(size)
                      for file in files]

    @staticmethod
    def open(rank: int, gather: Callable[[object], list], size: int) -> "SharedMemory | None":
        """Called by all workers together; None, for all, if they are on several machines or there is too
        little room."""
        world = len(gather(None))
        folder = gather(_reserve(world, size) if rank == 0 else None)[0]
        here = all(gather(folder is not None and folder.is_dir()))
        memory = SharedMemory(rank, [folder / str(r) for r in range(world)], size) if here else None
        # all have opened the files, which need no names any more: nothing is left behind, however a worker
        # ends
        gather(None)
        if rank == 0 and folder is not None:
            shutil.rmtree(folder)
        return memory

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The flat sum over the workers of tensors of one dtype, `size` bytes at most."""
        n = sum(t.numel() for t in parts)
        boxes = [turns[self._turn].view(parts[0].dtype)[:n] for turns in self.boxes]
        self._turn = 1 - self._turn
        torch.cat([t.reshape(-1) for t in parts], out=boxes[self.rank])
        dist.barrier()
        total = boxes[0] + boxes[1]
        for box in boxes[2:]:
            total += box
        return total


def _reserve(world: int, size: int) -> Path | None:
    """A folder with a file for each worker, whose memory is set aside now: without room there would be a
    SIGBUS later."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="flexgs-", dir=ROOM))
        for r in range(world):
            with (folder / str(r)).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 2 * size)
        return folder
    except (OSError, AttributeError):  # no such folder, or full; or a system without posix_fallocate
        if folder is not None:
            shutil.rmtree(folder)
        return None
