"""Contents of a capture before any image is opened, as the COLMAP and transforms.json readers return it."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from flexgs.scene.camera_model import CameraModel


@dataclass(eq=False)
class Points:
    """The sparse points of a capture."""

    xyz: Tensor
    """Positions [M, 3] in world units: float64 in the capture's own coordinates; in a loaded Scene, float32
    about the origin of the scene."""
    rgb: Tensor
    """Colours [M, 3] uint8, sRGB."""

    def __len__(self) -> int:
        return self.xyz.shape[0]


@dataclass(eq=False)
class Frame:
    """One photograph of a capture."""

    name: str
    """Name of the view; views are sorted by it."""
    folder: Path
    """Folder of the images in full size."""
    file: str
    """Path of the photograph relative to folder; it need not exist."""
    lens: CameraModel
    viewmat: np.ndarray
    """Pose, world to camera, [4, 4] float64, OpenCV axes."""
    split: str | None = None
    """"train", "test", "val" or "none" (in no list); None if the capture has no split of its own."""
    mask: Path | None = None
    """Path of the mask, if the capture names one."""

    def reduced_folder(self, factor: int) -> Path:
        """Return the folder for images at 1/factor of the size, such as images_4; it need not exist."""
        return self.folder.parent / f"{self.folder.name}_{factor}"


@dataclass(eq=False)
class Capture:
    """A capture as a reader returns it."""

    format: str
    """"colmap" or "transforms"."""
    file: Path
    """File or folder that errors about the cameras name."""
    frames: list[Frame]
    points: Points | None
    model: str | None = None
    """Path of the COLMAP model relative to the capture; None for other formats."""
    doubts: list[str] = field(default_factory=list)
    """Warnings for the user, one line each: ambiguities, contradictions, and data that are left out."""
