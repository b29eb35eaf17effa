"""Measured frame times, which turn a budget in milliseconds into a number of Gaussians."""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression

from flexgs.camera import Camera
from flexgs.camera_path import around, orbit
from flexgs.device import clock
from flexgs.errors import UserError
from flexgs.files import write_json
from flexgs.inputs import Range, read_json, typed
from flexgs.raster import render
from flexgs.splats import Splats

if TYPE_CHECKING:
    from flexgs.model.elastic import Cuttable

RATIOS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Profile:
    """Milliseconds per frame on one machine, at rising numbers of Gaussians."""

    gaussians: tuple[int, ...]
    ms: tuple[float, ...]
    about: str = ""
    """Image size and device of the measurement, for messages."""

    def __str__(self) -> str:
        return f"frames of {self.about}: " + ", ".join(
            f"{n:,} Gaussians {ms:.1f} ms" for n, ms in zip(self.gaussians, self.ms, strict=True))

    def most(self, ms: float) -> int:
        """Return how many Gaussians can be rendered in `ms` milliseconds per frame.

        Interpolated linearly between the measured numbers (made monotonic), and never above the largest of
        them. UserError if even the smallest takes longer.
        """
        times = isotonic_regression(self.ms)
        if ms < times[0]:
            raise UserError(f"{ms:g} ms per frame: even {self.gaussians[0]:,} Gaussians "
                            f"take {times[0]:.2f} ms; expected more time, a smaller --size or a "
                            "faster machine's --profile")
        return int(np.interp(ms, times, self.gaussians))

    def save(self, path: Path) -> None:
        """Write the profile as JSON."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "Profile":
        """Read a profile from JSON, written by save() or by hand with rising `gaussians` and as many `ms`."""
        try:
            about = read_json(path, dict[str, Any])
            positive = tuple[Annotated[float, Range(0, 1e12, "(]")], ...]
            gaussians, ms = (typed(positive, about.get(key), f"{path}: {key}") for key in ("gaussians", "ms"))
            if (len(gaussians) != len(ms) or len(ms) < 2
                or list(gaussians) != sorted(set(map(int, gaussians)))):
                raise UserError(f"{path}: found lists that do not fit")
            return Profile(tuple(map(int, gaussians)), ms, str(about.get("about", "")))
        except UserError as e:
            why = str(e).removeprefix(f"{path}: ")
            raise UserError(f"{path}: not a profile of frame times ({why}); expected JSON with the "
                            'lists gaussians and ms, such as {"gaussians": [10000, '
                            '1000000], "ms": [2.5, 14]}') from None


def measure_frames(model: "Cuttable", size: tuple[int, int], device: str) -> Profile:
    """Time renders of several cuts of the model on this machine: the median over an orbit, per cut."""
    cameras = orbit(model.cameras or around(model.cut(1.0)), 6, *size)
    frame_ms(model.cut(1.0).to(device), cameras[0])  # compile and warm up
    counts: list[int] = []
    times: list[float] = []
    for ratio in RATIOS:
        splats = model.cut(ratio).to(device)
        if counts and len(splats) == counts[-1]:
            continue  # a small model has no further cut at this ratio
        counts.append(len(splats))
        times.append(round(statistics.median(frame_ms(splats, camera) for camera in (*cameras, *cameras)), 3))
    return Profile(tuple(counts), tuple(times), f"{size[0]}x{size[1]} on {device}")


@torch.no_grad()
def frame_ms(splats: Splats, camera: Camera) -> float:
    """Milliseconds to render one frame."""
    device = splats.means.device
    start = clock(device)
    render(splats, camera.to(device))
    return 1000 * (clock(device) - start)
