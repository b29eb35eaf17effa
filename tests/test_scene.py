"""Loading captures: every format and lens that is read, and one line for the user for every way a capture can
be broken."""

import json
import os
import pickle
import re
import shutil
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from conftest import shared
from PIL import Image

from flexgs.datasets.catalog import find_scenes
from flexgs.demo.stages import STAGES
from flexgs.demo.synthetic import photograph, write_synthetic
from flexgs.demo.tracer import Tracer
from flexgs.errors import UserError
from flexgs.gaussians import SH_C0
from flexgs.ply import read_points
from flexgs.scene import Points, ViewSampler, initial_splats, load_scene
from flexgs.scene.camera_model import LENSES, CameraModel
from flexgs.scene.polynomial import POLYNOMIAL
from flexgs.scene.undistort import MAX_FOV, _sources, remap
from flexgs.scene.views import ImageCache


@pytest.fixture
def copy(capture: Path, tmp_path: Path) -> Path:
    """A capture that may be broken: 18 views of 64 x 48."""
    return Path(shutil.copytree(capture, tmp_path / "copy"))


def psnr(a, b) -> float:
    return float(-10 * torch.log10(((a.float() - b.float()) / 255).square().mean()))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def same_views(a, b, atol=1e-5):
    for one, two in zip(a.train + a.test, b.train + b.test, strict=True):
        assert (one.name == two.name and (one.camera.width, one.camera.height)
                == (two.camera.width, two.camera.height))
        torch.testing.assert_close(one.camera.viewmat, two.camera.viewmat, atol=atol, rtol=0)
        torch.testing.assert_close(one.camera.K, two.camera.K, atol=1e-4, rtol=0)
        assert torch.equal(one.image(), two.image())


def to_text(capture: Path) -> None:
    model = capture / "sparse" / "0"
    pycolmap.Reconstruction(str(model)).write_text(str(model))
    for file in model.glob("*.bin"):
        file.unlink()


def to_transforms(capture: Path, **top) -> dict:
    """Replace the COLMAP model by a transforms.json and return what it holds; intrinsics at the top."""
    found = pycolmap.Reconstruction(str(capture / "sparse" / "0"))
    camera = found.cameras[1]
    fx, fy, cx, cy = camera.params
    frames = []
    for image in found.images.values():
        pose = np.linalg.inv(np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]]))
        pose[:3, 1:3] *= -1
        frames.append({"file_path": f"images/{image.name}", "transform_matrix": pose.tolist()})
    data = {"w": camera.width, "h": camera.height, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy,
            "frames": frames, **top}
    shutil.rmtree(capture / "sparse")
    save(capture, data)
    return data


def save(capture: Path, data) -> None:
    (capture / "transforms.json").write_text(json.dumps(data))


# -- what is read
# -----------------------------------------------------------------------------------------------------

def test_colmap(capture):
    scene = load_scene(capture, name="other")
    found = pycolmap.Reconstruction(str(capture / "sparse" / "0"))
    poses = {image.name: image.cam_from_world().matrix() for image in found.images.values()}
    assert [v.name for v in scene.test] == ["000.png", "008.png", "016.png"] and len(scene.train) == 15
    for view in scene.train:
        assert view.camera.viewmat.dtype == view.camera.K.dtype == torch.float32
        np.testing.assert_allclose(view.camera.viewmat[:3].numpy(), poses[view.name], atol=1e-6)
        image = view.image()
        assert image.dtype == torch.uint8 and view.mask() is None
        assert np.array_equal(image.numpy(), np.asarray(Image.open(capture / "images" / view.name)))
    assert scene.points.xyz.dtype == torch.float32 and scene.points.rgb.dtype == torch.uint8
    centres = torch.stack([v.camera.center for v in scene.train])
    assert scene.scene_scale == pytest.approx(1.1 * float((centres - centres.mean(0)).norm(dim=1).max()))
    assert scene.name == "other" and scene.root == capture
    assert json.loads(json.dumps(scene.protocol)) == scene.protocol
    assert (scene.protocol["width"] == 64 and scene.protocol["train_views"] == 15
            and not scene.protocol["undistorted"])


def test_text_gives_the_same_scene_as_binary(capture, copy):
    to_text(copy)
    scene, again = load_scene(capture), load_scene(copy)
    same_views(scene, again)
    assert torch.equal(scene.points.xyz, again.points.xyz) and torch.equal(scene.points.rgb, again.points.rgb)


@pytest.mark.parametrize("place", ["sparse", "colmap/sparse/0"])
def test_other_places_and_the_layout_without_rigs(capture, copy, place):
    (copy / "sparse" / "0").rename(copy / "model")
    (copy / "sparse").rmdir()
    (copy / place).parent.mkdir(parents=True, exist_ok=True)
    (copy / "model").rename(copy / place)
    for name in ("rigs.bin", "frames.bin"):
        (copy / place / name).unlink()
    same_views(load_scene(capture), load_scene(copy))


def test_images_in_subfolders(capture, copy):
    found = pycolmap.Reconstruction(str(copy / "sparse" / "0"))
    for image in found.images.values():
        folder = "left" if image.image_id % 2 else "right"
        (copy / "images" / folder).mkdir(exist_ok=True)
        (copy / "images" / image.name).rename(copy / "images" / folder / image.name)
        image.name = f"{folder}/{image.name}"
    found.write_binary(str(copy / "sparse" / "0"))
    scene = load_scene(copy)
    assert (len(scene.train) == 15 and scene.test[0].name.startswith("left/")
            and scene.train[-1].name.startswith("right/"))
    assert scene.train[0].image().shape == (48, 64, 3)


def test_split(capture):
    assert len(load_scene(capture, test_every=0).test) == 0
    names = sorted(p.name for p in (capture / "images").iterdir())
    scene = load_scene(capture, test_every=5)
    assert [v.name for v in scene.test] == names[::5]
    assert [v.name for v in scene.train] == [n for i, n in enumerate(names) if i % 5]


# -- sizes
# ------------------------------------------------------------------------------------------------------------

def test_reducing_by_a_factor(capture):
    scene, small = load_scene(capture), load_scene(capture, factor=3)
    view, original = small.train[0], Image.open(capture / "images" / small.train[0].name)
    assert (view.camera.width, view.camera.height) == (21, 16)
    assert np.array_equal(view.image().numpy(),
                          np.asarray(original.resize((21, 16), Image.Resampling.BICUBIC)))
    K = scene.train[0].camera.K.numpy() * [[21 / 64], [16 / 48], [1]]
    np.testing.assert_allclose(view.camera.K.numpy(), K, rtol=1e-6)
    assert small.protocol["resize"] == "pillow bicubic" and small.protocol["images"] == "images"


def test_a_folder_of_reduced_images_is_taken_as_it_is(copy):
    (copy / "images_2").mkdir()
    for file in (copy / "images").iterdir():
        # another suffix, uneven rounding
        Image.open(file).resize((33, 24)).save(copy / "images_2" / f"{file.stem}.jpg")
    scene = load_scene(copy, factor=2)
    view = scene.train[0]
    assert view.path.parent.name == "images_2" and view.image().shape == (24, 33, 3)
    assert (view.camera.K[0, 0] == pytest.approx(0.9 * 64 * 33 / 64)
            and view.camera.K[1, 2] == pytest.approx(12))
    assert scene.protocol["images"] == "images_2" and scene.protocol["resize"] is None


