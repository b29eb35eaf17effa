"""Formats that others define: what comes back, what they lose, broken files, and files that strangers made."""

import json
import random
import shutil
import struct

import pytest
import torch
from conftest import random_splats, shared

from flexgs.deploy import gltf, interchange
from flexgs.deploy.export import read_ply, to_ply, write_ply
from flexgs.deploy.formats import FORMATS, format_of
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.evaluate.metrics import psnr
from flexgs.model.elastic import ElasticModel
from flexgs.raster import render
from flexgs.raster.reference import rotations
from flexgs.splats import Splats
from tests.test_cli import flexgs

EXACT = {"means": 1e-6, "scales": 1e-5, "opacities": 1e-3, "sh0": 1e-6, "shN": 1e-6}
# the largest error of each attribute that the bits of a format leave, for 300 Gaussians of random_splats (3 units wide)
BITS = {
    "compressed_ply": {"means": 0.01, "scales": 0.01, "opacities": 0.05, "sh0": 0.04, "shN": 0.05},
    "spz": {"means": 1.3e-4, "scales": 0.04, "opacities": 0.05, "sh0": 0.03, "shN": 0.08},
    "sog": {"means": 2e-3, "scales": 0.2, "opacities": 0.05, "sh0": 0.1, "shN": 0.8},
    "splat": {"means": 1e-6, "scales": 1e-5, "opacities": 0.09, "sh0": 0.02},
}
NODE = pytest.mark.skipif(not shutil.which("npx"), reason="Node.js is not installed")


def ours(n: int, degree: int) -> Splats:
    """Of opacities and colours that 8 bits can hold."""
    splats = random_splats(n, degree)
    splats.opacities.clamp_(-3, 3)
    splats.sh0.clamp_(-1.5, 1.5)
    splats.shN.clamp_(-0.9, 0.9)
    return splats


def matched(a: Splats, b: Splats) -> Splats:
    """Those of b in the order of a: the formats sort them."""
    return b[torch.cdist(a.means, b.means).argmin(dim=1)]


def same_to(bounds: dict[str, float], a: Splats, b: Splats) -> None:
    b = matched(a, b)
    for name, bound in bounds.items():
        wrong = (getattr(a, name) - getattr(b, name)).abs()
        assert not wrong.numel() or float(wrong.max()) < bound, name
    between = (rotations(a.quats).mT @ rotations(b.quats)).abs()  # half a turn about an axis of its own changes no Gaussian
    assert float((between - torch.eye(3)).abs().max()) < 0.03


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("name", BITS)
def test_what_comes_back(tmp_path, name, degree):
    splats, path = ours(300, degree), tmp_path / f"x{FORMATS[name].suffix}"
    FORMATS[name].write(splats, path, [])
    again = FORMATS[name].read(path)
    assert len(again) == 300 and again.sh_degree == (0 if name == "splat" else degree)
    same_to(BITS[name], splats, again)
    first = path.read_bytes()
    FORMATS[name].write(splats, path, [])
    assert path.read_bytes() == first  # equal splats make equal files


@NODE
def test_gltf_comes_back_exactly(tmp_path, splats):
    """And its axes are those of glTF: y up."""
    for degree in (0, 3):
        splats = ours(50, degree)
        try:
            gltf.write(splats, tmp_path / "x.glb")
        except UserError as e:
            pytest.skip(f"splat-transform cannot be had here: {e}")
        again = gltf.read(tmp_path / "x.glb")
        assert again.sh_degree == degree
        same_to(EXACT, splats, again)


def test_pictures_stay(trained, scene, tmp_path):
    """The cut of a trained model, seen from the test views, against the float one."""
    cut = ElasticModel.load(trained).cut(0.5)
    for name, least in {"compressed_ply": 38, "spz": 33, "sog": 38, "splat": 24}.items():
        path = tmp_path / f"x{FORMATS[name].suffix}"
        FORMATS[name].write(cut, path, [])
        assert path.stat().st_size < 0.8 * len(to_ply(cut))
        again = FORMATS[name].read(path)
        for view in scene.test[:2]:
            was, now = (render(s, view.camera).image.clamp(0, 1) for s in (cut, again))
            assert psnr(now, was) > least, name


@pytest.mark.parametrize("name", [*BITS, "ply"])
def test_broken_files_are_one_line_or_read(tmp_path, name):
    """Truncated and flipped at random places: formats without a checksum may still hold numbers, but nothing crashes."""
    splats, path = ours(200, 1), tmp_path / f"x{FORMATS[name].suffix}"
    FORMATS[name].write(splats, path, [])
    whole, rng = path.read_bytes(), random.Random(0)
    refused, rounds = 0, 100 if name in ("spz", "sog") else 40
    for i in range(rounds):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] if i % 2 else whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        try:
            FORMATS[name].read(path)
        except UserError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refused >= 0.4 * rounds  # most of the truncated ones; .splat has no head, and may end behind any Gaussian


