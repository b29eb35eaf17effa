"""Photographs and videos become captures: kinds of files, kills, what is refused; with real COLMAP."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from conftest import shared
from PIL import Image

from flexgs.dataset_options import DatasetOptions
from flexgs.demo.stages import STAGES
from flexgs.demo.synthetic import photograph
from flexgs.demo.tracer import Tracer
from flexgs.errors import UserError
from flexgs.run import recorded_capture
from flexgs.scene import load_scene
from flexgs.scene.camera_model import CameraModel
from flexgs.sfm import capture as sfm
from flexgs.sfm.capture import capture_name, is_source, make_capture
from flexgs.sfm.mapping import Mapper
from flexgs.sfm.options import CaptureOptions
from flexgs.sfm.progress import Phase
from flexgs.sfm.video import sharpness
from tests.test_cli import SMALL, flexgs

WIDTH, HEIGHT, FOCAL = 256, 192, 230.0
HEIC = Path(__file__).parent / "data" / "photographs" / "kitchen.heic"


def place(i: int) -> np.ndarray:
    """Camera centre of the i-th frame, on an arc around the scene, 3.2 m from its middle."""
    return np.array([3.2 * np.cos(0.09 * i), 3.2 * np.sin(0.09 * i), 1.5 + 0.3 * np.sin(0.5 * i)])


def film(scene: str, count: int) -> list[Image.Image]:
    """Photographs of a built-in scene from successive places."""
    tracer = Tracer(STAGES[scene](np.random.default_rng((0, 1))))
    lens = CameraModel("PINHOLE", WIDTH, HEIGHT, (FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2))

    def shot(i: int) -> Image.Image:
        forward = np.array([0, 0, 0.75]) - place(i)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward])
        pose[:3, 3] = -pose[:3, :3] @ place(i)
        return Image.fromarray(photograph(tracer, lens, pose))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(shot, range(count)))


@pytest.fixture(scope="module")
def studio() -> list[Image.Image]:
    return film("studio", 14)


@pytest.fixture(scope="module")
def photographs(studio, tmp_path_factory) -> Path:
    """A folder as people have them: several kinds, one taken sideways, masks, and what is no photograph."""
    folder = tmp_path_factory.mktemp("my photographs")
    for i, image in enumerate(studio):
        image.save(folder / f"p {i:02}.png")
    (folder / "p 02.png").unlink()
    studio[2].convert("RGBA").save(folder / "p 02.tif")
    (folder / "p 05.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees, clockwise, to see it upright
    studio[5].transpose(Image.Transpose.ROTATE_90).save(folder / "p 05.jpg", quality=97, exif=exif)
    (folder / "masks").mkdir()
    mask = Image.new("L", (WIDTH, HEIGHT), 255)
    mask.paste(0, (0, 0, WIDTH, 20))  # the upper rim, upright
    mask.transpose(Image.Transpose.ROTATE_90).save(folder / "masks" / "p 05.png")
    mask.save(folder / "masks" / "p 06_mask.png")
    shutil.copy(folder / "p 01.png", folder / "p 99.png")
    (folder / "p 98.jpg").write_bytes((folder / "p 05.jpg").read_bytes()[:2000])
    (folder / "notes.txt").write_text("at noon")
    return folder


@pytest.fixture(scope="module")
def made(photographs, tmp_path_factory) -> tuple[Path, str]:
    """The capture of these photographs, and what was said."""
    done = subprocess.run([sys.executable, "-m", "flexgs", "capture", photographs, "-o",
                           out := tmp_path_factory.mktemp("captures") / "garden"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_photographs_become_a_capture(made, photographs, studio):
    out, said = made
    assert "14 of 14 photographs have a pose" in said and f"flexgs train {out}" in said
    assert all(f"{phase}: " in said for phase in ("photographs", "features", "matches", "poses"))
    scene = load_scene(out)
    assert len(scene.train) == 12 and len(scene.test) == 2 and scene.protocol["masks"] == 2
    names = [f"p_{i:02}" for i in range(14)]  # COLMAP's lists of pairs have blanks between names
    views = sorted([*scene.train, *scene.test], key=lambda view: view.name)
    assert [Path(view.name).stem for view in views] == names
    for factor in (2, 4, 8):
        assert load_scene(out, factor=factor).protocol["images"] == f"images_{factor}"
    assert (out / "images" / "p_00.png").read_bytes() == (photographs / "p 00.png").read_bytes()
    turned = np.asarray(Image.open(out / "images" / "p_05.jpg"), int)
    assert turned.shape == (HEIGHT, WIDTH, 3) and np.abs(turned - np.asarray(studio[5], int)).mean() < 5
    for mask in ("p_05.jpg.png", "p_06.png.png"):
        rows = np.asarray(Image.open(out / "masks" / mask)).max(axis=1)
        assert not rows[:20].any() and rows[20:].all()
    assert not any("EXIF" in doubt for doubt in scene.doubts)


def test_the_poses_are_those_of_the_cameras(made):
    """Up to a similarity, within a hundredth of the distance to the scene."""
    model = pycolmap.Reconstruction(made[0] / "sparse" / "0")
    names = [image.name for image in model.images.values()]
    places = np.stack([place(int(Path(name).stem[2:])) for name in names])
    to_truth = pycolmap.estimate_sim3d(
        np.stack([image.projection_center() for image in model.images.values()]), places)
    model.transform(to_truth)
    found = np.stack([image.projection_center() for image in model.images.values()])
    assert np.abs(found - places).max() < 0.032
    assert model.cameras[1].mean_focal_length() == pytest.approx(FOCAL, rel=0.03)


def test_what_is_left_out_is_said(made, photographs):
    said = made[1]
    assert f"{photographs}/p 99.png: is the same file as p 01.png; left out" in said
    assert f"{photographs}/p 98.jpg: cannot be decoded" in said
    assert "1 other files are not read, for instance notes.txt" in said


def test_a_finished_capture_is_left_alone(made, photographs, capsys, monkeypatch):
    out, _ = made
    monkeypatch.setattr(sfm, "Mapper", None)
    assert flexgs("capture", photographs, "-o", out) == 0
    assert "14 of 14 photographs have a pose" in capsys.readouterr().out
    assert flexgs("capture", photographs, "-o", out, "--features", "500") == 2
    assert "is a capture of other options" in capsys.readouterr().err
    assert flexgs("capture", out / "images", "-o", out) == 2
    assert "is a capture of other source" in capsys.readouterr().err
    assert flexgs("capture", photographs, "-o", photographs) == 2
    assert "exists and is not a capture of `flexgs capture`; choose another" in capsys.readouterr().err


def test_a_dataset_may_hold_photographs(studio, tmp_path, capsys):
    """train_all makes captures of them, once; folders of results are no photographs."""
    root = tmp_path / "data"
    for folder in ("garden", "runs/flexgs/old/renders"):
        (root / folder).mkdir(parents=True)
        for i, image in enumerate(studio):
            image.save(root / folder / f"{i:02}.png")
    options = DatasetOptions(data_root=root, storage=str(tmp_path / "runs"))
    [found] = options.captures()
    assert found == tmp_path / "runs" / "flexgs-data" / "captures" / "garden"
    assert load_scene(found).train
    said = capsys.readouterr().out
    assert "garden: no reconstruction; computing one from the photographs, into" in said
    assert "features: " in said
    assert options.captures() == [found] and "features: " not in capsys.readouterr().out
    with pytest.raises(UserError, match="make a capture of them first: flexgs capture"):
        replace(options, storage="s3://bucket/runs").captures()
    with pytest.raises(UserError, match="it is itself a capture: give the folder that it is in"):
        replace(options, data_root=root / "garden").captures()


@pytest.mark.parametrize("phase", ["photographs", "features", "matches", "poses"])
def test_an_interrupted_capture_goes_on(phase, made, photographs, tmp_path, monkeypatch):
    """In any phase; the reconstruction is that of an uninterrupted one, to the byte."""
    class Stop(Phase):
        def done(self, count: int) -> None:
            if self.name == phase and count > 4:
                raise KeyboardInterrupt

    out = tmp_path / "garden"
    for module in ("photographs", "mapping"):
        monkeypatch.setattr(f"flexgs.sfm.{module}.Phase", Stop)
    with pytest.raises(KeyboardInterrupt):
        make_capture(photographs, out, CaptureOptions())
    assert not (out / "sparse").exists()
    for module in ("photographs", "mapping"):
        monkeypatch.setattr(f"flexgs.sfm.{module}.Phase", Phase)
    make_capture(photographs, out, CaptureOptions())
    for name in ("cameras", "images", "points3D"):
        assert ((out / "sparse" / "0" / f"{name}.bin").read_bytes()
                == (made[0] / "sparse" / "0" / f"{name}.bin").read_bytes())
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        "capture.json", "database.db", "images", "images_2", "images_4", "images_8", "masks", "sparse"}


def test_of_many_photographs_those_that_may_fit_are_matched(made, tmp_path):
    """They follow each other, or look alike: with 14 of them these are fewer than all pairs."""
    shutil.copytree(made[0] / "images", tmp_path / "images")
    mapper = Mapper(tmp_path, CaptureOptions(exhaustive=4))
    mapper.add([sorted(p.name for p in (tmp_path / "images").iterdir())])
    mapper.find_features()
    assert mapper.match() > 14
    with pycolmap.Database.open(tmp_path / "database.db") as database:
        assert 14 * 10 - 55 <= database.num_matched_image_pairs() <= 14 * 13 // 2
    assert {p.name for p in tmp_path.iterdir()} == {"database.db", "images"}
    (tmp_path / "out").mkdir()
    assert mapper.map(tmp_path / "out").models[0].num_reg_images() == 14


def test_the_poses_do_not_depend_on_the_number_of_threads(made, tmp_path, monkeypatch):
    shutil.copytree(made[0] / "images", tmp_path / "images")
    shutil.copy(made[0] / "database.db", tmp_path)
    found = []
    for n in (1, 3):
        monkeypatch.setattr("flexgs.pool._threads", n)
        (out := tmp_path / str(n)).mkdir()
        Mapper(tmp_path, CaptureOptions()).map(out)
        found.append([(out / "0" / f"{name}.bin").read_bytes() for name in ("cameras", "images", "points3D")])
    assert found[0] == found[1]


def test_parts_that_do_not_fit_together(studio, tmp_path, capsys):
    """The larger one is trained on; the other is kept and named."""
    (tmp_path / "in").mkdir()
    for i, image in enumerate([*studio[:9], *film("courtyard", 6)]):
        image.save(tmp_path / "in" / f"{i:02}.png")
    make_capture(tmp_path / "in", tmp_path / "out", CaptureOptions())
    said = capsys.readouterr().out
    assert "9 of 15 photographs have a pose" in said and "few have a pose" in said
    assert "without a pose, and not trained on: 09.png, 10.png, 11.png" in said
    assert "2 parts that do not fit together, of 9, 6 photographs" in said
    assert len(load_scene(tmp_path / "out", model="1").train) == 5


def test_photographs_of_several_sizes_have_cameras_of_their_own(studio, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, image in enumerate(studio):
        (image if i % 2 else image.crop((28, 0, 228, 192))).save(tmp_path / "in" / f"{i:02}.png")
    make_capture(tmp_path / "in", tmp_path / "out", CaptureOptions())
    assert "2 sizes or focal lengths; each has a camera of its own" in capsys.readouterr().out
    assert len(pycolmap.Reconstruction(tmp_path / "out" / "sparse" / "0").cameras) == 2


def blank(folder: Path) -> Path:
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 48), (i, 90, 90)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("make", "said"), [
    (lambda p: p / "gone", "no such file or folder; expected photographs or a video"),
    (lambda p: p / "empty", "found no photograph that can be read; expected files such as .avif"),
    (lambda p: p / "two", "found too few photographs, 2, expected at least 3, better 20 or more"),
    (lambda p: p / "two" / "0.png", "is one photograph; expected a folder of them, or a video"),
    (lambda p: p / "no.mp4", "cannot be decoded as a video"),
    (lambda p: blank(p / "blank"), "no two of 4 photographs fit together; each part of the scene has to be"),
])
def test_what_cannot_become_a_capture_is_refused_in_a_line(make, said, studio, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for i in (0, 1):
        studio[i].save(tmp_path / "two" / f"{i}.png")
    (tmp_path / "no.mp4").write_text("not a video")
    assert flexgs("capture", make(tmp_path), "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    if "fit together" not in said:  # the folder can be used for another source
        assert not (tmp_path / "out" / "capture.json").exists()
    assert flexgs("capture", tmp_path / "two", "-o", tmp_path / "out", "--frames", "2") == 2
    assert "--frames: found 2, expected 3 to 100,000" in capsys.readouterr().err


def test_photographs_that_come_and_go(studio, tmp_path, capsys):
    """Those that were added are taken up; a capture of photographs that have changed is refused."""
    (folder := tmp_path / "in").mkdir()
    for i, image in enumerate(studio[:6]):
        image.save(folder / f"{i}.png")
    make_capture(folder, out := tmp_path / "out", CaptureOptions())
    studio[6].save(folder / "6.png")
    make_capture(folder, out, CaptureOptions())
    said = capsys.readouterr().out
    assert "1 files were added since" in said and "7 of 7 photographs have a pose" in said
    studio[9].crop((0, 0, 200, 100)).save(folder / "2.png")
    assert flexgs("capture", folder, "-o", out) == 2
    said = capsys.readouterr().err
    assert f"{folder}/2.png: 1 files, this one for instance, were removed or changed" in said
    (folder / "2.png").unlink()
    assert flexgs("capture", folder, "-o", out) == 2


def test_captures_in_the_folder_are_no_photographs(capture, studio, tmp_path):
    shutil.copytree(capture, tmp_path / "garden")
    (tmp_path / "lego" / "train").mkdir(parents=True)
    studio[0].save(tmp_path / "lego" / "train" / "0.png")
    (tmp_path / "lego" / "transforms_train.json").write_text("{}")
    assert not is_source(tmp_path)


def test_a_refused_video_leaves_no_frames_for_the_next(studio, tmp_path, capsys):
    short = write_video(studio[:2], tmp_path / "short.mp4", fps=3)
    out = tmp_path / "out"
    assert flexgs("capture", short, "-o", out) == 2
    assert "found too few photographs, 2" in capsys.readouterr().err
    assert not (out / "frames").exists() and not (out / "capture.json").exists()


def test_a_video_that_does_not_say_its_length(studio, tmp_path, capsys):
    """Its frames are counted: no more than were asked for are taken."""
    from flexgs.sfm.video import write_frames

    stream = write_video(studio, tmp_path / "raw.h264", fps=25)
    (tmp_path / "frames").mkdir()
    write_frames(stream, tmp_path / "frames", 4)
    assert len(list((tmp_path / "frames").iterdir())) == 4
    assert "video: 14 frames, 4 taken" in capsys.readouterr().out


def write_video(images: list[Image.Image], path: Path, fps: int) -> Path:
    from imageio_ffmpeg import write_frames

    writer = write_frames(str(path), images[0].size, fps=fps, codec="libx264", macro_block_size=4,
                          output_params=["-crf", "10", "-loglevel", "error"])
    writer.send(None)
    for image in images:
        writer.send(np.ascontiguousarray(image))
    writer.close()
    return path


def test_a_video_becomes_a_model(studio, tmp_path, capsys):
    """The sharp frames are taken, get poses, and are trained on."""
    blurred = [image.resize((32, 24)).resize((WIDTH, HEIGHT)) for image in studio]
    assert all(sharpness(np.asarray(a)) > 4 * sharpness(np.asarray(b))
               for a, b in zip(studio, blurred, strict=True))
    video = write_video([image for pair in zip(blurred, studio, strict=True) for image in pair],
                        tmp_path / "a walk.mp4", fps=3)
    out = tmp_path / "vid"
    make_capture(video, out, CaptureOptions(frames=14))
    assert sorted(p.name for p in (out / "images").iterdir()) == [f"frame_{2 * i + 2:06}.jpg"
                                                                   for i in range(14)]
    assert not (out / "frames").exists() and len(load_scene(out).train) == 12
    assert "28 frames, 14 taken" in capsys.readouterr().out
    assert flexgs("train", out, "--output", tmp_path / "runs", *SMALL, "--evaluation.lpips") == 0
    assert json.loads((tmp_path / "runs/vid/results.json").read_text())["ratios"]["1"]["psnr"] > 10


def test_train_takes_photographs(photographs, tmp_path, capsys):
    run = tmp_path / photographs.name
    train = ["train", photographs, "--output", tmp_path, *SMALL, "--evaluation.lpips"]
    assert flexgs(*train) == 0
    said = capsys.readouterr().out
    assert "no reconstruction; computing one" in said and "14 of 14 photographs have a pose" in said
    assert f"{photographs.name}: 14 photographs, 14 with a pose, 12 to train on" in said
    assert json.loads((run / "results.json").read_text())["ratios"]["1"]["psnr"] > 10
    assert recorded_capture(run) == run / "capture"
    assert flexgs(*train) == 0 and "already finished at 40 views" in capsys.readouterr().out


def test_what_is_a_source(capture, photographs, tmp_path):
    assert is_source(photographs) and is_source(photographs / "p 00.png")
    assert not is_source(capture) and not is_source(tmp_path) and not is_source(tmp_path / "gone")
    assert capture_name(photographs) == photographs.name
    assert capture_name(capture / "images") == capture_name(capture) == capture.name
    assert capture_name(HEIC) == "kitchen"


def test_heic(tmp_path, monkeypatch, capsys):
    """Upright, with the focal length of its EXIF; without the package the error names it."""
    from flexgs.sfm.photographs import find_photographs, write_photographs

    (tmp_path / "in").mkdir()
    shutil.copy(HEIC, tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pi_heif", None)
        assert flexgs("capture", tmp_path / "in", "-o", tmp_path / "out") == 2
        assert "pip install 'flexgs[capture]'" in capsys.readouterr().err
    pytest.importorskip("pi_heif")
    found, said = find_photographs(tmp_path / "in")
    assert not said and [(p.name, p.camera[:2], p.camera[3]) for p in found] == [
        ("kitchen.jpg", (256, 388), "26")]
    write_photographs(found, tmp_path / "out")
    camera = pycolmap.infer_camera_from_image(tmp_path / "out" / "images" / "kitchen.jpg")
    assert (camera.width, camera.height) == (256, 388) and camera.has_prior_focal_length
    assert camera.mean_focal_length() == pytest.approx(26 / 35 * 388, rel=0.1)


@pytest.mark.slow
def test_photographs_with_few_matches_are_found_in_a_second_pass(tmp_path, capsys):
    """All 24 of kitchen25; the poses are those of the reconstruction that is given with it."""
    given = shared("scenes/kitchen25")
    make_capture(given / "images", tmp_path / "out", CaptureOptions())
    said = capsys.readouterr().out
    assert "24 of 24 photographs have a pose" in said and "second pass: 00.jpg" in said
    found, wanted = (pycolmap.Reconstruction(path / "sparse" / "0") for path in (tmp_path / "out", given))
    found.transform(pycolmap.align_reconstructions_via_proj_centers(found, wanted, 0.1))
    there = {image.name: image.projection_center() for image in wanted.images.values()}
    scale = np.ptp(np.stack([*there.values()]), axis=0).max()
    assert max(np.linalg.norm(image.projection_center() - there[image.name])
               for image in found.images.values()) < 0.01 * scale
