"""Frames of a video: of each stretch of it, the sharpest one."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy.ndimage import laplace

from flexgs.errors import MissingDependencyError, UserError
from flexgs.inputs import regular_file
from flexgs.sfm.progress import Phase

if TYPE_CHECKING:
    from collections.abc import Generator

PER_SECOND, LEAST, MOST = 3, 40, 240
"""How many frames are taken where the user has not said it: so many a second, and so many in all."""
QUALITY = 95
"""JPEG quality of the frames."""


def write_frames(video: Path, folder: Path, count: int | None) -> None:
    """Write the sharpest frame of each of `count` equal stretches of a video to folder/frame_<number>.jpg.

    A short video has fewer frames than that; then all are written.

    Args:
        video: File of any kind that ffmpeg decodes.
        folder: Folder to write to; it exists.
        count: Number of frames; None for PER_SECOND, at least LEAST and at most MOST.

    Raises:
        UserError: The file is no video, or ffmpeg is not installed.
    """
    frames = _open(video)
    try:
        about = next(frames)
        (width, height), fps = about["size"], about["fps"] or 30.0
        total = round(about["duration"] * fps)
        if not total:  # the file does not say how long it is: its frames are counted
            total = sum(1 for _ in frames)
            frames = _open(video)
            next(frames)
        count = count or min(max(round(PER_SECOND * total / fps), LEAST), MOST)
        phase = Phase("video", total, "frames")
        best: tuple[float, int, np.ndarray] | None = None
        read = written = 0
        for read, raw in enumerate(frames, 1):
            frame = np.frombuffer(raw, np.uint8).reshape(height, width, 3)
            if best is None or (sharp := sharpness(frame)) > best[0]:
                best = (sharp if best else sharpness(frame)), read, frame
            if read * count >= (written + 1) * total:  # the last frame of its stretch
                _write(best, folder)
                best, written = None, written + 1
            phase.done(read)
        if best is not None and written < count:
            _write(best, folder)
            written += 1
    except (OSError, RuntimeError, StopIteration) as e:
        raise UserError(f"{video}: cannot be decoded as a video ({_last_line(e)}); expected a video, or a "
                        "folder of photographs") from None
    finally:
        frames.close()
    if not written:
        raise UserError(f"{video}: found no frame in it, expected a video; the file may be cut off")
    phase.total = read  # the file's own account of its length is not exact
    phase.end(f", {written} taken")


def sharpness(frame: np.ndarray) -> float:
    """Measure the sharpness of a frame [H, W, 3] uint8: the mean square of the Laplacian of its grey values.

    Fine detail is left out, since noise and compression change it more than motion does.
    """
    grey = Image.fromarray(frame).convert("L")
    small = grey.reduce(max(1, min(grey.size) // 360))
    return float(np.square(laplace(np.asarray(small, np.float32))).mean())


def _open(video: Path) -> "Generator":
    """Decode a video: yields its description, then the bytes of each frame, upright and RGB."""
    try:
        from imageio_ffmpeg import read_frames
    except ImportError:
        raise MissingDependencyError("imageio-ffmpeg", "capture", f"{video}: a video") from None
    path = regular_file(video, "a video").absolute()
    # A playlist may name addresses: nothing but files is read.
    return read_frames(f"file:{path}", input_params=["-protocol_whitelist", "file"],
                       output_params=["-fps_mode", "passthrough"])


def _last_line(error: Exception) -> str:
    """Return the end of what ffmpeg has said, which is why it stopped."""
    return (str(error).strip().splitlines() or ["it has no frames"])[-1].strip()


def _write(best: tuple[float, int, np.ndarray], folder: Path) -> None:
    _, number, frame = best
    Image.fromarray(frame).save(folder / f"frame_{number:06d}.jpg", quality=QUALITY, subsampling=0)
