"""Photographs of any kind, copied upright and in several sizes into a capture, with their masks."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flexgs.errors import MissingDependencyError, UserError
from flexgs.files import atomic_file
from flexgs.pool import get_num_threads
from flexgs.scene.colmap import find_models
from flexgs.scene.masks import mask_folder, mask_index, mask_of
from flexgs.scene.transforms import find_transforms
from flexgs.scene.views import KINDS, ORIENTATION, decode, kept, plain, read_head
from flexgs.sfm.progress import Phase

HEIF = {".heic", ".heif", ".hif"}
"""Suffixes of the photographs that need the package pi-heif."""
ALL_KINDS = {*KINDS, *HEIF, ".avif", ".jfif", ".jp2"}
FACTORS = (2, 4, 8)
"""The photographs are also written at 1/2, 1/4 and 1/8 of their size, in images_2 and so on."""
QUALITY = 95
"""JPEG quality of the files that are written."""
EXIF_IFD, FOCAL_LENGTH, FOCAL_LENGTH_35MM = 0x8769, 0x920A, 0xA405
"""EXIF tags: the directory of the camera's settings, and the focal lengths in it."""
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
"""EXIF orientation -> how to make the pixels upright."""


@dataclass(frozen=True)
class Photograph:
    """One photograph that goes into a capture."""

    source: Path
    file: str
    """Its path relative to the folder of photographs, for messages."""
    name: str
    """Path of its copy below images/, without blanks, which COLMAP's lists of pairs cannot hold."""
    camera: tuple
    """Photographs of equal values may share a camera: width, height and EXIF's focal lengths."""
    turn: int
    """EXIF orientation; 1 is upright."""
    mask: Path | None


def holds_photographs(folder: Path) -> bool:
    """Whether there is any file with the suffix of a photograph for find_photographs()."""
    return any(path.suffix.lower() in ALL_KINDS for path in _files(folder))


def sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each photograph and mask of a folder, by its path relative to it.

    Nothing is decoded: photographs that find_photographs() leaves out are among them.
    """
    root, masks = _places(folder)
    files = [path for path in _files(root) if path.suffix.lower() in ALL_KINDS]
    files += mask_index(masks).values() if masks else []
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)
            if path.is_file()}


def find_photographs(folder: Path) -> tuple[list[Photograph], list[str]]:
    """List the photographs of a folder, in order of their names, and what is left out, one line each.

    If the folder has a folder images, those of that are meant. Hidden files, masks, reduced copies (images_2)
    and captures in the folder do not count; neither do files that cannot be read, and copies of others.

    Raises:
        UserError: There is no photograph, or a package that it needs is not installed.
    """
    root, masks = _places(folder)
    files = sorted(_files(root), key=lambda path: path.as_posix())
    if any(path.suffix.lower() in HEIF for path in files):
        _register_heif(folder)
    index = mask_index(masks) if masks else {}
    said: list[str] = []
    found: list[Photograph] = []
    taken: set[str] = set()
    known = _Contents()
    for path in files:
        file = path.relative_to(root).as_posix()
        if path.suffix.lower() not in ALL_KINDS:
            continue
        try:
            camera, turn = _head(path)
        except UserError as e:
            said.append(f"{e}; left out")
            continue
        if (first := known.seen(path)) is not None:
            said.append(f"{path}: is the same file as {first.relative_to(root)}; left out")
            continue
        name = _name(path, file, taken)
        found.append(Photograph(path, file, name, camera, turn, mask_of(index, file)))
    if others := [path for path in files if path.suffix.lower() not in ALL_KINDS]:
        said.append(f"{root}: {len(others)} other files are not read, for instance {others[0].name}")
    if index and not any(photograph.mask for photograph in found):
        said.append(f"{masks}: no mask fits a photograph by its name; going on without masks")
    if not found:
        raise UserError(f"{folder}: found no photograph that can be read{f' ({said[0]})' if said else ''}; "
                        f"expected files such as {', '.join(sorted(ALL_KINDS))}, or a video")
    return found, said


def write_photographs(photographs: list[Photograph], capture: Path) -> None:
    """Write the photographs to images/, images_2/, ... of a capture, and their masks to masks/.

    Photographs that are there already are left alone.
    """
    phase = Phase("photographs", len(photographs), "photographs")
    with ThreadPoolExecutor(get_num_threads()) as pool:
        for i, _ in enumerate(pool.map(lambda photograph: _write(photograph, capture), photographs), 1):
            phase.done(i)
    phase.end()


def _places(folder: Path) -> tuple[Path, Path | None]:
    """Return the folder that holds the photographs, which may be images/, and that of their masks, if any."""
    root = folder / "images" if (folder / "images").is_dir() else folder
    return root, mask_folder(root, 1) or (mask_folder(folder, 1) if root != folder else None)


def _files(root: Path) -> Iterator[Path]:
    """Yield the visible files below a folder, without masks, reduced copies and captures."""
    for inner, folders, names in os.walk(root):
        folders[:] = [name for name in folders
                      if not re.fullmatch(r"\..*|masks?(_\d+)?|images_\d+", name, re.IGNORECASE)
                      and not (Path(inner) / name / "capture.json").exists()
                      and not find_models(Path(inner) / name) and not find_transforms(Path(inner) / name)]
        yield from (Path(inner) / name for name in names if not name.startswith("."))


def _register_heif(folder: Path) -> None:
    try:
        from pi_heif import register_heif_opener
    except ImportError:
        raise MissingDependencyError("pi-heif", "capture", f"{folder}: a HEIC photograph") from None
    register_heif_opener()


def _head(path: Path) -> tuple[tuple, int]:
    """Read the camera of a photograph (see Photograph.camera) and its EXIF orientation."""
    width, height = read_head(path)[:2]
    with Image.open(path) as image:
        exif = image.getexif()
        settings = exif.get_ifd(EXIF_IFD)
        focal = tuple(str(settings.get(tag, "")) for tag in (FOCAL_LENGTH, FOCAL_LENGTH_35MM))
        turn = exif.get(ORIENTATION, 1)
    turn = turn if turn in TURNS else 1
    return ((height, width) if turn >= 5 else (width, height)) + focal, turn


class _Contents:
    """The contents of files, to find copies; only files of equal size are read."""

    def __init__(self) -> None:
        self._of_size: dict[int, list[Path]] = {}

    def seen(self, path: Path) -> Path | None:
        """Return an earlier file with the same bytes, or None."""
        alike = self._of_size.setdefault(path.stat().st_size, [])
        first = next((other for other in alike if _digest(other) == _digest(path)), None)
        alike.append(path)
        return first


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _name(path: Path, file: str, taken: set[str]) -> str:
    """Choose the name of a photograph in the capture: none differs from another in its suffix only."""
    suffix = ".png" if path.suffix.lower() == ".png" else ".jpg"
    name = re.sub(r"[^\w./+=@-]", "_", file.removesuffix(path.suffix))
    while plain(name) in taken:
        name += f"_{path.suffix[1:].lower()}"
    taken.add(plain(name))
    return name + suffix


def _write(photograph: Photograph, capture: Path) -> None:
    """Write one photograph in all sizes, and its mask; the one in images/ comes last."""
    done = capture / "images" / photograph.name
    if done.exists():
        return
    image = decode(photograph.source)
    if photograph.turn in TURNS:
        image = image.transpose(TURNS[photograph.turn])
    if photograph.mask:
        _write_mask(photograph, image.size, capture / "masks" / f"{photograph.name}.png")
    for factor in FACTORS:
        size = [max(1, round(side / factor)) for side in image.size]
        _save(image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3.0),
              capture / f"images_{factor}" / photograph.name)
    with Image.open(photograph.source) as original:
        as_it_is = (original.format in ("JPEG", "PNG") and original.mode in ("RGB", "L")
                    and photograph.turn == 1 and "transparency" not in original.info)
        exif = original.getexif()
        exif.get_ifd(EXIF_IFD)
        exif.pop(ORIENTATION, None)
    if as_it_is:
        with atomic_file(done) as out:
            shutil.copyfile(photograph.source, out)
    else:
        _save(image, done, exif.tobytes())  # COLMAP takes the focal length from it


def _write_mask(photograph: Photograph, size: tuple[int, int], path: Path) -> None:
    """Write the mask at the size of the upright photograph, as COLMAP has it: 0 where nothing counts.

    UserError if its aspect ratio is that of neither the upright photograph nor the one that was taken.
    """
    assert photograph.mask
    mask = Image.fromarray(kept(photograph.mask).astype(np.uint8) * 255)
    taken = size[::-1] if photograph.turn >= 5 else size
    if photograph.turn in TURNS and _same_aspect(mask.size, taken):
        mask = mask.transpose(TURNS[photograph.turn])
    if not _same_aspect(mask.size, size):
        raise UserError(f"{photograph.mask}: found {mask.width}x{mask.height} pixels for a photograph of "
                        f"{size[0]}x{size[1]}, another aspect ratio: expected the mask of this photograph")
    _save(mask.resize(size, Image.Resampling.NEAREST), path)


def _same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return abs(a[0] * b[1] / b[0] - a[1]) <= 2 + 0.005 * max(a)


def _save(image: Image.Image, path: Path, exif: bytes = b"") -> None:
    with atomic_file(path) as out:
        image.save(out, quality=QUALITY, subsampling=0, exif=exif)
