"""Loading a capture from disk: cameras, images and points ready for training."""

import contextlib
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from flexgs.camera import FARTHEST, Camera, focus, scene_scale_of
from flexgs.config import Config
from flexgs.errors import UserError, one_line
from flexgs.origin import WORLD, Origin, local_origin, offset, unit_of
from flexgs.scene.capture import Capture, Frame, Points
from flexgs.scene.colmap import PLACES, find_models, read_colmap
from flexgs.scene.identity import capture_digest
from flexgs.scene.masks import Masks
from flexgs.scene.transforms import find_transforms, read_transforms
from flexgs.scene.undistort import MAX_FOV
from flexgs.scene.views import (
    ImageCache,
    ImageHead,
    View,
    cache_limit,
    find_image,
    image_size,
    is_photograph,
    plain,
    read_head,
    stem,
)
from flexgs.seeds import generator

RANDOM_POINTS = 10_000
"""Number of initial points of a capture that has none."""
NEAR = 0.01
"""Depth of the near plane, in units of origin.unit_of (about a fifth of the scene scale)."""


@dataclass(eq=False)
class Scene:
    """A capture that is split into training views and test views."""

    name: str
    root: Path
    train: list[View]
    test: list[View]
    points: Points
    scene_scale: float
    """1.1 times the largest distance of a training camera from the mean of the training cameras, in world
    units."""
    protocol: dict = field(default_factory=dict)
    """How the images and the split were made, as JSON values; metrics compare only where this is equal."""
    origin: Origin = WORLD
    """Position of (0, 0, 0) of cameras and points in the capture's own coordinates; see
    docs/coordinates.md."""
    doubts: list[str] = field(default_factory=list)
    """Warnings about the capture, one line each: ambiguities, contradictions, and data that are left out."""

    def summary(self) -> str:
        """Describe in one line what was read, for a person to check."""
        p = self.protocol
        by_name = f"every {p['test_every']}th by name" if p["test_every"] else "none"
        split = "as the capture says" if p["split"] == "files" else by_name
        size = f"{p['width']}x{p['height']} pixels" + ("" if p["one_size"] else " most often")
        model = f", sub-model {p['model']}" if p["model"] else ""
        unused = p["posed"] - p["train_views"] - p["test_views"]
        left = f", {unused} left out" if unused else ""
        return (f"{self.name}: {p['photographs']} photographs, {p['posed']} with a pose, "
                f"{p['train_views']} to train on, {p['test_views']} to test on ({split}){left}, {p['masks']} "
                f"masks; {' '.join(p['lenses'])}, {p['images']}/ at factor {p['factor']}, {size}; "
                f"{p['format']}{model}, {p['points']:,} "
                f"points{' at random' if p['points_from'] == 'random' else ''}, scene scale "
                f"{self.scene_scale:.4g}")

    @property
    def digest(self) -> str | None:
        """Digest that identifies the capture (identity.py); None if it was not read from a disk."""
        return self.protocol.get("digest")

    @property
    def unit(self) -> float:
        """Unit of length of this scene, in world units (origin.unit_of)."""
        return unit_of(self.scene_scale)


