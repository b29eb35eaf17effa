"""Camera paths: where a model is looked at from in a video, on a page, and in the viewer."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from scipy.spatial.transform import Rotation, Slerp

from flexgs.camera import Camera, focus, look_at
from flexgs.errors import UserError
from flexgs.inputs import Range, read_json, typed
from flexgs.origin import WORLD, unit_of
from flexgs.splats import Splats

Path = Callable[[Sequence[Camera], int, int, int], list[Camera]]
"""Function (cameras of the capture, number of frames, width, height) -> one camera per frame of a closed
path."""


def orbit(cameras: Sequence[Camera], frames: int, width: int, height: int) -> list[Camera]:
    """Cameras on an ellipse in the plane of the capture's cameras, looking at the point those look at.

    The ellipse is as wide as the capture's cameras spread: it surrounds the object where they do, and stays
    in front of it where they all stand on one side.
    """
    places, target, up = _places(cameras), focus(_poses(cameras)), torch.from_numpy(upwards(cameras))
    middle = places.mean(0)
    _, _, axes = np.linalg.svd(places - middle, full_matrices=False)
    # points on a circle have a standard deviation of radius / sqrt(2) along each axis
    reach = math.sqrt(2) * (places - middle) @ axes[:2].T
    a, b = axes[:2] * reach.std(0)[:, None]
    angle = fov(cameras)
    ways = [middle + math.cos(t) * a + math.sin(t) * b for t in 2 * np.pi * np.arange(frames) / frames]
    return [_as_float(look_at(torch.from_numpy(eye), torch.from_numpy(target), up, width, height, angle,
                              cameras[0].near, cameras[0].origin)) for eye in ways]


def views(cameras: Sequence[Camera], frames: int, width: int, height: int) -> list[Camera]:
    """Cameras that go from each camera of the capture to the next, in order, and back to the first."""
    poses = [np.linalg.inv(viewmat) for viewmat in _poses([*cameras, cameras[0]])]
    at = np.linspace(0, len(cameras), frames, endpoint=False)
    turns = Slerp(np.arange(len(poses)),
                  Rotation.from_matrix([pose[:3, :3] for pose in poses]))(at).as_matrix()
    places = np.stack([np.interp(at, np.arange(len(poses)), [pose[i, 3] for pose in poses])
                       for i in range(3)], axis=1)
    focal = height / 2 / math.tan(math.radians(fov(cameras)) / 2)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    made = []
    for turn, place in zip(turns, places, strict=True):
        viewmat = np.eye(4)
        viewmat[:3, :3], viewmat[:3, 3] = turn.T, -turn.T @ place
        made.append(Camera(torch.from_numpy(viewmat).float(), K, width, height, cameras[0].near,
                           cameras[0].origin))
    return made


def read_path(file: str, like: Camera, width: int, height: int) -> list[Camera]:
    """Read a camera path in nerfstudio's format, in the coordinates of the capture: one camera per frame.

    Args:
        file: JSON {"camera_path": [{"camera_to_world": 16 numbers by rows, "fov": degrees}, ...]}; axes are
            OpenGL's (x right, y up, z backward), and fov is the vertical field of view.
        like: a camera of the model, for the origin of its coordinates and the near plane.
        width: width of the frames in pixels.
        height: height of the frames in pixels.

    Raises:
        UserError: the file is not of this format, or a pose is no rotation and translation.
    """
    frames = read_json(file).get("camera_path")
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{file}: found no frames in camera_path, expected a camera path as nerfstudio "
                        "exports it")
    cameras = []
    for i, frame in enumerate(frames):
        frame = typed(dict, frame, where := f"{file}: frame {i}")
        rows = typed(Annotated[tuple[float, ...], Range(16, 16)], frame.get("camera_to_world"),
                     f"{where}: camera_to_world")
        angle = typed(Annotated[float, Range(1, 170)], frame.get("fov"), f"{where}: fov")
        pose = np.array(rows).reshape(4, 4)
        if (not np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=0.01)
                or np.linalg.det(pose[:3, :3]) < 0 or not np.allclose(pose[3], [0, 0, 0, 1])):
            raise UserError(f"{where}: camera_to_world is no rotation and translation; export it again")
        viewmat = np.linalg.inv(pose @ np.diag([1.0, -1, -1, 1]))
        focal = height / 2 / math.tan(math.radians(angle) / 2)
        K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        cameras.append(_as_float(Camera(torch.from_numpy(viewmat), K, width, height, like.near,
                                        WORLD).at(like.origin)))
    return cameras


def path_text(cameras: Sequence[Camera]) -> str:
    """Return the JSON of a camera path as read_path() reads it: one frame for each camera."""
    frames = []
    for camera in cameras:
        pose = np.linalg.inv(camera.at(WORLD).viewmat.cpu().double().numpy()) @ np.diag([1.0, -1, -1, 1])
        angle = math.degrees(2 * math.atan(camera.height / 2 / float(camera.K[1, 1])))
        frames.append({"camera_to_world": pose.ravel().tolist(), "fov": angle})
    return json.dumps({"camera_path": frames})


PATHS: Mapping[str, Path] = {"orbit": orbit, "views": views}


def around(splats: Splats, count: int = 16) -> list[Camera]:
    """Make cameras for a model that has none, in a circle from which half of the Gaussians are seen.

    The centre is the median of the Gaussians, weighted by opacity. Up is -y, as COLMAP leaves it where
    gravity is along y, and as most viewers assume.
    """
    weight = torch.sigmoid(splats.opacities.detach().cpu())
    means = splats.means.detach().cpu().double()
    middle = torch.stack([_median(means[:, i], weight) for i in range(3)])
    away = _median((means - middle).norm(dim=1), weight)
    if not away > 1e-6 * middle.norm():
        # all Gaussians lie at one place: stand off by their size, and by no less than float32 resolves there
        # (the clamp keeps exp() within the range of float32)
        size = _median(splats.scales.detach().cpu().double().amax(1), weight).clamp(max=80).exp()
        away = torch.maximum(size, 1e-6 * middle.norm())
    near = 0.01 * unit_of(2.2 * float(away))
    up = torch.tensor([0.0, -1.0, 0.0])
    turns = 2 * math.pi * torch.arange(count) / count
    return [_as_float(look_at(middle + 2.2 * away * middle.new_tensor([math.cos(t), -0.35, math.sin(t)]),
                              middle, up, 640, 480, near=near, origin=splats.origin)) for t in turns.tolist()]


def start(cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose an initial (position, target, up), each [3]: those of most_direct()."""
    poses, places = _poses(cameras), _places(cameras)
    first = most_direct(cameras)
    distance = np.linalg.norm(focus(poses) - places[first])
    return places[first], places[first] + distance * poses[first][2, :3], upwards(cameras)


