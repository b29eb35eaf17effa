"""Every reader of flexgs, tiny valid files for it that the project makes itself, and whether what it has read
is sound."""

import atexit
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexgs import cli, formats
from flexgs.bench.scenes import load_points
from flexgs.camera import Camera, look_at
from flexgs.camera_path import PATHS, around
from flexgs.config import Config
from flexgs.datasets import download
from flexgs.datasets.check import check_capture
from flexgs.deploy import progressive
from flexgs.deploy.info import describe
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.formats import vq
from flexgs.image import lpips
from flexgs.model.budget import parse as parse_budget
from flexgs.model.elastic import ElasticModel, make_transform
from flexgs.model.frame_time import Profile
from flexgs.ply import checked, read_points, write_ply
from flexgs.report.table import psnr_auc, results_table
from flexgs.run import history, read_results, recorded_capture
from flexgs.scene import Points, Scene, load_scene
from flexgs.scene.camera_model import CameraModel
from flexgs.scene.identity import check_same_capture
from flexgs.scene.pycolmap_library import library
from flexgs.splats import Splats

SHARED = Path(os.environ.get("FLEXGS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
"""Where files that strangers made are looked for, in samples/."""
WIDTH, HEIGHT, VIEWS = 32, 24, 4


@dataclass(frozen=True)
class Reader:
    """How a kind of file is made and read."""

    seeds: Callable[[Path], None]
    """Writes valid files and folders, each a seed, into an empty folder."""
    read: Callable[[Path], Any]
    """Reads a seed, and returns what it has made of it."""
    share: int = 4
    """Of the cases; less for what takes long."""
    changed: str = ""
    """A pattern; only files whose path it finds are changed."""
    names_file: bool = True
    """Whether a refusal has to name the file; what is not read from one names a flag."""


# -- what is sound
# ----------------------------------------------------------------------------------------------------------

def flaw(value: Any) -> str:
    """What is wrong with what a reader has made, in words; empty if nothing is."""
    if isinstance(value, Tensor):
        return ("" if not value.is_floating_point() or bool(torch.isfinite(value).all())
                else "numbers that are not finite")
    if isinstance(value, np.ndarray):
        return flaw(torch.from_numpy(value.copy())) if value.dtype.kind in "fiu" else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a number that is not finite"
    if isinstance(value, Splats) and {len(t) for _, t in value.items()} != {len(value)}:
        return "attributes of different lengths"
    if isinstance(value, Points) and len(value.xyz) != len(value.rgb):
        return "points and colours of different lengths"
    if isinstance(value, Mapping):
        return next(filter(None, map(flaw, value.values())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, map(flaw, value)), "")
    if dataclasses.is_dataclass(value):
        return next((f"{f.name}: {wrong}" for f in dataclasses.fields(value)
                     if (wrong := flaw(getattr(value, f.name)))), "")
    return ""


def _lines(texts: Iterable[str]) -> None:
    """What a person gets to see of what was read."""
    if wrong := [text for text in texts if not text.isprintable()]:
        raise AssertionError(f"text that is not a line: {wrong[0]!a}")


# -- Gaussians
# ------------------------------------------------------------------------------------------------------------

def _splats(n: int = 40, degree: int = 1) -> Splats:
    g = torch.Generator().manual_seed(n + degree)
    return Splats(means=torch.randn(n, 3, generator=g), quats=torch.randn(n, 4, generator=g),
                  scales=torch.randn(n, 3, generator=g) * 0.4 - 2.5,
                  opacities=torch.randn(n, generator=g).clamp(-3, 3),
                  sh0=torch.randn(n, 3, generator=g).clamp(-1.5, 1.5),
                  shN=torch.randn(n, (degree + 1) ** 2 - 1, 3, generator=g) * 0.1)


def _cameras() -> list[Camera]:
    turns = (2 * math.pi * i / VIEWS for i in range(VIEWS))
    return [look_at(torch.tensor([4 * math.cos(t), 1.0, 4 * math.sin(t)]), torch.zeros(3),
                    torch.tensor([0.0, 1.0, 0.0]), WIDTH, HEIGHT) for t in turns]


def _model(kind: str) -> ElasticModel:
    config, splats = Config.from_preset("smoke"), _splats()
    config.transform.kind = kind  # type: ignore[assignment]
    field = config.field
    field.resolution, field.levels, field.channels, field.width = (4, 4, 4, 4), (1,), 2, 8
    return ElasticModel(splats, make_transform(config, splats).stored(), config, _cameras(),
                        "4-01234567-01234567-01234567")


def _look(path: Path) -> Any:
    """What `flexgs info`, `cut` and `render` do with it before they draw."""
    model = open_model(path)
    about = describe(model, str(path))
    if wrong := [value for name, value in about.items() if name != "bytes"
                 and re.search(r"\b(nan|inf)\b", value)]:
        raise AssertionError(f"flexgs info says {wrong}")
    whole, part = (checked(model.cut(ratio), path) for ratio in (1.0, 0.3))
    paths = [make(model.cameras or around(whole), 3, WIDTH, HEIGHT) for make in PATHS.values()]
    if isinstance(model, ElasticModel):
        check_same_capture(model.capture, "4-01234567-01234567-01234567", path, "give another")
    _lines(about.values())
    return whole, part, paths


def _written(name: str) -> Callable[[Path], None]:
    def seeds(folder: Path) -> None:
        for degree in (0, 3):
            formats.FORMATS[name].write(_splats(40, degree),
                                        folder / f"degree{degree}{formats.FORMATS[name].suffix}", [])
    return seeds


def _ply_seeds(folder: Path) -> None:
    """As we write them; as text; the other way round; with doubles; with another element and comments
    before."""
    _written("ply")(folder)
    from plyfile import PlyData

    data = PlyData.read(folder / "degree0.ply")
    for name, how in {"text": {"text": True}, "big": {"byte_order": ">"}}.items():
        PlyData(data.elements, **{"text": False, **how}).write(folder / f"{name}.ply")
    write_ply(dataclasses.replace(_splats(40, 0), origin=(5e5, 5.4e6, 100.0)), folder / "wide.ply")
    head, _, body = (folder / "degree0.ply").read_bytes().partition(b"element")
    (folder / "other.ply").write_bytes(head + b"comment by \xe9\nelement other 2\nproperty uchar a\nelement"
                                       + body.replace(
b"end_header\n", b"end_header\n\1\2", 1))


def _spz_seeds(folder: Path) -> None:
    """Versions 3 and 4 as gsply writes them, 3 with the record of its axes too; 1 and 2 made of 3, in two
    columns of others."""
    import gzip

    import gsply

    s = _splats(40, 1)
    data = gsply.GSData(**{name: t.numpy() for name, t in s.items() if name != "quats"},
                        quats=torch.nn.functional.normalize(s.quats, dim=1).numpy())
    for version in (3, 4):
        gsply.write_spz(folder / f"v{version}.spz", data, version=version)
    plain = bytearray(gzip.decompress((folder / "v3.spz").read_bytes()))
    n = struct.unpack_from("<I", plain, 8)[0]
    # positions, alphas, colours, scales; then rotations of 4 bytes, of 3 before
    row = 16 + 9 * n + n + 3 * n + 3 * n
    for version, positions in ((1, bytes(6 * n)), (2, bytes(plain[16:16 + 9 * n]))):
        head = bytes(plain[:4]) + struct.pack("<I", version) + bytes(plain[8:16])
        (folder / f"v{version}.spz").write_bytes(gzip.compress(head + positions
                                                               + bytes(plain[16 + 9 * n:row + 3 * n])
                                                               + bytes(plain[row + 4 * n:]), mtime=0))
    plain[14] |= 2
    (folder / "axes.spz").write_bytes(gzip.compress(bytes(plain) + struct.pack("<II3s", 0xADBE0002, 3, b"abc")
                                                    + struct.pack("<III", 0xADBE0003, 4, 6), mtime=0))


def _glb_seeds(folder: Path) -> None:
    s, prefix = _splats(20, 1), "KHR_gaussian_splatting:"
    arrays = {"POSITION": s.means,
              prefix + "ROTATION": torch.nn.functional.normalize(s.quats, dim=1)[:, [1, 2, 3, 0]],
              prefix + "SCALE": s.scales.exp(), prefix + "OPACITY": torch.sigmoid(s.opacities)[:, None],
              prefix + "SH_DEGREE_0_COEF_0": s.sh0,
              **{f"{prefix}SH_DEGREE_1_COEF_{i}": s.shN[:, i] for i in range(3)}}
    kinds, at, views, body = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}, 0, [], b""
    for array in arrays.values():
        raw = array.contiguous().numpy().tobytes()
        views.append({"buffer": 0, "byteOffset": at, "byteLength": len(raw)})
        at, body = at + len(raw), body + raw
    accessors = [{"bufferView": i, "componentType": 5126, "count": len(array), "type": kinds[array.shape[1]]}
                 for i, array in enumerate(arrays.values())]
    text = json.dumps({"asset": {"version": "2.0"}, "buffers": [{"byteLength": len(body)}],
                       "bufferViews": views, "accessors": accessors, "meshes": [{"primitives": [{
                           "mode": 0, "attributes": {name: i for i, name in enumerate(arrays)},
                           "extensions": {"KHR_gaussian_splatting": {"kernel": "ellipse"}}}]}]}).encode()
    text += b" " * (-len(text) % 4)
    (folder / "x.glb").write_bytes(struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + len(body), len(text),
                                               0x4E4F534A) + text
                                   + struct.pack("<II", len(body), 0x004E4942) + body)
    formats.FORMATS["gltf_spz"].write(s, folder / "x.spz.glb")