@pytest.mark.parametrize("name", [*BITS, "ply", "gltf"])
def test_files_of_something_else(tmp_path, name):
    path = tmp_path / f"x{FORMATS[name].suffix}"
    for raw in (b"", b"\0" * 33, b"PK\x03\x04 not a zip", b"glTF" + b"\xff" * 60, b"ply\nformat binary_little_endian 1.0\n",
                b"\x1f\x8b\x08\0" + b"\xff" * 50):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"x\.\S+: ") as e:
            FORMATS[name].read(path)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no such file"):
        FORMATS[name].read(tmp_path / f"none{FORMATS[name].suffix}")


def test_gltf_of_something_else(tmp_path):
    gaussians = {"attributes": {"POSITION": 0}, "extensions": {"KHR_gaussian_splatting": {}}}

    def one(accessor: dict, view: object = {}) -> dict:
        return {"meshes": [{"primitives": [gaussians]}], "bufferViews": [view],
                "accessors": [{"bufferView": 0, "componentType": 5126, **accessor}]}

    path = tmp_path / "x.glb"
    for about in ({"meshes": []}, [], {"meshes": [{"primitives": [{"attributes": {}}]}]}, one({"count": 10**30}),
                  one({"count": 1}, [1]), one({"count": "a"}), one({"count": -5})):
        text = json.dumps(about).encode()
        path.write_bytes(struct.pack("<4sIII4s", b"glTF", 2, 0, len(text), b"JSON") + text + struct.pack("<I4s", 60, b"BIN\0")
                         + bytes(60))
        with pytest.raises(UserError, match=r"x\.glb: "):
            gltf.read(path)


def test_huge_counts_allocate_nothing(tmp_path):
    """A head that promises a billion Gaussians in a file of a few kilobytes."""
    splats = ours(40, 0)
    ply, packed = tmp_path / "x.ply", tmp_path / "x.compressed.ply"
    write_ply(splats, ply)
    FORMATS["compressed_ply"].write(splats, packed, [])
    for path in (ply, packed):
        path.write_bytes(path.read_bytes().replace(b"element vertex 40", b"element vertex 4000000000"))
        with pytest.raises(UserError, match="x"):
            FORMATS[format_of(path)].read(path)


def test_format_by_suffix():
    assert [format_of(f"a/b.C.{s}") for s in ("ply", "compressed.ply", "SPZ", "sog", "splat", "glb", "vq.npz")] == \
        ["ply", "compressed_ply", "spz", "sog", "splat", "gltf", "vq"]
    with pytest.raises(UserError, match=r"x\.obj: expected a name that ends in one of \.ply \.compressed\.ply"):
        format_of("x.obj")


def test_an_opacity_of_one_stays_finite(tmp_path):
    splats = ours(20, 0)
    splats.opacities[:] = 40.0
    interchange.write(splats, tmp_path / "x.spz", "spz")
    assert bool(torch.isfinite(interchange.read(tmp_path / "x.spz", "spz").opacities).all())


def test_a_strangers_file_is_cut_by_what_is_seen(trained, capture, scene, tmp_path, capsys):
    """Not elastic, without training: in the order of opacity and size, or for the views of its capture."""
    whole = ElasticModel.load(trained).cut(1.0)
    generator = torch.Generator().manual_seed(0)
    shuffled = whole[torch.randperm(len(whole), generator=generator)]
    write_ply(shuffled, tmp_path / "a.ply")
    quality = {}
    for name, scored in {"alone": open_model(tmp_path / "a.ply"), "seen": open_model(tmp_path / "a.ply", scene)}.items():
        cut = scored.cut(0.5)
        assert len(cut) == len(whole) // 2
        quality[name] = sum(psnr(render(cut, v.camera).image.clamp(0, 1), v.image() / 255) for v in scene.test)
    quality["any"] = sum(psnr(render(shuffled[:len(whole) // 2], v.camera).image.clamp(0, 1), v.image() / 255)
                         for v in scene.test)
    assert min(quality["alone"], quality["seen"]) > quality["any"]
    for more in ([], ["--scene", capture]):
        assert flexgs("cut", tmp_path / "a.ply", "--budget", "100", "-o", tmp_path / "b.spz", *more) == 0
    said = capsys.readouterr().out
    assert "b.spz: 100 of 800 Gaussians" in said and "on the test views" in said
    assert len(interchange.read(tmp_path / "b.spz", "spz")) == 100


def test_a_real_splat_file(tmp_path):
    model = open_model(shared("samples/plant.splat"))
    assert len(model) == 113_648 and model.sh_degree == 0
    assert len(model.cut("quest")) == len(model)
    write_ply(model.cut(0.1), tmp_path / "x.ply")
    assert len(read_ply(tmp_path / "x.ply")) == 11_364
