"""A capture may lie anywhere and be of any unit: what is trained, drawn and written is the same, in its own
coordinates."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from plyfile import PlyData

from flexgs import Config, UserError
from flexgs import config as cfg
from flexgs.bench.scenes import random_splats
from flexgs.camera import Camera
from flexgs.camera_path import PATHS, around, start
from flexgs.demo.synthetic import write_synthetic
from flexgs.deploy.progressive import Progressive, write
from flexgs.distributed import Group
from flexgs.formats import FORMATS, as_stored
from flexgs.image.quality import psnr
from flexgs.model.budget import parse
from flexgs.model.elastic import ElasticModel
from flexgs.model.field import Field
from flexgs.model.importance import score
from flexgs.model.merge import merged
from flexgs.origin import WORLD, unit_of
from flexgs.ply import is_wide, ply_bytes, read_ply, write_ply
from flexgs.raster import render
from flexgs.scene import initial_splats, load_scene
from flexgs.splats import cat, quantile
from flexgs.training.trainer import Trainer

UTM = (5e5, 5.4e6, 100.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_synthetic("studio", tmp_path_factory.mktemp("coordinates") / "plain", views=9, width=64,
                           height=48)


def moved(capture: Path, to: Path, shift: tuple[float, float, float], scale: float) -> Path:
    (to / "sparse/0").mkdir(parents=True)
    (to / "images").symlink_to(capture / "images")
    found = pycolmap.Reconstruction(str(capture / "sparse/0"))
    found.transform(pycolmap.Sim3d(scale, pycolmap.Rotation3d(), np.array(shift)))
    found.write(str(to / "sparse/0"))
    return to


def trained(capture: Path) -> tuple[ElasticModel, list[float]]:
    """(model, PSNR of the whole and of a cut over the views)."""
    scene = load_scene(capture, test_every=0)
    config = Config.from_preset("smoke", steps=120)
    config.base.max_splats, config.base.refine_every = 1500, 20
    trainer = Trainer(config, scene)
    trainer.fit(lambda step, metrics: None, lambda step, write: None)
    model = trainer.model()
    return model, [float(np.mean([psnr(render(model.cut(ratio), view.camera).image.clamp(0, 1),
                                       view.image() / 255)
                                  for view in scene.train])) for ratio in (1.0, 0.1)]


@pytest.mark.parametrize(("shift", "scale"),
                         [(UTM, 1.0), ((1e7, -1e7, 0), 1e-4), ((0, 0, 0), 1e6), ((1e7, 0, 1e7), 1e6)])
def test_a_moved_or_scaled_capture_trains_to_the_same_quality(plain, tmp_path, shift, scale):
    _, expected = trained(plain)
    model, found = trained(moved(plain, tmp_path / "moved", shift, scale))
    assert found == pytest.approx(expected, abs=0.1)
    assert (model.splats.origin == WORLD) == (shift == (0, 0, 0))
    assert model.cameras[0].near == pytest.approx(0.01 * scale, rel=0.5)


@pytest.mark.parametrize("scale_change", ["log", "activated"])
def test_the_field_of_the_paper_follows_the_unit(scale_change):
    options, unit = cfg.FieldConfig(resolution=(8, 8, 8, 8), zero_init=False,
                                    scale_change=scale_change), 2.0**20
    splats = random_splats(60, sh_degree=0)
    scaled = replace(splats, means=splats.means * unit, scales=splats.scales + math.log(unit))
    one, two = Field(options, splats.means), Field(options, scaled.means, unit)
    two.load_state_dict({**one.state_dict(), "box": two.box})
    before, after = one(splats, 0.1), two(scaled, 0.1)
    assert not torch.equal(before.means, splats.means)
    torch.testing.assert_close(after.means / unit, before.means, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.scales - math.log(unit), before.scales, atol=1e-3, rtol=1e-3)


def test_a_stranger_s_ply_made_elastic_keeps_its_positions(plain, tmp_path):
    scene = load_scene(moved(plain, tmp_path / "utm", UTM, 1.0), test_every=0)
    base = initial_splats(scene.points, 1, origin=scene.origin)
    write_ply(base, tmp_path / "base.ply")
    config = Config.from_preset("smoke", steps=2)
    config.base.ply = str(tmp_path / "base.ply")
    trainer = Trainer(config, scene, base=read_ply(tmp_path / "base.ply"))
    trainer.fit(lambda step, metrics: None, lambda step, write: None)
    whole = trainer.model().cut(1.0)
    write_ply(whole, tmp_path / "again.ply")
    one, two = (PlyData.read(tmp_path / name)["vertex"].data for name in ("base.ply", "again.ply"))
    order = np.argsort(one["x"]), np.argsort(two["x"])
    for name in one.dtype.names:
        if not name.startswith("rot"):
            np.testing.assert_allclose(one[name][order[0]], two[name][order[1]], rtol=0, atol=5e-7)


def own_cameras(capture: Path) -> list[tuple[str, np.ndarray]]:
    found = pycolmap.Reconstruction(str(capture / "sparse/0"))
    images = sorted(found.images.values(), key=lambda image: image.name)
    return [(image.name, np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]])) for image in images]


def test_every_file_is_in_the_captures_coordinates_again(plain, tmp_path):
    capture = moved(plain, tmp_path / "utm", UTM, 1.0)
    model, _ = trained(capture)
    cut, camera = model.cut(0.5), model.cameras[2]
    drawn = render(cut, camera).image

    write_ply(cut, tmp_path / "a.ply")
    again = read_ply(tmp_path / "a.ply")
    assert (tmp_path / "a.ply").stat().st_size == ply_bytes(len(cut), cut.sh_degree, wide=True)
    assert b"property double x" in (tmp_path / "a.ply").read_bytes()[:200]
    (_, pose) = own_cameras(capture)[2]
    mine = Camera(torch.from_numpy(pose), camera.K, camera.width, camera.height, camera.near)
    torch.testing.assert_close(render(again, mine).image, drawn, atol=2e-3, rtol=0)
    world = cut.means.double() + torch.tensor(cut.origin, dtype=torch.float64)
    torch.testing.assert_close(again.means.double() + torch.tensor(again.origin, dtype=torch.float64), world,
                               atol=1e-6, rtol=0)

    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    write(model, tmp_path / "a.fgs", exact=True)
    for loaded in (ElasticModel.load(tmp_path / "model"), Progressive.open(tmp_path / "a.fgs")):
        assert torch.equal(render(loaded.cut(0.5), loaded.cameras[0]).image,
                           render(cut, model.cameras[0]).image)
        assert loaded.cut(0.5).origin == cut.origin and loaded.cameras[0].near == camera.near
    write(model, tmp_path / "a.fgs")
    packed = Progressive.open(tmp_path / "a.fgs")
    assert packed.cut(0.5).origin == cut.origin and packed.cameras[0].near == camera.near
    rounded, kept = packed.cut(0.5), model.cameras[::1 + len(model.cameras) // 8]
    same = [psnr(render(rounded, theirs).image.clamp(0, 1), render(cut, mine).image.clamp(0, 1))
            for theirs, mine in zip(packed.cameras, kept, strict=True)]
    assert np.median(same) > 45  # in one or two a Gaussian may have come in front of the near plane

    limit = 0.5 * ply_bytes(len(model), model.sh_degree, wide=True)
    write_ply(model.cut(f"{limit / 1e6}MB"), tmp_path / "budget.ply")
    assert parse(f"{limit / 1e6}MB").unit == "bytes"
    row = ply_bytes(1, model.sh_degree, wide=True) - ply_bytes(0, model.sh_degree, wide=True)
    assert limit - 2 * row < (tmp_path / "budget.ply").stat().st_size <= limit


def test_a_checkpoint_keeps_the_origin_and_one_without_is_moved_there(plain, tmp_path):
    scene = load_scene(moved(plain, tmp_path / "utm", UTM, 1.0), test_every=0)
    trainer = Trainer(Config.from_preset("smoke"), scene)
    trainer.train_step()
    (tmp_path / "checkpoint").mkdir()
    trainer.save(tmp_path / "checkpoint")
    other = Trainer(Config.from_preset("smoke"),
                    replace(scene, origin=(scene.origin[0] + 1, *scene.origin[1:])))
    other.load(tmp_path / "checkpoint")
    assert other.splats.origin[0] == scene.origin[0] + 1
    torch.testing.assert_close(other.splats.means[:, 0] + 1, trainer.splats.means[:, 0])


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("ply", "gltf")])
def test_a_format_that_cannot_hold_the_coordinates_says_so(name, tmp_path):
    splats = replace(random_splats(30, sh_degree=0), origin=UTM)
    assert is_wide(splats)
    if name != "vq":  # needs views
        with pytest.raises(UserError, match=r"float64.*ply, or --local"):
            FORMATS[name].write(splats, tmp_path / f"x{FORMATS[name].suffix}", [])
        assert as_stored(splats, name, []).splats.origin == UTM
    assert not is_wide(replace(splats, origin=(100.0, 0.0, 0.0)))


def test_parts_about_different_origins_are_brought_together():
    splats = replace(random_splats(40, sh_degree=1), origin=UTM)
    there = splats.at((UTM[0] + 16, UTM[1], UTM[2] - 2))
    both = cat([splats, there])
    torch.testing.assert_close(both.means[:40], both.means[40:], atol=2e-6, rtol=0)
    for made in (both, both[:3], both.clone(), both.to("cpu"), merged(splats, torch.rand(40), 7)):
        assert made.origin == UTM


@pytest.mark.parametrize("unit", [1e-4, 1e6])
def test_merging_and_scores_do_not_know_the_unit(unit):
    splats, weight = random_splats(200, sh_degree=0), torch.rand(200)
    scaled = replace(splats, means=splats.means * unit, scales=splats.scales + math.log(unit))
    one, two = merged(splats, weight, 20), merged(scaled, weight, 20)
    torch.testing.assert_close(two.means / unit, one.means, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two.scales - math.log(unit), one.scales, atol=1e-3, rtol=0)
    torch.testing.assert_close(two.opacities, one.opacities, atol=1e-3, rtol=0)
    first, second = (score("footprint", s, [], Group()).argsort()[-5:] for s in (splats, scaled))
    assert torch.equal(first, second)
    camera, other = around(splats)[3], around(scaled)[3]
    assert other.near == pytest.approx(camera.near * unit, rel=1.5)
    assert psnr(render(scaled, other).image.clamp(0, 1), render(splats, camera).image.clamp(0, 1)) > 45


@pytest.mark.parametrize("far", [1e25, 3e38])
def test_huge_positions_still_have_cameras(far):
    stray, all_there = random_splats(50, sh_degree=0), random_splats(50, sh_degree=0)
    stray.means[0], stray.means[1] = far, -far
    all_there.means[:] = far
    for splats in (stray, all_there):
        cameras = around(splats)
        assert all(np.isfinite(part).all() for part in start(cameras))
        for path in PATHS.values():
            for camera in path(cameras, 3, 32, 24):
                assert bool(torch.isfinite(render(splats, camera).image).all())
    assert render(stray, around(stray)[0]).alpha.max() > 0.1


def test_the_quantile_is_that_of_torch_and_has_no_limit():
    values = torch.rand(1001, 2)
    for q in (0.0, 0.01, 0.9, 1.0):
        torch.testing.assert_close(quantile(values, q), values.quantile(q, dim=0))
    assert quantile(torch.zeros(2**24 + 1, dtype=torch.int8).float(), 0.9) == 0


def test_a_unit_is_1_in_usual_scenes():
    assert [unit_of(extent) for extent in (4.1, 5.0, 7.0, 5e6, 0.0)] == [1, 1, 1, 2.0**20, 1]
