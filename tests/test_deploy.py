"""What a user does with a model: budgets of every unit, levels of detail, videos, frame times, info, serving
a run."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_splats
from PIL import Image

from flexgs.camera import look_at
from flexgs.camera_path import PATHS, around, path_text, read_path, start
from flexgs.config import Config
from flexgs.deploy.lod import _chunks, write_lod
from flexgs.deploy.merged import MergedModel
from flexgs.deploy.progressive import Progressive
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.formats.node import UNREACHED
from flexgs.model.elastic import ElasticModel
from flexgs.model.frame_time import Profile, measure_frames
from flexgs.ply import read_ply, write_ply
from tests.test_cli import flexgs


def test_a_model_knows_where_it_is_looked_at_from(trained, scene, tmp_path):
    """Its training cameras, in the run as in memory; a packed one has some of them."""
    model = ElasticModel.load(trained)
    assert len(model.cameras) == len(scene.train)
    for ours, view in zip(model.cameras, scene.train, strict=True):
        assert torch.equal(ours.viewmat, view.camera.viewmat) and torch.equal(ours.K, view.camera.K)
        assert (ours.width, ours.height) == (view.camera.width, view.camera.height)
    assert flexgs("pack", trained, "-o", tmp_path / "m.fgs") == 0
    packed = Progressive.open(tmp_path / "m.fgs")
    assert 3 <= len(packed.cameras) <= 8
    torch.testing.assert_close(packed.cameras[0].viewmat, model.cameras[0].viewmat, atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["ply", "spz", "splat", "compressed.ply"])
def test_megabytes_are_those_of_the_file(trained, tmp_path, suffix, capsys):
    """The largest cut that fits, to a hundredth."""
    out = tmp_path / f"x.{suffix}"
    assert flexgs("cut", trained, "--budget", "8kB", "-o", out) == 0
    assert 0.95 * 8000 < out.stat().st_size <= 8000
    assert flexgs("cut", trained, "--budget", "0.01kB", "-o", out) == 2
    assert "not enough for one Gaussian" in capsys.readouterr().err
    assert out.stat().st_size > 0.95 * 8000  # what was there stays


def test_frame_times(trained, tmp_path, capsys):
    """Measured here, or given for another machine."""
    profile = measure_frames(ElasticModel.load(trained), (64, 48), "cpu")
    assert profile.gaussians == (8, 24, 80, 240, 800) and min(profile.ms) > 0
    given = Profile((100, 300, 700), (1.0, 2.0, 4.0))
    assert [given.most(ms) for ms in (1, 1.5, 2, 3, 4, 50)] == [100, 200, 300, 500, 700, 700]
    with pytest.raises(UserError, match="even 100 Gaussians take"):
        given.most(0.5)
    assert Profile((1, 2, 3), (5.0, 1.0, 6.0)).most(3) == 2  # noise: more Gaussians are not faster
    given.save(tmp_path / "phone.json")
    assert flexgs("cut", trained, "--budget", "3ms", "--profile", tmp_path / "phone.json", "-o",
                  tmp_path / "x.ply") == 0
    assert len(read_ply(tmp_path / "x.ply")) == 500
    assert flexgs("bench", "frame", "--run", trained, "--size", "64", "48", "--save",
                  tmp_path / "here.json") == 0
    assert Profile.load(tmp_path / "here.json").gaussians == profile.gaussians
    assert flexgs("cut", trained, "--budget", "1000ms", "--size", "64", "48", "-o", tmp_path / "x.ply") == 0
    assert len(read_ply(tmp_path / "x.ply")) == 800
    for text in ("{}", "[]", "nonsense", '{"gaussians": [2, 1], "ms": [1, 2]}',
                 '{"gaussians": [1, 2], "ms": [1]}', "[" * 100_000,
                 '{"gaussians": [1, Infinity], "ms": [1, 2]}', '{"gaussians": [1, 2], "ms": [0, 1]}',
                 "\udcff", '{"gaussians": [0.1, 0.2], "ms": [1, 2]}', '{"gaussians": "12", "ms": "12"}',
                 f'{{"gaussians": [{10**400}]}}'):
        (tmp_path / "bad.json").write_text(text, errors="surrogateescape")
        capsys.readouterr()
        assert flexgs("cut", trained, "--budget", "3ms", "--profile", tmp_path / "bad.json", "-o",
                      tmp_path / "y.ply") == 2
        assert "bad.json: not a profile of frame times" in capsys.readouterr().err


def test_levels_of_detail(trained, tmp_path, capsys):
    model = ElasticModel.load(trained)
    assert flexgs("cut", trained, "--lod", "100", "50", "12.5", "-o", tmp_path / "lod") == 0
    for i, share in enumerate((1.0, 0.5, 0.125)):
        level, cut = read_ply(tmp_path / "lod" / f"lod{i}.ply"), model.cut(share)
        assert len(level) == len(cut) and torch.equal(level.means, cut.means)
    assert "levels of 800, 400, 100 Gaussians" in capsys.readouterr().out
    for wrong in (("50", "100"), ("100", "100"), ("200",), ("0",)):
        assert flexgs("cut", trained, "--lod", *wrong, "-o", tmp_path / "other") == 2
        assert "expected falling percentages" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def _leaves(node: dict) -> Iterator[dict]:
    for child in node.get("children", ()):
        yield from _leaves(child)
    if "lods" in node:
        yield node


@pytest.mark.skipif(not shutil.which("npx"), reason="Node.js is not installed")
def test_streamed_levels(tmp_path):
    """A small model has several chunks too, each of them at all levels."""
    model = MergedModel(random_splats(6_000, sh_degree=0).arrays(), Config.from_preset("plain"))
    try:
        write_lod(model, tmp_path / "streamed" / "lod-meta.json", (100, 50))
    except UserError as e:
        if UNREACHED not in str(e):
            raise
        pytest.skip(f"splat-transform cannot be had here: {e}")
    about = json.loads((tmp_path / "streamed" / "lod-meta.json").read_text())
    assert about["lodLevels"] == 2 and all((tmp_path / "streamed" / name).is_file()
                                           for name in about["filenames"])
    chunks = [[lod["count"] for lod in leaf["lods"].values()] for leaf in _leaves(about["tree"])]
    assert len(chunks) == 2 and sum(map(sum, chunks)) == 9_000 and all(len(levels) == 2 for levels in chunks)


@pytest.mark.parametrize(("count", "unit", "thousands", "extent"), [
    (2_000, 0.001, 8, 1), (200_000, 1, 25, 1), (200_000, 1000, 25, 825)])
def test_chunks_fit_the_model(count, unit, thousands, extent):
    """Whatever its coordinates are measured in: an eighth of the Gaussians, within a quarter of the model."""
    level = random_splats(count, sh_degree=0).arrays()
    level.means *= unit
    options = _chunks([level])
    found = dict(zip(options[::2], map(int, options[1::2]), strict=True))
    assert found == {"--lod-chunk-count": thousands, "--lod-chunk-extent": extent}


def test_paths(trained, scene):
    model = ElasticModel.load(trained)
    for path in PATHS.values():
        frames = path(model.cameras, 12, 80, 60)
        assert len(frames) == 12 and all((c.width, c.height) == (80, 60) for c in frames)
        for camera in frames:
            turn = camera.viewmat[:3, :3]
            torch.testing.assert_close(turn @ turn.T, torch.eye(3), atol=1e-5, rtol=0)
            assert float(torch.linalg.det(turn)) > 0.99
        steps = torch.stack([c.center for c in [*frames, frames[0]]]).diff(dim=0).norm(dim=1)
        assert float(steps.max()) < 3 * float(steps.median())  # smooth, and closed
    orbit = PATHS["orbit"](model.cameras, 12, 80, 60)
    places = torch.stack([c.center for c in model.cameras])
    assert float(torch.stack([c.center for c in orbit]).std()) == pytest.approx(float(places.std()), rel=0.35)
    views = PATHS["views"](model.cameras, len(model.cameras), 64, 48)
    torch.testing.assert_close(views[3].viewmat, model.cameras[3].viewmat, atol=1e-4, rtol=0)


def test_cameras_of_a_model_that_has_none():
    """Its middle is in the middle of each, and its Gaussians are in the picture."""
    splats = random_splats(2000)
    splats.means += torch.tensor([10.0, -4, 3])
    for camera in around(splats):
        seen = splats.means @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3]
        pixels = seen[:, :2] / seen[:, 2:] * camera.K[0, 0] + torch.tensor([320.0, 240])
        inside = (seen[:, 2] > 0) & (pixels > 0).all(1) & (pixels < torch.tensor([640.0, 480])).all(1)
        assert float(inside.float().mean()) > 0.5
    eye, target, up = start(around(splats))
    assert np.linalg.norm(target - [10, -4, 3]) < 0.5 and np.linalg.norm(eye - target) > 1 and up[1] < -0.9


def test_levels_replace_no_folder(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    for output in (tmp_path, tmp_path / "lod-meta.json"):
        assert flexgs("cut", trained, "--lod", "100", "50", "-o", output) == 2
        assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert ([p.name for p in tmp_path.iterdir()] == ["mine.txt"]
            and (tmp_path / "mine.txt").read_text() == "precious")


def test_look_at():
    camera = look_at(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 8]), torch.tensor([0.0, -1, 0]), 64, 48,
                     90.0)
    torch.testing.assert_close(camera.center, torch.tensor([1.0, 2, 3]))
    torch.testing.assert_close(camera.viewmat[:3, :3], torch.eye(3))  # y down, z forward
    assert float(camera.K[0, 0]) == pytest.approx(24)
    along = look_at(torch.zeros(3), torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 0, 1]), 64, 48)
    assert bool(torch.isfinite(along.viewmat).all())


def test_render(trained, tmp_path, capsys):
    for name, frames in (("x.mp4", 5), ("x.gif", 5), ("x.png", 1)):
        assert flexgs("render", trained, "--path", "orbit", "--ratio", "0.05", "--frames", frames, "--size",
                      "64", "48", "-o", tmp_path / name) == 0
    assert "40 of 800 Gaussians" in capsys.readouterr().out
    with Image.open(tmp_path / "x.gif") as moving:
        assert (moving.n_frames, moving.size) == (5, (64, 48))
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 5
    from imageio_ffmpeg import count_frames_and_secs

    assert count_frames_and_secs(tmp_path / "x.mp4")[0] == 5
    for wrong, message in ((["-o", tmp_path / "x.avi"], "expected a name that ends in .mp4"),
                           (["-o", tmp_path / "y.mp4", "--size", "63", "48"], "width and height even"),
                           (["-o", tmp_path / "y.mp4", "--ratio", "2"], "expected a ratio above 0"),
                           (["-o", tmp_path / "y.mp4", "--frames", "0"], "--frames: found 0, expected 1 to")):
        assert flexgs("render", trained, *wrong) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gif", "x.mp4", "x.png"]


def test_info(trained, tmp_path, capsys):
    write_ply(random_splats(70, 2), tmp_path / "x.ply")
    assert flexgs("pack", trained, "-o", tmp_path / "m.fgs") == 0
    (tmp_path / "renamed").write_bytes((tmp_path / "m.fgs").read_bytes())
    for source, said in ((trained, "elastic model, preset smoke"),
                         (tmp_path / "m.fgs", "packed elastic model, chunks up to 1 %,"),
                         (tmp_path / "renamed", "packed elastic model, chunks up to 1 %,"),
                         (tmp_path / "x.ply", "70, spherical harmonics of degree 2")):
        capsys.readouterr()
        assert flexgs("info", source) == 0
        assert said in capsys.readouterr().out
    for wrong in (tmp_path, tmp_path / "none.ply", tmp_path / "x.obj"):
        assert flexgs("info", wrong) == 2
        assert str(wrong) in capsys.readouterr().err


def test_what_cut_asks_for(trained, tmp_path, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("a") / "folder.ply"
    folder.mkdir()
    for wrong, message in ((["--budget", "5%"], "neither --output nor --html"),
                           (["-o", tmp_path / "x.ply"], "either --budget or --lod"),
                           (["--budget", "5%", "--lod", "50", "-o", tmp_path / "x"],
                            "either --budget or --lod"),
                           (["--budget", "5%", "-o", tmp_path / "x.obj"], "expected a name that ends in"),
                           (["--budget", "5%", "-o", tmp_path / "x.vq.npz"], "--scene"),
                           (["--html", tmp_path / "x.html", "--budget", "5%"], "without --output"),
                           (["--budget", "5%", "-o", folder], "is a folder"),
                           (["--html", tmp_path / "x.htm"], "expected a name that ends in .html")):
        assert flexgs("cut", trained, *wrong) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_open_model_refuses(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_model(tmp_path / "none")
    with pytest.raises(UserError, match="not a flexgs model"):
        open_model(tmp_path)


def test_a_camera_path_of_ones_own(tmp_path):
    """nerfstudio's axes: a camera at z = 3 with the identity pose looks down, along -z."""
    pose = [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 0, 0, 0, 1]
    like = look_at(torch.zeros(3), torch.ones(3), torch.tensor([0.0, 1, 0]), 16, 12, near=0.2)
    file = tmp_path / "path.json"
    file.write_text(json.dumps({"camera_path": [{"camera_to_world": pose, "fov": 50}] * 2}))
    found = read_path(str(file), like, 64, 48)
    wanted = look_at(torch.tensor([0.0, 0, 3]), torch.zeros(3), torch.tensor([0.0, 1, 0]), 64, 48, fov=50)
    assert len(found) == 2 and found[0].near == 0.2
    assert torch.allclose(found[0].viewmat, wanted.viewmat, atol=1e-6)
    assert torch.allclose(found[0].K, wanted.K)
    around_town = replace(wanted, origin=(4e5, 5e6, 0))  # a path is in the coordinates of the capture
    file.write_text(path_text([around_town]))
    [again] = read_path(str(file), replace(like, origin=around_town.origin), 64, 48)
    assert torch.allclose(again.viewmat, wanted.viewmat, atol=1e-6) and torch.allclose(again.K, wanted.K)
    for broken, said in (({"keyframes": []}, "found no frames in camera_path"),
                         ({"camera_path": [{"camera_to_world": pose[:12], "fov": 50}]}, "camera_to_world"),
                         ({"camera_path": [{"camera_to_world": pose, "fov": 500}]}, "fov: found 500"),
                         ({"camera_path": [{"camera_to_world": [0] * 16, "fov": 50}]}, "no rotation")):
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=said):
            read_path(str(file), like, 64, 48)
