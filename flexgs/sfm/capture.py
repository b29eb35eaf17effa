"""A capture from a folder of photographs or a video: frames, photographs, features, matches, poses.

    capture.json  images/  images_2/  images_4/  images_8/  masks/  sparse/0/  database.db

capture.json says what the capture is made from and, at the end, what was found. The same command continues
after a kill, and takes up photographs that were added to the folder: those that are written and what is in
the database are not done again, and sparse/ appears when it is whole. Only poses begin anew.
"""

import os
import shutil
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from flexgs.config import check_ranges
from flexgs.errors import UserError, pasted
from flexgs.files import atomic_folder, only_one, write_json
from flexgs.inputs import read_json, shown, typed
from flexgs.scene.colmap import find_models
from flexgs.scene.transforms import find_transforms
from flexgs.sfm.mapping import Mapped, Mapper, posed
from flexgs.sfm.options import FEWEST, CaptureOptions
from flexgs.sfm.photographs import (
    ALL_KINDS,
    Photograph,
    find_photographs,
    holds_photographs,
    sizes,
    write_photographs,
)
from flexgs.sfm.video import write_frames

RECORD = "capture.json"
ADVICE = ("each part of the scene has to be sharp in three photographs or more, taken from different places, "
          "with steps of a hand's breadth to a pace between them; turning on the spot shows no depth, and "
          "glass, mirrors, blank walls and what moves hold nothing to match")


def is_source(path: Path) -> bool:
    """Whether a path is a file, or a folder of photographs that is no capture yet."""
    return path.is_file() or (path.is_dir() and not find_models(path) and not find_transforms(path)
                              and holds_photographs(path))


def is_folder_of_photographs(path: Path) -> bool:
    """Whether a folder that is no capture yet has photographs in it or in images/, not only further down."""
    if not path.is_dir() or not is_source(path):
        return False
    inner = path / "images" if (path / "images").is_dir() else path
    return any(file.suffix.lower() in ALL_KINDS for file in inner.iterdir())


def capture_name(path: Path) -> str:
    """Return the name of the scene at a path: of the folder, the one around images/, or the video."""
    absolute = Path(os.path.abspath(path))
    if absolute.name == "images" and is_source(path):
        absolute = absolute.parent
    return absolute.stem if path.is_file() else absolute.name


