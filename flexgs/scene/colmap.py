"""Reader of COLMAP reconstructions, binary or text.

pycolmap is not used to read them: it trusts the sizes that a binary file promises, reads every second line of
a text file whatever it holds, and takes the poses of frames.bin however old that file is.
"""

import contextlib
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flexgs.errors import UserError
from flexgs.inputs import regular_file, shown
from flexgs.scene.camera_model import CameraModel
from flexgs.scene.capture import Capture, Frame, Points
from flexgs.scene.pycolmap_library import library
from flexgs.scene.views import find_image

PLACES = ("sparse", "colmap/sparse")
PARTS = ("cameras", "images", "points3D")
SUFFIXES = (".bin", ".txt")
MAX_NAME = 4096
"""Most bytes of an image name."""
SAMPLE = 200
"""About how many observations of an image its pose is checked against."""

Array = np.ndarray


def find_models(root: Path) -> list[Path]:
    """List the folders of a capture that hold any file of a COLMAP model.

    They are the folders in sparse/, by number and then by name, followed by sparse/ itself. Only if there are
    none, colmap/sparse/ is searched in the same way.
    """
    for place in PLACES:
        folder = root / place
        inner = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
        inner.sort(key=lambda p: (not p.name.isdigit(), int(p.name) if p.name.isdecimal() else 0, p.name))
        if found := [p for p in (*inner, folder)
                     if any((p / f"{part}{end}").is_file() for part in PARTS for end in SUFFIXES)]:
            return found
    return []


def read_colmap(root: Path, models: list[Path], images: Path, wanted: str | None = None) -> Capture:
    """Read one COLMAP model of a capture.

    Args:
        root: Folder of the capture.
        models: Folders of its models, as find_models returns them.
        images: Folder of the photographs.
        wanted: Which model, by the path from root or by the last part of it; None reads the model that gives
            the most photographs a pose.

    Raises:
        UserError: There is no such model, a file is absent, truncated or damaged, or a camera model is not
            supported.
    """
    doubts: list[str] = []
    model = _choose(root, models, images, wanted, doubts)
    suffix = _suffix(model)
    found = (_Binary if suffix == ".bin" else _Text)(model).read(doubts)
    cameras, file = model / f"cameras{suffix}", model / f"images{suffix}"
    for image in found.images:
        if image.camera not in found.cameras:
            raise UserError(f"{file}: the image {shown(image.name)} names camera {image.camera}, which "
                            f"{cameras.name} does not have: the files are of different reconstructions, copy "
                            "or export them again")
    for camera in sorted({image.camera for image in found.images}):
        found.cameras[camera].check(cameras)
    if suffix == ".bin" and (model / "images.txt").is_file():
        _compare_text(found, model, doubts)
    _settle_poses(found, model, suffix, doubts)
    frames = [Frame(image.name, images, image.name, found.cameras[image.camera], image.pose)
              for image in found.images]
    xyz, finite = found.xyz, np.isfinite(found.xyz).all(1)
    if not finite.all():
        doubts.append(f"{model / f'points3D{suffix}'}: {np.sum(~finite)} of {len(xyz)} points have a "
                      "position that is no number and are left out")
    points = Points(torch.from_numpy(xyz[finite]),
                    torch.from_numpy(found.rgb[finite])) if finite.any() else None
    return Capture("colmap", cameras, frames, points, model=str(model.relative_to(root)), doubts=doubts)


