"""Matching of masks to photographs."""

import os
from pathlib import Path

from flexgs.errors import UserError
from flexgs.scene.capture import Frame
from flexgs.scene.views import ImageHead, find_image, image_size, is_photograph, plain, stem


class Masks:
    """Masks of a capture.

    A mask that the capture names for a frame counts, with any suffix. Otherwise masks are searched beside the
    images folder: in masks/ or mask/, else in masks_<factor>/ or mask_<factor>/, else in another masks_<n>/
    or mask_<n>/. The mask of `a/b.jpg` is called `a/b`, `a/b.jpg`, `a/b_mask` or `a/b.jpg_mask` there,
    followed by the suffix of an image. Upper and lower case count the same.
    """

    def __init__(self, frames: list[Frame], factor: int):
        self.folders: dict[Path, tuple[Path, dict[str, Path]] | None] = {}
        self.without: list[Path] = []
        self.absent: list[Path] = []
        self.used: set[Path] = set()
        for parent in {frame.folder.parent for frame in frames if frame.mask is None}:
            folder = mask_folder(parent, factor)
            self.folders[parent] = (folder, mask_index(folder)) if folder else None

    def find(self, frame: Frame, head: ImageHead) -> Path | None:
        """Find the mask of a photograph, None if it has none; UserError if its aspect ratio differs."""
        if frame.mask is not None:
            if (mask := find_image(frame.mask)) is None:
                self.absent.append(frame.mask)
        else:
            place = self.folders[frame.folder.parent]
            mask = mask_of(place[1], frame.file) if place else None
        if mask is None:
            self.without.append(frame.folder / frame.file)
            return None
        self.used.add(mask)
        width, height = image_size(mask)
        slack = 2 + 0.005 * max(width, height)
        if abs(width * head.height / head.width - height) > slack:
            raise UserError(f"{mask}: found {width}x{height} pixels for a photograph of "
                            f"{head.width}x{head.height}, another aspect ratio: expected the "
                            "mask of this photograph")
        return mask

    def doubts(self) -> list[str]:
        """List, one line each, masks that fit no photograph and photographs that have no mask."""
        said = []
        if self.absent:
            said.append(f"{self.absent[0]}: {len(self.absent)} masks that the capture names are not "
                        "there, this one for instance; these photographs count as a whole")
        for folder, index in filter(None, self.folders.values()):
            if not index:
                said.append(f"{folder}: holds no image, so there are no masks; expected PNG, JPEG, "
                            "WebP, TIFF or BMP files with the names of the photographs")
            if left := sorted(set(index.values()) - self.used):
                said.append(f"{folder}: {len(left)} of {len(set(index.values()))} masks fit no "
                            f"photograph and are not used, for instance {left[0].name}; expected the name of "
                            "the photograph, or that and _mask")
        if self.used and len(self.without) > len(self.absent):
            said.append(f"{self.without[0]}: {len(self.without)} photographs have no mask, this one for "
                        "instance, and count as a whole")
        return said


def mask_folder(parent: Path, factor: int) -> Path | None:
    """Find the folder of masks in parent: masks/ or mask/, else the one of this factor, else any other."""
    wanted = ["masks", "mask", f"masks_{factor}", f"mask_{factor}"]
    found = {path: path.name.lower() for path in sorted(parent.glob("*"))
             if path.name.lower().startswith(("masks", "mask")) and path.is_dir()}
    found = {path: name for path, name in found.items() if name in wanted[:2]
             or name.startswith(("masks_", "mask_"))}
    return min(found, key=lambda path: wanted.index(found[path]) if found[path] in wanted else len(wanted),
               default=None)


def mask_index(folder: Path) -> dict[str, Path]:
    """Map the plain() relative paths, without suffix, of the images below folder to these images."""
    return {plain(stem((Path(inner) / name).relative_to(folder).as_posix())): Path(inner) / name
            for inner, _, names in os.walk(folder) for name in sorted(names) if is_photograph(name)}


def mask_of(index: dict[str, Path], file: str) -> Path | None:
    """Find the mask of a photograph in a mask_index(); `file` is its path relative to the images folder."""
    base = stem(file)
    keys = map(plain, (base, file, f"{base}_mask", f"{file}_mask"))
    return next((index[key] for key in keys if key in index), None)