def _splat_seeds(folder: Path) -> None:
    _written("splat")(folder)
    (folder / "degree3.splat").unlink()  # it holds no harmonics
    if (theirs := SHARED / "samples" / "plant.splat").is_file():
        (folder / "plant.splat").write_bytes(theirs.read_bytes()[:32 * 300])


def _vq_seeds(folder: Path) -> None:
    for degree in (0, 3):
        vq.write(_splats(40, degree).arrays(), folder / f"degree{degree}.vq.npz", np.linspace(0, 1, 40))


def _fgs_seeds(folder: Path) -> None:
    for kind in ("deltas", "field"):
        for exact in (False, True):
            name = f"{kind}_exact.fgs" if exact else f"{kind}.fgs"
            progressive.write(_model(kind), folder / name, (0.3, 1.0), exact)


def _model_seeds(folder: Path) -> None:
    """With and without the digest, which those of older versions have not: behind it is what a lying file
    reaches."""
    for kind in ("deltas", "field", "none"):
        for name in (kind, f"{kind}_old"):
            (folder / name).mkdir()
            _model(kind).save(folder / name)
    for path in folder.glob("*_old/model.json"):
        _without(path, "sha256")


def _without(path: Path, key: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


# -- captures
# ------------------------------------------------------------------------------------------------------------

def _photographs(folder: Path, suffixes: tuple[str, ...] = (".png",), masks: bool = False) -> list[str]:
    """VIEWS of them, of the kinds of these suffixes in turn; their names."""
    draw, names = np.random.default_rng(0), []
    for place in ("images", *(["masks"] if masks else [])):
        (folder / place).mkdir(parents=True)
    for i in range(VIEWS):
        names.append(f"{i}{suffixes[i % len(suffixes)]}")
        pixels = draw.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / names[-1])
        if masks:
            Image.fromarray(pixels[..., 0] // 128 * 255).save(folder / "masks" / f"{names[-1]}.png")
    return names


LENSES = {"pinhole": CameraModel("PINHOLE", WIDTH, HEIGHT, (28.0, 28.0, 16.0, 12.0)),
          "opencv": CameraModel("OPENCV", WIDTH, HEIGHT, (28.0, 28.0, 16.0, 12.0, 0.05, -0.01, 0.001, 0.001)),
          "fisheye": CameraModel("OPENCV_FISHEYE", WIDTH, HEIGHT,
                                 (20.0, 20.0, 16.0, 12.0, 0.01, 0.0, 0.0, 0.0))}


def _reconstruction(folder: Path, lens: CameraModel, text: bool = False, **photographs: Any) -> None:
    """A capture with points, what the images see of them, rigs and frames."""
    pycolmap, names = library(), _photographs(folder, **photographs)
    found, camera = pycolmap.Reconstruction(), lens.colmap()
    camera.camera_id = 1  # type: ignore[union-attr]
    found.add_camera_with_trivial_rig(camera)
    xyz = np.random.default_rng(1).normal(size=(30, 3)) * 0.5
    ids = [found.add_point3D(place, pycolmap.Track(), np.array([10, 20, 30], np.uint8)) for place in xyz]
    for i, (name, at) in enumerate(zip(names, _cameras(), strict=True), 1):
        R, t = at.viewmat[:3, :3].double().numpy(), at.viewmat[:3, 3].double().numpy()
        image = pycolmap.Image(name=name, camera_id=1, image_id=i)
        pixels = camera.img_from_cam(xyz[:8] @ R.T + t)
        image.points2D = pycolmap.Point2DList([pycolmap.Point2D(pixel) for pixel in pixels])
        found.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pycolmap.Rotation3d(R), t))
        for j in range(len(pixels)):
            found.add_observation(ids[j], pycolmap.TrackElement(i, j))
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    (found.write_text if text else found.write_binary)(str(model))