def test_images_larger_than_the_model_says_scale_the_camera(copy):
    for file in (copy / "images").iterdir():
        Image.open(file).resize((128, 96)).save(file)
    camera = load_scene(copy).train[0].camera
    assert (camera.width, camera.height) == (128, 96) and camera.K[0, 0] == pytest.approx(0.9 * 128)


def test_exif_orientation_is_not_applied_and_transparency_is_white(copy):
    first, second = sorted((copy / "images").iterdir())[:2]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(first).save(first, exif=exif)
    Image.new("RGBA", (64, 48), (200, 0, 0, 0)).save(second)
    scene = load_scene(copy)
    assert scene.test[0].image().shape == (48, 64, 3)
    assert (scene.train[0].image() == 255).all()


# -- masks
# ------------------------------------------------------------------------------------------------------------

def test_masks_by_both_habits(copy):
    (copy / "masks").mkdir()
    keep = np.zeros((48, 64), np.uint8)
    keep[:24, 16:] = 1  # any value but zero counts
    Image.fromarray(keep).save(copy / "masks" / "001.png")
    # what is inside does not matter to Pillow
    (copy / "images" / "002.png").rename(copy / "images" / "002.jpg")
    Image.fromarray(keep).resize((128, 96), 0).save(copy / "masks" / "002.jpg.png")
    found = pycolmap.Reconstruction(str(copy / "sparse" / "0"))
    found.images[3].name = "002.jpg"
    found.write_binary(str(copy / "sparse" / "0"))
    scene = load_scene(copy)
    one, two, none = scene.train[:3]
    assert one.mask().dtype == torch.bool and none.mask() is None and scene.protocol["masks"] == 2
    assert torch.equal(one.mask(), torch.from_numpy(keep > 0)) and torch.equal(two.mask(), one.mask())
    assert torch.equal(load_scene(copy, factor=2).train[0].mask(), torch.from_numpy(keep[::2, ::2] > 0))
    assert load_scene(copy, masks=False).train[0].mask() is None


# -- lenses
# -----------------------------------------------------------------------------------------------------------

FOCAL = 130.0


@pytest.mark.parametrize("lens", [
    CameraModel("SIMPLE_PINHOLE", 160, 120, (FOCAL, 71.0, 66.0)),
    CameraModel("SIMPLE_RADIAL", 160, 120, (FOCAL, 80.0, 60.0, 0.15)),
    CameraModel("RADIAL", 160, 120, (FOCAL, 71.0, 66.0, -0.25, 0.05)),
    CameraModel("OPENCV", 160, 120, (FOCAL, 1.05 * FOCAL, 84.0, 55.0, -0.2, 0.1, 0.01, -0.008)),
    CameraModel("FULL_OPENCV", 160, 120,
                (FOCAL, FOCAL, 71.0, 66.0, 0.1, 0.02, 0.003, 0.002, 0.01, 0.05, 0.0, 0.0)),
    CameraModel("SIMPLE_DIVISION", 160, 120, (FOCAL, 80.0, 60.0, -0.1)),
    CameraModel("DIVISION", 160, 120, (FOCAL, FOCAL, 71.0, 66.0, -0.15)),
    CameraModel("OPENCV_FISHEYE", 160, 120, (70.0, 72.0, 77.0, 63.0, 0.03, -0.01, 0.002, 0.0)),
    CameraModel("SIMPLE_RADIAL_FISHEYE", 160, 120, (70.0, 80.0, 60.0, 0.03)),
    CameraModel("RADIAL_FISHEYE", 160, 120, (70.0, 80.0, 60.0, 0.03, -0.01)),
    CameraModel("SIMPLE_FISHEYE", 160, 120, (70.0, 80.0, 60.0)),
    CameraModel("FISHEYE", 160, 120, (70.0, 70.0, 80.0, 60.0)),
    CameraModel("THIN_PRISM_FISHEYE", 160, 120,
                (70.0, 70.0, 80.0, 60.0, 0.02, -0.005, 0.001, 0.001, 0.0, 0.0, 0.001, 0.001)),
    CameraModel("RAD_TAN_THIN_PRISM_FISHEYE", 160, 120,
                (70.0, 70.0, 80.0, 60.0, 0.02, -0.005, 0.001, 0.0, 0.0, 0.0, 0.001, 0.001, 0.001, 0.0, 0.001,
                 0.0)),
    CameraModel("FOV", 160, 120, (70.0, 70.0, 80.0, 60.0, 0.9)),
    CameraModel("EUCM", 160, 120, (75.0, 75.0, 80.0, 60.0, 0.6, 1.1)),
], ids=lambda lens: lens.model)
def test_a_bent_photograph_becomes_what_a_pinhole_camera_sees(lens, tmp_path):
    """The scene photographed through the lens and undistorted, against the scene photographed by the pinhole
    camera."""
    assert lens.model in LENSES
    folder = write_synthetic("studio", tmp_path / "bent", views=4, lens=lens)
    scene = load_scene(folder, test_every=0)
    view = scene.train[2]
    K = view.camera.K.double()
    pinhole = CameraModel("PINHOLE", view.camera.width, view.camera.height,
                          (float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])))
    tracer = Tracer(STAGES["studio"](np.random.default_rng((0, 1))))
    truth = torch.from_numpy(photograph(tracer, pinhole, view.camera.viewmat.double().numpy()))
    image = view.image()
    assert image.shape == truth.shape and scene.protocol["undistorted"] == bool(LENSES[lens.model])
    right = psnr(image, truth)
    assert right > (24 if LENSES[lens.model] else 45)
    # the error over the shift is a parabola, lowest at what the image is off by, in pixels
    for axis in (0, 1):
        back, here, forth = (float((image.roll(shift, axis).float() - truth).square().mean())
                             for shift in (-1, 0, 1))
        assert abs(back - forth) / (2 * (back + forth - 2 * here)) < 0.1
    assert (image.float().mean(2) == 0).float().mean() < 0.01  # no blank pixels at the edges


WIDE = {
    "OPENCV_FISHEYE": (700, 690, 790, 610, 0.02, -0.005, 0.001, 0),
    "SIMPLE_RADIAL_FISHEYE": (700, 800, 600, 0.02),
    "RADIAL_FISHEYE": (700, 800, 600, 0.02, -0.005), "SIMPLE_FISHEYE": (700, 800, 600),
    "FISHEYE": (700, 700, 800, 600),
    "THIN_PRISM_FISHEYE": (700, 700, 800, 600, 0.02, -0.005, 0.001, 0.001, 0, 0, 0.001, 0.001),
    "RAD_TAN_THIN_PRISM_FISHEYE": (700, 700, 800, 600, 0.02, -0.005, 0.001, 0, 0, 0, 0.001, 0.001, 0.001, 0,
                                   0.001, 0),
    "FOV": (700, 700, 800, 600, 0.9), "EUCM": (700, 700, 800, 600, 0.6, 1.1),
}


def test_every_lens_of_pycolmap_is_known_or_refused():
    assert set(pycolmap.CameraModelId.__members__) - set(LENSES) == {"INVALID", "EQUIRECTANGULAR"}
    assert {name for name, by in LENSES.items() if by == "flexgs"} == {*WIDE, POLYNOMIAL}


