"""A capture of a model's own renders, for training on a model that comes without photographs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flexgs.camera import Camera
from flexgs.errors import UserError
from flexgs.files import atomic_folder, write_json
from flexgs.formats import save
from flexgs.inputs import read_json
from flexgs.origin import WORLD
from flexgs.raster import render
from flexgs.scene.transforms import OPENGL_TO_OPENCV
from flexgs.splats import Splats

POINTS = 10_000
"""Gaussians whose means are the points of the capture."""


def write_renders(model: Splats, cameras: Sequence[Camera], folder: Path, source: Path) -> None:
    """Write the renders of model at cameras into folder: images/ and a transforms.json, as nerfstudio has it.

    A folder that was written for the same bytes of source, the file that model was read from, stays; one of
    other renders is replaced when the new ones are complete. UserError for a folder of anything else.
    """
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if folder.exists():
        about = folder / "transforms.json"
        before = read_json(about, dict).get("rendered_from") if about.is_file() else None
        if before == digest:
            return
        if before is None:
            raise UserError(f"{folder}: found a folder that holds no renders of a model, expected none; "
                            "move it away, or choose another --output")
    with atomic_folder(folder) as out:
        (out / "images").mkdir()
        frames = []
        for i, camera in enumerate(cameras):
            with torch.no_grad():
                image = render(model, camera).image.clamp(0, 1)
            name = f"images/{i:03}.png"
            Image.fromarray((255 * image).round().byte().numpy()).save(out / name)
            pose = np.linalg.inv(camera.at(WORLD).viewmat.double().numpy()) @ OPENGL_TO_OPENCV
            K = camera.K
            frames.append({"file_path": name, "transform_matrix": pose.tolist(), "w": camera.width,
                           "h": camera.height, "fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]),
                           "cx": float(K[0, 2]), "cy": float(K[1, 2])})
        save(model[:: max(1, len(model) // POINTS)], out / "points.ply")
        write_json(out / "transforms.json", {"camera_model": "PINHOLE", "ply_file_path": "points.ply",
                                             "rendered_from": digest, "frames": frames})