def make_capture(source: Path, folder: Path, options: CaptureOptions) -> Path:
    """Make a capture of a folder of photographs or a video, or continue it, and print what was found.

    Args:
        source: The photographs, or the video; they are only read.
        folder: Where the capture goes.
        options: How it is made.

    Returns:
        The folder.

    Raises:
        UserError: The source cannot be read or too few photographs fit together; or the folder holds
            something else, or a capture of another source.
    """
    check_ranges(options)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected photographs or a video")
    if folder.is_dir() and not (folder / RECORD).exists() and any(
            path.name != "frames" and not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: exists and is not a capture of `flexgs capture`; choose another folder")
    with only_one(folder):
        record, fresh = _record(source, folder, options), not (folder / RECORD).exists()
        if "found" not in record:
            write_json(folder / RECORD, record)
            try:
                photographs = _photographs(source, folder, options)
            except UserError:
                if fresh:  # a source that is refused leaves nothing: the folder is free for another one
                    (folder / RECORD).unlink()
                    shutil.rmtree(folder / "frames", ignore_errors=True)
                raise
            try:
                write_photographs(photographs, folder)
                record["found"] = _found(photographs, _map(photographs, folder, options))
            except KeyboardInterrupt as e:
                raise type(e)("what is done is kept; the same command goes on from there") from None
            write_json(folder / RECORD, record)
            shutil.rmtree(folder / "frames", ignore_errors=True)
    _report(record["found"], folder)
    return folder


def _record(source: Path, folder: Path, options: CaptureOptions) -> dict[str, Any]:
    """Return the record of the capture in the folder, or a new one; UserError if it is of something else.

    Where photographs have been added since, it has no "found".
    """
    here = {source.name: source.stat().st_size} if source.is_file() else sizes(source)
    began = {"source": str(source.absolute()), "options": asdict(options), "files": here}
    path = folder / RECORD
    if not path.exists():
        return began
    record: dict[str, Any] = read_json(path, advice="remove the folder of the capture, and make it anew")
    if "found" in record:
        typed(dict, record["found"], f"{path}: found")
    for key in ("source", "options"):
        if record.get(key) != began[key]:
            raise UserError(f"{folder}: is a capture of other {key}, {shown(record.get(key))}; choose "
                            "another folder, or remove this one")
    before = typed(dict[str, int], record.get("files", here), f"{path}: files")
    if changed := sorted(file for file, size in before.items() if here.get(file) != size):
        first = source if source.is_file() else source / changed[0]
        raise UserError(f"{first}: {len(changed)} files, this one for instance, were removed or "
                        f"changed after {folder} was begun; remove that folder, and the same command makes "
                        "it anew")
    if added := len(here) - len(before):
        print(f"{pasted(source)}: {added} files were added since; going on with them", flush=True)
        return began
    return record


def _photographs(source: Path, folder: Path, options: CaptureOptions) -> list[Photograph]:
    """Find the photographs and say what is left out; frames of a video are written to folder/frames first."""
    if source.suffix.lower() in ALL_KINDS and source.is_file():
        raise UserError(f"{source}: is one photograph; expected a folder of them, or a video")
    place = folder / "frames" if source.is_file() else source
    if source.is_file() and not place.is_dir():
        with atomic_folder(place) as out:
            write_frames(source, out, options.frames)
    photographs, said = find_photographs(place)
    for line in said:
        print(f"photographs: {line}", flush=True)
    if len(photographs) < FEWEST:
        raise UserError(f"{source}: found too few photographs, {len(photographs)}, expected at least "
                        f"{FEWEST}, better 20 or more")
    return photographs


def _map(photographs: list[Photograph], folder: Path, options: CaptureOptions) -> Mapped:
    """Compute features, matches and poses, and write sparse/."""
    def camera(photograph: Photograph) -> tuple:
        return photograph.camera

    groups = [[p.name for p in group] for _, group in groupby(sorted(photographs, key=camera), camera)]
    if len(groups) > 1 and not options.each_camera:
        print(f"photographs: {len(groups)} sizes or focal lengths; each has a camera of its own", flush=True)
    mapper = Mapper(folder, options)
    mapper.add(groups)
    mapper.find_features()
    if not mapper.match():
        raise UserError(f"{folder}: no two of {len(photographs)} photographs fit together; {ADVICE}")
    with atomic_folder(folder / "sparse") as out:
        mapped = mapper.map(out)
        if not mapped.models:
            raise UserError(f"{folder}: COLMAP found poses for less than {FEWEST} of {len(photographs)} "
                            f"photographs; {ADVICE}")
    return mapped


def _found(photographs: list[Photograph], mapped: Mapped) -> dict[str, Any]:
    """Summarise what was found, as JSON values."""
    model = mapped.models[0]
    names = {p.name: p.file for p in photographs}
    return {
        "photographs": len(photographs), "posed": model.num_reg_images(),
        "missing": sorted(names[name] for name in names.keys() - posed(model)),
        "weak": [names[name] for name in mapped.weak],
        "reprojection_error": round(float(model.compute_mean_reprojection_error()), 3),
        "points": model.num_points3D(),
        "cameras": [f"{camera.model.name} {camera.width}x{camera.height}, focal length "
                    f"{camera.mean_focal_length():.0f}" for _, camera in sorted(model.cameras.items())],
        "models": [other.num_reg_images() for other in mapped.models],
    }


def _report(found: dict[str, Any], folder: Path) -> None:
    """Print what was found, and what to do where few photographs have a pose."""
    cameras = found["cameras"]
    print(f"capture: {found['posed']} of {found['photographs']} photographs have a pose, "
          f"{found['points']:,} points, mean reprojection error {found['reprojection_error']:.2f} pixels; "
          f"{cameras[0] if len(cameras) == 1 else f'{len(cameras)} cameras'}")
    if found["weak"]:
        print(f"capture: found with few matches, in a second pass: {', '.join(found['weak'])}")
    if found["missing"]:
        print(f"capture: without a pose, and not trained on: {', '.join(found['missing'])}")
    if len(found["models"]) > 1:
        print(f"capture: {len(found['models'])} parts that do not fit together, of "
              f"{', '.join(map(str, found['models']))} photographs: sparse/0, the first, is used "
              "(--data.model 1: the second); photographs that link them would join them")
    if found["posed"] < 0.7 * found["photographs"]:
        print(f"capture: few have a pose; {ADVICE}")
    print(f"capture: {pasted(folder)}", flush=True)