def load_scene(path: str | Path, *, factor: int = 1, test_every: int = 8, name: str | None = None,
               masks: bool = True, seed: int = 0, cache_bytes: int | None = None,
               model: str | None = None) -> Scene:
    """Load a COLMAP reconstruction or, if there is none, a transforms.json of nerfstudio or instant-ngp.

    Only the headers of images are read; a View decodes its image when it is asked for it. Doubts about the
    capture are kept in Scene.doubts, and each is also a warning.

    Args:
        path: Folder of the capture.
        factor: Train at 1/factor of the size of images/, from the folder images_<factor> if there is one,
            else by resizing.
        test_every: Every test_every-th view by name, starting with the first, is a test view; 0 for none.
        name: Name of the scene; None for the name of the folder.
        masks: Read masks/ beside images/; masks.Masks lists the file names.
        seed: Seed of the random points of a capture that has none.
        cache_bytes: Most bytes of decoded images in the memory of a machine; None for views.cache_limit.
        model: Which of several COLMAP models, such as "1" for sparse/1; None for the one that gives the most
            photographs a pose.

    Raises:
        UserError: The capture cannot be trained on; one line says why.
    """
    root = Path(path)
    if factor < 1 or test_every < 0:
        raise UserError(f"found factor {factor} and test_every {test_every}; expected a "
                        "factor of 1 or more and test_every of 0 or more")
    capture = read_capture(root, model)
    frames = sorted(capture.frames, key=lambda frame: frame.name)
    if len(frames) < 2:
        raise UserError(f"{capture.file}: found {len(frames)} images with a pose, expected at least 2")
    doubts = capture.doubts
    frames, files, reduced = _locate(capture, frames, factor, doubts)
    photographs = _count(capture, frames, files, doubts)
    resize = factor if not reduced else 1
    origin = _origin(capture, frames)
    cache = ImageCache(cache_limit(cache_bytes))
    views = _views(capture, frames, files, origin, Masks(frames, factor) if masks else None, resize, cache)
    splits = [frame.split for frame in frames] if any(frame.split for frame in frames) else None
    train, test = _split(root, views, splits, test_every, doubts)
    if len(train) < 2:
        raise UserError(f"{root}: found {len(train)} training views of {len(views)} images, "
                        "expected at least 2: change test_every or add images")
    points, points_from = _points(capture, train, origin, seed)
    scene_scale = scene_scale_of([view.camera for view in train])
    if scene_scale == 0:
        raise UserError(f"{capture.file}: all cameras are at the same place; expected a "
                        "capture from several places")
    doubts += _blind(capture.file, views, points) if capture.points is not None else []
    for view in views:
        view.camera = replace(view.camera, near=NEAR * unit_of(scene_scale))
    folder = frames[0].folder.name
    protocol = {
        "format": capture.format, "images": f"{folder}_{factor}" if reduced else folder, "factor": factor,
        "resize": "pillow bicubic" if resize > 1 else None, **_sizes(views),
        "split": "files" if splits else "every nth by name", "test_every": None if splits else test_every,
        "train_views": len(train), "test_views": len(test),
        "undistorted": any(view.lens.distorted for view in views),
        "lenses": sorted({frame.lens.model for frame in frames}),
        "masks": sum(view.mask_path is not None for view in views),
        "photographs": photographs, "posed": len(views), "model": capture.model,
        "points": len(points), "points_from": points_from, "digest": capture_digest(views),
        **({"max_fov": MAX_FOV} if any(view.lens.wide for view in views) else {}),
        **({"origin": list(origin)} if origin != WORLD else {}),
    }
    doubts = [one_line(doubt) for doubt in doubts]
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    return Scene(name or Path(os.path.abspath(root)).name, root, train, test, points, scene_scale, protocol,
                 origin, doubts)


def _origin(capture: Capture, frames: list[Frame]) -> Origin:
    """Choose the origin about which float32 is enough for these cameras; UserError if there is none."""
    places = np.stack([_place(frame.viewmat) for frame in frames])
    if not np.abs(places).max() < FARTHEST:
        far = frames[int(np.abs(places).max(1).argmax())]
        raise UserError(f"{capture.file}: found the camera of {far.name} over {FARTHEST:g} units "
                        "from 0 0 0, expected a capture that float32 can hold: the file is damaged, "
                        "copy or export it again")
    return local_origin(places, np.linalg.norm(places - places.mean(0), axis=1).max())


def _views(capture: Capture, frames: list[Frame], files: list[Path], origin: Origin, finder: Masks | None,
           resize: int, cache: ImageCache) -> list[View]:
    """Make the views of frames, whose photographs are files, at 1/resize of the size of these."""
    views, heads = [], []
    for frame, file in zip(frames, files, strict=True):
        head = _checked_head(file, frame, capture.file)
        lens = frame.lens.scaled(head.width, head.height)
        pinhole = lens.pinhole()
        camera = pinhole.camera(_about(origin, frame.viewmat), origin)
        if resize > 1:
            camera = camera.scaled(max(1, round(pinhole.width / resize)),
                                   max(1, round(pinhole.height / resize)))
        views.append(View(frame.name, camera, file, finder.find(frame, head) if finder else None, lens,
                          cache))
        heads.append(head)
    capture.doubts += finder.doubts() if finder else []
    capture.doubts += _doubts_of_heads(files, heads)
    return views


