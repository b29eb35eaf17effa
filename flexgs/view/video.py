"""Renders along a camera path, as a video or a still image."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flexgs.camera import Camera
from flexgs.errors import MissingDependencyError, UserError
from flexgs.files import atomic_file
from flexgs.raster import render
from flexgs.raster.contract import RasterConfig
from flexgs.splats import Splats


def write_video(splats: Splats, cameras: Sequence[Camera], path: Path, fps: int,
                background: Sequence[float], antialiased: bool = False) -> None:
    """Render the cameras to an .mp4 (H.264) or a .gif, or the first camera alone to a .png.

    All cameras have the same size, with even width and height. UserError for any other suffix.
    """
    kinds = {".mp4": _mp4, ".gif": _gif, ".png": _png}
    if path.suffix.lower() not in kinds:
        raise UserError(f"--output {path}: expected a name that ends in {', '.join(kinds)}")
    with atomic_file(path) as out:
        kinds[path.suffix.lower()](frames(splats, cameras, background, antialiased), out, fps)


@torch.no_grad()
def frames(splats: Splats, cameras: Sequence[Camera], background: Sequence[float],
           antialiased: bool = False) -> Iterator[np.ndarray]:
    """Yield the render of each camera, uint8 [H, W, 3]."""
    device = splats.means.device
    colour = torch.tensor(background, device=device)
    for camera in cameras:
        image = render(splats, camera.to(device), background=colour,
                       config=RasterConfig(antialiased=antialiased)).image
        yield (255 * image.clamp(0, 1) + 0.5).byte().cpu().numpy()


def _mp4(images: Iterator[np.ndarray], path: Path, fps: int) -> None:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        raise MissingDependencyError("imageio-ffmpeg", "view", "an .mp4 file") from None
    first = next(images)
    height, width, _ = first.shape
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s",
               f"{width}x{height}", "-r", str(fps), "-i", "-", "-c:v", "libx264", "-pix_fmt", "yuv420p",
               "-crf", "10", "-f", "mp4", str(path)]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              stderr=said) as ffmpeg:
            assert ffmpeg.stdin
            with contextlib.suppress(BrokenPipeError):  # ffmpeg has ended early; its message is raised below
                for image in (first, *images):
                    ffmpeg.stdin.write(image.tobytes())
                ffmpeg.stdin.close()
        if ffmpeg.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise OSError(f"ffmpeg: {lines[0] if lines else f'exit code {ffmpeg.returncode}'}")


def _gif(images: Iterator[np.ndarray], path: Path, fps: int) -> None:
    first, *rest = (Image.fromarray(image) for image in images)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _png(images: Iterator[np.ndarray], path: Path, fps: int) -> None:
    Image.fromarray(next(images)).save(path)