def most_direct(cameras: Sequence[Camera]) -> int:
    """Return which camera shows the capture best.

    Of the half of the cameras that stand furthest back, it is the one that looks most directly at the point
    on which all cameras focus.
    """
    poses, places = _poses(cameras), _places(cameras)
    forward, ahead = np.stack([pose[2, :3] for pose in poses]), focus(poses) - places
    distance = np.linalg.norm(ahead, axis=1)
    straight = np.where(distance >= np.median(distance),
                        (ahead * forward).sum(1) / np.maximum(distance, 1e-300), -1)
    return int(straight.argmax())


def upwards(cameras: Sequence[Camera]) -> np.ndarray:
    """Return the mean up direction of the cameras, a unit vector [3]."""
    up = -np.mean([camera.viewmat[1, :3].cpu().double().numpy() for camera in cameras], axis=0)
    return up / np.linalg.norm(up)


def _poses(cameras: Sequence[Camera]) -> list[np.ndarray]:
    """Return the cameras' [4, 4] float64 world-to-camera matrices, relative to the origin of the first."""
    return [camera.at(cameras[0].origin).viewmat.cpu().double().numpy() for camera in cameras]


def _places(cameras: Sequence[Camera]) -> np.ndarray:
    """Return the positions of the cameras, [N, 3] float64."""
    return np.stack([-pose[:3, :3].T @ pose[:3, 3] for pose in _poses(cameras)])


def _as_float(camera: Camera) -> Camera:
    """Return the camera with a float32 pose, clamped to the range of float32."""
    most = torch.finfo(torch.float32).max
    return replace(camera, viewmat=camera.viewmat.clamp(-most, most).float())


def _median(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted median."""
    order = values.argsort()
    return values[order[int((weight[order].cumsum(0) < weight.sum() / 2).sum())]]


def fov(cameras: Sequence[Camera]) -> float:
    """Return the median vertical field of view of the cameras, in degrees."""
    return math.degrees(float(np.median([2 * math.atan(camera.height / 2 / float(camera.K[1, 1]))
                                         for camera in cameras])))