def _choose(root: Path, models: list[Path], images: Path, wanted: str | None, doubts: list[str]) -> Path:
    names = [str(model.relative_to(root)) for model in models]
    if wanted is not None:
        for model, name in zip(models, names, strict=True):
            if Path(wanted) in (Path(name), Path(model.name)):
                return model
        raise UserError(f"{root}: found no sub-model {wanted!r} (--data.model), expected one "
                        f"of {', '.join(names)}")
    if len(models) == 1:
        return models[0]
    counts: dict[Path, int] = {}
    for model in models:
        try:
            suffix = _suffix(model)
            named = (_Binary if suffix == ".bin" else _Text)(model).names()
        except UserError as e:
            doubts.append(f"{e}; this sub-model is not looked at further")
            continue
        counts[model] = sum(find_image(images / name) is not None for name in named) or -bool(named)
    if not counts:
        raise UserError(doubts[0])
    best = max(counts, key=lambda model: counts[model])  # max returns the first of equal ones
    others = ", ".join(f"{model.relative_to(root)} has {max(n, 0)}"
                       for model, n in counts.items() if model != best)
    if others:
        doubts.append(f"{root}: of {len(models)} sub-models {best.relative_to(root)} is used, "
                      f"whose poses are those of {max(counts[best], 0)} photographs ({others}); "
                      "--data.model chooses another")
    return best


def _suffix(model: Path) -> str:
    """Find the kind of file of which a model is complete: ".bin", or else ".txt"."""
    for suffix in SUFFIXES:
        if all((model / f"{part}{suffix}").is_file() for part in PARTS):
            return suffix
    found = sorted(p.name for p in model.iterdir() if p.suffix in SUFFIXES)
    raise UserError(f"{model}: found only {', '.join(found)}; expected cameras, images and points3D, "
                    "all as .bin or all as .txt: copy the missing files from the COLMAP run")


# -- contents of both kinds of file --------------------------------------------------------------------------

class _Image(NamedTuple):
    """One photograph of a COLMAP model."""

    id: int
    pose: Array
    """World to camera, [4, 4] float64."""
    camera: int
    """Id of the camera in _Model.cameras."""
    name: str
    xy: Array
    """Observations in pixels, [n, 2] float64."""
    seen: Array
    """Id of the point that each observation belongs to, [n] int64; negative for none."""


@dataclass
class _Model:
    """A COLMAP model as its files hold it."""

    cameras: dict[int, CameraModel]
    images: list[_Image]
    ids: Array
    """Ids of the points, [M] int64, ascending."""
    xyz: Array
    """Positions of the points, [M, 3] float64."""
    rgb: Array
    """Colours of the points, [M, 3] uint8."""
    sensors: dict[tuple[int, int, int], Array] = field(default_factory=dict)
    """Pose of each sensor of a rig: (rig, kind, sensor) -> rig to sensor, [4, 4]."""
    frames: list[tuple[int, Array, list[tuple[int, int, int]]]] = field(default_factory=list)
    """Moments at which a rig took images: (rig, world to rig [4, 4], [(kind, sensor, image id), ...])."""

    def poses_of_frames(self) -> dict[int, Array]:
        """Map image ids to world-to-camera poses [4, 4] by the rigs and frames alone."""
        return {image: self.sensors[rig, kind, sensor] @ pose for rig, pose, data in self.frames
                for kind, sensor, image in data if kind == CAMERA and (rig, kind, sensor) in self.sensors}


CAMERA = 0
"""Number of the kind of sensor that takes photographs."""
KINDS = {"CAMERA": CAMERA, "IMU": 1}
"""Numbers of the kinds of sensors by their names in text files."""


class _Reader:
    """Reader of the files of one model, all binary or all text."""

    suffix: str

    def __init__(self, model: Path):
        self.model = model

    def file(self, part: str) -> Path:
        return regular_file(self.model / f"{part}{self.suffix}", "a file of a COLMAP reconstruction")

    def names(self) -> list[str]:
        return [image.name for image in self.images([])]

    def read(self, doubts: list[str]) -> _Model:
        ids, xyz, rgb = self.points(doubts)
        order = np.argsort(ids, kind="stable")
        found = _Model(self.cameras(doubts), self.images(doubts), ids[order], xyz[order], rgb[order])
        if all((self.model / f"{part}{self.suffix}").is_file() for part in ("rigs", "frames")):
            found.sensors, found.frames = self.rigs(), self.frames()
        return found

    def cameras(self, doubts: list[str]) -> dict[int, CameraModel]:
        raise NotImplementedError

    def images(self, doubts: list[str]) -> list[_Image]:
        raise NotImplementedError

    def points(self, doubts: list[str]) -> tuple[Array, Array, Array]:
        """Read ids [M] int64, positions [M, 3] float64 and colours [M, 3] uint8 of the points."""
        raise NotImplementedError

    def rigs(self) -> dict[tuple[int, int, int], Array]:
        raise NotImplementedError

    def frames(self) -> list[tuple[int, Array, list[tuple[int, int, int]]]]:
        raise NotImplementedError


