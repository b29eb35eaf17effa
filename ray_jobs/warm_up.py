"""Compiles the rasterizer's kernels for the CPU into numba's cache, so that the workers of a scene find them there.

It takes some 20 seconds of one core, and happens while the scenes are prepared and Ray starts.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_background() -> Iterator[Callable[[], None]]:
    """Compile in another process, unless numba's cache has them; yields a function that waits for it."""
    if _compiled():
        yield lambda: None
        return
    command, here = [sys.executable, "-m", __name__], Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=here, stderr=subprocess.DEVNULL) as compiler:  # if it fails, the workers compile
        try:
            yield lambda: _wait(compiler)
        finally:
            compiler.terminate()


def _compiled() -> bool:
    """Whether numba's cache has every kernel as it is in the source now."""
    from flexgs.raster.cpu import kernels

    source = Path(kernels.__file__)
    names = [name for name, value in vars(kernels).items() if getattr(value, "targetoptions", {}).get("nogil")]
    return all(any(file.stat().st_mtime > source.stat().st_mtime
                   for file in (source.parent / "__pycache__").glob(f"{source.stem}.{name}-*.nbi")) for name in names)


def _wait(compiler: subprocess.Popen) -> None:
    if compiler.poll() is None:
        print("compiling the rasterizer, once", flush=True)
        compiler.wait()


def compile_kernels() -> None:
    """Render a few Gaussians, once with every output and every gradient."""
    import torch

    from flexgs.camera import Camera
    from flexgs.raster import render
    from flexgs.splats import Splats
    from flexgs.training.losses import photometric

    n = 4
    splats = Splats(means=torch.randn(n, 3), quats=torch.randn(n, 4), scales=torch.full((n, 3), -1.0),
                    opacities=torch.zeros(n), sh0=torch.zeros(n, 3), shN=torch.zeros(n, 15, 3)).requires_grad_()
    pose = torch.eye(4)
    pose[2, 3] = 4.0
    camera = Camera(pose, torch.tensor([[20.0, 0.0, 16.0], [0.0, 20.0, 16.0], [0.0, 0.0, 1.0]]), 32, 32)
    out = render(splats, camera, contributions=True)
    photometric(out.image, torch.zeros(32, 32, 3, dtype=torch.uint8), l1=0.8, ssim=0.2).backward()


if __name__ == "__main__":
    compile_kernels()