def _colmap_seeds(text: bool) -> Callable[[Path], None]:
    def seeds(folder: Path) -> None:
        for name, lens in LENSES.items():
            _reconstruction(folder / name, lens, text)
        _reconstruction(folder / "old", LENSES["pinhole"], text)
        for path in (folder / "old").glob("sparse/0/[rf][ir]*"):
            # what rigs and frames say must agree with the images; without them the images are believed
            path.unlink()
    return seeds


def _frames(names: list[str]) -> list[dict[str, Any]]:
    poses = [torch.linalg.inv(camera.viewmat.double()).numpy() @ np.diag([1.0, -1, -1, 1])
             for camera in _cameras()]
    return [{"file_path": f"images/{name}", "transform_matrix": pose.tolist()} for name,
            pose in zip(names, poses, strict=True)]


def _transforms_seeds(folder: Path) -> None:
    """As nerfstudio, instant-ngp, Metashape and Blender's scenes have them, with lists of views, points and
    masks."""
    points = ("ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float "
              "y\nproperty float z\nproperty uchar red\nproperty uchar green\nproperty "
              "uchar blue\nend_header\n0 0 0 1 2 3\n1 0 0 4 5 6\n0 1 0 7 8 9\n")
    lens = {"w": WIDTH, "h": HEIGHT, "fl_x": 28.0, "fl_y": 28.0, "cx": 16.0, "cy": 12.0}
    kinds: dict[str, dict[str, Any]] = {
        "lists": {**lens, "camera_model": "OPENCV", "k1": 0.05, "k2": 0.01, "p1": 0.001, "p2": 0.001,
                  "ply_file_path": "p.ply", "train_filenames": ["images/0.png", "images/1.png"],
                  "val_filenames": ["images/2.png"], "test_filenames": ["./images/3"]},
        "angle": {"camera_angle_x": 1.0, "aabb_scale": 4},
        "metashape": {**lens, "b1": 0.1, "b2": 0.0, "k1": 0.01, "k2": 0.0, "k3": 0.001, "k4": 0.0001,
                      "p1": 0.001, "p2": 0.0},
        "fisheye": {**lens, "camera_model": "OPENCV_FISHEYE", "k1": 0.01, "k2": 0.0, "k3": 0.0, "k4": 0.0}}
    for name, top in kinds.items():
        frames = _frames(_photographs(folder / name, masks=name == "lists"))
        if name == "lists":
            frames[0]["mask_path"] = "masks/0.png.png"
        (folder / name / "transforms.json").write_text(json.dumps({**top, "frames": frames}))
        (folder / name / "p.ply").write_text(points)
    frames = _frames(_photographs(folder / "blender"))
    for split, some in {"train": frames[:2], "val": frames[2:3], "test": frames[3:]}.items():
        (folder / "blender"
         / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": some}))


def _images_seeds(folder: Path) -> None:
    kinds = {"png": (".png",), "jpeg": (".jpg",), "others": (".webp", ".tif", ".bmp", ".png")}
    for name, suffixes in kinds.items():
        _reconstruction(folder / name, LENSES["pinhole"], suffixes=suffixes, masks=True)
    _reconstruction(folder / "modes", LENSES["pinhole"], masks=True)
    for i, mode in enumerate(("RGBA", "I;16", "L", "P")):
        path = folder / "modes" / "images" / f"{i}.png"
        image = Image.open(path)
        image = Image.fromarray(np.array(image.convert("L")).astype(np.uint16)
                                * 257) if mode == "I;16" else image.convert(mode)
        image.save(path)


def _scene(path: Path) -> Any:
    """All that training would read of a capture."""
    scene = load_scene(path, factor=1)
    views = [*scene.train, *scene.test]
    pictures = [(view.image(), view.mask()) for view in views]
    sizes = {(p.shape[1], p.shape[0]) == (v.camera.width, v.camera.height)
             and (m is None or m.shape == p.shape[:2])
             for v, (p, m) in zip(views, pictures, strict=True)}
    if sizes != {True}:
        raise AssertionError("a picture is not as large as its camera says")
    _lines([*scene.doubts, scene.summary()])
    return [v.camera for v in views], scene.points, scene.scene_scale, scene.origin, scene.protocol


def _checked_capture(path: Path) -> Any:
    found = check_capture(path)
    if lost := [line for line in found.wrong if str(path) not in line and path.name not in line]:
        raise AssertionError(f"data check names no file: {lost}")
    _lines([found.holds, *found.doubts, *found.wrong])


def _points_seeds(folder: Path) -> None:
    colours = {"bytes": (("red", "green", "blue"), np.uint8, 255),
               "wide": (("r", "g", "b"), np.uint16, 65535),
               "floats": (("diffuse_red", "diffuse_green", "diffuse_blue"), np.float32, 1),
               "harmonics": (("f_dc_0", "f_dc_1", "f_dc_2"), np.float32, 1), "none": ((), np.uint8, 1)}
    from plyfile import PlyData, PlyElement

    draw = np.random.default_rng(0)
    for name, (columns, kind, most) in colours.items():
        axis_kind: Any = "f8" if name == "wide" else "f4"
        rows = np.zeros(20, [*((axis, axis_kind) for axis in "xyz"), *((column, kind) for column in columns)])
        for column in rows.dtype.names or ():
            rows[column] = draw.uniform(0, 1 if column in "xyz" else most, 20)
        for text in (False, True):
            PlyData([PlyElement.describe(rows, "vertex")],
                    text=text).write(folder / f"{name}{'_text' * text}.ply")


def _points(path: Path) -> Any:
    doubts: list[str] = []
    xyz, rgb = read_points(path, doubts)
    return Points(torch.from_numpy(xyz), torch.from_numpy(rgb))


def _bench_seeds(folder: Path) -> None:
    cameras = _cameras()
    np.savez(folder / "points.npz", means3d=_splats().means.numpy(), width=WIDTH, height=HEIGHT,
             viewmats=torch.stack([c.viewmat for c in cameras]).numpy(),
             Ks=torch.stack([c.K for c in cameras]).numpy())
    if (theirs := SHARED / "samples" / "test_garden.npz").is_file():
        with np.load(theirs) as some:
            np.savez(folder / "garden.npz", **{name: some[name][:300] if name == "means3d" else some[name]
                                               for name in (
"means3d", "viewmats", "Ks", "width", "height")})


def _zip_seeds(folder: Path) -> None:
    _reconstruction(folder / "work" / "scene", LENSES["pinhole"])
    shutil.make_archive(str(folder / "archive"), "zip", folder / "work", "scene")
    shutil.rmtree(folder / "work")


def _unpack(path: Path) -> Any:
    download.unpack(path, "scene", path.with_name("capture"))
    if not path.with_name("capture").is_dir() or any(p.is_symlink() for p in path.parent.rglob("*")
                                                     if p != path):
        raise AssertionError("unpacked something else than files and folders")


# -- JSON, settings, runs
# ---------------------------------------------------------------------------------------------------

def _config_seeds(folder: Path) -> None:
    for preset in ("default", "paper", "smoke"):
        (folder / f"{preset}.json").write_text(json.dumps(Config.from_preset(preset).to_dict()))


def _words_seeds(folder: Path) -> None:
    """Command lines, a word on each line."""
    lines = {"train": "train CAPTURE --preset smoke --steps 20 --lr.delta-means 1e-3 --deltas.knots "
                      "0.01 0.1 --data.masks",
             "field": "train CAPTURE --field.resolution 4 4 4 4 --field.levels 1 2 --ratios.bands 0.1 "
                      "0.5 --data.model None",
             "config": "train CAPTURE --config config.json",
             "cut": "cut RUN --budget 20MB -o a.ply --size 64 48 --lod 100 50",
             "eval": "eval RUN --ratios 0.1 0.5 --lpips vgg"}
    for name, line in lines.items():
        (folder / name).mkdir()
        (folder / name / "words").write_text("\n".join(line.split()) + "\n")
        (folder / name / "config.json").write_text(json.dumps(Config().to_dict()))


def _words(path: Path) -> Any:
    text = (path / "words").read_text("utf-8", "surrogateescape")
    words = text.replace("config.json", str(path / "config.json")).splitlines()
    if not words or words[0] not in cli.COMMANDS:
        return
    try:
        command = cli.parse(cli.COMMANDS[words[0]], words[1:], f"flexgs {words[0]}")
    except SystemExit as e:
        if e.code:
            raise AssertionError("ended without a line") from None
        return  # --help
    if isinstance(command, cli.Train):
        command.config.check()
        return command.config.to_dict()
    if isinstance(command, cli.Cut) and command.budget:
        return parse_budget(command.budget)


def _profile_seeds(folder: Path) -> None:
    Profile((1000, 50_000, 10**6), (1.5, 7.25, 100.0), "64x48 on cpu").save(folder / "profile.json")


def _profile(path: Path) -> Any:
    profile = Profile.load(path)
    return str(profile), profile.most(1e12)


@functools.cache
def _tiny() -> tuple[Scene, Config]:
    """A capture, whose photographs are there no more, and the settings of a comparison of seconds."""
    with tempfile.TemporaryDirectory() as folder:
        _reconstruction(Path(folder) / "capture", LENSES["pinhole"])
        scene = load_scene(Path(folder) / "capture", factor=1, cache_bytes=1 << 20)
        for view in (*scene.train, *scene.test):
            view.prefetch()
    config = Config.from_preset("smoke")
    config.steps, config.base.max_splats, config.data.factor = 8, 40, 1
    config.evaluation.ratios, config.evaluation.lpips = (0.5, 1.0), ()
    config.report_every = config.checkpoint_every = config.check_every = 2
    return scene, config


METHODS = ("plain", "default", "paper --field.resolution 4 4 4 4 --field.levels 1 "
                               "--field.channels 2 --field.width 8")


def _cells(folder: Path) -> list[Any]:
    from flexgs import compare

    return compare.cells(METHODS, _tiny()[1], folder)


@functools.cache
def _compared() -> Path:
    """The folder of a comparison, trained once: stage 1, and runs with everything in them."""
    from flexgs import compare

    scene, config = _tiny()
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    compare.train_stage1(scene, config, folder, "cpu")
    for cell in _cells(folder):
        compare.train_cell(cell, scene, "cpu")
    return folder


OUTPUTS = shutil.ignore_patterns("*.png", "*.ply", "checkpoints", ".*")


def _runs_seeds(folder: Path) -> None:
    for cell in _cells(_compared()):
        shutil.copytree(cell.folder, folder / cell.folder.name, ignore=OUTPUTS)


def _run(path: Path) -> Any:
    """What `flexgs info`, `eval` and MLflow make of a run folder."""
    from flexgs.tracking import notes

    results = read_results(path)
    if not results:
        return
    results_table([results])
    text = notes.scene(results, path)
    try:
        recorded_capture(path)
    except UserError as e:
        if str(path) not in str(e):
            raise
    return results["ratios"], psnr_auc(results["ratios"]), text.splitlines()


def _metrics(path: Path) -> Any:
    return history(path / "metrics.jsonl")


def _comparison_seeds(folder: Path) -> None:
    shutil.copytree(_compared(), folder / "compare", ignore=OUTPUTS)
    for path in [*(folder / "compare").glob("*/default*"), *(folder / "compare").glob("*/paper*")]:
        shutil.rmtree(path)


def _comparison(path: Path) -> Any:
    from flexgs import compare
    from flexgs.report.comparison import cost_sheet, quality_sheet

    scene, config = _tiny()
    cells = compare.cells(METHODS[:1], config, path)
    finished = [compare.done(cell, scene) for cell in cells]
    rows = compare.measured(cells)
    return (finished, rows, quality_sheet(rows).markdown().splitlines(),
            cost_sheet(rows).markdown().splitlines())


def _checkpoint_seeds(folder: Path) -> None:
    from flexgs.training.checkpoint import latest_checkpoint

    for cell in _cells(_compared()):
        latest = latest_checkpoint(cell.folder / "checkpoints")
        assert latest
        for name in (cell.config.preset, f"{cell.config.preset}_old"):
            shutil.copytree(latest, folder / name / latest.name)
        _without(folder / f"{cell.config.preset}_old" / latest.name / "state.json", "sha256")


@functools.cache
def _trainer(preset: str) -> Any:
    from flexgs.training.trainer import Trainer

    return Trainer(next(cell.config for cell in _cells(Path()) if cell.config.preset == preset), _tiny()[0])


def _checkpoint(path: Path) -> Any:
    trainer = _trainer(path.name.removesuffix("_old"))
    trainer.load(next(path.iterdir()))
    return (trainer.splats.detach(), list(trainer.transform.state_dict().values()), trainer.step,
            trainer.seconds)


def _trial_seeds(folder: Path) -> None:
    from tuning.trial import Record

    figures = {"psnr_auc": 20.5, "mb": 1.25,
               "ratios": {"0.5": {"psnr": 20.0, "ssim": 0.5, "splats": 20, "mb": 0.1}}}
    for name, rungs in {"new": {}, "begun": {"1": figures},
                        "finished": {"1": figures, "2": figures, "4": figures}}.items():
        (folder / name).mkdir()
        Record({"lr.sh0": 1e-3, "structure": "sampled deltas"}, 1, rungs, 3.5).save(folder / name)


def _trial(path: Path) -> Any:
    from tuning.study import values
    from tuning.trial import Record

    record = Record.load(path)
    return record.status, record.figures, record.last, values(record, "psnr_auc") if record.rungs else None


def _search_seeds(folder: Path) -> None:
    scene, config = _tiny()
    (folder / "search").mkdir()
    (folder / "search" / "search.json").write_text(json.dumps({
        "capture": "capture", "digest": scene.digest, "objective": "psnr_auc", "start": config.to_dict()}))


def _search(path: Path) -> Any:
    from flexgs.store import Store
    from tuning.search import _same_as_before
    from tuning.trial import Search

    scene, config = _tiny()
    _same_as_before(Search(Path("capture"), Store(path), config), "psnr_auc", scene)


def _version_seeds(folder: Path) -> None:
    (folder / "version.json").write_text(json.dumps({"validator": '"abc"', "size": 100,
                                                     "md5": "1B2M2Y8AsgTpgAmY7PhCfg=="}))


def _lpips_seeds(folder: Path) -> None:
    """AlexNet's convolutions in float16, all one number: what is read does not depend on what they can
    see."""
    layers = {"0": (64, 3, 11, 11), "3": (192, 64, 5, 5), "6": (384, 192, 3, 3), "8": (256, 384, 3, 3),
              "10": (256, 256, 3, 3)}
    state = {f"features.{name}.{part}": torch.full(shape if part == "weight" else shape[:1], 0.5,
                                                   dtype=torch.float16)
             for name, shape in layers.items() for part in ("weight", "bias")}
    torch.save(state, folder / "alexnet_features_f16.pth")


def _backbone(path: Path) -> Any:
    convolutions = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    network = torch.nn.Sequential(OrderedDict((name, torch.nn.Conv2d(*convolution)) for name, convolution in
                                              zip(("0", "3", "6", "8", "10"), convolutions, strict=True)))
    lpips.fill(network, lpips.read_layers(path), str(path))
    return list(network.parameters())


SPLATS = {"ply": Reader(_ply_seeds, _look, 20),
          "compressed_ply": Reader(_written("compressed_ply"), _look, 1),
          "spz": Reader(_spz_seeds, _look, 1), "sog": Reader(_written("sog"), _look, 1),
          "splat": Reader(_splat_seeds, _look, 8), "gltf": Reader(_glb_seeds, _look, 12),
          "vq": Reader(_vq_seeds, _look, 12), "latents": Reader(_written("latents"), _look, 12),
          "fgs": Reader(_fgs_seeds, _look, 20), "model": Reader(_model_seeds, _look, 20)}
CAPTURES = {"colmap_binary": Reader(_colmap_seeds(False), _scene, 20, r"sparse/"),
            "colmap_text": Reader(_colmap_seeds(True), _scene, 20, r"sparse/"),
            "transforms": Reader(_transforms_seeds, _scene, 20, r"\.json|\.ply"),
            "images": Reader(_images_seeds, _scene, 16, r"images/|masks/"),
            "data_check": Reader(_transforms_seeds, _checked_capture, 4),
            "points": Reader(_points_seeds, _points, 20),
            "bench_points": Reader(_bench_seeds, load_points, 4),
            "zip": Reader(_zip_seeds, _unpack, 8)}
OTHERS = {"config": Reader(_config_seeds, lambda path: Config.load(path).to_dict(), 12),
          "command_line": Reader(_words_seeds, _words, 1, "words", names_file=False),
          "profile": Reader(_profile_seeds, _profile, 12),
          "results": Reader(_runs_seeds, _run, 12, r"results\.json"),
          "metrics": Reader(_runs_seeds, _metrics, 4, r"metrics\.jsonl"),
          "comparison": Reader(_comparison_seeds, _comparison, 2, r"\.json|safetensors"),
          "checkpoint": Reader(_checkpoint_seeds, _checkpoint, 12), "trial": Reader(_trial_seeds, _trial, 12),
          "search": Reader(_search_seeds, _search, 4),
          "download_state": Reader(_version_seeds, download._read, 2),
          "lpips": Reader(_lpips_seeds, _backbone, 1)}
READERS = {**SPLATS, **CAPTURES, **OTHERS}
