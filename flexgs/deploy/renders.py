"""A capture of a model's own renders, for training on a model that comes without photographs."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flexgs.camera import WORLD, Camera
from flexgs.files import atomic_folder, write_json
from flexgs.formats import save
from flexgs.inputs import read_json
from flexgs.raster import render
from flexgs.splats import Splats

OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
POINTS = 10_000
"""Gaussians whose means are the points of the capture."""


def write_renders(model: Splats, cameras: Sequence[Camera], folder: Path, source: Path) -> None:
    """Write the renders of model at cameras into folder: images/ and a transforms.json, as nerfstudio has it.

    A folder that was written for the same bytes of source, the file that model was read from, stays.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    about = folder / "transforms.json"
    if about.is_file() and read_json(about).get("rendered_from") == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as out:
        (out / "images").mkdir()
        frames = []
        for i, camera in enumerate(cameras):
            with torch.no_grad():
                image = render(model, camera).image.clamp(0, 1)
            name = f"images/{i:03}.png"
            Image.fromarray((255 * image).round().byte().numpy()).save(out / name)
            pose = np.linalg.inv(camera.at(WORLD).viewmat.double().numpy()) @ OPENCV_TO_OPENGL
            K = camera.K
            frames.append({"file_path": name, "transform_matrix": pose.tolist(), "w": camera.width,
                           "h": camera.height, "fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]),
                           "cx": float(K[0, 2]), "cy": float(K[1, 2])})
        save(model[:: max(1, len(model) // POINTS)], out / "points.ply")
        write_json(out / "transforms.json", {"camera_model": "PINHOLE", "ply_file_path": "points.ply",
                                             "rendered_from": digest, "frames": frames})