def _points(capture: Capture, train: list[View], origin: Origin, seed: int) -> tuple[Points, str]:
    """Return the points about origin, and where they are from: "capture", or "random" if it has none."""
    points = _near(capture, capture.doubts)
    if points is None:
        capture.doubts.append(f"{capture.file.parent}: the capture has no points; starting from "
                              f"{RANDOM_POINTS} random ones")
        return _random_points([view.camera.viewmat.double().numpy() for view in train], seed), "random"
    xyz = (points.xyz.double() - torch.tensor(origin, dtype=torch.float64)).float()
    return Points(xyz, points.rgb), "capture"


def _sizes(views: list[View]) -> dict[str, int | bool]:
    """Return the most common size of the views in pixels, and whether all have it."""
    sizes = Counter((view.camera.width, view.camera.height) for view in views)
    (width, height), _ = sizes.most_common(1)[0]
    return {"width": width, "height": height, "one_size": len(sizes) == 1}


def load_cameras(path: str | Path, model: str | None = None) -> list[Camera]:
    """Read the cameras of a capture, by name and without distortion; its photographs need not be there.

    UserError as of load_scene().
    """
    capture = read_capture(Path(path), model)
    frames = sorted(capture.frames, key=lambda frame: frame.name)
    if len(frames) < 2:
        raise UserError(f"{capture.file}: found {len(frames)} images with a pose, expected at least 2")
    origin = _origin(capture, frames)
    cameras = [frame.lens.pinhole().camera(_about(origin, frame.viewmat), origin) for frame in frames]
    near = NEAR * unit_of(scene_scale_of(cameras))
    return [replace(camera, near=near) for camera in cameras]


def photograph_size(path: Path, model: str | None = None) -> tuple[int, int] | None:
    """Return width and height of the first photograph of a capture; None if it is not there in full size.

    UserError as of load_scene().
    """
    frame = min(read_capture(path, model).frames, key=lambda frame: frame.name, default=None)
    file = find_image(frame.folder / frame.file) if frame else None
    return image_size(file) if file else None


def _near(capture: Capture, doubts: list[str]) -> Points | None:
    """Return the points whose coordinates are below FARTHEST; None if there are none."""
    if capture.points is None or bool((near := (capture.points.xyz.abs() < FARTHEST).all(1)).all()):
        return capture.points
    doubts.append(f"{capture.file}: {int((~near).sum())} of {len(near)} points are over {FARTHEST:g} "
                  "units from 0 0 0 and are left out")
    return Points(capture.points.xyz[near], capture.points.rgb[near]) if bool(near.any()) else None


def _place(viewmat: np.ndarray) -> np.ndarray:
    """Compute the camera position [3] of a world-to-camera pose [4, 4]."""
    return -viewmat[:3, :3].T @ viewmat[:3, 3]


def _about(origin: Origin, viewmat: np.ndarray) -> np.ndarray:
    """Convert a pose [4, 4] float64 from the capture's own coordinates to coordinates about origin."""
    moved = viewmat.copy()
    moved[:3, 3] += viewmat[:3, :3] @ offset(WORLD, origin)
    return moved


def read_capture(root: Path, model: str | None = None) -> Capture:
    """Read the capture in the folder root, whichever its format; UserError if there is none.

    model names one of several COLMAP models; a name that fits none is a UserError.
    """
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected "
                        "the folder of a capture")
    if models := find_models(root):
        return read_colmap(root, models, root / "images", model)
    if model is not None:
        raise UserError(f"{root}: found no COLMAP model in {', '.join(PLACES)}, expected the sub-model "
                        f"{model} (--data.model)")
    if files := find_transforms(root):
        return read_transforms(root, files)
    found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise UserError(f"{root}: no capture here; looked for cameras, images and points3D (.bin or .txt) in "
                    f"{', '.join(PLACES)} and the folders in them, and for transforms.json; found {found}; "
                    "`flexgs capture` makes a capture of photographs or a video")


