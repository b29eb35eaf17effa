"""COLMAP reconstructions, binary or text, read by pycolmap.

pycolmap trusts the sizes written in a binary file: a truncated one gives garbage poses without a word, or is answered by
an allocation without bound. So binary files are walked first, header by header, and must hold what they promise.
"""

import mmap
import signal
import struct
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from flexgs.errors import UserError
from flexgs.scene.capture import Capture, Frame, Points, from_colmap

PLACES = ("sparse/0", "sparse", "colmap/sparse/0")
PARTS = ("cameras", "images", "points3D")
MAX_NAME = 4096


def find_model(root: Path) -> Path | None:
    """The first of PLACES under root that holds any file of a reconstruction, or None."""
    for place in PLACES:
        if any((root / place / f"{part}{suffix}").is_file() for part in PARTS for suffix in (".bin", ".txt")):
            return root / place
    return None


def library() -> ModuleType:
    """pycolmap. Its import makes SIGTERM, by which schedulers end a run, print a stack trace; that is undone here."""
    import pycolmap

    if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    return pycolmap


def read_colmap(model: Path, images: Path) -> Capture:
    """The reconstruction in the folder model of the photographs in the folder images.

    UserError if a file is absent, truncated or damaged, or a camera model is not supported.
    """
    pycolmap = library()
    suffix = _suffix(model)
    if suffix == ".bin":
        for part in (*PARTS, "rigs", "frames"):
            if (file := model / f"{part}.bin").exists():
                check_binary(file)
    try:
        found = pycolmap.Reconstruction(str(model))
        posed = [image for image in found.images.values() if image.has_pose]
        ids = {image.camera_id for image in posed}
        lenses = {i: from_colmap(camera) for i, camera in found.cameras.items() if i in ids}
        viewmats = [np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]]) for image in posed]
    except (ValueError, IndexError, KeyError, RuntimeError, MemoryError) as e:
        raise UserError(f"{model}: the COLMAP files do not fit together or are damaged ({_first_line(e)}); expected the "
                        f"cameras{suffix}, images{suffix} and points3D{suffix} of one reconstruction: copy or export them "
                        "again") from e
    for lens in lenses.values():
        lens.check(model / f"cameras{suffix}")
    frames = []
    for image, viewmat in zip(posed, viewmats, strict=True):
        if not np.isfinite(viewmat).all():
            raise UserError(f"{model / f'images{suffix}'}: the pose of {image.name} is not a number: the file is damaged, "
                            "copy or export it again")
        frames.append(Frame(image.name, images, image.name, lenses[image.camera_id], viewmat))
    points = _points(found)
    if suffix == ".txt":
        _warn_if_short(model / "points3D.txt", len(points))
    return Capture("colmap", model / f"cameras{suffix}", frames, points if len(points) else None)


def _suffix(model: Path) -> str:
    """Which kind of file the folder holds completely, ".bin" before ".txt"."""
    for suffix in (".bin", ".txt"):
        if all((model / f"{part}{suffix}").is_file() for part in PARTS):
            return suffix
    found = sorted(p.name for p in model.iterdir() if p.suffix in (".bin", ".txt"))
    raise UserError(f"{model}: found only {', '.join(found)}; expected cameras, images and points3D, "
                    "all as .bin or all as .txt: copy the missing files from the COLMAP run")


def _points(found) -> Points:
    ids = sorted(found.points3D.keys())  # the order in memory differs from one file format to the other
    points = [found.points3D[i] for i in ids]
    xyz = np.array([p.xyz for p in points], np.float64).reshape(-1, 3)
    rgb = np.array([p.color for p in points], np.uint8).reshape(-1, 3)
    finite = np.isfinite(xyz).all(1)
    return Points(torch.from_numpy(xyz[finite]), torch.from_numpy(rgb[finite]))


def _warn_if_short(file: Path, count: int) -> None:
    """Text cut at the end of a line is valid text; COLMAP's comment on top says how much there was."""
    with file.open(errors="replace") as lines:
        for line in lines:
            if not line.startswith("#"):
                return
            promised = line.partition("Number of points:")[2].partition(",")[0].strip()
            if promised.isdigit() and int(promised) > count:
                warnings.warn(f"{file}: its head promises {promised} points, found {count}; is the file complete?",
                              stacklevel=4)
                return


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -- the guard --------------------------------------------------------------------------------------------------------

class _Bytes:
    """A little-endian binary file read front to back; running over its end is a UserError."""

    def __init__(self, file: Path, data: mmap.mmap | bytes):
        self.file, self.data, self.at = file, data, 0

    def skip(self, count: int) -> None:
        if self.at + count > len(self.data):
            raise UserError(f"{self.file}: found {len(self.data)} bytes, expected at least {self.at + count}: the file is "
                            "truncated or damaged, copy or export it again")
        self.at += count

    def take(self, layout: struct.Struct) -> tuple:
        start = self.at
        self.skip(layout.size)
        return layout.unpack_from(self.data, start)

    def skip_string(self) -> None:
        end = self.data.find(b"\0", self.at, self.at + MAX_NAME)
        self.skip(MAX_NAME if end < 0 else end + 1 - self.at)
        if end < 0:
            raise UserError(f"{self.file}: found an image name of over {MAX_NAME} bytes: the file is damaged, copy or "
                            "export it again")


_U64, _U32, _CAMERA = struct.Struct("<Q"), struct.Struct("<I"), struct.Struct("<IiQQ")
_IMAGE_POSE, _POINT, _POSE = 4 + 7 * 8 + 4, 8 + 3 * 8 + 3 + 8, 7 * 8
_RIG, _SENSOR, _FRAME = struct.Struct("<II"), struct.Struct("<iIB"), struct.Struct(f"<II{_POSE}xI")


def _camera(data: _Bytes) -> None:
    _, model, _, _ = data.take(_CAMERA)
    count = _parameter_count(model)
    if count is None:
        raise UserError(f"{data.file}: found camera model number {model}, which COLMAP does not define: the file is "
                        "damaged, copy or export it again")
    data.skip(8 * count)


def _image(data: _Bytes) -> None:
    data.skip(_IMAGE_POSE)
    data.skip_string()
    data.skip(24 * data.take(_U64)[0])


def _point(data: _Bytes) -> None:
    data.skip(_POINT)
    data.skip(8 * data.take(_U64)[0])


def _rig(data: _Bytes) -> None:
    _, sensors = data.take(_RIG)
    if sensors:
        data.skip(8)  # the reference sensor has no pose
    for _ in range(sensors - 1):
        data.skip(_POSE if data.take(_SENSOR)[2] else 0)


def _frame(data: _Bytes) -> None:
    data.skip(16 * data.take(_FRAME)[2])


_RECORDS: dict[str, Callable[[_Bytes], None]] = {
    "cameras": _camera, "images": _image, "points3D": _point, "rigs": _rig, "frames": _frame}


@cache
def _parameter_count(model: int) -> int | None:
    pycolmap = library()
    try:
        return len(pycolmap.Camera.create_from_model_id(1, pycolmap.CameraModelId(model), 1.0, 1, 1).params)
    except (ValueError, IndexError):
        return None


def check_binary(file: Path) -> None:
    """UserError unless the COLMAP file (cameras, images, points3D, rigs or frames .bin) is as long as its counts say."""
    if not file.stat().st_size:  # cannot be mapped
        return _check(_Bytes(file, b""))
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check(_Bytes(file, data))


def _check(data: _Bytes) -> None:
    record = _RECORDS[data.file.stem]
    for _ in range(data.take(_U64)[0]):
        record(data)
