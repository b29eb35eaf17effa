"""Compilation of all CPU kernels on a toy scene; later processes load them from numba's cache on disk."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from flexgs.camera import Camera
from flexgs.files import write_json
from flexgs.splats import Splats


def warmup() -> None:
    """Compile all kernels before worker processes start, each of which would take ten seconds for it.

    The cache lies beside the source, or in NUMBA_CACHE_DIR where that is read-only.
    """
    from flexgs.image.losses import photometric
    from flexgs.raster import render

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, requires_grad=True)

    means = torch.tensor([[0.0, 0.0, 2.0], [0.1, 0.0, 3.0]], requires_grad=True)
    splats = Splats(means, torch.ones(2, 4, requires_grad=True), zeros(2, 3), zeros(2), zeros(2, 3),
                    zeros(2, 15, 3))
    K = torch.tensor([[16.0, 0.0, 8.0], [0.0, 16.0, 8.0], [0.0, 0.0, 1.0]])
    out = render(splats, Camera(torch.eye(4), K, 16, 16), mask=torch.ones(2), contributions="all")
    photometric(out.image, torch.zeros(16, 16, 3)).backward()
    with suppress(OSError):  # it only saves time
        write_json(_note(), _compiled_from())


def _note() -> Path:
    """Return the file that says from what the kernels in numba's cache were compiled."""
    from flexgs.raster.cpu.kernels import project_fwd

    return Path(str(project_fwd.stats.cache_path)) / "compiled.json"


def _compiled_from() -> dict[str, list | str]:
    """Return all that makes numba compile the kernels again."""
    import numba
    from numba.core.registry import cpu_target

    from flexgs.image import ssim
    from flexgs.raster.cpu import kernels

    files = [Path(str(module.__file__)).stat() for module in (kernels, ssim)]
    return {"numba": numba.__version__, "cpu": list(cpu_target.target_context.codegen().magic_tuple()),
            "sources": [[file.st_mtime_ns, file.st_size] for file in files]}


def compiled() -> bool:
    """Whether numba's cache has the kernels."""
    try:
        return bool(json.loads(_note().read_text()) == _compiled_from())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: numba has no folder for its cache
        return False


@contextmanager
def in_background() -> Iterator[Callable[[], None]]:
    """Compile in another process unless that is done, and yield a function that waits for it.

    The first time, that takes some 20 seconds of one core, while captures are read and Ray starts.
    """
    if compiled():
        yield lambda: None
        return
    # Errors are not shown: if it fails, the workers compile the kernels themselves.
    with subprocess.Popen([sys.executable, "-m", "flexgs.training.warmup"],
                          stderr=subprocess.DEVNULL) as compiler:

        def wait() -> None:
            if compiler.poll() is None:
                print("compiling the rasterizer, once", flush=True)
                compiler.wait()

        try:
            yield wait
        finally:
            compiler.terminate()


if __name__ == "__main__":
    warmup()
