"""A small share of the study of damaged files, `python -m tests.fuzz`, and an example of every kind that it
has found."""

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import random_splats

from flexgs.bench.scenes import load_points
from flexgs.camera import look_at
from flexgs.camera_path import around
from flexgs.compare import measured
from flexgs.config import Config
from flexgs.datasets.check import _factors
from flexgs.deploy.info import describe
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.formats import latents
from flexgs.model.elastic import ElasticModel
from flexgs.model.transform import Transform
from flexgs.run import read_results, recorded_capture
from flexgs.scene import load_scene
from flexgs.scene.camera_model import CameraModel
from flexgs.scene.capture import Capture, Frame
from flexgs.scene.identity import check_same_capture
from flexgs.scene.views import find_image
from flexgs.splats import Splats
from tests.fuzz.cases import Cases, write_seeds
from tests.fuzz.mutate import changed, opened
from tuning.trial import Record

QUICK = ("ply", "splat", "gltf", "latents", "model", "colmap_binary", "colmap_text", "transforms", "images",
         "points", "bench_points", "config", "profile", "trial")
"""Readers of files that are made without a training, and that need no process of their own."""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path: Path):
    write_seeds(QUICK, tmp_path)
    cases = Cases("suite", QUICK, tmp_path)
    ends: dict[str, set[str]] = {}
    for number in range(300):
        (folder := tmp_path / str(number)).mkdir()
        found = cases(number, folder)
        assert found.how in ("read", "refused"), f"{cases.make(number, folder)}: {found}"
        ends.setdefault(found.how, set()).add(cases.reader(number))
    assert min(len(names) for names in ends.values()) > len(QUICK) / 2


def test_cases_repeat(tmp_path: Path):
    write_seeds(("config",), tmp_path)
    made = [Cases("suite", ("config",), tmp_path).make(7, tmp_path / name)[1].read_bytes() for name in "ab"]
    assert made[0] == made[1] != (tmp_path / "config" / "smoke.json").read_bytes()


def test_packed_files_are_changed_inside(tmp_path: Path):
    """Most changes leave a zip whole, with right checksums, and what is in it another."""
    latents.write(random_splats(20).arrays(), tmp_path / "x.npz")
    raw = (tmp_path / "x.npz").read_bytes()
    whole = 0
    for i in range(40):
        (tmp_path / "y.npz").write_bytes(new := changed(raw, Random(i)))
        try:
            with zipfile.ZipFile(tmp_path / "y.npz") as packed:
                whole += packed.testzip() is None and new != raw
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, zlib.error):
            pass
    assert 20 < whole < 40


# -- what the study has found, an example of each kind
# ----------------------------------------------------------------------

