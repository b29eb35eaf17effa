"""The options of structure from motion."""

from dataclasses import dataclass
from typing import Annotated, Literal

from flexgs.inputs import Range

FEWEST = 3
"""Photographs with a pose that a capture needs: two to train on and one to test on."""


@dataclass
class CaptureOptions:
    """How a capture is made of photographs or a video."""

    frames: Annotated[int, Range(FEWEST, 100_000)] | None = None
    """Frames to take from a video, the sharpest of as many stretches. None: 3 a second, 40 to 240 in all."""
    each_camera: bool = False
    """Estimate a camera for each photograph, for lenses that zoom. Default: photographs of the same size and
    focal length share one."""
    camera_model: Literal["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV",
                          "OPENCV_FISHEYE"] = "SIMPLE_RADIAL"
    """Camera model of COLMAP."""
    features: Annotated[int, Range(100, 100_000)] = 8192
    """Most features of a photograph."""
    exhaustive: Annotated[int, Range(2, 100_000)] = 60
    """Up to so many photographs, all pairs are matched; of more, those that follow each other by name and
    those that look alike."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of COLMAP's random numbers."""
