"""The built-in captures: deterministic, ordinary COLMAP folders, seen rightly through any lens."""

import numpy as np
import pytest
import torch
from PIL import Image

from flexgs.datasets.catalog import find_scenes
from flexgs.demo import synthetic
from flexgs.demo.stages import STAGES, Builder
from flexgs.demo.synthetic import SYNTHETIC, ensure_synthetic, write_synthetic
from flexgs.demo.tracer import FAR, Tracer, speckled
from flexgs.errors import UserError
from flexgs.scene import load_scene

SMALL = {"views": 10, "width": 48, "height": 36}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_it_is_an_ordinary_capture(name, tmp_path):
    scene = load_scene(write_synthetic(name, tmp_path / name, **SMALL))
    assert (scene.name, len(scene.train), len(scene.test)) == (name, 8, 2)
    assert scene.train[0].image().shape == (36, 48, 3)
    assert 3000 < len(scene.points) <= 4010 and scene.scene_scale > 2
    assert scene.train[0].image().float().std() > 20  # something to see


@pytest.mark.parametrize("name", SYNTHETIC)
def test_points_lie_on_what_the_views_show(name, tmp_path):
    """A point that a view sees unoccluded has, up to a pixel, the colour of its place in the photograph."""
    scene = load_scene(write_synthetic(name, tmp_path / name, views=10, width=96, height=72))
    tracer, errors = Tracer(STAGES[name](np.random.default_rng((0, 1)))), []
    for view in scene.train:
        camera, image = view.camera, view.image().float()
        seen = camera.viewmat[:3, :3] @ scene.points.xyz.T + camera.viewmat[:3, 3:]
        u, v = (camera.K @ seen / seen[2])[:2].floor().long()
        way = scene.points.xyz - camera.center
        free = tracer.distances(camera.center.double().numpy(),
                                torch.nn.functional.normalize(way, dim=1).double().numpy())
        keep = ((seen[2] > 0) & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
                & (torch.from_numpy(free) > way.norm(dim=1) - 0.05))
        assert keep.sum() > 300
        errors.append((image[v[keep], u[keep]] - scene.points.rgb[keep].float()).abs().mean(1))
    assert torch.cat(errors).median() < 15


def test_the_same_arguments_give_the_same_files_and_another_seed_others(tmp_path):
    first = files(write_synthetic("studio", tmp_path / "a", seed=3, **SMALL))
    assert files(write_synthetic("studio", tmp_path / "b", seed=3, **SMALL)) == first
    other = files(write_synthetic("studio", tmp_path / "c", seed=4, **SMALL))
    assert other.keys() == first.keys() and all(other[name] != first[name] for name in first
                                                if "images/" in name)


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    write_synthetic("studio", tmp_path / "a", **SMALL)
    before = files(tmp_path)
    monkeypatch.setattr(synthetic, "_write_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_synthetic("courtyard", tmp_path / "a", **SMALL)
    assert files(tmp_path) == before


def test_nothing_else_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a synthetic capture"):
        write_synthetic("studio", tmp_path, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unknown_scene(tmp_path):
    with pytest.raises(UserError, match=r"courtyrd.*courtyard, studio"):
        write_synthetic("courtyrd", tmp_path / "x")


def test_ensure_makes_what_is_missing_and_no_more(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(synthetic, "write_synthetic",
                        lambda name, path: made.append(name) or write_synthetic(name, path, **SMALL))
    paths = ensure_synthetic(tmp_path / "data")
    assert (made == list(SYNTHETIC) and ensure_synthetic(tmp_path / "data") == paths
            and made == list(SYNTHETIC))
    assert find_scenes(tmp_path / "data") == paths


def test_the_tracer_meets_known_surfaces():
    """Distances along the axes to a ball, a box, a rod and a ring, against the ruler."""
    b, paint = Builder(), speckled("#ffffff")
    b.ball((5, 0, 0), 1, paint)
    b.add("box", (0, 5, 0), (1, 0.5, 1), paint)
    b.rod((-5, 0, -1), (-5, 0, 1), 0.01, paint)
    b.add("torus", (0, -5, 0), (1.0, 0.25, 0), paint)
    stage = STAGES["studio"](np.random.default_rng(0))
    stage.solids = b.solids
    ways = np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1]])
    found = [float(Tracer(stage).distances(np.zeros(3), way[None])[0]) for way in ways]
    assert found == pytest.approx([4, 4.5, 4.99, 3.75, FAR], abs=1e-3)
    # a call looks only at solids in the cone that its rays span; the widest cone must lose none
    together = Tracer(stage).distances(np.zeros(3), ways)
    assert together.tolist() == pytest.approx(found)


def test_images_are_complete_and_smooth_at_edges(tmp_path):
    """Supersampling: far more colours than the textures have, and no pixel left unset."""
    folder = write_synthetic("courtyard", tmp_path / "c", **SMALL)
    pixels = np.asarray(Image.open(folder / "images" / "000.png"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 800
    assert (pixels.max(2) > 5).mean() > 0.97
