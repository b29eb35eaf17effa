"""Captures described by JSON: nerfstudio, instant-ngp, and the split files of Blender-made scenes."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from flexgs.errors import UserError
from flexgs.scene.capture import LENSES, Capture, Frame, Lens, Points
from flexgs.scene.ply import read_points
from flexgs.scene.views import find_image, image_size

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def find_transforms(root: Path) -> list[Path]:
    """transforms.json, or else transforms_train.json with transforms_test.json beside it; empty if neither is there."""
    if (single := root / "transforms.json").is_file():
        return [single]
    if (train := root / "transforms_train.json").is_file():
        return [file for file in (train, root / "transforms_test.json") if file.is_file()]
    return []


def read_transforms(root: Path, files: list[Path]) -> Capture:
    """The cameras of these files. Poses are camera to world with OpenGL axes (x right, y up, z backward).

    Intrinsics (fl_x, fl_y, cx, cy, w, h, k1 ... k6, p1, p2, camera_angle_x) stand at the top or in a frame.
    UserError if a file is not such JSON, has a bad pose or a lens that is not supported.
    """
    frames: list[Frame] = []
    points = None
    for file in files:
        data = _load(file)
        split = file.stem.partition("_")[2] or None
        held_out = set(data.get("test_filenames") or [])
        size = _image_size(file, data)
        for i, entry in enumerate(data["frames"]):
            if not isinstance(entry, dict) or not isinstance(entry.get("file_path"), str):
                raise UserError(f"{file}: frame {i} has no file_path")
            where = f"{file}: frame {i} ({entry['file_path']})"
            path = root / entry["file_path"]
            lens = _lens({**data, **entry}, size, where)
            lens.check(file)
            mask = root / entry["mask_path"] if isinstance(entry.get("mask_path"), str) else None
            part = split or (("test" if entry["file_path"] in held_out else "train") if held_out else None)
            frames.append(Frame(path.name, path.parent, path.name, lens, _viewmat(entry, where), part, mask))
        if isinstance(data.get("ply_file_path"), str):
            points = Points(*map(torch.from_numpy, read_points(root / data["ply_file_path"])))
    if len({frame.folder for frame in frames}) > 1:
        for frame in frames:
            frame.name = f"{frame.folder.name}/{frame.file}"
    return Capture("transforms", files[0], frames, points if points is not None and len(points) else None)


def _load(file: Path) -> dict:
    try:
        data = json.loads(file.read_text())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not valid JSON ({e}): the file is damaged, copy or export it again") from e
    if not isinstance(data, dict) or not isinstance(data.get("frames"), list) or not data["frames"]:
        raise UserError(f"{file}: found no list of frames; expected the transforms.json of nerfstudio or instant-ngp")
    return data


def _image_size(file: Path, data: dict) -> tuple[int, int] | None:
    """(width, height) for frames that do not say theirs: that of the first image there is."""
    if "w" in data and "h" in data:
        return None
    paths = (file.parent / entry["file_path"] for entry in data["frames"]
             if isinstance(entry, dict) and isinstance(entry.get("file_path"), str))
    found = next((image for path in paths if (image := find_image(path))), None)
    if found is None:
        raise UserError(f"{file}: not one of the images of its {len(data['frames'])} frames is there, and no w and h: "
                        "copy the images beside it")
    return image_size(found)


def _lens(values: dict, size: tuple[int, int] | None, where: str) -> Lens:
    """The lens of a frame from its own values over those of the file."""
    def number(*keys: str) -> float | None:
        for key in keys:
            if (value := values.get(key)) is not None:
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise UserError(f"{where}: found {key} = {value!r}, expected a number")
                return float(value)
        return None

    w, h = number("w") or (size or (0, 0))[0], number("h") or (size or (0, 0))[1]

    def focal(key: str, angle: str, length: float) -> float | None:
        value, radians = number(key), number(angle)
        return value if value or not radians else 0.5 * length / math.tan(0.5 * radians)

    fx = focal("fl_x", "camera_angle_x", w)
    fy = focal("fl_y", "camera_angle_y", h) or fx
    if not fx or not fy:
        raise UserError(f"{where}: found no focal length; expected fl_x or camera_angle_x")
    cx, cy = number("cx"), number("cy")
    pinhole = (fx, fy, w / 2 if cx is None else cx, h / 2 if cy is None else cy)
    k1, k2, p1, p2, *higher = (number(key) or 0.0 for key in ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"))
    named = str(values.get("camera_model") or "OPENCV")
    if values.get("is_fisheye"):
        named = "OPENCV_FISHEYE"
    if named == "OPENCV_FISHEYE":  # nerfstudio's k1 to k4 are the coefficients of OpenCV, as COLMAP's
        return Lens(named, int(w), int(h), (*pinhole, k1, k2, higher[0], higher[1]))
    if named not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "FULL_OPENCV"):
        named = f"{named} of transforms.json" if named in LENSES else named
        return Lens(named, int(w), int(h), pinhole)  # refused by Lens.check, by its name
    if any(higher):
        return Lens("FULL_OPENCV", int(w), int(h), (*pinhole, k1, k2, p1, p2, *higher))
    if any((k1, k2, p1, p2)):
        return Lens("OPENCV", int(w), int(h), (*pinhole, k1, k2, p1, p2))
    return Lens("PINHOLE", int(w), int(h), pinhole)


def _viewmat(entry: dict, where: str) -> np.ndarray:
    """[4, 4] world to camera, OpenCV axes."""
    try:
        pose = np.array(entry.get("transform_matrix"), dtype=np.float64)
    except (ValueError, TypeError):
        pose = np.empty(0)
    if pose.shape not in ((3, 4), (4, 4)) or not np.isfinite(pose).all():
        raise UserError(f"{where}: transform_matrix is not a 4x4 matrix of numbers")
    R, t = pose[:3, :3], pose[:3, 3]
    if np.abs(R @ R.T - np.eye(3)).max() > 0.01 or np.linalg.det(R) < 0:
        raise UserError(f"{where}: the left 3x3 part of transform_matrix is not a rotation; expected camera to world "
                        "without scale")
    U, _, Vt = np.linalg.svd(R)  # digits are lost in JSON: the nearest exact rotation
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = U @ Vt, t
    return np.linalg.inv(pose @ OPENGL_TO_OPENCV)
