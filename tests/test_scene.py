"""Loading captures: every format and lens that is read, and one line for the user for every way a capture can be broken."""

import json
import pickle
import re
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from conftest import shared
from PIL import Image

from flexgs.errors import UserError
from flexgs.scene import Points, ViewSampler, find_scenes, initial_splats, load_scene, write_synthetic
from flexgs.scene.capture import LENSES, Lens
from flexgs.scene.polynomial import POLYNOMIAL
from flexgs.scene.stages import STAGES
from flexgs.scene.synthetic import photograph
from flexgs.scene.tracer import Tracer
from flexgs.scene.undistort import MAX_FOV, _sources, remap
from flexgs.scene.views import ImageCache
from flexgs.splats import SH_C0


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
        assert one.name == two.name and (one.camera.width, one.camera.height) == (two.camera.width, two.camera.height)
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
    data = {"w": camera.width, "h": camera.height, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "frames": frames, **top}
    shutil.rmtree(capture / "sparse")
    save(capture, data)
    return data


def save(capture: Path, data) -> None:
    (capture / "transforms.json").write_text(json.dumps(data))


# -- what is read -----------------------------------------------------------------------------------------------------

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
    assert scene.extent == pytest.approx(1.1 * float((centres - centres.mean(0)).norm(dim=1).max()))
    assert scene.name == "other" and scene.root == capture
    assert json.loads(json.dumps(scene.protocol)) == scene.protocol
    assert scene.protocol["width"] == 64 and scene.protocol["train_views"] == 15 and not scene.protocol["undistorted"]


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
    assert len(scene.train) == 15 and scene.test[0].name.startswith("left/") and scene.train[-1].name.startswith("right/")
    assert scene.train[0].image().shape == (48, 64, 3)


def test_split(capture):
    assert len(load_scene(capture, test_every=0).test) == 0
    names = sorted(p.name for p in (capture / "images").iterdir())
    scene = load_scene(capture, test_every=5)
    assert [v.name for v in scene.test] == names[::5]
    assert [v.name for v in scene.train] == [n for i, n in enumerate(names) if i % 5]


# -- sizes ------------------------------------------------------------------------------------------------------------

def test_reducing_by_a_factor(capture):
    scene, small = load_scene(capture), load_scene(capture, factor=3)
    view, original = small.train[0], Image.open(capture / "images" / small.train[0].name)
    assert (view.camera.width, view.camera.height) == (21, 16)
    assert np.array_equal(view.image().numpy(), np.asarray(original.resize((21, 16), Image.Resampling.BICUBIC)))
    K = scene.train[0].camera.K.numpy() * [[21 / 64], [16 / 48], [1]]
    np.testing.assert_allclose(view.camera.K.numpy(), K, rtol=1e-6)
    assert small.protocol["resize"] == "pillow bicubic" and small.protocol["images"] == "images"


def test_a_folder_of_reduced_images_is_taken_as_it_is(copy):
    (copy / "images_2").mkdir()
    for file in (copy / "images").iterdir():
        Image.open(file).resize((33, 24)).save(copy / "images_2" / f"{file.stem}.jpg")  # another suffix, uneven rounding
    scene = load_scene(copy, factor=2)
    view = scene.train[0]
    assert view.path.parent.name == "images_2" and view.image().shape == (24, 33, 3)
    assert view.camera.K[0, 0] == pytest.approx(0.9 * 64 * 33 / 64) and view.camera.K[1, 2] == pytest.approx(12)
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


# -- masks ------------------------------------------------------------------------------------------------------------

def test_masks_by_both_habits(copy):
    (copy / "masks").mkdir()
    keep = np.zeros((48, 64), np.uint8)
    keep[:24, 16:] = 1  # any value but zero counts
    Image.fromarray(keep).save(copy / "masks" / "001.png")
    (copy / "images" / "002.png").rename(copy / "images" / "002.jpg")  # what is inside does not matter to Pillow
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


# -- lenses -----------------------------------------------------------------------------------------------------------