@pytest.mark.parametrize("model", WIDE)
def test_a_point_is_in_the_undistorted_photograph_where_the_pinhole_sees_it(model):
    """A smooth ramp says in each pixel where in the photograph it came from; points in space say where it
    should."""
    lens = CameraModel(model, 1600, 1200, tuple(map(float, WIDE[model])))
    pinhole = lens.pinhole()
    fov = [2 * np.degrees(np.arctan(side / 2 / f)) for side,
           f in zip((pinhole.width, pinhole.height), pinhole.params[:2],
                 strict=True)]
    assert min(fov) > 75 and max(fov) <= MAX_FOV
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.integers(pinhole.width, size=400), rng.integers(pinhole.height, size=400)], 1)
    rays = np.hstack([pinhole.colmap().cam_from_img(pixels + 0.5), np.ones((400, 1))])
    want = lens.colmap().img_from_cam(3.7 * rays)  # the same points, further away
    assert (want > -1e-6).all() and (want < np.array([1600, 1200]) + 1e-6).all()  # nothing blank
    found = (_sources(lens)[0].numpy()[pixels[:, 1], pixels[:, 0]] + 1) * (800, 600)
    assert np.abs(found - want).max() < 1e-3
    ramp = np.zeros((1200, 1600, 3), np.uint8)
    ramp[..., 0] = (np.arange(1600) + 0.5) * 255 / 1600
    values = remap(ramp, lens, "bilinear")[pixels[:, 1], pixels[:, 0], 0]
    assert np.abs(values - want[:, 0] * 255 / 1600).max() < 1.6  # the ramp and the result are rounded


def test_distorted_masks_follow_the_image(tmp_path):
    lens = CameraModel("SIMPLE_RADIAL", 64, 48, (50.0, 32.0, 24.0, -0.2))
    folder = write_synthetic("studio", tmp_path / "bent", views=4, lens=lens)
    (folder / "masks").mkdir()
    for file in (folder / "images").iterdir():
        pixels = np.zeros((48, 64), np.uint8)
        pixels[12:36, 16:48] = 255
        Image.fromarray(pixels).save(folder / "masks" / file.name)
        Image.fromarray(pixels).convert("RGB").save(file)
    for factor in (1, 2):
        view = load_scene(folder, factor=factor, test_every=0).train[0]
        assert view.mask().shape == view.image().shape[:2]
        assert ((view.image()[..., 0] > 127) != view.mask()).float().mean() < 0.03 * factor


# -- transforms.json
# --------------------------------------------------------------------------------------------------

def test_transforms_give_the_cameras_of_colmap(capture, copy):
    to_transforms(copy, aabb_scale=4)
    with pytest.warns(UserWarning, match="no points"):
        scene = load_scene(copy)
    same_views(load_scene(capture), scene)
    assert scene.protocol["format"] == "transforms" and scene.protocol["points_from"] == "random"
    # the box of random points is where the cameras look
    assert (len(scene.points) == 10_000 and scene.points.xyz.mean(0).norm() < 1.5
            and scene.points.xyz.std() < 4)


@pytest.mark.filterwarnings("ignore:.*no points")
def test_transforms_of_instant_ngp(capture, copy):
    """camera_angle_x alone, no suffixes, no size, a frame that is not there."""
    data = to_transforms(copy)
    angle = 2 * np.arctan(0.5 * data["w"] / data["fl_x"])
    frames = [{**f, "file_path": f"./{f['file_path'][:-4]}"} for f in data["frames"]]
    frames.append({**frames[0], "file_path": "./images/999"})
    save(copy, {"camera_angle_x": angle, "frames": frames})
    with pytest.warns(UserWarning, match="names 19 images, but 1 are not there.*999"):
        scene = load_scene(copy)
    assert len(scene.train) + len(scene.test) == 18
    torch.testing.assert_close(scene.train[0].camera.K, load_scene(capture).train[0].camera.K)


def test_transforms_per_frame_intrinsics_and_distortion(copy):
    data = to_transforms(copy)
    data["frames"][0].update(fl_x=70.0, fl_y=71.0, cx=30.0, cy=25.0)
    data["frames"][1].update(k1=-0.1, p1=0.002)
    save(copy, data)
    with pytest.warns(UserWarning, match="no points"):
        scene = load_scene(copy, test_every=0)
    names = [Path(f["file_path"]).name for f in data["frames"]]
    views = {v.name: v for v in scene.train}
    assert views[names[0]].camera.K.tolist() == [[70, 0, 30], [0, 71, 25], [0, 0, 1]]
    assert (views[names[1]].lens.model == "OPENCV"
            and views[names[1]].image().shape[1] == views[names[1]].camera.width != 64)
    assert not scene.protocol["one_size"] and scene.protocol["lenses"] == ["OPENCV", "PINHOLE"]


@pytest.mark.parametrize("ascii", [True, False])
def test_transforms_points_reduced_images_and_split(copy, ascii):
    data = to_transforms(copy)
    vertices = np.array([(1, 2, 3, 255, 0, 7), (4, 5, 6, 1, 2, 3)], np.dtype(
        [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]))
    head = (f"ply\nformat {'ascii' if ascii else 'binary_little_endian'} 1.0\nelement vertex 2\n"
            + "".join(f"property {'float' if n in 'xyz' else 'uchar'} {n}\n" for n in vertices.dtype.names)
            + "end_header\n")
    body = "".join(" ".join(map(str, row)) + "\n"
                   for row in vertices.tolist()).encode() if ascii else vertices.tobytes()
    (copy / "points.ply").write_bytes(head.encode() + body)
    (copy / "images_2").mkdir()
    for file in (copy / "images").iterdir():
        Image.open(file).resize((32, 24)).save(copy / "images_2" / file.name)
    test = [f["file_path"] for f in data["frames"][:4]]
    save(copy, {**data, "ply_file_path": "points.ply", "test_filenames": test})
    scene = load_scene(copy, factor=2)
    assert (scene.points.xyz.tolist() == [[1, 2, 3], [4, 5, 6]]
            and scene.points.rgb.tolist() == [[255, 0, 7], [1, 2, 3]])
    assert scene.train[0].image().shape == (24, 32, 3) and scene.protocol["images"] == "images_2"
    assert {f"images/{v.name}" for v in scene.test} == set(test) and scene.protocol["test_every"] is None
    (copy / "points.ply").write_bytes(head.encode() + body[:-4])
    with pytest.raises(UserError, match=r"points\.ply"):
        load_scene(copy)


def test_split_files_of_blender_scenes(copy):
    data = to_transforms(copy)
    (copy / "transforms.json").unlink()
    for part, frames in (("train", data["frames"][:12]), ("test", data["frames"][12:])):
        (copy / f"transforms_{part}.json").write_text(json.dumps({**data, "frames": frames}))
    with pytest.warns(UserWarning, match="no points"):
        scene = load_scene(copy)
    assert (len(scene.train), len(scene.test)) == (12, 6)


def without(key):
    return lambda data: data.pop(key)


@pytest.mark.parametrize("change, says", [
    (without("frames"), "found no list of frames"),
    (lambda d: d.update(frames=[]), "found no list of frames"),
    (lambda d: d["frames"].__setitem__(3, 5), "frame 3 has no file_path"),
    (lambda d: d["frames"][2].pop("transform_matrix"), "frame 2 .* transform_matrix"),
    (lambda d: d["frames"][2].update(transform_matrix=[[1, 2], [3]]), "frame 2 .* transform_matrix"),
    (lambda d: d["frames"][2].update(transform_matrix=(2 * np.eye(4)).tolist()), "not a rotation"),
    (lambda d: d["frames"][2]["transform_matrix"][0].__setitem__(3, float("nan")),
     "the number NaN, which is not finite"),
    (without("fl_x"), "no focal length"),
    (lambda d: d.update(fl_x="wide"), "fl_x = 'wide', expected a number"),
    (lambda d: d.update(fl_x=-3), "positive sizes and focal lengths"),
    (lambda d: d.update(camera_model="EQUIRECTANGULAR"),
     "EQUIRECTANGULAR.* is not supported; expected one of SIMPLE_PINHOLE"),
    (lambda d: d.update(camera_model="OPENCV_FISHEYE", k1=-9e9), "no clear view around the optical axis"),
    (lambda d: d.update(w=48, h=64), "another aspect ratio"),
    (lambda d: d.update(ply_file_path="no.ply"), "no.ply: no such file, expected a PLY file"),
    (lambda d: [f.update(file_path="images/no.png") for f in d["frames"]],
     "names 18 images, but 18 are not there"),
])
def test_broken_transforms(copy, change, says):
    data = to_transforms(copy)
    change(data)
    save(copy, data)
    with pytest.raises(UserError, match=says) as error:
        load_scene(copy)
    assert str(copy) in one_line(error)