def refused(read: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as error:
        read()
    assert str(error.value).isprintable() and all(word in str(error.value)
                                                  for word in words), str(error.value)


def test_a_message_is_a_line_whatever_it_quotes():
    assert str(UserError("x.json: found \x1b[31m\n\ud800é")) == "x.json: found \\x1b[31m \\ud800é"


def test_settings_that_contradict_each_other_name_their_file(tmp_path: Path):
    tree = Config.from_preset("smoke").to_dict()
    tree["deltas"]["knots"] = [0.1, 0.1]
    (tmp_path / "a.json").write_text(json.dumps(tree))
    refused(lambda: Config.load(tmp_path / "a.json"), "a.json: --deltas.knots", "rising")


def test_a_member_that_is_no_array(tmp_path: Path):
    latents.write(random_splats(20).arrays(), tmp_path / "x.latents.npz")
    with (zipfile.ZipFile(tmp_path / "x.latents.npz") as packed,
          zipfile.ZipFile(tmp_path / "y.latents.npz", "w") as other):
        for name in packed.namelist():
            raw = packed.read(name)
            other.writestr(name, raw.replace(b"NUMPY", b"numpy") if name == "means.npy" else raw)
    refused(lambda: open_model(tmp_path / "y.latents.npz"), "y.latents.npz: found means")


@pytest.mark.parametrize("change",
                         [{"means3d": np.full((5, 3), np.nan)}, {"means3d": np.zeros((5, 2))},
                          {"Ks": np.zeros(3)}, {"viewmats": np.ones((1, 4, 4))}, {"width": "a"},
                          {"width": [1, 2]}, {"height": 0}, None])
def test_points_for_timings(tmp_path: Path, change: dict | None):
    good = {"means3d": np.zeros((5, 3)), "viewmats": np.eye(4)[None], "Ks": np.eye(3)[None], "width": 8,
            "height": 6}
    np.savez(tmp_path / "good.npz", **good)
    assert len(load_points(tmp_path / "good.npz")[0]) == 5
    np.savez(tmp_path / "bad.npz", **{**good, **(change or {})})
    if change is None:
        (tmp_path / "bad.npz").write_bytes(b"PK\3\4")
    refused(lambda: load_points(tmp_path / "bad.npz"), "bad.npz: ")


RESULTS = {"scene": "a", "preset": "smoke", "steps": 3, "train_seconds": 1.0, "protocol": {},
           "ratios": {"0.5": {"psnr": 20.0, "ssim": 0.5, "splats": 9, "mb": 1.0, "ms": None}}}


@pytest.mark.parametrize("change", [
    {"ratios": {}}, {"ratios": {"x": RESULTS["ratios"]["0.5"]}}, {"ratios": {"2": RESULTS["ratios"]["0.5"]}},
    {"ratios": {"0.5": {"psnr": 20.0}}}, {"ratios": {"0.5": {**RESULTS["ratios"]["0.5"], "psnr": None}}},
    {"ratios": {"0.5": RESULTS["ratios"]["0.5"], "0.50": RESULTS["ratios"]["0.5"]}},
    {"preset": 3}, {"protocol": {"digest": "4-a-b-c"}}])
def test_results_have_what_their_readers_take(tmp_path: Path, change: dict):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert read_results(tmp_path) == RESULTS
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, **change}))
    refused(lambda: read_results(tmp_path), "results.json: ")


def test_a_finished_cell_without_its_model(tmp_path: Path):
    from flexgs.compare import cells

    cell = cells(("scratch",), Config.from_preset("smoke"), tmp_path)[0]
    cell.folder.mkdir(parents=True)
    ratios = {"1": {**RESULTS["ratios"]["0.5"], "cut_seconds": 1.0}}
    (cell.folder / "results.json").write_text(json.dumps({**RESULTS, "ratios": ratios}))
    refused(lambda: measured([cell]), "model.safetensors: no such file")


@pytest.mark.parametrize("rungs", [{"3": {}}, {"x": {}}, {"1": {"psnr_auc": 1.0, "mb": 1.0}},
                                   {"1": {"mb": 1.0, "ratios": {}}},
                                   {"1": {"psnr_auc": 1.0, "mb": 1.0, "ratios": {"0.5": {"psnr": 1.0}}}}])
def test_trials_have_what_a_search_reads(tmp_path: Path, rungs: dict):
    Record({}, 1, rungs).save(tmp_path)
    refused(lambda: Record.load(tmp_path), "trial.json: ")


def test_what_is_too_far_for_float32(tmp_path: Path):
    """A camera is refused, a point is left out."""
    write_seeds(("transforms",), tmp_path)
    file = tmp_path / "transforms" / "lists" / "transforms.json"
    points = file.with_name("p.ply")
    points.write_text(points.read_text().replace("float", "double").replace("0 1 0 7", "0 1e300 0 7"))
    with pytest.warns(UserWarning, match=r"1 of 3 points are over 1e\+15 units from 0 0 0"):
        assert len(load_scene(file.parent).points) == 2
    data = json.loads(file.read_text())
    data["frames"][1]["transform_matrix"][0][3] = 1e200
    file.write_text(json.dumps(data))
    refused(lambda: load_scene(file.parent), "transforms.json: found the camera of 1.png over 1e+15")