def _pose(where: str, numbers: tuple[float, ...]) -> Array:
    """Build the pose [4, 4] of a quaternion (w, x, y, z) of any length but 0 and a translation (x, y, z)."""
    q, t = np.array(numbers[:4]), np.array(numbers[4:7])
    length = float(np.linalg.norm(q))
    if not (np.isfinite(numbers).all() and 1e-6 < length < 1e6):
        raise UserError(f"{where} has a pose that is not a rotation and a translation "
                        f"({shown(tuple(map(float, numbers)))}): the file is damaged, "
                        "copy or export it again")
    w, x, y, z = q / length
    pose = np.eye(4)
    pose[:3, :3] = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                    [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                    [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]
    pose[:3, 3] = t
    return pose


@cache
def _parameters(model: int | str) -> tuple[str, int] | None:
    """Look up a camera model of COLMAP by number or name: (name, number of parameters), or None."""
    pycolmap = library()
    try:
        number = (pycolmap.CameraModelId(model) if isinstance(model, int)
                  else pycolmap.CameraModelId.__members__[model])
        return number.name, len(pycolmap.Camera.create_from_model_id(1, number, 1.0, 1, 1).params)
    except (ValueError, IndexError, KeyError, TypeError):
        return None


# -- which poses are right -----------------------------------------------------------------------------------

def _compare_text(found: _Model, model: Path, doubts: list[str]) -> None:
    """Add a doubt if text files beside the binary model that was read hold other images, poses or cameras.

    Text files that cannot be read as a model are ignored.
    """
    with contextlib.suppress(UserError):
        text = _Text(model)
        images = {image.name: image for image in text.images([])}
        cameras = text.cameras([]) if (model / "cameras.txt").is_file() else found.cameras
        scale = _scale(found.images)

        def same(image: _Image) -> bool:
            other = images.get(image.name)
            a, b = found.cameras[image.camera], cameras.get(other.camera) if other else None
            return (other is not None and b is not None and _same_pose(image.pose, other.pose, scale)
                    and a.model == b.model
                    and np.allclose((a.width, a.height, *a.params), (b.width, b.height, *b.params),
                                    rtol=1e-6))

        differ = [image.name for image in found.images if not same(image)] + sorted(
            images.keys() - {image.name for image in found.images})
        if differ:
            doubts.append(f"{model}: its .txt files hold other images, poses or cameras than its .bin "
                          f"files, for instance of {shown(differ[0])}; the .bin files are read: delete them "
                          "if the .txt files are the newer")


def _settle_poses(found: _Model, model: Path, suffix: str, doubts: list[str]) -> None:
    """Choose between the poses of images and those of rigs and frames where the two differ.

    The poses that fit the observations of points better are kept in found.images, and a doubt names the stale
    file. Chosen poses that do not fit the observations are a doubt too. UserError if the poses differ and no
    observation tells which are right.
    """
    framed = found.poses_of_frames()
    images, stale = f"images{suffix}", f"frames{suffix} and rigs{suffix}"
    if found.frames and (lost := sum(image.id not in framed for image in found.images)):
        doubts.append(f"{model}: {stale} do not have {lost} of the {len(found.images)} images of "
                      f"{images}, so they are of another state; the poses of {images} are used: delete "
                      f"{stale} if that is right")
        framed = {}
    scale = _scale(found.images)
    differ = [image for image in found.images if image.id in framed
              and not _same_pose(image.pose, framed[image.id], scale)]
    wrong, seen = _contradicted(found, {})
    if differ:
        other, _ = _contradicted(found, framed)
        if seen == 0 or len(wrong) == len(other):
            raise UserError(f"{model}: {images} and {stale} give different poses to {len(differ)} of "
                            f"{len(found.images)} images, for instance {shown(differ[0].name)}, and no "
                            "observation tells which are right; one of them is older than the other: delete "
                            f"{stale} if {images} is the newer, or export the model again")
        good, bad = (images, stale) if len(wrong) < len(other) else (stale, images)
        doubts.append(f"{model}: {bad} give other poses than {good} to {len(differ)} of "
                      f"{len(found.images)} images and do not fit the points that these observe, so they are "
                      f"stale; those of {good} are used")
        if len(other) < len(wrong):
            wrong = other
            found.images = [image._replace(pose=framed[image.id]) for image in found.images]
    if wrong:
        pixels = max(wrong.values())
        doubts.append(f"{model}: the poses of {len(wrong)} of {seen} images do not fit the points that "
                      f"they observe, by up to {pixels:.0f} pixels, for instance "
                      f"{shown(max(wrong, key=lambda name: wrong[name]))}: {images}, cameras{suffix} and "
                      f"points3D{suffix} are of different states of the reconstruction: export them anew")


def _scale(images: Sequence[_Image]) -> float:
    """Compute the median distance (largest coordinate) of the cameras from their median position."""
    centres = np.array([-image.pose[:3, :3].T @ image.pose[:3, 3] for image in images])
    return float(np.median(np.abs(centres - np.median(centres, axis=0)).max(1))) if len(centres) else 0.0


def _same_pose(a: Array, b: Array, scale: float) -> bool:
    """Tell whether two poses differ by no more than the rounding of text files; scale is that of _scale."""
    moved, away = np.abs(a[:3, 3] - b[:3, 3]).max(), max(np.abs(a[:3, 3]).max(), np.abs(b[:3, 3]).max())
    return bool(np.abs(a[:3, :3] - b[:3, :3]).max() < 1e-4 and moved < 1e-9 + 1e-4 * scale + 1e-6 * away)


def _contradicted(found: _Model, poses: dict[int, Array]) -> tuple[dict[str, float], int]:
    """Find images half of whose observations are far from the projections of the observed points.

    poses maps image ids to poses [4, 4] that replace those in found. Returns the median distance in pixels of
    each such image by name, and how many images could be checked.
    """
    wrong, checked = {}, 0
    for image in found.images:
        rows = np.flatnonzero(image.seen >= 0)
        rows = rows[:: max(1, len(rows) // SAMPLE)]
        at = np.searchsorted(found.ids, image.seen[rows])
        known = at < len(found.ids)
        known[known] = found.ids[at[known]] == image.seen[rows[known]]
        rows, at = rows[known], at[known]
        if len(rows) < 3:
            continue
        checked += 1
        lens, pose = found.cameras[image.camera], poses.get(image.id, image.pose)
        with np.errstate(all="ignore"):
            rays = found.xyz[at] @ pose[:3, :3].T + pose[:3, 3]
            off = np.linalg.norm(lens.colmap().img_from_cam(rays) - image.xy[rows], axis=1)
        off = float(np.median(np.where(np.isfinite(off) & (rays[:, 2] > 0), off, lens.width + lens.height)))
        # COLMAP itself drops observations that are off by more than 4 pixels.
        if off > max(4, 0.005 * max(lens.width, lens.height)):
            wrong[image.name] = off
    return wrong, checked


# -- binary --------------------------------------------------------------------------------------------------

class _Bytes:
    """A little-endian binary file that is read front to back; reading over its end is a UserError."""

    def __init__(self, file: Path):
        self.file, self.at = file, 0
        with file.open("rb") as f:
            empty = not file.stat().st_size  # an empty file cannot be mapped
            self.data = b"" if empty else mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def _next(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise UserError(f"{self.file}: found {len(self.data)} bytes, expected at least "
                            f"{self.at}: the file is truncated or damaged, copy or export it again")
        return start

    def take(self, layout: struct.Struct) -> tuple:
        return layout.unpack_from(self.data, self._next(layout.size))

    def rows(self, kind: np.dtype, count: int) -> Array:
        return np.frombuffer(self.data, kind, count, self._next(kind.itemsize * count))

    def skip(self, count: int) -> None:
        self._next(count)

    def records(self, least: int) -> range:
        """Read how many records follow, each of least bytes or more, and return their range."""
        count = self.take(_U64)[0]
        if count * least > len(self.data) - self.at:
            raise UserError(f"{self.file}: found {len(self.data)} bytes, expected at least "
                            f"{self.at + count * least} for {count} records: the file is truncated or "
                            "damaged, copy or export it again")
        return range(count)

    def string(self) -> str:
        end = self.data.find(b"\0", self.at, self.at + MAX_NAME)
        start = self._next(MAX_NAME if end < 0 else end + 1 - self.at)
        if end < 0:
            raise UserError(f"{self.file}: found an image name of over {MAX_NAME} bytes: the file "
                            "is damaged, copy or export it again")
        return _decoded(self.data[start:end], str(self.file))


_U64, _CAMERA, _IMAGE = struct.Struct("<Q"), struct.Struct("<IiQQ"), struct.Struct("<I7dI")
_POINT, _POSE = struct.Struct("<Q3d3BdQ"), struct.Struct("<7d")
_RIG, _ID, _SENSOR, _FRAME, _DATUM = (struct.Struct(f"<{form}")
                                      for form in ("II", "iI", "iIB", "II7dI", "iIQ"))
_OBSERVATION = np.dtype([("xy", "<f8", 2), ("point", "<i8")])


class _Binary(_Reader):
    suffix = ".bin"

    def cameras(self, doubts: list[str]) -> dict[int, CameraModel]:
        data, found = _Bytes(self.file("cameras")), {}
        for _ in data.records(_CAMERA.size):
            number, model, width, height = data.take(_CAMERA)
            if (known := _parameters(model)) is None:
                raise UserError(f"{data.file}: found camera model number {model}, which COLMAP does not "
                                "define: the file is damaged, copy or export it again")
            params = data.rows(np.dtype("<f8"), known[1])
            _once(number in found, str(data.file), f"camera {number}")
            found[number] = CameraModel(known[0], width, height, tuple(map(float, params)))
        return found

    def images(self, doubts: list[str]) -> list[_Image]:
        data, found, ids = _Bytes(self.file("images")), [], set()
        for _ in data.records(_IMAGE.size + 9):
            number, *pose, camera = data.take(_IMAGE)
            name = data.string()
            seen = data.rows(_OBSERVATION, data.take(_U64)[0])
            _once(number in ids, str(data.file), f"image {number}")
            ids.add(number)
            matrix = _pose(f"{data.file}: the image {shown(name)}", tuple(pose))
            found.append(_Image(number, matrix, camera, name, seen["xy"], seen["point"]))
        return found

    def points(self, doubts: list[str]) -> tuple[Array, Array, Array]:
        data = _Bytes(self.file("points3D"))
        records = data.records(_POINT.size)
        ids, xyz, rgb = (np.empty(len(records), np.uint64), np.empty((len(records), 3)),
                         np.empty((len(records), 3), np.uint8))
        for i in records:
            ids[i], *numbers, _, length = data.take(_POINT)
            xyz[i], rgb[i] = numbers[:3], numbers[3:]
            data.skip(8 * length)
        return ids.view(np.int64), xyz, rgb

    def rigs(self) -> dict[tuple[int, int, int], Array]:
        data, found = _Bytes(self.file("rigs")), {}
        for _ in data.records(_RIG.size):
            rig, sensors = data.take(_RIG)
            if sensors:
                found[rig, *data.take(_ID)] = np.eye(4)
            for _ in range(sensors - 1):
                kind, sensor, posed = data.take(_SENSOR)
                if posed:
                    found[rig, kind, sensor] = _pose(f"{data.file}: sensor {sensor}", data.take(_POSE))
        return found

    def frames(self) -> list[tuple[int, Array, list[tuple[int, int, int]]]]:
        data, found = _Bytes(self.file("frames")), []
        for _ in data.records(_FRAME.size):
            frame, rig, *pose, count = data.take(_FRAME)
            members = [data.take(_DATUM) for _ in range(count)]
            found.append((rig, _pose(f"{data.file}: frame {frame}", tuple(pose)), members))
        return found


def _once(again: bool, where: str, what: str) -> None:
    """Refuse a file that defines the same thing again."""
    if again:
        raise UserError(f"{where}: has {what} twice: the file is damaged, copy or export it again")


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: found {shown(raw)}, which is not UTF-8, expected names in UTF-8: "
                        "rename the photograph or export the model again") from None


# -- text ----------------------------------------------------------------------------------------------------

class _Text(_Reader):
    """Reader of text files: lines of fields between blanks, where # starts a comment.

    Blank lines are skipped: the second line of an image without observations may be blank or absent.
    """

    suffix = ".txt"

    def cameras(self, doubts: list[str]) -> dict[int, CameraModel]:
        found: dict[int, CameraModel] = {}
        for where, line in self._lines("cameras", doubts, lambda: len(found)):
            with _Fields(where, "CAMERA_ID MODEL WIDTH HEIGHT PARAMS..."):
                number, model, width, height, *params = line.split()
                if (known := _parameters(model)) is None:
                    raise UserError(f"{where}: found the camera model {shown(model)}, which "
                                    "COLMAP does not define")
                if len(params) != known[1]:
                    raise UserError(f"{where}: found {len(params)} parameters, expected the "
                                    f"{known[1]} of a {model} camera")
                _once(int(number) in found, where, f"camera {int(number)}")
                found[int(number)] = CameraModel(model, int(width), int(height), tuple(map(float, params)))
        return found

    def images(self, doubts: list[str]) -> list[_Image]:
        found: list[_Image] = []
        ids: set[int] = set()
        for where, line in self._lines("images", doubts, lambda: len(found)):
            words = line.split()
            if _is_observations(words):
                if not found or len(found[-1].seen):
                    raise UserError(f"{where}: found observations (X Y POINT3D_ID ...), expected an "
                                    "image (IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME): a line is "
                                    "missing, export the model again")
                with _Fields(where, "X Y POINT3D_ID ..."):
                    found[-1] = found[-1]._replace(xy=np.array([words[0::3], words[1::3]], float).T,
                                                   seen=np.array([_signed(word) for word in words[2::3]],
                                                                 np.int64))
                continue
            with _Fields(where, "an image (IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME) or its "
                                "observations (X Y POINT3D_ID)"):
                number, *pose, camera, name = line.split(maxsplit=9)
                if len(pose) != 7:
                    raise ValueError
                matrix = _pose(f"{where}: the image {shown(name)}", tuple(map(float, pose)))
                _once(int(number) in ids, where, f"image {int(number)}")
                ids.add(int(number))
                found.append(_Image(int(number), matrix, int(camera), name, np.empty((0, 2)),
                                    np.empty(0, np.int64)))
        return found

    def points(self, doubts: list[str]) -> tuple[Array, Array, Array]:
        ids: list[int] = []
        xyz, rgb = [], []
        for where, line in self._lines("points3D", doubts, lambda: len(ids)):
            with _Fields(where, "POINT3D_ID X Y Z R G B ERROR and pairs of IMAGE_ID POINT2D_IDX"):
                number, *rest = line.split(maxsplit=8)
                colour = [int(word) for word in rest[3:6]]
                float(rest[6])
                if min(colour) < 0 or max(colour) > 255 or (len(rest) > 7 and len(rest[7].split()) % 2):
                    raise ValueError
                xyz.append([float(word) for word in rest[:3]])
                rgb.append(colour)
                ids.append(_signed(number))
        return (np.array(ids, np.int64), np.array(xyz, float).reshape(-1, 3),
                np.array(rgb, np.uint8).reshape(-1, 3))

    def rigs(self) -> dict[tuple[int, int, int], Array]:
        found = {}
        for where, line in self._lines("rigs", [], lambda: None):
            with _Fields(where, "RIG_ID NUM_SENSORS REF_SENSOR_TYPE REF_SENSOR_ID and sensors"):
                rig, count, *words = line.split()
                if int(count):
                    found[int(rig), KINDS[words[0]], int(words[1])] = np.eye(4)
                    words = words[2:]
                for _ in range(int(count) - 1):
                    key, posed, words = (int(rig), KINDS[words[0]], int(words[1])), int(words[2]), words[3:]
                    if posed:
                        found[key] = _pose(f"{where}: sensor {key[2]}", tuple(map(float, words[:7])))
                        words = words[7:]
                if words:
                    raise ValueError
        return found

    def frames(self) -> list[tuple[int, Array, list[tuple[int, int, int]]]]:
        found = []
        for where, line in self._lines("frames", [], lambda: None):
            with _Fields(where, "FRAME_ID RIG_ID QW QX QY QZ TX TY TZ NUM_DATA_IDS and its "
                                "SENSOR_TYPE SENSOR_ID DATA_ID"):
                _, rig, *pose = line.split()[:9]
                count, *words = line.split()[9:]
                if len(words) != 3 * int(count):
                    raise ValueError
                members = [(KINDS[a], int(b), int(c)) for a, b, c in zip(*[iter(words)] * 3, strict=True)]
                found.append((int(rig), _pose(f"{where}: the frame", tuple(map(float, pose))), members))
        return found

    def _lines(self, part: str, doubts: list[str],
               count: Callable[[], int | None]) -> Iterator[tuple[str, str]]:
        """Yield ("file, line n", text) for each line that is neither blank nor a comment.

        After the last line, a number of records that a comment promises is compared with count(), unless that
        is None; a difference is a doubt.
        """
        file, promised = self.file(part), None
        with file.open("rb") as lines:
            for i, raw in enumerate(lines, 1):
                where = f"{file}, line {i}"
                text = _decoded(raw, where).removeprefix("\ufeff").rstrip("\r\n").lstrip()
                if text.startswith("#"):
                    if match := re.match(r"#\s*Number of [a-zA-Z0-9 ]+:\s*(\d{1,18})\b", text):
                        promised = int(match[1])
                elif text:
                    yield where, text
        if promised is not None and (found := count()) is not None and found != promised:
            what = "points" if part == "points3D" else part
            doubts.append(f"{file}: its head promises {promised} {what}, found {found}; "
                          "is the file complete?")


class _Fields:
    """Context that turns a failure to split or convert the fields of a line into a UserError."""

    def __init__(self, where: str, expected: str):
        self.where, self.expected = where, expected

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | IndexError | KeyError | OverflowError):
            raise UserError(f"{self.where}: found something else, expected {self.expected}: the file "
                            "is damaged, copy or export it again") from None


def _is_observations(words: list[str]) -> bool:
    """Tell whether a line of images.txt holds observations, and no image: names are hardly numbers."""
    try:
        return (len(words) % 3 == 0 and all(_signed(word) >= -1 for word in words[2::3])
                and bool([*map(float, words)]))
    except (ValueError, OverflowError):
        return False


def _signed(word: str) -> int:
    """Convert the id of a point to int64; 2^64 - 1, which is COLMAP's id for no point, becomes -1."""
    number = int(word)
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError
    return number if number < 1 << 63 else number - (1 << 64)
