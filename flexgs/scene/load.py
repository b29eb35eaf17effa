"""load_scene: a capture on disk -> cameras, images and points ready for training."""

import hashlib
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from flexgs.camera import WORLD, Origin, focus, local_origin, offset, unit_of
from flexgs.errors import UserError
from flexgs.scene.capture import Capture, Frame, Points
from flexgs.scene.colmap import PLACES, find_model, read_colmap
from flexgs.scene.transforms import find_transforms, read_transforms
from flexgs.scene.undistort import MAX_FOV
from flexgs.scene.views import ImageCache, View, default_cache, find_image, image_size
from flexgs.seeds import generator

RANDOM_POINTS = 10_000
NEAR = 0.01
"""Units of the scene that nothing nearer than is drawn; a unit is about a fifth of the extent."""


@dataclass(eq=False)
class Scene:
    """A capture, split into views to train on and views to test on."""

    name: str
    root: Path
    train: list[View]
    test: list[View]
    points: Points
    extent: float
    """1.1 x the largest distance of a training camera from their mean, in world units."""
    protocol: dict = field(default_factory=dict)
    """JSON values: how the images and the split were made, for whoever compares figures."""
    origin: Origin = WORLD
    """Where (0, 0, 0) of cameras and points is in the capture's own coordinates; see docs/coordinates.md."""

    @property
    def unit(self) -> float:
        """A length of this scene, in world units; see unit_of in camera.py."""
        return unit_of(self.extent)


def load_scene(path: str | Path, *, factor: int = 1, test_every: int = 8, name: str | None = None, masks: bool = True,
               seed: int = 0, cache_bytes: int | None = None) -> Scene:
    """Read a capture: a COLMAP reconstruction or, if there is none, a transforms.json of nerfstudio or instant-ngp.

    factor: train at 1/factor of the size of images/: from the folder images_<factor> if there is one, else resized.
    test_every: every so many views, by name, starting with the first, is a test view; 0 for none.
    masks: read masks/ beside images/, where an image `a/b.jpg` has the mask `a/b.png` or `a/b.jpg.png`.
    seed: for the random points of a capture that has none.
    cache_bytes: how much decoded images may take in memory; None: see views.default_cache.

    No image is decoded here, only its size is read. UserError, in one line, for whatever is wrong with the capture.
    """
    root = Path(path)
    if factor < 1 or test_every < 0:
        raise UserError(f"found factor {factor} and test_every {test_every}; expected a factor of 1 or more and "
                        "test_every of 0 or more")
    capture = read_capture(root)
    frames = sorted(capture.frames, key=lambda frame: frame.name)
    if len(frames) < 2:
        raise UserError(f"{capture.file}: found {len(frames)} images with a pose, expected at least 2")
    frames, files, reduced = _locate(capture, frames, factor)
    resize = factor if not reduced else 1

    places = np.stack([_place(frame.viewmat) for frame in frames])
    origin = local_origin(places, np.linalg.norm(places - places.mean(0), axis=1).max())
    cache = ImageCache(default_cache() if cache_bytes is None else cache_bytes)
    views = []
    for frame, file in zip(frames, files, strict=True):
        lens = frame.lens.scaled(*_checked_size(file, frame, capture.file))
        pinhole = lens.pinhole()
        camera = pinhole.camera(_about(origin, frame.viewmat), origin)
        if resize > 1:
            camera = camera.scaled(max(1, round(pinhole.width / resize)), max(1, round(pinhole.height / resize)))
        views.append(View(frame.name, camera, file, _mask(frame) if masks else None, lens, cache))
    said = [frame.split for frame in frames] if any(frame.split for frame in frames) else None
    train, test = _split(views, said, test_every)
    if len(train) < 2:
        raise UserError(f"{root}: found {len(train)} training views of {len(views)} images, expected at least 2: "
                        "change test_every or add images")
    points, note = capture.points, "capture"
    if points is None:
        points, note = _random_points([view.camera.viewmat.double().numpy() for view in train], seed), "random"
        warnings.warn(f"{capture.file.parent}: the capture has no points; starting from {RANDOM_POINTS} random ones",
                      stacklevel=2)
    else:
        points = Points((points.xyz.double() - torch.tensor(origin, dtype=torch.float64)).float(), points.rgb)

    centres = torch.stack([view.camera.center for view in train])
    extent = 1.1 * float((centres - centres.mean(0)).norm(dim=1).max())
    if extent == 0:
        raise UserError(f"{capture.file}: all cameras are at the same place; expected a capture from several places")
    for view in views:
        view.camera = replace(view.camera, near=NEAR * unit_of(extent))
    (width, height), _ = Counter((view.camera.width, view.camera.height) for view in views).most_common(1)[0]
    folder = frames[0].folder.name
    protocol = {
        "format": capture.format, "images": f"{folder}_{factor}" if reduced else folder, "factor": factor,
        "resize": "pillow bicubic" if resize > 1 else None,
        "width": width, "height": height,
        "one_size": all((v.camera.width, v.camera.height) == (width, height) for v in views),
        "split": "files" if said else "every nth by name", "test_every": None if said else test_every,
        "train_views": len(train), "test_views": len(test),
        "undistorted": any(view.lens.distorted for view in views),
        "lenses": sorted({frame.lens.model for frame in frames}),
        "masks": sum(view.mask_path is not None for view in views),
        "points": len(points), "points_from": note, "digest": _digest(views), **capture.notes,
        **({"max_fov": MAX_FOV} if any(view.lens.wide for view in views) else {}),
        **({"origin": list(origin)} if origin != WORLD else {}),
    }
    return Scene(name or root.resolve().name, root, train, test, points, extent, protocol, origin)