FOCAL = 130.0


@pytest.mark.parametrize("lens", [
    Lens("SIMPLE_PINHOLE", 160, 120, (FOCAL, 71.0, 66.0)),
    Lens("SIMPLE_RADIAL", 160, 120, (FOCAL, 80.0, 60.0, 0.15)),
    Lens("RADIAL", 160, 120, (FOCAL, 71.0, 66.0, -0.25, 0.05)),
    Lens("OPENCV", 160, 120, (FOCAL, 1.05 * FOCAL, 84.0, 55.0, -0.2, 0.1, 0.01, -0.008)),
    Lens("FULL_OPENCV", 160, 120, (FOCAL, FOCAL, 71.0, 66.0, 0.1, 0.02, 0.003, 0.002, 0.01, 0.05, 0.0, 0.0)),
    Lens("SIMPLE_DIVISION", 160, 120, (FOCAL, 80.0, 60.0, -0.1)),
    Lens("DIVISION", 160, 120, (FOCAL, FOCAL, 71.0, 66.0, -0.15)),
    Lens("OPENCV_FISHEYE", 160, 120, (70.0, 72.0, 77.0, 63.0, 0.03, -0.01, 0.002, 0.0)),
    Lens("SIMPLE_RADIAL_FISHEYE", 160, 120, (70.0, 80.0, 60.0, 0.03)),
    Lens("RADIAL_FISHEYE", 160, 120, (70.0, 80.0, 60.0, 0.03, -0.01)),
    Lens("SIMPLE_FISHEYE", 160, 120, (70.0, 80.0, 60.0)),
    Lens("FISHEYE", 160, 120, (70.0, 70.0, 80.0, 60.0)),
    Lens("THIN_PRISM_FISHEYE", 160, 120, (70.0, 70.0, 80.0, 60.0, 0.02, -0.005, 0.001, 0.001, 0.0, 0.0, 0.001, 0.001)),
    Lens("RAD_TAN_THIN_PRISM_FISHEYE", 160, 120,
         (70.0, 70.0, 80.0, 60.0, 0.02, -0.005, 0.001, 0.0, 0.0, 0.0, 0.001, 0.001, 0.001, 0.0, 0.001, 0.0)),
    Lens("FOV", 160, 120, (70.0, 70.0, 80.0, 60.0, 0.9)),
    Lens("EUCM", 160, 120, (75.0, 75.0, 80.0, 60.0, 0.6, 1.1)),
], ids=lambda lens: lens.model)
def test_a_bent_photograph_becomes_what_a_pinhole_camera_sees(lens, tmp_path):
    """The scene photographed through the lens and undistorted, against the scene photographed by the pinhole camera."""
    assert lens.model in LENSES
    folder = write_synthetic("studio", tmp_path / "bent", views=4, lens=lens)
    scene = load_scene(folder, test_every=0)
    view = scene.train[2]
    K = view.camera.K.double()
    pinhole = Lens("PINHOLE", view.camera.width, view.camera.height,
                   (float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])))
    tracer = Tracer(STAGES["studio"](np.random.default_rng((0, 1))))
    truth = torch.from_numpy(photograph(tracer, pinhole, view.camera.viewmat.double().numpy()))
    image = view.image()
    assert image.shape == truth.shape and scene.protocol["undistorted"] == bool(LENSES[lens.model])
    right = psnr(image, truth)
    assert right > (24 if LENSES[lens.model] else 45)
    for axis in (0, 1):  # the error over the shift is a parabola, lowest at what the image is off by, in pixels
        back, here, forth = (float((image.roll(shift, axis).float() - truth).square().mean()) for shift in (-1, 0, 1))
        assert abs(back - forth) / (2 * (back + forth - 2 * here)) < 0.1
    assert (image.float().mean(2) == 0).float().mean() < 0.01  # no blank pixels at the edges


