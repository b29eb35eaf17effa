"""What a capture on disk says, before any image is opened: the common ground of the COLMAP and
transforms.json readers."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from flexgs.scene.camera_model import CameraModel


@dataclass(eq=False)
class Points:
    """The sparse points of a capture."""

    xyz: Tensor
    """[M, 3] in world units: float64 in the capture's own coordinates; once a scene is loaded, float32 from
    its origin."""
    rgb: Tensor
    """[M, 3] uint8."""

    def __len__(self) -> int:
        return self.xyz.shape[0]


@dataclass(eq=False)
class Frame:
    """One photograph of a capture."""

    name: str
    """What the view is called; views are ordered by it."""
    folder: Path
    """The images folder, at factor 1."""
    file: str
    """The photograph, relative to folder; it need not exist."""
    lens: CameraModel
    viewmat: np.ndarray
    """[4, 4] float64, world to camera, OpenCV axes."""
    split: str | None = None
    """"train", "test", "val" or "none" (in no list) where the capture itself says so."""
    mask: Path | None = None
    """The mask where the capture itself names one."""

    def reduced_folder(self, factor: int) -> Path:
        """Where its photograph may lie at 1/factor of the size: images_<factor> beside images. It need not
        exist."""
        return self.folder.parent / f"{self.folder.name}_{factor}"


@dataclass(eq=False)
class Capture:
    """A capture as its reader found it."""

    format: str
    """"colmap" or "transforms"."""
    file: Path
    """The file or folder to name when the cameras are wrong."""
    frames: list[Frame]
    points: Points | None
    model: str | None = None
    """The sub-model of a COLMAP reconstruction, by its path in the capture."""
    doubts: list[str] = field(default_factory=list)
    """What was read in one of several ways, left out or contradicts itself: a line each, for the user."""