def _place(viewmat: np.ndarray) -> np.ndarray:
    """[3] where the camera of a pose [4, 4] stands."""
    return -viewmat[:3, :3].T @ viewmat[:3, 3]


def _about(origin: Origin, viewmat: np.ndarray) -> np.ndarray:
    """The pose [4, 4] float64 of the same camera in coordinates about origin."""
    moved = viewmat.copy()
    moved[:3, 3] += viewmat[:3, :3] @ offset(WORLD, origin)
    return moved


def read_capture(root: Path) -> Capture:
    """The capture in the folder root, in whichever format it is. UserError if there is none."""
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected the folder of a capture")
    if model := find_model(root):
        return read_colmap(model, root / "images")
    if files := find_transforms(root):
        return read_transforms(root, files)
    found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise UserError(f"{root}: no capture here; looked for cameras, images and points3D (.bin or .txt) in "
                    f"{', '.join(PLACES)} and for transforms.json; found {found}")


def _locate(capture: Capture, frames: list[Frame], factor: int) -> tuple[list[Frame], list[Path], bool]:
    """(frames, the image file of each, whether these are the reduced images of images_<factor>)."""
    folders = {frame.folder: frame.folder.with_name(f"{frame.folder.name}_{factor}") for frame in frames}
    reduced = factor > 1 and all(folder.is_dir() for folder in folders.values())
    wanted = [(folders[frame.folder] if reduced else frame.folder) / frame.file for frame in frames]
    found = [find_image(path) for path in wanted]
    missing = [path for path, file in zip(wanted, found, strict=True) if file is None]
    if missing:
        text = f"{capture.file}: names {len(frames)} images, but {len(missing)} are not there, for instance {missing[0]}"
        if capture.format == "colmap" or len(missing) == len(frames):
            folder = next(iter(folders))
            others = sorted(int(p.name.rpartition("_")[2]) for p in folder.parent.glob(f"{folder.name}_*")
                            if p.name.rpartition("_")[2].isdigit())
            hint = f", or use the factor {others[0]} of {folder.name}_{others[0]}/" if others and not reduced else ""
            raise UserError(f"{text}: copy them to there{hint}")
        warnings.warn(f"{text}; going on without them", stacklevel=3)
    kept = [(frame, file) for frame, file in zip(frames, found, strict=True) if file is not None]
    return [frame for frame, _ in kept], [file for _, file in kept], reduced


def _checked_size(file: Path, frame: Frame, source: Path) -> tuple[int, int]:
    """(width, height) of the image file, which must be as the camera says, up to one scale and rounding."""
    width, height = image_size(file)
    lens = frame.lens
    slack = 2 + 0.005 * max(width, height)
    if abs(height - lens.height * width / lens.width) > slack or abs(width - lens.width * height / lens.height) > slack:
        raise UserError(f"{file}: found {width}x{height} pixels, but {source} has a camera of {lens.width}x{lens.height} "
                        "for it, another aspect ratio: use the images that the cameras were computed from")
    return width, height


def _mask(frame: Frame) -> Path | None:
    if frame.mask is not None:
        return frame.mask if frame.mask.is_file() else None
    path = frame.folder.parent / "masks" / frame.file
    names = (path.with_suffix(".png"), path.with_name(f"{path.name}.png"))
    return next((mask for mask in names if mask.is_file()), None)


def _split(views: list[View], said: list[str | None] | None, test_every: int) -> tuple[list[View], list[View]]:
    """(train, test): as the capture itself says, or every so many views."""
    held_out = ([split == "test" for split in said] if said else
                [test_every > 0 and i % test_every == 0 for i in range(len(views))])
    return ([view for view, held in zip(views, held_out, strict=True) if not held],
            [view for view, held in zip(views, held_out, strict=True) if held])


def _digest(views: list[View]) -> str:
    """A short name for the images, by name and size of the file, and the cameras: equal on every machine, cheap to make."""
    digest = hashlib.blake2b(digest_size=6)
    for view in views:
        camera = view.camera
        digest.update(repr((view.name, view.path.stat().st_size, camera.width, camera.height)).encode())
        digest.update(camera.viewmat.numpy().tobytes() + camera.K.numpy().tobytes())
        digest.update(repr(camera.origin).encode() if camera.origin != WORLD else b"")
    return digest.hexdigest()


def _random_points(viewmats: list[np.ndarray], seed: int) -> Points:
    """Points of random place and colour in the box that the cameras look at or stand around."""
    centre = focus(viewmats)
    places = np.stack([_place(viewmat) for viewmat in viewmats])
    half = np.linalg.norm(places - centre, axis=1).max()
    draw = generator(seed, "random points")
    xyz = torch.from_numpy(centre).float() + half * (2 * torch.rand(RANDOM_POINTS, 3, generator=draw) - 1)
    return Points(xyz, torch.randint(0, 256, (RANDOM_POINTS, 3), generator=draw, dtype=torch.uint8))