def _locate(capture: Capture, frames: list[Frame], factor: int,
            doubts: list[str]) -> tuple[list[Frame], list[Path], bool]:
    """Find the image file of each frame; frames without one and repeated photographs are left out.

    Returns:
        The frames kept, the image file of each, and whether these files are those of images_<factor>.
    """
    folders = {frame.folder: frame.reduced_folder(factor) for frame in frames}
    reduced = factor > 1 and all(folder.is_dir() for folder in folders.values())
    wanted = [(folders[frame.folder] if reduced else frame.folder) / frame.file for frame in frames]
    found = [find_image(path) for path in wanted]
    missing = [path for path, file in zip(wanted, found, strict=True) if file is None]
    if missing:
        text = (f"{capture.file}: names {len(frames)} images, but {len(missing)} are not there, for "
                f"instance {missing[0]}")
        if capture.format == "colmap" or len(missing) == len(frames):
            folder = next(iter(folders))
            others = sorted(int(p.name.rpartition("_")[2]) for p in folder.parent.glob(f"{folder.name}_*")
                            if p.name.rpartition("_")[2].isdigit())
            hint = (f", or use the factor {others[0]} of {folder.name}_{others[0]}/"
                    if others and not reduced else "")
            raise UserError(f"{text}: copy them to there{hint}")
        doubts.append(f"{text}; going on without them")
    if reduced:
        doubts += _unlike(frames[0], found[0], factor)
    kept: dict[Path, Frame] = {}
    again = []
    for frame, file in zip(frames, found, strict=True):
        if file is None:
            continue
        if (first := kept.setdefault(file, frame)) is not frame:
            again.append(file)
            if frame.split in ("test", "val"):  # a photograph that is held out once is never trained on
                first.split = frame.split
    if again:
        doubts.append(f"{capture.file}: names {len(again)} photographs more than once, for instance "
                      f"{again[0]}; their first pose is used")
    return list(kept.values()), list(kept), reduced


