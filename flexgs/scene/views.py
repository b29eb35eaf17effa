"""Views (a camera with its photograph, decoded on demand) and the order in which training draws them."""

import contextlib
import os
import threading
import unicodedata
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from flexgs.camera import Camera
from flexgs.errors import UserError
from flexgs.inputs import regular_file
from flexgs.scene.camera_model import CameraModel
from flexgs.scene.undistort import remap, straightened
from flexgs.seeds import generator
from flexgs.urls import first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
KINDS = {*map(str.lower, SUFFIXES), ".webp", ".tif", ".tiff", ".bmp"}
"""Suffixes, in lower case, by which photographs are found when a folder is searched."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
AHEAD = 4
"""Number of views that training decodes ahead, a thread for each."""
ROOM_AHEAD = 2 * AHEAD + 1
"""Number of arrays that a worker needs room for to decode image and mask of AHEAD views ahead."""
Key = tuple[Path, str]
"""What an array in the cache is of: a file, and "image" or "mask"."""
TAIL = 4096
"""Bytes at the end of a file in which its end marker is looked for."""
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
"""End markers by the format of the file."""


def cache_limit(budget: int | None = None) -> int:
    """Return the limit of a worker's ImageCache in bytes: its part of what the workers of a machine may take.

    budget: for all workers of the machine. None: a quarter of the memory that is free now (on the machine, or
        within the limit of the control group), at least 256 MB, and at most 16 GB for each worker.
    """
    # set by torchrun and, with the workers of other scenes, by the jobs on Ray
    workers = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if budget is not None:
        return budget // workers
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # the control group has no limit
        free = min(free, int((group / "memory.max").read_text())
                   - int((group / "memory.current").read_text()))
    return min(max(free // 4, 256 << 20) // workers, 16 << 30)


class Shared(Protocol):
    """Arrays that several processes share: see flexgs.scene.shared_images."""

    slots: Mapping[Key, Any]

    def get(self, key: Key, make: Callable[[], np.ndarray]) -> np.ndarray | None:
        """Return the array of a slot, which make() fills if nobody has yet; None where there is none."""


class ImageCache:
    """Cache of the most recently used arrays, as many as fit into limit bytes.

    Threads may share it: one that asks for an array that another thread is making waits for that array.
    Arrays that have a slot in `shared` are there, and do not count.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        self.shared: Shared | None = None
        self._held: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._making: dict[Key, Future[np.ndarray]] = {}
        self._lock = threading.Lock()

    def get(self, key: Key, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array of this key; call make() for it if it is not in the cache."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            other = self._making.get(key)
            if other is None:
                mine = self._making[key] = Future()
        if other is not None:
            return other.result()
        try:
            shared = self.shared.get(key, make) if self.shared else None
            array = make() if shared is None else shared
        except BaseException as e:
            with self._lock:
                del self._making[key]
            mine.set_exception(e)
            raise
        with self._lock:
            del self._making[key]
            if shared is None and array.nbytes <= self.limit:
                self._held[key] = array
                self.bytes += array.nbytes
                while self.bytes > self.limit:
                    self.bytes -= self._held.popitem(last=False)[1].nbytes
        mine.set_result(array)
        return array

    def __reduce__(self):
        return ImageCache, (self.limit,)  # a copy in another process starts empty


@dataclass(eq=False)
class View:
    """One photograph and its pinhole camera, both at the size that is trained at."""

    name: str
    camera: Camera
    path: Path
    mask_path: Path | None
    lens: CameraModel = field(repr=False)
    """Camera model of the file at path, before undistortion, at the size of that file."""
    cache: ImageCache = field(repr=False)

    def image(self) -> Tensor:
        """Return the photograph, undistorted and resized: sRGB, [H, W, 3] uint8, transparent parts white.

        Do not write into it: the tensor shares the memory of the cache. UserError if the file cannot be
        decoded.
        """
        return torch.from_numpy(self.cache.get((self.path, "image"), self._image))

    def mask(self) -> Tensor | None:
        """Return the mask, [H, W] bool, true where the photograph counts; None if there is none."""
        if self.mask_path is None:
            return None
        return torch.from_numpy(self.cache.get((self.mask_path, "mask"), self._mask))

    def prefetch(self) -> None:
        """Decode image and mask into the cache, if two for each of AHEAD views fit; meant for another thread.

        Raises what image() and mask() raise.
        """
        room = self.cache.limit >= ROOM_AHEAD * 3 * self.camera.width * self.camera.height
        if room or (self.cache.shared and all(key in self.cache.shared.slots for key, _, _ in self.arrays())):
            self.image()
            self.mask()

    def arrays(self) -> list[tuple[Key, tuple[int, ...], type]]:
        """Return key, shape and type of the arrays of image and mask in the cache."""
        size = self.camera.height, self.camera.width
        image: tuple[Key, tuple[int, ...], type] = ((self.path, "image"), (*size, 3), np.uint8)
        return [image, *([((self.mask_path, "mask"), size, np.bool_)] if self.mask_path else [])]

    def _image(self) -> np.ndarray:
        image = decode(self.path)
        if image.size != (self.lens.width, self.lens.height):
            raise UserError(f"{self.path}: found {image.width}x{image.height} pixels, but when the "
                            f"scene was loaded it had {self.lens.width}x{self.lens.height}: "
                            "load the scene again")
        return self._fit(np.array(image), Image.Resampling.BICUBIC)

    def _mask(self) -> np.ndarray:
        assert self.mask_path is not None
        mask = Image.fromarray(kept(self.mask_path).astype(np.uint8) * 255)
        mask = mask.resize((self.lens.width, self.lens.height), Image.Resampling.NEAREST)
        return self._fit(np.array(mask.convert("RGB")), Image.Resampling.NEAREST)[..., 0] > 127

    def _fit(self, pixels: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        """Undistort pixels [h, w, 3] of the file and resize them to the size of the camera."""
        if self.lens.wide:
            mode = "nearest" if resample == Image.Resampling.NEAREST else "bilinear"
            pixels = remap(pixels, self.lens, mode)
        elif self.lens.distorted:
            pixels = straightened(pixels, self.lens)
        size = (self.camera.width, self.camera.height)
        if size != (pixels.shape[1], pixels.shape[0]):
            pixels = np.array(Image.fromarray(pixels).resize(size, resample))
        return np.require(pixels, requirements=["C", "W"])


def find_image(path: Path) -> Path | None:
    """Find the image at path, or else one whose name differs only in spelling; None if there is none.

    Spellings differ in the suffix (absent, or .jpg in place of .png), upper and lower case, Unicode
    composition (macOS), blanks at the ends, and URL escapes.
    """
    if os.path.isfile(path):  # False also for an impossible name, for which Path.is_file() fails
        return path
    bases = (path.with_suffix("") if path.suffix in SUFFIXES else path, path)
    if found := next((file for base in bases for suffix in SUFFIXES
                      if os.path.isfile(file := Path(f"{base}{suffix}"))), None):
        return found
    with contextlib.suppress(OSError, ValueError):
        names = _listing(path.parent, path.parent.stat().st_mtime_ns)
        for wanted in (path.name, urllib.parse.unquote(path.name)):
            for key in (plain(wanted), plain(stem(wanted))):
                if len(same := names.get(key, [])) == 1:  # several names would be ambiguous
                    return path.parent / same[0]
    unquoted = Path(urllib.parse.unquote(str(path)))
    return find_image(unquoted) if unquoted.parent != path.parent else None


@lru_cache(64)
def _listing(folder: Path, mtime: int) -> dict[str, list[str]]:
    """Map the plain() names, with and without suffix, of the images in folder to their file names.

    The modification time of the folder is an argument so that the cache follows changes.
    """
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        if is_photograph(name):
            for key in {plain(name), plain(stem(name))}:
                found.setdefault(key, []).append(name)
    return found


def plain(name: str) -> str:
    """Normalize a name for comparison: composed Unicode letters (NFC), no blanks at the ends, lower case."""
    return unicodedata.normalize("NFC", name).strip().lower()


def stem(name: str) -> str:
    """Remove the suffix of a photograph from a path, if it has one."""
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in KINDS else name


def is_photograph(name: str) -> bool:
    """Tell by its name whether a file is a photograph; hidden files are not."""
    return os.path.splitext(name)[1].lower() in KINDS and not name.startswith(".")


class ImageHead(NamedTuple):
    """Properties of an image file that are known without decoding it."""

    width: int
    height: int
    deep: bool
    """Whether there are more than 8 bits per channel; only the upper 8 are used."""
    cmyk: bool
    """Whether the colours are CMYK."""
    turned: bool
    """Whether there is an EXIF orientation; it is ignored, as in COLMAP."""


def read_head(path: Path) -> ImageHead:
    """Read the header of an image file.

    UserError if the file is no image, is truncated, or has pixels of a kind that cannot be trained on.
    """
    with _open(path) as image:
        deep = "16" in image.mode or any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        if image.mode in ("I", "F") or (image.mode.startswith("I;") and not deep):
            raise UserError(f"{path}: found pixels of mode {image.mode}, expected 8 or 16 bits per "
                            "channel: convert the image")
        turned = ("exif" in image.info or image.format == "TIFF") and image.getexif().get(ORIENTATION, 1) != 1
        if (end := ENDS.get(image.format or "")) and end not in _tail(path):
            _load(image, path)  # fails if the file is truncated, not if other bytes follow the image
        return ImageHead(*image.size, deep, image.mode in ("CMYK", "YCCK"), turned)


def image_size(path: Path) -> tuple[int, int]:
    """Read (width, height) of an image file; its EXIF orientation is ignored, as in COLMAP."""
    head = read_head(path)
    return head.width, head.height


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read(TAIL)


def _open(path: Path) -> Image.Image:
    regular_file(path, "an image")
    try:
        return Image.open(path)
    except Exception as e:  # decoders raise many kinds of errors for damaged files
        raise UserError(f"{path}: cannot be read as an image ({first_line(e)}): copy it again") from e


def _load(image: Image.Image, path: Path) -> None:
    try:
        image.load()
    except Exception as e:
        raise UserError(f"{path}: cannot be decoded ({first_line(e)}): the file is damaged, "
                        "copy it again") from e


def decode(path: Path) -> Image.Image:
    """Decode an image to mode RGB, with white in place of transparency."""
    with _open(path) as image:
        _load(image, path)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: found pixels of mode {image.mode}, expected 8 or 16 bits per "
                            "channel: convert the image")
        if "A" in image.mode or "transparency" in image.info:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


def kept(path: Path) -> np.ndarray:
    """Decode a mask to [h, w] bool: true where any channel is above 0 and the mask is not transparent.

    JPEG blurs edges, so the limit in a JPEG file is 127 of 255 instead of 0.
    """
    with _open(path) as image:
        _load(image, path)
        least = 127 if image.format == "JPEG" else 0
        if image.mode.startswith(("I", "F", "1")):
            return np.array(image) > least
        pixels = np.array(image.convert("RGBA"))
        return (pixels[..., :3] > least).any(-1) & (pixels[..., 3] > 0)


class ViewSampler:
    """Order in which training draws n views: each epoch is a new random permutation of all of them.

    sampler[position] is the view index (0 to n - 1) of the position-th view of the run. It depends on n, seed
    and position alone, so a resumed run goes on where it stopped and all workers agree.
    """

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        # (epoch, its permutation), replaced as a whole so that threads may share a sampler
        self._drawn: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise IndexError(position)
        epoch, i = divmod(position, self.n)
        drawn = self._drawn
        if drawn[0] != epoch:
            order = torch.randperm(self.n, generator=generator(self.seed, "views", epoch))
            drawn = self._drawn = (epoch, order.tolist())
        return drawn[1][i]