def test_truncated_transforms(copy):
    to_transforms(copy)
    text = (copy / "transforms.json").read_text()
    for cut in range(0, len(text), len(text) // 20):
        (copy / "transforms.json").write_text(text[:cut])
        with pytest.raises(UserError, match=r"transforms\.json"):
            load_scene(copy)


# -- what is refused
# --------------------------------------------------------------------------------------------------

def test_no_capture(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_scene(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        load_scene(tmp_path / "file")
    with pytest.raises(UserError, match=r"sparse, colmap/sparse and the folders in them, and for "
                                        r"transforms\.json; found file"):
        load_scene(tmp_path)
    with pytest.raises(UserError, match="factor 0"):
        load_scene(tmp_path, factor=0)


@pytest.mark.parametrize("part", ["cameras", "images", "points3D", "rigs", "frames"])
def test_truncated_binary_files(copy, part):
    """Cut at any byte, a file is refused by its name. (pycolmap itself reads garbage from it, or allocates
    for ever.)"""
    file = copy / "sparse" / "0" / f"{part}.bin"
    data = file.read_bytes()
    for cut in {*range(0, min(len(data), 120)), *range(0, len(data), max(1, len(data) // 60)), len(data) - 1}:
        file.write_bytes(data[:cut])
        with pytest.raises(UserError,
                           match=rf"{part}\.bin: found {cut} bytes, expected at least \d+") as error:
            load_scene(copy)
        one_line(error)


@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
def test_counts_beyond_reason(copy, part):
    file = copy / "sparse" / "0" / f"{part}.bin"
    data = file.read_bytes()
    for count in (10_000_000, 1 << 40, (1 << 64) - 1):
        file.write_bytes(struct.pack("<Q", count) + data[8:])
        with pytest.raises(UserError, match=rf"{part}\.bin"):
            load_scene(copy)


def test_damaged_bytes_are_read_or_refused_but_never_crash(copy):
    """Values, not sizes, are wrong: pycolmap notices what contradicts itself, the loader what is no
    number."""
    rng = np.random.default_rng(0)
    files = list((copy / "sparse" / "0").glob("*.bin"))
    for _ in range(60):
        file = files[rng.integers(len(files))]
        data = file.read_bytes()
        at = rng.integers(min(len(data) - 8, 200))
        file.write_bytes(data[:at] + rng.bytes(rng.choice([1, 4, 8])) + data[at + 8:])
        try:
            load_scene(copy)
        except UserError as e:
            assert str(copy) in str(e)
        file.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.*no points")
@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
def test_truncated_text_files(copy, part):
    to_text(copy)
    file = copy / "sparse" / "0" / f"{part}.txt"
    lines = file.read_text().splitlines()
    body = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    head, first = "\n".join(lines[:body]) + "\n", lines[body].split()
    for words in range(1, 4):
        file.write_text(head + " ".join(first[:words]))
        with pytest.raises(UserError, match=rf"{part}\.txt, line {body + 1}: found"):
            load_scene(copy)
    file.write_text(head)
    if part == "points3D":
        with pytest.warns(UserWarning, match=r"points3D\.txt: its head promises \d+ points, found 0"):
            load_scene(copy)
    else:
        with pytest.raises(UserError, match=str(copy)):
            load_scene(copy)


def test_a_missing_part(copy):
    (copy / "sparse" / "0" / "points3D.bin").unlink()
    with pytest.raises(UserError, match=r"found only cameras\.bin, .*images\.bin.*expected "
                                        r"cameras, images and points3D"):
        load_scene(copy)


@pytest.mark.parametrize("model", ["EQUIRECTANGULAR"])
def test_unsupported_lenses(copy, model):
    found = pycolmap.Reconstruction(str(copy / "sparse" / "0"))
    found.cameras[1] = pycolmap.Camera.create_from_model_name(1, model, 60.0, 64, 48)
    changed = pycolmap.Reconstruction()
    changed.add_camera_with_trivial_rig(found.cameras[1])
    for image in found.images.values():
        changed.add_image_with_trivial_frame(pycolmap.Image(name=image.name, camera_id=1,
                                                            image_id=image.image_id),
                                             image.cam_from_world())
    changed.write_binary(str(copy / "sparse" / "0"))
    with pytest.raises(UserError, match=rf"cameras\.bin: the camera model {model} is not supported"):
        load_scene(copy)


def test_too_few_views(copy):
    found = pycolmap.Reconstruction(str(copy / "sparse" / "0"))
    for i in range(3, 19):
        found.deregister_frame(i)
    found.write_binary(str(copy / "sparse" / "0"))
    with pytest.raises(UserError, match="found 1 training views of 2 images, expected at least 2"):
        load_scene(copy)


def test_missing_damaged_and_mismatched_images(copy):
    file = copy / "images" / "003.png"
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(UserError, match=r"names 18 images, but 1 are not there, for instance "
                                        rf"{re.escape(str(file))}"):
        load_scene(copy)
    for broken in (b"", b"not an image", data[:10]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=rf"{re.escape(str(file))}: cannot be read as an image"):
            load_scene(copy)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}: cannot be decoded"):
        load_scene(copy)
    Image.new("RGB", (48, 64)).save(file)
    with pytest.raises(UserError, match=r"found 48x64 pixels, but .* has a camera of 64x48 for it"):
        load_scene(copy)
    Image.fromarray(np.zeros((48, 64), np.float32)).save(file, format="TIFF")
    with pytest.raises(UserError, match="found pixels of mode F, expected 8 or 16 bits per channel"):
        load_scene(copy)


def test_only_reduced_images_are_there(copy):
    (copy / "images").rename(copy / "images_4")
    with pytest.raises(UserError, match=r"18 are not there.*or use the factor 4 of images_4/"):
        load_scene(copy)


def test_catalog(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(copy, tmp_path / "b")
    assert find_scenes(tmp_path) == [tmp_path / "b", tmp_path / "copy"]
    assert find_scenes(tmp_path, ["copy"]) == [tmp_path / "copy"]
    for root, names, says in ((tmp_path, ["copy", "empty"], "no capture named empty; found b, copy"),
                              (tmp_path / "empty", None, "no capture here; expected folders"),
                              (copy, None, "it is itself a capture"),
                              (tmp_path / "no", None, "no such folder")):
        with pytest.raises(UserError, match=says):
            find_scenes(root, names)


# -- the cache, the sampler, the first splats
# -------------------------------------------------------------------------

def test_the_cache_holds_what_was_used_last_and_no_more():
    cache, made = ImageCache(100), []

    def get(key):
        return cache.get((key,), lambda: made.append(key) or np.zeros(40, np.uint8))

    for key in "ababcac":  # c drives out a, then a drives out b
        get(key)
    assert made == ["a", "b", "c", "a"] and cache.bytes == 80
    assert cache.get(("large",), lambda: np.zeros(101, np.uint8)).size == 101 and cache.bytes == 80


def test_an_image_that_another_thread_is_decoding_is_waited_for():
    cache, made, started, go = ImageCache(100), [], threading.Event(), threading.Event()

    def make():
        made.append(1)
        started.set()
        go.wait(10)
        return np.zeros(40, np.uint8)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, ("a",), make)
        started.wait(10)
        second = pool.submit(cache.get, ("a",), make)
        go.set()
        assert first.result() is second.result() and made == [1] and cache.bytes == 40


def test_a_failed_decoding_is_tried_again():
    cache = ImageCache(100)
    with pytest.raises(ZeroDivisionError):
        cache.get(("a",), lambda: 1 / 0)
    assert cache.get(("a",), lambda: np.ones(4, np.uint8)).sum() == 4


def test_views_share_a_bounded_cache_and_travel_to_other_processes(capture):
    scene = load_scene(capture, cache_bytes=2 * 64 * 48 * 3)
    for view in scene.train:
        view.image()
    cache = scene.train[0].cache
    assert cache is scene.test[0].cache and cache.bytes == cache.limit
    assert scene.train[-1].image().data_ptr() == scene.train[-1].image().data_ptr()
    again = pickle.loads(pickle.dumps(scene.train[0]))
    assert again.cache.bytes == 0 and torch.equal(again.image(), scene.train[0].image())


def test_sampler():
    n, sampler = 7, ViewSampler(7, seed=1)
    drawn = [sampler[i] for i in range(20 * n)]
    epochs = [tuple(drawn[i:i + n]) for i in range(0, len(drawn), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len(set(epochs)) > 15
    assert [ViewSampler(7, seed=1)[i] for i in reversed(range(20 * n))] == drawn[::-1]
    assert [ViewSampler(7, seed=2)[i] for i in range(20 * n)] != drawn


def test_initial_splats():
    xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [10, 0, 0], [10, 0, 0], [10, 0, 0],
                        [10, 0, 0]])
    rgb = torch.arange(24, dtype=torch.uint8).reshape(8, 3)
    splats = initial_splats(Points(xyz, rgb), 2, opacity=0.2)
    assert len(splats) == 8 and splats.sh_degree == 2 and torch.equal(splats.means, xyz)
    assert all(t.dtype == torch.float32 for _, t in splats.items())
    assert splats.scales[0].exp().tolist() == pytest.approx([((1 + 4 + 9) / 3) ** 0.5] * 3)
    assert torch.isfinite(splats.scales).all() and splats.scales.min() > -12  # four points at one place
    torch.testing.assert_close(splats.opacities.sigmoid(), torch.full((8,), 0.2))
    torch.testing.assert_close((splats.sh0 * SH_C0 + 0.5) * 255, rgb.float())
    assert splats.shN.abs().max() == 0 and splats.quats.tolist() == [[1, 0, 0, 0]] * 8
    for few in (1, 2, 3):
        assert torch.isfinite(initial_splats(Points(xyz[:few], rgb[:few]), 0).scales).all()


# -- real captures
# ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, factor, views, points, size", [
    ("fox", 1, 50, 15191, (536, 960)), ("fox", 4, 50, 15191, (134, 240)),
    ("kitchen25", 1, 24, 2645, (776, 512)), ("kitchen25", 2, 24, 2645, (388, 256)),
])
def test_real_captures(name, factor, views, points, size):
    scene = load_scene(shared("scenes") / name, factor=factor)
    assert len(scene.train) + len(scene.test) == views and len(scene.test) == -(-views // 8)
    assert len(scene.points) == points and (scene.protocol["width"], scene.protocol["height"]) == size
    assert scene.train[0].image().shape == (size[1], size[0], 3)


# -- what captures of other programs hold
# ------------------------------------------------------------------------------

def doubts(folder, **options):
    """(the scene, its doubts), each of which was a warning too, and fits on a line."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scene = load_scene(folder, **options)
    assert [str(w.message) for w in said] == scene.doubts and all("\n" not in doubt for doubt in scene.doubts)
    return scene, " | ".join(scene.doubts)


def with_tracks(folder: Path) -> pycolmap.Reconstruction:
    """The model of a capture, in which each image observes 40 of the points where they are."""
    model = folder / "sparse" / "0"
    found = pycolmap.Reconstruction(str(model))
    rng = np.random.default_rng(0)
    changed = pycolmap.Reconstruction()
    changed.add_camera_with_trivial_rig(found.cameras[1])
    xyz = np.array([p.xyz for p in found.points3D.values()])
    ids = [changed.add_point3D(p.xyz, pycolmap.Track(), p.color) for p in found.points3D.values()]
    for image in found.images.values():
        pose = image.cam_from_world()
        rays = xyz @ pose.rotation.matrix().T + pose.translation
        front = rng.choice(np.flatnonzero(rays[:, 2] > 0.5), 40, replace=False)
        again = pycolmap.Image(name=image.name, camera_id=1, image_id=image.image_id)
        again.points2D = pycolmap.Point2DList([pycolmap.Point2D(found.cameras[1].img_from_cam(rays[i]))
                                               for i in front])
        changed.add_image_with_trivial_frame(again, pose)
        for at, i in enumerate(front):
            changed.add_observation(ids[i], pycolmap.TrackElement(image.image_id, at))
    changed.write_binary(str(model))
    return changed


@pytest.mark.parametrize("part, says", [
    (("images", "points3D"), "frames.bin and rigs.bin give other poses than images.bin to 18 of 18 images"),
    (("images",), "images.bin give other poses than frames.bin and rigs.bin to 18 of 18 images"),
    (("points3D",), "the poses of 18 of 18 images do not fit the points that they observe, by up to"),
])
def test_files_of_different_states_are_told_by_what_images_observe(copy, tmp_path, part, says):
    found, model = with_tracks(copy), copy / "sparse" / "0"
    assert not load_scene(copy).doubts
    moved = pycolmap.Reconstruction(str(model))
    moved.transform(pycolmap.Sim3d(2.0, pycolmap.Rotation3d(np.array([0.2, 0.5, 0.1, 0.8])),
                                   np.array([3.0, -2, 1])))
    (tmp_path / "moved").mkdir()
    moved.write_binary(str(tmp_path / "moved"))
    for name in part:
        shutil.copy(tmp_path / "moved" / f"{name}.bin", model)
    scene, said = doubts(copy)
    assert says in said
    right = moved if "points3D" in part and "images" in part else found
    want = {image.name: image.cam_from_world().matrix() for image in right.images.values()}
    for view in scene.train:
        np.testing.assert_allclose(view.camera.viewmat[:3], want[view.name], atol=1e-5)


def test_poses_that_contradict_each_other_without_observations_are_refused(copy, tmp_path):
    moved = pycolmap.Reconstruction(str(copy / "sparse" / "0"))
    moved.transform(pycolmap.Sim3d(2.0, pycolmap.Rotation3d(), np.array([3.0, -2, 1])))
    (tmp_path / "moved").mkdir()
    moved.write_binary(str(tmp_path / "moved"))
    shutil.copy(tmp_path / "moved" / "images.bin", copy / "sparse" / "0")
    with pytest.raises(UserError, match=r"different poses to 18 of 18 images, .*delete "
                                        r"frames\.bin and rigs\.bin"):
        load_scene(copy)
    for name in ("frames", "rigs"):
        (copy / "sparse" / "0" / f"{name}.bin").unlink()
    assert not load_scene(copy).doubts


def test_the_largest_sub_model_is_taken_and_photographs_without_a_pose_are_said(copy):
    shutil.copytree(copy / "sparse" / "0", copy / "sparse" / "1")
    small = pycolmap.Reconstruction(str(copy / "sparse" / "0"))
    for i in range(4, 19):
        small.deregister_frame(i)
    small.write_binary(str(copy / "sparse" / "0"))
    scene, said = doubts(copy)
    assert (scene.protocol["posed"] == 18 and "of 2 sub-models sparse/1 is used" in said
            and "sparse/0 has 3" in said)
    for name in ("0", "sparse/0"):
        scene, said = doubts(copy, model=name)
        assert scene.protocol["posed"] == 3 and "3 of 18 photographs have a pose; 15 have none" in said
    assert ("18 photographs, 3 with a pose, 2 to train on, 1 to test on" in scene.summary()
            and "sparse/0" in scene.summary())
    with pytest.raises(UserError, match=r"no sub-model '7' .*expected one of sparse/0, sparse/1"):
        load_scene(copy, model="7")


@pytest.mark.parametrize("second", ["kept", "blank", "absent"])
@pytest.mark.parametrize("name", ["DJI 2024 ({}).png", "Kamera Süd/写真 {}.png", "#{}%20.PNG", "a {} .png"])
def test_text_models_of_other_programs(capture, copy, second, name):
    """Names with blanks, brackets, letters of all kinds and #; second lines with observations, blank or
    absent; CRLF."""
    found = with_tracks(copy)
    back = {}
    for image in found.images.values():
        new = name.format(image.image_id)
        (copy / "images" / new).parent.mkdir(exist_ok=True)
        (copy / "images" / image.name).rename(copy / "images" / new)
        back[new], image.name = image.name, new
    found.write_binary(str(copy / "sparse" / "0"))
    to_text(copy)
    file = copy / "sparse" / "0" / "images.txt"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    if second != "kept":
        lines = [line for image in lines[::2] for line in ([image, ""] if second == "blank" else [image])]
    file.write_bytes("\r\n".join([*lines, ""]).encode())
    scene, said = doubts(copy, test_every=0)
    want = {view.name: view.camera for view in load_scene(capture, test_every=0).train}
    assert {back[view.name] for view in scene.train} == set(want) and not said
    for view in scene.train:
        torch.testing.assert_close(view.camera.viewmat, want[back[view.name]].viewmat, atol=1e-6, rtol=0)


@pytest.mark.parametrize("part, line, says", [
    ("images", "1 2 x", r"images\.txt, line 5: found something else, expected an image"),
    ("images", "1 0 0 0 0 1 2 3 1 a.png", r"images\.txt, line 5: the image 'a\.png' has a pose "
                                          r"that is not a rotation"),
    ("images", "99 1 0 0 0 1 2 3 7 a.png", r"the image 'a\.png' names camera 7, which "
                                           r"cameras\.txt does not have"),
    ("images", "2 1 0 0 0 1 2 3 1 a.png", r"has image 2 twice"),
    ("cameras", "2 NO_LENS 64 48 1", r"cameras\.txt, line 4: found the camera model 'NO_LENS'"),
    ("cameras", "2 PINHOLE 64 48 1 2 3", r"cameras\.txt, line 4: found 3 parameters, expected the "
                                         r"4 of a PINHOLE camera"),
    ("points3D", "1 0 0 0 300 0 0 1", r"points3D\.txt, line 4: found something else, expected POINT3D_ID"),
    ("points3D", "1 0 0 0 30 0 0 1 4", r"points3D\.txt, line 4: found something else, expected POINT3D_ID"),
])
def test_lines_that_are_not_understood_are_named(copy, part, line, says):
    to_text(copy)
    file = copy / "sparse" / "0" / f"{part}.txt"
    lines = file.read_text().splitlines()
    head = [i for i, text in enumerate(lines) if text.startswith("#")]
    file.write_text("\n".join([*lines[:len(head)], line, *lines[len(head):]]))
    with pytest.raises(UserError, match=says) as error:
        load_scene(copy)
    one_line(error)


def test_lists_of_views(copy):
    """However lists write the names, what they hold out is not trained on, and they leave something to test
    on."""
    data = to_transforms(copy, ply_file_path="p.ply")
    (copy / "p.ply").write_text("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\n"
                                "property float y\nproperty float z\n"
                                "property uchar r\nproperty uchar g\nproperty uchar "
                                "b\nend_header\n0 0 0 1 2 3\n")
    names = [frame["file_path"] for frame in data["frames"]]

    def views(**lists):
        save(copy, {**data, **lists})
        scene, said = doubts(copy)
        return [{f"images/{view.name}" for view in part} for part in (scene.train, scene.test)], said

    for write in (lambda n: f"./{n}", lambda n: n.rpartition("/")[2], lambda n: n.replace("/", "\\"),
                  lambda n: n[:-4], lambda n: n.replace(".png", ".jpg"), lambda n: f"C:\\data\\{n}"):
        (train, test), said = views(test_filenames=[write(n) for n in names[:3]])
        assert test == set(names[:3]) and train == set(names[3:]) and not said
    (train, test), said = views(train_filenames=names[:8], val_filenames=names[8:10],
                                test_filenames=names[10:15])
    assert ((train, test) == (set(names[:8]), set(names[10:15]))
            and "2 photographs are held out for validation" in said)
    assert "3 photographs are in none of its lists" in said
    (train, test), said = views(train_filenames=names[:8])
    assert (train, test) == (set(names[:8]), set(names[8:])) and "names no view to test on; the 10" in said
    (train, test), said = views(val_filenames=names[:4])
    assert ((train, test) == (set(names[4:]), set(names[:4]))
            and "held out for validation are tested on" in said)
    (train, test), said = views(train_filenames=names, test_filenames=[*names[:3], "images/none.png"])
    assert test == set(names[:3]) and "3 frames are in train_filenames and held out" in said
    assert "1 of 4 names in test_filenames are of no frame, for instance 'images/none.png'" in said
    save(copy, {**data, "test_filenames": ["images/none.png"]})
    with pytest.raises(UserError, match=r"leaves nothing to test on; name the views"):
        load_scene(copy)
    assert len(doubts(copy, test_every=0)[0].train) == 18


def test_split_files_with_validation_and_alone(copy):
    data = to_transforms(copy)
    (copy / "transforms.json").unlink()
    for part, frames in (("train", data["frames"][:8]), ("val", data["frames"][8:12]),
                         ("test", data["frames"][12:])):
        (copy / f"transforms_{part}.json").write_text(json.dumps({**data, "frames": frames}))
    scene, said = doubts(copy)
    assert ((len(scene.train), len(scene.test)) == (8, 6)
            and "4 photographs are held out for validation" in said)
    (copy / "transforms_test.json").unlink()
    scene, said = doubts(copy)
    assert (len(scene.train), len(scene.test)) == (8, 4)
    (copy / "transforms_val.json").unlink()
    scene, said = doubts(copy)
    assert (len(scene.train), len(scene.test)) == (7, 1) and "there is no transforms_test.json" in said


K = {"k1": -0.05, "k2": 0.02, "k3": -0.01, "k4": 0.08, "p1": 0.003, "p2": -0.002}


@pytest.mark.parametrize("more, model", [
    ({}, "POLYNOMIAL"), ({"camera_model": "OPENCV"}, "POLYNOMIAL"), ({"k4": 0}, "FULL_OPENCV"),
    ({"b1": 3.0, "b2": 0}, "POLYNOMIAL"),
    ({"camera_model": "FULL_OPENCV"}, "FULL_OPENCV"), ({"k5": 0.01, "k6": 0.0}, "FULL_OPENCV"),
])
def test_coefficients_mean_what_the_writer_of_transforms_means(copy, more, model):
    """Polynomial up to r^8 of nerfstudio and Metashape, or OpenCV's rational model where its name or its k5
    and k6 say so."""
    to_transforms(copy, **{**K, **more})
    scene, said = doubts(copy)
    lens, k = scene.train[0].lens, {**K, "k5": 0, "k6": 0, "b1": 0, **more}
    x, y = 0.4, -0.3
    r2 = x * x + y * y
    up = 1 + k["k1"] * r2 + k["k2"] * r2**2 + k["k3"] * r2**3
    factor = up + k["k4"] * r2**4 if model == "POLYNOMIAL" else up / (1 + k["k4"] * r2 + k["k5"] * r2**2
                                                                      + k["k6"] * r2**3)
    p1, p2 = (k["p2"], k["p1"]) if "b1" in more else (k["p1"], k["p2"])
    want = [x * factor + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * factor + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)]
    fx, fy, cx, cy = lens.params[:4]
    found = lens.colmap().img_from_cam(np.array([[x, y, 1.0]]))[0]
    np.testing.assert_allclose(found, [fx * want[0] + cx, fy * want[1] + cy], atol=1e-9)
    assert fx == pytest.approx(57.6 + k["b1"]) and lens.model == model
    assert ("k3 and k4 are taken as" in said) == (model == "POLYNOMIAL")
    assert ("b1 and b2 are Metashape's" in said) == ("b1" in more)
    half = lens.scaled(32, 24).colmap().img_from_cam(np.array([[x, y, 1.0]]))[0]
    np.testing.assert_allclose(half, found / 2, atol=1e-9)
    assert (load_scene(copy, masks=False).train[0].image() > 0).any()


def test_names_of_other_file_systems_and_machines(copy):
    data = to_transforms(copy)
    decomposed, composed = "Su\u0308d 1.png", "S\u00fcd 1.png"
    (copy / "images" / "000.png").rename(copy / "images" / decomposed)
    frames = data["frames"]
    order = {f["file_path"]: f for f in frames}
    order["images/000.png"]["file_path"] = f"images/{composed}"
    order["images/001.png"]["file_path"] = "/home/else/data/images/001.png"
    order["images/002.png"]["file_path"] = "images\\002.PNG"
    (copy / "images" / "003.png").rename(copy / "images" / "a b.png")
    order["images/003.png"]["file_path"] = "images/a%20b.png"
    frames.append(dict(order["images/004.png"]))
    save(copy, data)
    scene, said = doubts(copy, test_every=0)
    assert len(scene.train) == 18 and {view.path.name for view in scene.train} >= {decomposed, "a b.png"}
    assert ("names 1 files by paths of another machine" in said
            and "names 1 photographs more than once" in said)


def test_views_of_folders_of_equal_names(copy):
    data = to_transforms(copy)
    for i, frame in enumerate(data["frames"]):
        place = copy / f"cam{i % 2}" / "images" / f"{i // 2}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(copy / frame["file_path"], place)
        frame["file_path"] = place.relative_to(copy).as_posix()
    save(copy, data)
    names = {view.name for view in doubts(copy, test_every=0)[0].train}
    assert len(names) == 18 and "cam0/images/0.png" in names


@pytest.mark.parametrize("name", ["{}.png", "{}.PNG", "{}_mask.png", "{}.png.png", "{}.jpg"])
@pytest.mark.parametrize("folder", ["masks", "masks_2"])
def test_masks_by_any_name(copy, name, folder):
    (copy / folder).mkdir()
    keep = np.zeros((48, 64), np.uint8)
    keep[:24] = 255
    for i in range(17):
        Image.fromarray(keep).save(copy / folder / name.format(f"{i:03d}"))
    Image.fromarray(keep).save(copy / folder / "other.png")
    scene, said = doubts(copy, test_every=0)
    assert scene.protocol["masks"] == 17 and torch.equal(scene.train[0].mask(), torch.from_numpy(keep > 0))
    assert "1 of 18 masks fit no photograph and are not used, for instance other.png" in said
    assert "017.png: 1 photographs have no mask" in said


@pytest.mark.parametrize("mode", ["1", "P", "I;16", "RGB", "RGBA"])
def test_masks_of_any_pixels(copy, mode):
    keep = np.zeros((48, 64), bool)
    keep[:24] = True
    (copy / "masks").mkdir()
    if mode == "I;16":
        image = Image.fromarray(keep.astype(np.uint16))  # 1 of 65535
    elif mode == "P":
        image = Image.fromarray(keep.astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 1])
    else:
        image = Image.fromarray(keep.astype(np.uint8) * 255).convert(mode)
    image.save(copy / "masks" / "000.png")
    assert torch.equal(doubts(copy, test_every=0)[0].train[0].mask(), torch.from_numpy(keep))


def test_masks_that_are_not_there_are_said(copy):
    data = to_transforms(copy)
    for frame in data["frames"]:
        frame["mask_path"] = frame["file_path"].replace("images", "masks")[:-4]
    save(copy, data)
    assert "18 masks that the capture names are not there" in doubts(copy)[1]
    (copy / "masks").mkdir()
    for file in (copy / "images").iterdir():
        Image.new("L", (64, 48), 255).save(copy / "masks" / file.name)
    scene, said = doubts(copy)
    assert scene.protocol["masks"] == 18 and "masks" not in said.replace("test_masks", "")
    Image.new("L", (48, 64)).save(copy / "masks" / "003.png")
    with pytest.raises(UserError, match=r"masks/003\.png: found 48x64 pixels for a photograph of 64x48"):
        load_scene(copy)


def points_file(file: Path, properties: dict[str, str], values: np.ndarray, head: str = "",
                before: bytes = b"") -> Path:
    kinds = {"float": "<f4", "double": "<f8", "uchar": "u1", "ushort": "<u2", "int": "<i4"}
    rows = np.zeros(len(values), [(name, kinds[kind]) for name, kind in properties.items()])
    for i, name in enumerate(properties):
        rows[name] = values[:, i]
    lines = "".join(f"property {kind} {name}\n" for name, kind in properties.items())
    text = f"ply\nformat binary_little_endian 1.0\n{head}element vertex {len(values)}\n{lines}end_header\n"
    file.write_bytes(text.encode() + before + rows.tobytes())
    return file


@pytest.mark.parametrize("names, kind, scale", [
    (("red", "green", "blue"), "uchar", 255), (("red", "green", "blue"), "float", 1),
    (("red", "green", "blue"), "double", 255),
    (("red", "green", "blue"), "ushort", 65535),
    (("diffuse_red", "diffuse_green", "diffuse_blue"), "uchar", 255),
    (("r", "g", "b"), "int", 255), (("f_dc_0", "f_dc_1", "f_dc_2"), "float", None),
])
def test_colours_of_points(tmp_path, names, kind, scale):
    share = np.random.default_rng(0).uniform(size=(20, 3))
    share[0] = 1  # the largest value that there is
    values = (np.round(share * scale) if scale and scale > 1 else share * scale if scale
              else (share - 0.5) / SH_C0)
    file = points_file(tmp_path / "p.ply", {**dict.fromkeys("xyz", "double"), **dict.fromkeys(names, kind)},
                       np.hstack([1e6 + share, values]))
    xyz, rgb = read_points(file, said := [])
    assert xyz.dtype == np.float64 and np.abs(xyz - 1e6 - share).max() < 1e-9
    assert np.abs(rgb / 255 - share).max() < 0.003 and not said


def test_heads_of_point_files(tmp_path):
    xyz = np.arange(15.0).reshape(5, 3)
    plain, file = dict.fromkeys("xyz", "float"), tmp_path / "p.ply"
    head = "comment J\u00f6rg\nobj_info x\n\nelement camera 2\nproperty float f\n"
    assert np.array_equal(read_points(points_file(file, plain, xyz, head, bytes(8)), said := [])[0], xyz)
    assert "has no colours" in said[0]
    for promised in (6, 10**12):
        file.write_bytes(file.read_bytes().replace(b"vertex 5", b"vertex %d" % promised))
        with pytest.raises(UserError, match=r"p\.ply: not a readable PLY file: .*ply_file_path"):
            read_points(file)
        points_file(file, plain, xyz)
    columns = b"".join(b"property uchar %c\n" % c for c in b"xyzrgb")
    text = b"ply\nformat ascii 1.0\nelement vertex 1\n" + columns + b"end_header\n"
    file.write_bytes(text + b"1 2 3 4 5 255\n")
    assert read_points(file, [])[1].tolist() == [[4, 5, 255]]
    file.write_bytes(text + b"1 2 3 4 5 300\n")
    with pytest.raises(UserError, match="found a 'b' that uint8 cannot hold"):
        read_points(file)
    os.mkfifo(tmp_path / "pipe.ply")
    for bad in ("/dev/zero", str(tmp_path / "pipe.ply"), str(tmp_path)):
        with pytest.raises(UserError, match="expected a PLY file; or delete ply_file_path"):
            read_points(Path(bad))


def test_photographs_of_other_kinds(copy):
    """16 bits per channel are read by their upper 8; what is doubtful is said at load."""
    pixels = np.asarray(Image.open(copy / "images" / "000.png").convert("L")).copy()
    Image.fromarray(pixels.astype(np.uint16) * 257).save(copy / "images" / "000.png")
    Image.open(copy / "images" / "001.png").convert("CMYK").save(copy / "images" / "001.png", format="JPEG")
    scene, said = doubts(copy, test_every=0)
    assert torch.equal(scene.train[0].image(), torch.from_numpy(pixels)[..., None].expand(-1, -1, 3))
    assert ("1 of 18 photographs have more than 8 bits per channel" in said
            and "1 of 18 photographs are CMYK" in said)


@pytest.mark.parametrize("folder", ["mask", "Masks", "MASK_2"])
def test_folders_of_masks_by_other_names(copy, folder):
    shutil.copytree(copy / "images", copy / folder)
    assert doubts(copy)[0].protocol["masks"] == 18


def test_a_folder_of_masks_without_an_image_is_said(copy):
    (copy / "masks").mkdir()
    (copy / "masks" / "000.gif").write_bytes(b"GIF89a")
    scene, said = doubts(copy)
    assert scene.protocol["masks"] == 0 and "masks: holds no image, so there are no masks" in said


@pytest.mark.parametrize(("size", "right"),
                         [((32, 24), True), ((33, 25), True), ((64, 48), False), ((16, 12), False)])
def test_reduced_images_of_another_size_are_said(copy, size, right):
    (copy / "images_2").mkdir()
    for file in (copy / "images").iterdir():
        Image.open(file).resize(size).save(copy / "images_2" / file.name)
    scene, said = doubts(copy, factor=2)
    assert (scene.train[0].camera.width, scene.train[0].camera.height) == size
    assert ("is not 1/2 of it" in said) is not right


def test_the_focal_length_of_a_frame_is_before_any_of_the_file(copy):
    data = to_transforms(copy, fl_x=100.0, fl_y=100.0)
    data["frames"][0]["camera_angle_x"] = 1.0
    save(copy, data)
    name = Path(data["frames"][0]["file_path"]).name
    lens = next(view.lens for view in doubts(copy, test_every=0)[0].train if view.name == name)
    assert lens.params[0] == pytest.approx(32 / np.tan(0.5)) == lens.params[1]


@pytest.mark.parametrize(("top", "message"), [
    ({"fl_x": 0.9, "fl_y": 1.2}, "expected them in pixels"),
    ({"fl_x": None, "fl_y": None, "camera_angle_x": 58.1}, "expected radians"),
])
def test_focal_lengths_in_other_units_are_refused(copy, top, message):
    save(copy, to_transforms(copy, **top))
    with pytest.raises(UserError, match=message) as error:
        load_scene(copy)
    one_line(error)


def test_a_principal_point_at_the_border_is_said(copy):
    save(copy, to_transforms(copy, cx=0.5, cy=0.5))
    assert "cx and cy are at the border of the image or beyond" in doubts(copy)[1]


def test_cameras_that_see_none_of_the_points_are_said(copy):
    """Poses are world to camera where the format has camera to world."""
    pycolmap.Reconstruction(str(copy / "sparse" / "0")).export_PLY(str(copy / "points.ply"))
    data = to_transforms(copy, ply_file_path="points.ply")
    save(copy, data)
    assert "see none of" not in doubts(copy)[1]
    for frame in data["frames"]:
        frame["transform_matrix"] = np.linalg.inv(frame["transform_matrix"]).tolist()
    save(copy, data)
    assert "cameras see none of the 4,002 points" in re.sub(r"the [\d,]+ points", "the 4,002 points",
                                                            doubts(copy)[1])


def test_text_files_of_another_state_than_the_binary_ones_are_said(copy):
    model = copy / "sparse" / "0"
    found = pycolmap.Reconstruction(str(model))
    found.write_text(str(model))
    assert ".txt files" not in doubts(copy)[1]
    found.transform(pycolmap.Sim3d(3.0, pycolmap.Rotation3d(), np.array([1.0, 2, 3])))
    found.write_text(str(model))
    scene, said = doubts(copy)
    assert "its .txt files hold other images, poses or cameras than its .bin files" in said
    for file in model.glob("*.txt"):
        file.unlink()
    same_views(scene, doubts(copy)[0])


def test_a_small_shift_far_from_the_origin_is_seen(copy):
    """Text files a few units off, of a model whose coordinates are in the millions."""
    model = copy / "sparse" / "0"

    def moved(offset: tuple[float, float, float]) -> pycolmap.Reconstruction:
        found = pycolmap.Reconstruction(model)
        found.transform(pycolmap.Sim3d(1.0, pycolmap.Rotation3d(), np.array(offset)))
        return found

    moved((5e5, 5.4e6, 300.0)).write(model)
    for file in model.glob("*.txt"):
        file.unlink()
    moved((0.0, 0.0, 0.0)).write_text(model)
    assert ".txt files hold other" not in doubts(copy)[1]
    moved((30.0, 0.0, 0.0)).write_text(model)
    assert ".txt files hold other images, poses or cameras" in doubts(copy)[1]


def test_a_capture_behind_a_link_has_the_name_of_the_link(copy, monkeypatch):
    """As jobs over many captures call it; and one in the current folder that of the folder."""
    link = copy.with_name("garden")
    link.symlink_to(copy)
    assert load_scene(link).name == load_scene(f"{link}/images/..").name == "garden"
    monkeypatch.chdir(copy)
    assert load_scene(".").name == copy.name
