"""Compiles the rasterizer's kernels for the CPU into numba's cache, so that the workers of a scene find them
there.

It takes some 20 seconds of one core the first time, and happens while the scenes are prepared and Ray starts.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background() -> Iterator[Callable[[], None]]:
    """Compile in another process; yields a function that waits for it."""
    command = [sys.executable, "-m", "flexgs.training.warmup"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as compiler:  # if it fails, the workers compile
        try:
            yield lambda: _wait(compiler)
        finally:
            compiler.terminate()


def _wait(compiler: subprocess.Popen) -> None:
    if compiler.poll() is None:
        print("compiling the rasterizer, once", flush=True)
        compiler.wait()
