"""Compile the rasterizer's CPU kernels into numba's cache, where the workers of a scene find them.

The first time, that takes some 20 seconds of one core, while scenes are read and Ray starts.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background() -> Iterator[Callable[[], None]]:
    """Compile in another process, and yield a function that waits for it."""
    command = [sys.executable, "-m", "flexgs.training.warmup"]
    # Errors are not shown: if it fails, the workers compile the kernels themselves.
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as compiler:
        try:
            yield lambda: _wait(compiler)
        finally:
            compiler.terminate()


def _wait(compiler: subprocess.Popen) -> None:
    if compiler.poll() is None:
        print("compiling the rasterizer, once", flush=True)
        compiler.wait()
