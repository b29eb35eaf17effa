"""Built-in captures: two ray-traced scenes, written to disk as COLMAP reconstructions.

With them a first run, a test or an experiment needs no download. They hold what makes real captures hard
(thin structures, occlusion, fine texture, highlights, a mirror), and their cameras are exact.
"""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flexgs.errors import UserError
from flexgs.scene.camera_model import CameraModel
from flexgs.scene.pycolmap_library import library

if TYPE_CHECKING:
    from flexgs.demo.tracer import Tracer

SYNTHETIC = ("courtyard", "studio")
"""Names of the built-in scenes."""
POINTS = 4000
"""About how many sparse points a capture has."""
SUPERSAMPLES = 2
"""Rays along each side of a pixel."""
TILE = 32
"""Side, in pixels, of the squares whose rays are traced together."""

Array = np.ndarray


def _poses(views: int, rng: np.random.Generator) -> list[Array]:
    """Draw world-to-camera poses [4, 4] on rings at three heights, looking inwards as if held by hand."""
    poses = []
    for i in range(views):
        # Steps of the golden angle put cameras with successive names far apart.
        angle = 2 * np.pi * (i * 0.381966 + rng.uniform(-0.01, 0.01))
        centre = np.array([0, 0, (0.9, 1.6, 2.4)[i % 3] + rng.uniform(-0.15, 0.15)])
        centre[:2] = rng.uniform(2.9, 3.7) * np.array([np.cos(angle), np.sin(angle)])
        forward = np.array([0, 0, 0.75]) + rng.normal(size=3) * 0.15 - centre
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, np.array([0, 0, 1]) + rng.normal(size=3) * 0.03)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward])
        pose[:3, 3] = -pose[:3, :3] @ centre
        poses.append(pose)
    return poses


def photograph(tracer: "Tracer", lens: CameraModel, viewmat: Array) -> Array:
    """Render the photograph of a camera model at the pose viewmat ([4, 4], world to camera).

    Returns sRGB [H, W, 3] uint8 at the size of lens.
    """
    from flexgs.demo.tracer import develop

    light = np.empty((lens.height, lens.width, 3))
    offsets = (np.mgrid[0:SUPERSAMPLES, 0:SUPERSAMPLES].reshape(2, -1).T + 0.5) / SUPERSAMPLES
    for y0 in range(0, lens.height, TILE):
        for x0 in range(0, lens.width, TILE):
            y, x = np.mgrid[y0:min(y0 + TILE, lens.height), x0:min(x0 + TILE, lens.width)]
            corners = np.stack([x, y], -1).reshape(-1, 1, 2)
            colours = tracer.colours(*_rays(lens, viewmat, (corners + offsets).reshape(-1, 2)))
            light[y, x] = np.clip(colours, 0, 1).reshape(*y.shape, len(offsets), 3).mean(2)
    return develop(light)


def _rays(lens: CameraModel, viewmat: Array, pixels: Array) -> tuple[Array, Array]:
    """Compute the camera centre [3] and unit directions [n, 3] of the rays through image positions [n, 2]."""
    R = viewmat[:3, :3]
    camera: Any = lens.colmap()
    d = np.hstack([camera.cam_from_img(pixels), np.ones((len(pixels), 1))]) @ R
    return -R.T @ viewmat[:3, 3], d / np.linalg.norm(d, axis=1, keepdims=True)


def write_synthetic(name: str, folder: str | Path, *, views: int = 48, width: int = 208, height: int = 156,
                    seed: int = 0, lens: CameraModel | None = None) -> Path:
    """Render a built-in scene and write it to folder as a COLMAP capture; equal arguments give equal files.

    The capture has images/*.png, and sparse/0 with the cameras and some thousand points that they see. It
    replaces an older capture in folder, and appears there only when it is complete.

    Args:
        name: One of SYNTHETIC.
        folder: Where to write; it may be absent. It is also what is returned.
        views: Number of photographs.
        width: Width of the photographs in pixels.
        height: Height of the photographs in pixels.
        seed: Seed of the poses, the points and some of the solids.
        lens: Camera model in place of a pinhole of width x height pixels.

    Raises:
        UserError: There is no scene of this name, or folder holds anything but a capture.
    """
    if name not in SYNTHETIC:
        raise UserError(f"synthetic scene {name!r}: no such scene; expected one of {', '.join(SYNTHETIC)}")
    from flexgs.demo.stages import STAGES
    from flexgs.demo.tracer import Tracer

    folder = Path(folder)
    if folder.exists() and not (folder.is_dir()
                                and {p.name for p in folder.iterdir()} <= {"images", "sparse"}):
        raise UserError(f"{folder}: exists and is not a synthetic capture; it would be "
                        "replaced: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lens = lens or CameraModel("PINHOLE", width, height, (0.9 * width, 0.9 * width, width / 2, height / 2))
    tracer = Tracer(STAGES[name](np.random.default_rng((seed, 1))))
    poses = _poses(views, np.random.default_rng((seed, 2)))
    library()  # imported here, since only the main thread may restore the signal handler
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda pose: photograph(tracer, lens, pose), poses))
    rng = np.random.default_rng((seed, 3))
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (work / "images").mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(work / "images" / _file(i))
        points = [_seen(tracer, lens, pose, image, 1 + POINTS // views, rng)
                  for pose, image in zip(poses, images, strict=True)]
        _write_model(work / "sparse" / "0", lens, poses, points)
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is there, another process wrote it first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _file(i: int) -> str:
    return f"{i:03d}.png"


def _seen(tracer: "Tracer", lens: CameraModel, viewmat: Array, image: Array, count: int,
          rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw sparse points from count pixels of a photograph; pixels of the sky give none.

    Returns positions [n, 3] with noise of 1 cm and colours [n, 3] uint8.
    """
    from flexgs.demo.tracer import FAR

    x, y = rng.integers(lens.width, size=count), rng.integers(lens.height, size=count)
    o, d = _rays(lens, viewmat, np.stack([x, y], 1) + 0.5)
    t = tracer.distances(o, d)
    xyz = o + t[:, None] * d + rng.normal(scale=0.01, size=(count, 3))
    return xyz[t < FAR], image[y, x][t < FAR]


def _write_model(model: Path, lens: CameraModel, poses: list[Array],
                 points: list[tuple[Array, Array]]) -> None:
    pycolmap = library()
    found = pycolmap.Reconstruction()
    camera: Any = lens.colmap()
    camera.camera_id = 1
    found.add_camera_with_trivial_rig(camera)
    for i, pose in enumerate(poses):
        image = pycolmap.Image(name=_file(i), camera_id=1, image_id=i + 1)
        found.add_image_with_trivial_frame(image,
                                           pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:3, :3]), pose[:3, 3]))
    for xyz, colours in points:
        for place, colour in zip(xyz, colours, strict=True):
            found.add_point3D(place, pycolmap.Track(), colour)
    model.mkdir(parents=True)
    found.write_binary(str(model))


def ensure_synthetic(folder: str | Path) -> list[Path]:
    """Write the built-in captures that folder lacks, in a few seconds each; return the folders of all."""
    paths = [Path(folder) / name for name in SYNTHETIC]
    return [path if path.is_dir() else write_synthetic(path.name, path) for path in paths]