def _blind(file: Path, views: list[View], points: Points) -> list[str]:
    """Return a doubt if most cameras have none of the capture's points in their image, else nothing."""
    xyz = points.xyz[::max(1, len(points) // 10_000)]
    blind = []
    for view in views:
        at = (xyz @ view.camera.viewmat[:3, :3].T + view.camera.viewmat[:3, 3]) @ view.camera.K.T
        u, v, depth = at.unbind(1)
        inside = (u >= 0) & (u <= view.camera.width * depth) & (v >= 0) & (v <= view.camera.height * depth)
        if not bool((inside & (depth > 0)).any()):
            blind.append(view.name)
    if 2 * len(blind) <= len(views):
        return []
    return [f"{file}: {len(blind)} of {len(views)} cameras see none of the {len(points):,} points, "
            f"for instance that of {blind[0]}; the poses may be of another convention (world to camera in "
            "place of camera to world, or other axes) or the points of another reconstruction"]


def _unlike(frame: Frame, file: Path | None, factor: int) -> list[str]:
    """Return a doubt if a photograph of images_<factor> is not 1/factor the size of the one in images/."""
    with contextlib.suppress(UserError):  # the one in images/ is not trained on, so it may be damaged
        if file and (whole := find_image(frame.folder / frame.file)):
            (width, height), (full_width, full_height) = read_head(file)[:2], read_head(whole)[:2]
            if (abs(width - full_width / factor) > 2 + 0.005 * width
                or abs(height - full_height / factor) > 2 + 0.005 * height):
                return [f"{file}: found {width}x{height} pixels for a photograph of "
                        f"{full_width}x{full_height} in {frame.folder.name}/, which is not 1/{factor} of it; "
                        "this size is trained at"]
    return []


def _count(capture: Capture, frames: list[Frame], files: list[Path], doubts: list[str]) -> int:
    """Count the photographs in the folders of these frames; add a doubt if some of them have no pose."""
    posed: dict[Path, set[str]] = {}
    for frame, file in zip(frames, files, strict=True):
        on_disk = Path(frame.file).with_name(file.name)  # may differ from the capture's name, say in case
        posed.setdefault(frame.folder, set()).update(
            {plain(stem(frame.file)), plain(stem(on_disk.as_posix()))})
    unposed = []
    for folder, names in posed.items():
        for inner, folders, found in os.walk(folder, followlinks=False):
            if capture.format != "colmap":
                folders.clear()  # transforms.json names every folder, so folders in it are not searched
            place = Path(inner).relative_to(folder)
            unposed += [Path(inner) / name for name in found
                        if is_photograph(name) and plain(stem((place / name).as_posix())) not in names]
    total = len(frames) + len(unposed)
    if unposed:
        doubts.append(f"{capture.file}: {len(frames)} of {total} photographs have a pose; "
                      f"{len(unposed)} have none and are left out, for instance {min(unposed)}")
    return total


def _checked_head(file: Path, frame: Frame, source: Path) -> ImageHead:
    """Read the header of an image file; UserError if its aspect ratio is not that of the camera model."""
    head = read_head(file)
    width, height = head[:2]
    lens = frame.lens
    slack = 2 + 0.005 * max(width, height)
    if (abs(height - lens.height * width / lens.width) > slack
            or abs(width - lens.width * height / lens.height) > slack):
        turned = " (its EXIF orientation is not applied)" if head.turned else ""
        raise UserError(f"{file}: found {width}x{height} pixels{turned}, but {source} has a camera of "
                        f"{lens.width}x{lens.height} for it, another aspect ratio: use the "
                        "images that the cameras were computed from")
    return head


def _doubts_of_heads(files: list[Path], heads: list[ImageHead]) -> list[str]:
    kinds = {"deep": "have more than 8 bits per channel, of which the upper 8 are used",
             "cmyk": "are CMYK and are converted without a colour profile",
             "turned": "have an EXIF orientation, which is not applied: cameras are of the "
                       "pixels as they are stored"}
    found = {kind: [file for file, head in zip(files, heads, strict=True) if getattr(head, kind)]
             for kind in kinds}
    return [f"{some[0].parent}: {len(some)} of {len(files)} photographs {kinds[kind]}, for instance "
            f"{some[0].name}" for kind, some in found.items() if some]


def _split(root: Path, views: list[View], splits: list[str | None] | None, test_every: int,
           doubts: list[str]) -> tuple[list[View], list[View]]:
    """Split views into (train, test).

    The capture's own split counts (splits, one entry per view); without one, every test_every-th view is a
    test view. If that split has no "test", its "val" or else its "none" is tested on; with none of these the
    capture is a UserError, unless test_every is 0.
    """
    if not splits:
        return ([view for i, view in enumerate(views) if not test_every or i % test_every],
                [view for i, view in enumerate(views) if test_every and i % test_every == 0])
    parts = {part: [view for view, split in zip(views, splits, strict=True) if (split or "train") == part]
             for part in ("train", "test", "val", "none")}
    others = {"val": "are held out for validation", "none": "are in none of its lists"}
    for part in ("val", "none"):
        if parts[part] and not parts["test"]:
            parts["test"] = parts.pop(part)
            doubts.append(f"{root}: the capture names no view to test on; the {len(parts['test'])} "
                          f"that {others[part]} are tested on")
    for part in ("val", "none"):
        if some := parts.get(part):
            doubts.append(f"{root}: {len(some)} photographs {others[part]} and are neither trained nor "
                          f"tested on, for instance {some[0].name}")
    if not parts["test"] and test_every:
        raise UserError(f"{root}: the capture says what to train on and leaves nothing to test on; "
                        "name the views in its test_filenames or, to hold out views by name, remove the "
                        "lists of the capture")
    return parts["train"], parts["test"]


def _random_points(viewmats: list[np.ndarray], seed: int) -> Points:
    """Draw points of random position and colour in a cube around the focus of the cameras.

    The cube reaches, in each direction, as far as the farthest camera is from its centre.
    """
    centre = focus(viewmats)
    places = np.stack([_place(viewmat) for viewmat in viewmats])
    half = np.linalg.norm(places - centre, axis=1).max()
    draw = generator(seed, "random points")
    xyz = torch.from_numpy(centre) + half * (2 * torch.rand(RANDOM_POINTS, 3, generator=draw) - 1)
    return Points(xyz.float(), torch.randint(0, 256, (RANDOM_POINTS, 3), generator=draw, dtype=torch.uint8))


def load_capture(path: Path, config: Config, name: str | None = None) -> Scene:
    """Load the capture at path with the data settings and the seed of config; name as for load_scene()."""
    data = config.data
    return load_scene(path, factor=data.factor, test_every=data.test_every, masks=data.masks,
                      seed=config.seed, cache_bytes=data.cache_bytes, model=data.model, name=name)