@pytest.mark.parametrize("change",
                         [{"viewmat": torch.zeros(4, 4)},
                          {"viewmat": torch.diag(torch.tensor([1.0, 1, -1, 1]))},
                          {"viewmat": torch.diag(torch.tensor([1.0, 1, 1, 2]))},
                          {"viewmat": 1e20 * torch.eye(4)}, {"K": torch.zeros(3, 3)}, {"width": 0}])
def test_cameras_of_a_model_are_cameras(tmp_path: Path, change: dict):
    camera = look_at(torch.tensor([0.0, 0, 3]), torch.zeros(3), torch.tensor([0.0, 1, 0]), 8, 6)
    config = Config.from_preset("smoke")
    config.transform.kind = "none"
    for one, name in ((camera, "good"), (dataclasses.replace(camera, **change), "bad")):
        (tmp_path / name).mkdir()
        ElasticModel(random_splats(5), Transform(), config, [one]).save(tmp_path / name)
    assert len(ElasticModel.load(tmp_path / "good").cameras) == 1
    refused(lambda: ElasticModel.load(tmp_path / "bad"), "model.safetensors: found camera 1 of")


@pytest.mark.parametrize("digest", [3, ["a"], {}])
def test_a_digest_that_is_no_text(digest: object):
    # type: ignore[arg-type]
    refused(lambda: check_same_capture(digest, "4-a-b-c", Path("run"), "give another"), "run: ")


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000, "a\0", "\ud800", "a\nb"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str):
    assert find_image(tmp_path / name) is None
    frames = [{"file_path": name, "transform_matrix": np.eye(4).tolist()}]
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": frames}))
    refused(lambda: load_scene(tmp_path), str(tmp_path))


def test_harmonics_of_different_lengths(tmp_path: Path):
    write_seeds(("gltf",), tmp_path)
    (head, *rest), close = opened((tmp_path / "gltf" / "x.glb").read_bytes()) or ([b""], b"".join)
    about = json.loads(head)
    about["accessors"][-1]["count"] = 1
    (tmp_path / "x.glb").write_bytes(close([json.dumps(about).encode(), *rest]))
    refused(lambda: open_model(tmp_path / "x.glb"),
            "x.glb: not a readable .glb file of Gaussians (its harmonics")


def test_sizes_beyond_float32_are_described_and_looked_at(tmp_path: Path):
    splats: Splats = random_splats(5)
    row = np.zeros(5, [("means", "<f4", 3), ("sizes", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])
    row["means"], row["sizes"], row["rgba"], row["quats"] = splats.means, 3e38, 128, 200
    (tmp_path / "x.splat").write_bytes(row.tobytes())
    one = splats.changed(means=torch.zeros(5, 3), scales=torch.full((5, 3), 1e4))
    assert all(bool(camera.viewmat.isfinite().all()) for camera in around(one))
    assert math.isfinite(float(describe(open_model(tmp_path / "x.splat"),
                                        str(tmp_path / "x.splat"))["size"].split()[-2]))


def test_a_capture_whose_name_is_too_long_is_not_there(tmp_path: Path):
    figures = dict.fromkeys(("psnr", "ssim", "splats", "mb", "ms", "cut_seconds"), 1.0)
    (tmp_path / "results.json").write_text(json.dumps({
        "scene": "c", "preset": "smoke", "steps": 1, "train_seconds": 1.0, "protocol": {},
        "capture": "c" * 5000, "ratios": {"1": figures}}))
    refused(lambda: recorded_capture(tmp_path), "is not there")


def test_a_folder_without_a_name_or_with_too_long_a_one(tmp_path: Path):
    """Photographs in the root of the disk, and behind a path that no disk takes."""
    lens = CameraModel("PINHOLE", 8, 6, (5.0, 5.0, 4.0, 3.0))
    assert Frame("a", Path("/"), "a.png", lens, np.eye(4)).reduced_folder(2) == Path("/_2")
    long = Frame("a", tmp_path.joinpath(*["d" * 200] * 30) / "images", "a.png", lens, np.eye(4))
    assert _factors(Capture("transforms", tmp_path, [long], None)) == [1]