WIDE = {
    "OPENCV_FISHEYE": (700, 690, 790, 610, 0.02, -0.005, 0.001, 0), "SIMPLE_RADIAL_FISHEYE": (700, 800, 600, 0.02),
    "RADIAL_FISHEYE": (700, 800, 600, 0.02, -0.005), "SIMPLE_FISHEYE": (700, 800, 600), "FISHEYE": (700, 700, 800, 600),
    "THIN_PRISM_FISHEYE": (700, 700, 800, 600, 0.02, -0.005, 0.001, 0.001, 0, 0, 0.001, 0.001),
    "RAD_TAN_THIN_PRISM_FISHEYE": (700, 700, 800, 600, 0.02, -0.005, 0.001, 0, 0, 0, 0.001, 0.001, 0.001, 0, 0.001, 0),
    "FOV": (700, 700, 800, 600, 0.9), "EUCM": (700, 700, 800, 600, 0.6, 1.1),
}


def test_every_lens_of_pycolmap_is_known_or_refused():
    assert set(pycolmap.CameraModelId.__members__) - set(LENSES) == {"INVALID", "EQUIRECTANGULAR"}
    assert {name for name, by in LENSES.items() if by == "flexgs"} == {*WIDE, POLYNOMIAL}


@pytest.mark.parametrize("model", WIDE)
def test_a_point_is_in_the_undistorted_photograph_where_the_pinhole_sees_it(model):
    """A smooth ramp says in each pixel where in the photograph it came from; points in space say where it should."""
    lens = Lens(model, 1600, 1200, tuple(map(float, WIDE[model])))
    pinhole = lens.pinhole()
    fov = [2 * np.degrees(np.arctan(side / 2 / f)) for side, f in zip((pinhole.width, pinhole.height), pinhole.params[:2],
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
    lens = Lens("SIMPLE_RADIAL", 64, 48, (50.0, 32.0, 24.0, -0.2))
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


# -- transforms.json --------------------------------------------------------------------------------------------------

def test_transforms_give_the_cameras_of_colmap(capture, copy):
    to_transforms(copy, aabb_scale=4)
    with pytest.warns(UserWarning, match="no points"):
        scene = load_scene(copy)
    same_views(load_scene(capture), scene)
    assert scene.protocol["format"] == "transforms" and scene.protocol["points_from"] == "random"
    # the box of random points is where the cameras look
    assert len(scene.points) == 10_000 and scene.points.xyz.mean(0).norm() < 1.5 and scene.points.xyz.std() < 4


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
    assert views[names[1]].lens.model == "OPENCV" and views[names[1]].image().shape[1] == views[names[1]].camera.width != 64
    assert not scene.protocol["one_size"] and scene.protocol["lenses"] == ["OPENCV", "PINHOLE"]


@pytest.mark.parametrize("ascii", [True, False])
def test_transforms_points_reduced_images_and_split(copy, ascii):
    data = to_transforms(copy)
    vertices = np.array([(1, 2, 3, 255, 0, 7), (4, 5, 6, 1, 2, 3)], np.dtype(
        [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]))
    head = (f"ply\nformat {'ascii' if ascii else 'binary_little_endian'} 1.0\nelement vertex 2\n"
            + "".join(f"property {'float' if n in 'xyz' else 'uchar'} {n}\n" for n in vertices.dtype.names) + "end_header\n")
    body = "".join(" ".join(map(str, row)) + "\n" for row in vertices.tolist()).encode() if ascii else vertices.tobytes()
    (copy / "points.ply").write_bytes(head.encode() + body)
    (copy / "images_2").mkdir()
    for file in (copy / "images").iterdir():
        Image.open(file).resize((32, 24)).save(copy / "images_2" / file.name)
    test = [f["file_path"] for f in data["frames"][:4]]
    save(copy, {**data, "ply_file_path": "points.ply", "test_filenames": test})
    scene = load_scene(copy, factor=2)
    assert scene.points.xyz.tolist() == [[1, 2, 3], [4, 5, 6]] and scene.points.rgb.tolist() == [[255, 0, 7], [1, 2, 3]]
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
    (lambda d: d["frames"][2]["transform_matrix"][0].__setitem__(3, float("nan")), "the number NaN, which is not finite"),
    (without("fl_x"), "no focal length"),
    (lambda d: d.update(fl_x="wide"), "fl_x = 'wide', expected a number"),
    (lambda d: d.update(fl_x=-3), "positive sizes and focal lengths"),
    (lambda d: d.update(camera_model="EQUIRECTANGULAR"), "EQUIRECTANGULAR.* is not supported; expected one of SIMPLE_PINHOLE"),
    (lambda d: d.update(camera_model="OPENCV_FISHEYE", k1=-9e9), "no clear view around the optical axis"),
    (lambda d: d.update(w=48, h=64), "another aspect ratio"),
    (lambda d: d.update(ply_file_path="no.ply"), "no.ply: no such file, expected the point cloud"),
    (lambda d: [f.update(file_path="images/no.png") for f in d["frames"]], "names 18 images, but 18 are not there"),
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


# -- what is refused --------------------------------------------------------------------------------------------------

def test_no_capture(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_scene(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        load_scene(tmp_path / "file")
    with pytest.raises(UserError, match=r"sparse, colmap/sparse and the folders in them, and for transforms\.json; found file"):
        load_scene(tmp_path)
    with pytest.raises(UserError, match="factor 0"):
        load_scene(tmp_path, factor=0)


@pytest.mark.parametrize("part", ["cameras", "images", "points3D", "rigs", "frames"])
def test_truncated_binary_files(copy, part):
    """Cut at any byte, a file is refused by its name. (pycolmap itself reads garbage from it, or allocates for ever.)"""
    file = copy / "sparse" / "0" / f"{part}.bin"
    data = file.read_bytes()
    for cut in {*range(0, min(len(data), 120)), *range(0, len(data), max(1, len(data) // 60)), len(data) - 1}:
        file.write_bytes(data[:cut])
        with pytest.raises(UserError, match=rf"{part}\.bin: found {cut} bytes, expected at least \d+") as error:
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
    """Values, not sizes, are wrong: pycolmap notices what contradicts itself, the loader what is no number."""
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
    with pytest.raises(UserError, match=r"found only cameras\.bin, .*images\.bin.*expected cameras, images and points3D"):
        load_scene(copy)


@pytest.mark.parametrize("model", ["EQUIRECTANGULAR"])
def test_unsupported_lenses(copy, model):
    found = pycolmap.Reconstruction(str(copy / "sparse" / "0"))
    found.cameras[1] = pycolmap.Camera.create_from_model_name(1, model, 60.0, 64, 48)
    changed = pycolmap.Reconstruction()
    changed.add_camera_with_trivial_rig(found.cameras[1])
    for image in found.images.values():
        changed.add_image_with_trivial_frame(pycolmap.Image(name=image.name, camera_id=1, image_id=image.image_id),
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
    with pytest.raises(UserError, match=rf"names 18 images, but 1 are not there, for instance {re.escape(str(file))}"):
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
                              (copy, None, "it is itself a capture"), (tmp_path / "no", None, "no such folder")):
        with pytest.raises(UserError, match=says):
            find_scenes(root, names)


# -- the cache, the sampler, the first splats -------------------------------------------------------------------------

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
    xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [10, 0, 0], [10, 0, 0], [10, 0, 0], [10, 0, 0]])
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


# -- real captures ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, factor, views, points, size", [
    ("fox", 1, 50, 15191, (536, 960)), ("fox", 4, 50, 15191, (134, 240)),
    ("kitchen25", 1, 24, 2645, (776, 512)), ("kitchen25", 2, 24, 2645, (388, 256)),
])
def test_real_captures(name, factor, views, points, size):
    scene = load_scene(shared("scenes") / name, factor=factor)
    assert len(scene.train) + len(scene.test) == views and len(scene.test) == -(-views // 8)
    assert len(scene.points) == points and (scene.protocol["width"], scene.protocol["height"]) == size
    assert scene.train[0].image().shape == (size[1], size[0], 3)
