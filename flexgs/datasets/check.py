"""A check whether a capture is whole: all images at all sizes, and as many as the catalogue says."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from flexgs.datasets.catalog import CATALOG, DATASETS
from flexgs.errors import UserError, one_line
from flexgs.scene.capture import Capture
from flexgs.scene.load import load_scene, read_capture
from flexgs.scene.views import find_image, image_size


class Checked(NamedTuple):
    """The findings about a capture, each in one line."""

    holds: str
    """What the capture holds; empty if it cannot be read."""
    doubts: list[str]
    """What is doubtful, but allows training."""
    wrong: list[str]
    """What is wrong; empty for a whole capture."""


def check_capture(folder: Path, model: str | None = None) -> Checked:
    """Check a capture, reading only the heads of images; `model` names one of several, as in load_scene."""
    try:
        capture = read_capture(folder, model)
    except UserError as e:
        return Checked("", [], [str(e)])
    if not capture.frames:
        return Checked("", [], [f"{capture.file}: found no image with a camera"])
    factors, holds, doubts = _factors(capture), "", list(capture.doubts)
    wrong = []
    for factor in factors:
        broken = _images(capture, factor)
        if not broken:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Scene.doubts has what they say
                    scene = load_scene(folder, factor=factor, model=model)
                holds, doubts = holds or scene.summary(), [*dict.fromkeys([*doubts, *scene.doubts])]
            except UserError as e:
                broken = [str(e)]
        wrong += [line for line in broken if line not in wrong]
    lenses = sorted({frame.lens.model for frame in capture.frames})
    holds = holds or f"{len(capture.frames)} images with a pose, {', '.join(lenses)}"
    holds += f"; factors {' '.join(map(str, factors))}"
    if known := CATALOG.get(folder.resolve().name):
        dataset = DATASETS[known.dataset]
        holds = f"{known.name} of {dataset.title}: {holds}"
        if known.images and known.images != len(capture.frames):
            wrong.append(f"found {len(capture.frames)} images with a camera, but the released "
                         f"capture has {known.images}")
        if lenses != [dataset.camera]:
            wrong.append(f"found cameras {', '.join(lenses)}, but the released capture has {dataset.camera}")
        if absent := [f"images_{factor}/" for factor in dataset.smaller if factor not in factors]:
            wrong.append(f"found no {', '.join(absent)}, which the released capture has")
    return Checked(one_line(holds), [one_line(doubt) for doubt in doubts], [one_line(text) for text in wrong])


def _factors(capture: Capture) -> list[int]:
    """Return 1 and the factors for which there is a folder of reduced images."""
    frame = capture.frames[0]
    if not os.path.isdir(frame.folder.parent):  # unlike Path.is_dir, False for an impossible name too
        return [1]
    ends = [path.name.removeprefix(f"{frame.folder.name}_")
            for path in frame.folder.parent.glob(f"{frame.folder.name}_*")]
    return sorted({1} | {int(end) for end in ends if end.isdecimal() and int(end) > 1})


def _images(capture: Capture, factor: int) -> list[str]:
    """Return lines about absent and broken images of one factor."""
    absent, broken = [], []
    for frame in capture.frames:
        whole, reduced = frame.folder / frame.file, frame.reduced_folder(factor) / frame.file
        if (file := find_image(reduced if factor > 1 else whole)) is None:
            absent.append(reduced if factor > 1 else whole)
            continue
        try:
            size, full = image_size(file), find_image(whole)
            sides = zip(size, image_size(full), strict=True) if factor > 1 and full else ()
            if any(abs(factor * small - large) > factor for small, large in sides):
                broken.append(f"{file}: found {size[0]}x{size[1]} pixels, which is not 1/{factor} of {full}")
        except UserError as e:
            broken.append(str(e))
    n = len(capture.frames)
    wrong = [f"{len(absent)} of {n} images are not there, for instance {absent[0]}"] if absent else []
    return wrong + ([f"{len(broken)} of {n} images are not what they should be, for instance {broken[0]}"]
                    if broken else [])
