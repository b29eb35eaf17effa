"""Reader of transforms.json: nerfstudio, instant-ngp, and the split files of Blender-made scenes."""

import math
import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexgs.errors import UserError
from flexgs.inputs import read_json, shown
from flexgs.ply import read_points
from flexgs.scene.camera_model import LENSES, CameraModel
from flexgs.scene.capture import Capture, Frame, Points
from flexgs.scene.polynomial import POLYNOMIAL
from flexgs.scene.views import find_image, image_size, plain, stem

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
SPLITS = ("train", "val", "test")
PERSPECTIVE = ("OPENCV", "PERSPECTIVE", "SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "FULL_OPENCV")
"""Values of camera_model for a perspective camera, whose distortion is given by k1, p1, ... in the same JSON
object, as in nerfstudio."""
FOCAL = {"fl_x", "fl_y", "camera_angle_x", "camera_angle_y"}
"""Keys of the focal length: a frame with any of them inherits none of them from the top of the file."""


def find_transforms(root: Path) -> list[Path]:
    """List transforms.json, or else transforms_train.json and those of val and test; [] if there is none."""
    if (single := root / "transforms.json").is_file():
        return [single]
    files = [root / f"transforms_{split}.json" for split in SPLITS]
    return [file for file in files if file.is_file()] if files[0].is_file() else []


def read_transforms(root: Path, files: list[Path]) -> Capture:
    """Read the capture in the folder root that these files, as find_transforms lists them, describe.

    Poses in the files are camera to world with OpenGL axes (x right, y up, z backward). Intrinsics (fl_x,
    fl_y, cx, cy, w, h, k1 ... k6, p1, p2, b1, b2, camera_angle_x, camera_angle_y) are at the top of a file or
    in a frame. UserError if a file is no such JSON, a pose is no rotation and translation, or a camera model
    is not supported.
    """
    frames: list[Frame] = []
    doubts: list[str] = []
    points, notes = None, _Notes()
    for file in files:
        data = _load(file)
        places = _Places(root)
        paths = [_path(file, i, entry, places) for i, entry in enumerate(data["frames"])]
        splits = _splits(file, data, [entry["file_path"] for entry in data["frames"]], doubts)
        if splits is None and len(files) > 1:
            splits = [file.stem.partition("_")[2]] * len(paths)
        size = _image_size(file, data, paths)
        for i, (entry, path) in enumerate(zip(data["frames"], paths, strict=True)):
            where = f"{file}: frame {i} ({entry['file_path']})"
            own = FOCAL if FOCAL & entry.keys() else set()
            shared = {key: value for key, value in data.items() if key not in own}
            lens = _lens({**shared, **entry}, size, where, notes)
            lens.check(file)
            named = entry.get("mask_path")
            if named is not None and not isinstance(named, str):
                raise UserError(f"{where}: found mask_path = {shown(named)}, expected a path")
            mask = places.find(named) if named else None
            split = splits[i] if splits else None
            frames.append(Frame(path.name, path.parent, path.name, lens, _viewmat(entry, where), split, mask))
        if places.moved:
            doubts.append(f"{file}: names {places.moved} files by paths of another machine, for instance "
                          f"{shown(places.example)}; those of the same names in this folder are used")
        cloud = data.get("ply_file_path")
        if cloud is not None:
            if not isinstance(cloud, str):
                raise UserError(f"{file}: found ply_file_path = {shown(cloud)}, expected a path")
            xyz, rgb = read_points(places.find(cloud), doubts)
            points = Points(torch.from_numpy(xyz), torch.from_numpy(rgb))
    if len(files) == 1 and files[0].stem.endswith("_train"):
        doubts.append(f"{files[0]}: there is no transforms_test.json or transforms_val.json beside it, so "
                      "every so many of its photographs are held out to test on (--data.test-every)")
    _name(frames)
    return Capture("transforms", files[0], frames, points if points is not None and len(points) else None,
                   doubts=doubts + notes.lines(files[0]))


def _load(file: Path) -> dict:
    data = read_json(file, Any, "the file is damaged, copy or export it again")
    if not isinstance(data, dict) or not isinstance(data.get("frames"), list) or not data["frames"]:
        raise UserError(f"{file}: found no list of frames; expected the transforms.json of "
                        "nerfstudio or instant-ngp")
    return data


def _path(file: Path, i: int, entry: Any, places: "_Places") -> Path:
    if (not isinstance(entry, dict) or not isinstance(entry.get("file_path"), str)
        or not entry["file_path"].strip()):
        raise UserError(f"{file}: frame {i} has no file_path")
    return places.find(entry["file_path"])


class _Places:
    """Finder of the files that transforms.json names, relative to the folder root.

    Backslashes of Windows are understood. An absolute path of another machine is replaced by its longest end
    that exists in root; moved counts these, and example is the first.
    """

    def __init__(self, root: Path):
        self.root, self.moved, self.example = root, 0, ""

    def find(self, named: str) -> Path:
        if "\0" in named:
            raise UserError(f"{self.root}: transforms.json names the file {shown(named)}, expected a path")
        path = self.root / named
        if "\\" in named and not find_image(path):
            named = named.replace("\\", "/")
            path = self.root / named
        absolute = named.startswith("/") or re.match("[A-Za-z]:/", named)
        if absolute and not os.path.exists(path) and not find_image(path):
            parts = [part for part in named.split("/") if part][:-1 if named.endswith("/") else None]
            for i in range(1, len(parts)):
                here = self.root / "/".join(parts[i:])
                if os.path.isfile(here) or find_image(here):
                    self.moved, self.example = self.moved + 1, self.example or named
                    return here
        return (Path(os.path.normpath(path)) if "./" in named and not os.path.islink(path)
                and ".." not in path.parts else path)


def _name(frames: list[Frame]) -> None:
    """Add folders to the names of frames of several folders: as much of the path as tells them apart."""
    folders = {frame.folder for frame in frames}
    if len(folders) == 1:
        return
    short = len({folder.name for folder in folders}) == len(folders)
    top = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    for frame in frames:
        inner = Path(frame.folder.name) if short else Path(os.path.abspath(frame.folder)).relative_to(top)
        frame.name = (inner / frame.file).as_posix()


# -- train and test split ------------------------------------------------------------------------------------

def _splits(file: Path, data: dict, names: list[str], doubts: list[str]) -> list[str] | None:
    """Return "train", "val", "test" or "none" (in no list) for each frame; None if the file has no lists.

    A frame that one list holds out is not trained on, even if train_filenames has it too.
    """
    lists = {split: data[f"{split}_filenames"] for split in SPLITS
             if data.get(f"{split}_filenames") is not None}
    for split, listed in lists.items():
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise UserError(f"{file}: found {split}_filenames = {shown(listed)}, expected "
                            "a list of file names")
    if not lists:
        return None
    full = [_key(name) for name in names]
    by_key: dict[str, set[int]] = {}
    for i, key in enumerate(full):
        parts = key.split("/")
        for start in range(len(parts)):  # the whole path, and every end of it
            by_key.setdefault("/".join(parts[start:]), set()).add(i)
    exact: dict[str, set[int]] = {}
    for i, key in enumerate(full):
        exact.setdefault(key, set()).add(i)
    members: dict[str, set[int]] = {}
    for split, listed in lists.items():
        hits = [exact.get(_key(name)) or by_key.get(_key(name)) or _by_end(_key(name), exact)
                for name in listed]
        if lost := [name for name, hit in zip(listed, hits, strict=True) if not hit]:
            doubts.append(f"{file}: {len(lost)} of {len(listed)} names in {split}_filenames are of no "
                          f"frame, for instance {shown(lost[0])}")
        if many := [name for name, hit in zip(listed, hits, strict=True) if len(hit) > 1]:
            doubts.append(f"{file}: {len(many)} names in {split}_filenames fit several "
                          f"frames each, for instance {shown(many[0])}; all of these are taken")
        members[split] = set[int]().union(*hits)
    if both := members.get("train", set()) & (members.get("val", set()) | members.get("test", set())):
        doubts.append(f"{file}: {len(both)} frames are in train_filenames and held out by "
                      f"another list, for instance {shown(names[min(both)])}; they are not trained on")
    rest = "none" if "train" in lists else "train"
    return [next((split for split in ("test", "val", "train") if i in members.get(split, ())), rest)
            for i in range(len(names))]


def _key(name: str) -> str:
    """Normalize a path so that the spellings of lists and frames compare equal."""
    return stem(plain(posixpath.normpath(name.strip().replace("\\", "/"))).lstrip("/"))


def _by_end(key: str, exact: dict[str, set[int]]) -> set[int]:
    """Find the frames whose path is the longest possible end of an absolute path of another machine."""
    parts = key.split("/")
    return next((exact[end] for i in range(1, len(parts)) if (end := "/".join(parts[i:])) in exact), set())


# -- cameras -------------------------------------------------------------------------------------------------

def _image_size(file: Path, data: dict, paths: Iterable[Path]) -> dict[str, tuple[int, int]] | None:
    """Read (width, height) of the images that exist, by file_path; None if all frames have w and h."""
    if all("w" in {**data, **entry} and "h" in {**data, **entry} for entry in data["frames"]):
        return None
    found: dict[str, tuple[int, int]] = {}
    for entry, path in zip(data["frames"], paths, strict=True):
        if image := find_image(path):
            found[entry["file_path"]] = image_size(image)
    if not found:
        raise UserError(f"{file}: not one of the images of its {len(data['frames'])} frames is "
                        "there, and no w and h: copy the images beside it")
    return found


class _Notes:
    """Assumptions about camera models, each with the frames that it was made for."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, what: str, where: str) -> None:
        self.found.setdefault(what, []).append(where)

    def lines(self, file: Path) -> list[str]:
        return [f"{file}: {what} ({len(where)} frames)" for what, where in self.found.items()]


def _lens(values: dict, sizes: dict[str, tuple[int, int]] | None, where: str, notes: _Notes) -> CameraModel:
    """Build the camera model of a frame from its JSON values over those at the top of the file.

    Without w and h, the image size is the one in sizes (by file_path), or else the first one there.
    """
    def number(*keys: str) -> float | None:
        for key in keys:
            if (value := values.get(key)) is not None:
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise UserError(f"{where}: found {key} = {value!r}, expected a number")
                return float(value)
        return None

    size = (sizes.get(values["file_path"]) or next(iter(sizes.values()))) if sizes else (0, 0)
    w, h = number("w") or size[0], number("h") or size[1]
    if not (0 < w < 1 << 17 and 0 < h < 1 << 17 and w == int(w) and h == int(h)):
        raise UserError(f"{where}: found an image of w = {w:g} and h = {h:g}, expected positive "
                        "sizes and focal lengths")

    def focal(key: str, angle: str, length: float) -> float | None:
        value, radians = number(key), number(angle)
        if radians and not value and not 0 < radians < math.pi:
            raise UserError(f"{where}: found {angle} = {radians:g}, expected radians above 0 and below pi")
        return value if value or not radians else 0.5 * length / math.tan(0.5 * radians)

    fx = focal("fl_x", "camera_angle_x", w)
    fy = focal("fl_y", "camera_angle_y", h) or fx
    if not fx or not fy:
        raise UserError(f"{where}: found no focal length; expected fl_x or camera_angle_x")
    cx, cy = number("cx"), number("cy")
    k1, k2, p1, p2, k3, k4, k5, k6 = (number(key) or 0.0
                                      for key in ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"))
    named = values.get("camera_model") or "OPENCV"
    fisheye = values.get("is_fisheye") or False
    if not isinstance(named, str) or not isinstance(fisheye, bool):
        raise UserError(f"{where}: found camera_model = {shown(named)} and is_fisheye = {shown(fisheye)}, "
                        "expected a name and true or false")
    named = "OPENCV_FISHEYE" if fisheye else named.upper()
    # Metashape's frame camera has fx = f + b1, and its p1 and p2 are OpenCV's p2 and p1.
    if "b1" in values or "b2" in values:
        if number("b2"):
            raise UserError(f"{where}: found a skew of b2 = {number('b2'):g}, which no supported "
                            "camera has; expected 0: calibrate without it, or undistort the "
                            "photographs in Metashape")
        if named != "OPENCV_FISHEYE":
            fx, p1, p2 = fx + (number("b1") or 0.0), p2, p1
            if p1 or p2:
                notes.add("b1 and b2 are Metashape's, so p1 and p2 are taken in its order, "
                          "which is not OpenCV's", where)
    pinhole = (fx, fy, w / 2 if cx is None else cx, h / 2 if cy is None else cy)
    if not (0.05 < pinhole[2] / w < 0.95 and 0.05 < pinhole[3] / h < 0.95):
        notes.add("cx and cy are at the border of the image or beyond; they count in pixels from "
                  "its upper left corner", where)
    if named == "OPENCV_FISHEYE":  # nerfstudio and COLMAP both use OpenCV's k1 to k4
        return CameraModel(named, int(w), int(h), (*pinhole, k1, k2, k3, k4))
    if named not in PERSPECTIVE:
        named = f"{named} of transforms.json" if named in LENSES else named
        return CameraModel(named, int(w), int(h), pinhole)  # CameraModel.check refuses it by its name
    if named.endswith("PINHOLE") and any((k1, k2, p1, p2, k3, k4, k5, k6)):
        notes.add(f"the camera model is {named}, but there are distortion coefficients, which are used",
                  where)
    if named == "FULL_OPENCV" or "k5" in values or "k6" in values:  # only OpenCV's rational model has these
        if named != "FULL_OPENCV" and any((k4, k5, k6)):
            notes.add("k5 and k6 are of OpenCV's rational model, so k4 is taken as its first denominator",
                      where)
        if any((k3, k4, k5, k6)):
            return CameraModel("FULL_OPENCV", int(w), int(h), (*pinhole, k1, k2, p1, p2, k3, k4, k5, k6))
    elif k4:
        notes.add("k3 and k4 are taken as the factors of r^6 and r^8 of a polynomial, as nerfstudio and "
                  "Metashape use them; OpenCV's rational model is camera_model FULL_OPENCV", where)
    if not ("b1" in values or "b2" in values) and (k3 or k4) and (p1 or p2) and named != "FULL_OPENCV":
        notes.add("p1 and p2 are taken in OpenCV's order; Metashape's are exchanged: swap them if "
                  "they come from there", where)
    if k4:
        return CameraModel(POLYNOMIAL, int(w), int(h), (*pinhole, k1, k2, p1, p2, k3, k4))
    if k3:  # the numerator of the rational model is this polynomial
        return CameraModel("FULL_OPENCV", int(w), int(h), (*pinhole, k1, k2, p1, p2, k3, 0.0, 0.0, 0.0))
    if any((k1, k2, p1, p2)):
        return CameraModel("OPENCV", int(w), int(h), (*pinhole, k1, k2, p1, p2))
    return CameraModel("PINHOLE", int(w), int(h), pinhole)


def _viewmat(entry: dict, where: str) -> np.ndarray:
    """Read the pose of a frame: world to camera, [4, 4] float64, OpenCV axes."""
    try:
        pose = np.array(entry.get("transform_matrix"), dtype=np.float64)
    except (ValueError, TypeError):
        pose = np.empty(0)
    if pose.shape not in ((3, 4), (4, 4)) or not np.isfinite(pose).all():
        raise UserError(f"{where}: transform_matrix is not a 4x4 matrix of numbers")
    R, t = pose[:3, :3], pose[:3, 3]
    if np.abs(R).max() > 2 or np.abs(R @ R.T - np.eye(3)).max() > 0.01 or np.linalg.det(R) < 0:
        raise UserError(f"{where}: the left 3x3 part of transform_matrix is not a rotation; "
                        "expected camera to world without scale")
    if len(pose) == 4 and np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise UserError(f"{where}: the last row of transform_matrix is {shown(pose[3].tolist())}, expected "
                        "0 0 0 1: the matrix may be transposed")
    U, _, Vt = np.linalg.svd(R)  # U @ Vt is the nearest rotation: JSON files hold rounded digits
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = U @ Vt, t
    return np.linalg.inv(pose @ OPENGL_TO_OPENCV)
