"""Formats that others define: what comes back, what they lose, broken files, and files that strangers
made."""

import contextlib
import json
import random
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_splats, shared

from flexgs import bounded, load
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.formats import FORMATS, decode, format_at, format_of, gltf, interchange, read, save
from flexgs.formats.node import UNREACHED
from flexgs.gaussians import unit_quaternions
from flexgs.image.quality import psnr
from flexgs.model.elastic import ElasticModel
from flexgs.ply import read_ply, to_ply, write_ply
from flexgs.raster import render
from flexgs.splats import Splats, rotation_matrices
from tests.test_cli import flexgs

EXACT = {"means": 1e-6, "scales": 1e-5, "opacities": 1e-3, "sh0": 1e-6, "shN": 1e-6}
# the largest error of each attribute that the bits of a format leave, for 300 Gaussians of random_splats (3
# units wide)
BITS = {
    "compressed_ply": {"means": 0.01, "scales": 0.01, "opacities": 0.05, "sh0": 0.04, "shN": 0.05},
    "spz": {"means": 1.3e-4, "scales": 0.04, "opacities": 0.05, "sh0": 0.03, "shN": 0.08},
    "spz4": {"means": 1.3e-4, "scales": 0.04, "opacities": 0.05, "sh0": 0.03, "shN": 0.08},
    "gltf_spz": {"means": 1.3e-4, "scales": 0.04, "opacities": 0.05, "sh0": 0.03, "shN": 0.08},
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


def same_to(bounds: dict[str, float], a: Splats, b: Splats, rotations: float = 0.03) -> None:
    b = matched(a, b)
    for name, bound in bounds.items():
        wrong = (getattr(a, name) - getattr(b, name)).abs()
        assert not wrong.numel() or float(wrong.max()) < bound, name
    # half a turn about an axis of its own changes no Gaussian
    between = (rotation_matrices(a.quats).mT @ rotation_matrices(b.quats)).abs()
    assert float((between - torch.eye(3)).abs().max()) < rotations


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("name", BITS)
def test_what_comes_back(tmp_path, name, degree):
    splats, path = ours(300, degree), tmp_path / f"x{FORMATS[name].suffix}"
    FORMATS[name].write(splats, path, [])
    again = FORMATS[name].read(path)
    assert len(again) == 300 and again.sh_degree == (0 if name == "splat" else degree)
    same_to(BITS[name], splats, again, 0.2 if name == "gltf_spz" else 0.03)  # SPZ 2 has 8 bits for x, y and z
    first = path.read_bytes()
    FORMATS[name].write(splats, path, [])
    assert path.read_bytes() == first  # equal splats make equal files


@NODE
def test_gltf_comes_back_exactly(tmp_path, monkeypatch):
    """And its axes are those of glTF: y up."""
    monkeypatch.chdir(tmp_path)
    for degree in (0, 3):
        splats = ours(50, degree)
        try:
            gltf.write(splats.arrays(), Path("x.glb"))
        except UserError as e:
            if UNREACHED not in str(e):
                raise
            pytest.skip(f"splat-transform cannot be had here: {e}")
        again = Splats.of(gltf.read(Path("x.glb")))
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
    """Truncated and flipped at random places: formats without a checksum may still hold numbers, but nothing
    crashes."""
    splats, path = ours(200, 1), tmp_path / f"x{FORMATS[name].suffix}"
    FORMATS[name].write(splats, path, [])
    whole, rng = path.read_bytes(), random.Random(0)
    refused, rounds = 0, 100 if name in ("spz", "sog") else 40
    for i in range(rounds):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] if i % 2 else whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)])
                         + whole[at + 1:])
        try:
            read(path)
        except UserError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    # most of the truncated ones; .splat has no head, and may end behind any Gaussian
    assert refused >= 0.4 * rounds


@pytest.mark.parametrize("name", [*BITS, "ply", "gltf"])
def test_files_of_something_else(tmp_path, name):
    path = tmp_path / f"x{FORMATS[name].suffix}"
    for raw in (b"", b"\0" * 33, b"PK\x03\x04 not a zip", b"glTF" + b"\xff" * 60,
                b"ply\nformat binary_little_endian 1.0\n",
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
    for about in ({"meshes": []}, [], {"meshes": [{"primitives": [{"attributes": {}}]}]},
                  one({"count": 10**30}), one({"count": 1}, [1]), one({"count": "a"}), one({"count": -5}),
                  one({"count": 1, "byteOffset": -4}), one({"count": 1, "byteOffset": 1e300}),
                  one({"count": True}), one({"count": 1, "type": "VEC2"}), "deep",
                  one({"count": 1, "sparse": {}}), {"meshes": float("nan")}, {"meshes": 10**400},
                  {"meshes": [{"primitives": 1}]}):
        text = b"[" * 100_000 if about == "deep" else json.dumps(about).encode()
        path.write_bytes(struct.pack("<4sIII4s", b"glTF", 2, 0, len(text), b"JSON") + text
                         + struct.pack("<I4s", 60, b"BIN\0")
                         + bytes(60))
        with pytest.raises(UserError, match=r"x\.glb: "):
            gltf.read(path)


def test_signalling_nans_of_gltf_are_refused_without_a_warning(tmp_path):
    names = {"POSITION": 3, **{f"KHR_gaussian_splatting:{name}": width for name, width in
                               {"ROTATION": 4, "SCALE": 3, "OPACITY": 1, "SH_DEGREE_0_COEF_0": 3}.items()}}
    text = json.dumps({
        "meshes": [{"primitives": [{"attributes": {name: i for i, name in enumerate(names)},
                                    "extensions": {"KHR_gaussian_splatting": {}}}]}],
        "bufferViews": [{}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 1}] * 5}).encode()
    for number, said in ((0x3f000000, None), (0x7f800001, "found NaN or infinite means")):
        (path := tmp_path / "x.glb").write_bytes(
            struct.pack("<4sIII4s", b"glTF", 2, 0, len(text), b"JSON") + text
            + struct.pack("<I4s4I", 16, b"BIN\0", *[number] * 4))
        with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
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
    assert [format_of(f"a/b.C.{s}") for s in ("ply", "compressed.ply", "SPZ", "v4.spz", "sog", "splat", "glb",
                                              "spz.glb", "vq.npz")] == \
        ["ply", "compressed_ply", "spz", "spz4", "sog", "splat", "gltf", "gltf_spz", "vq"]
    with pytest.raises(UserError, match=r"x\.obj: expected a name that ends in one of "
                                        r"\.ply \.compressed\.ply"):
        format_of("x.obj")


def test_an_opacity_of_one_stays_finite(tmp_path):
    splats = ours(20, 0)
    splats.opacities[:] = 40.0
    interchange.write(splats.arrays(), tmp_path / "x.spz", "spz")
    assert np.isfinite(interchange.read(tmp_path / "x.spz", "spz").opacities).all()


def test_a_strangers_file_is_cut_by_what_is_seen(trained, capture, scene, tmp_path, capsys):
    """Not elastic, without training: merged, or in the order of opacity and size, or for the views of its
    capture."""
    whole = ElasticModel.load(trained).cut(1.0)
    generator = torch.Generator().manual_seed(0)
    shuffled = whole[torch.randperm(len(whole), generator=generator)]
    write_ply(shuffled, tmp_path / "a.ply")
    quality = {}
    for name, scored in {"merged": open_model(tmp_path / "a.ply"),
                         "alone": open_model(tmp_path / "a.ply", by="prune"),
                         "seen": open_model(tmp_path / "a.ply", scene, "prune")}.items():
        cut = scored.cut(0.5)
        assert len(cut) == len(whole) // 2
        quality[name] = sum(psnr(render(cut, v.camera).image.clamp(0, 1), v.image() / 255)
                            for v in scene.test)
    quality["any"] = sum(psnr(render(shuffled[:len(whole) // 2], v.camera).image.clamp(0, 1), v.image() / 255)
                         for v in scene.test)
    assert quality["merged"] > max(quality["alone"], quality["seen"])
    assert min(quality["alone"], quality["seen"]) > quality["any"]
    for more in (["--by", "prune"], ["--scene", capture, "--seconds", "0.5"]):
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


def test_what_a_file_is_counts_and_not_its_name(tmp_path):
    """People rename what they send each other: the first bytes tell, and where none do, the name."""
    splats = ours(60, 1)
    for name in ("ply", "compressed_ply", "spz", "spz4", "sog", "gltf_spz", "latents"):
        chosen = FORMATS[name]
        stored = chosen.write(splats, tmp_path / f"x{chosen.suffix}")
        for other in ("y.ply", "y.splat", "y.dat"):
            (tmp_path / other).write_bytes((tmp_path / f"x{chosen.suffix}").read_bytes())
            assert format_at(tmp_path / other) == name and torch.equal(read(tmp_path / other).means,
                                                                       stored.means)
    (tmp_path / "y.ksplat").write_bytes(bytes(4096))
    (tmp_path / "folder.ply").mkdir()
    for wrong, words in (("y.ksplat", "expected a name that ends in"), ("folder.ply", "is a folder"),
                         ("none", "no such file")):
        with pytest.raises(UserError, match=words):
            read(tmp_path / wrong)


def test_save_and_load_go_by_the_suffix(tmp_path):
    splats = ours(60, 1)
    for name, magic in {"a.ply": b"ply\n", "a.compressed.ply": b"ply\n", "a.spz": b"\x1f\x8b",
                        "a.sog": b"PK"}.items():
        saved = save(splats, tmp_path / name)
        assert ((tmp_path / name).read_bytes().startswith(magic)
                and len(load(str(tmp_path / name))) == len(saved) == 60)
    assert format_at(tmp_path / "a.compressed.ply") == "compressed_ply"
    with pytest.raises(UserError, match=r"a\.obj: expected a name that ends in"):
        save(splats, tmp_path / "a.obj")


def test_what_a_format_cannot_hold_is_refused(scene, tmp_path):
    """With the file that was there kept, and nothing left beside it."""
    def changed(name: str, rows: slice, value: float) -> Splats:
        splats = ours(400, 1)
        getattr(splats, name)[rows] = value
        return splats

    one = slice(0, 1)
    for kind, splats, words in (
            ("spz", changed("scales", one, 60.0), "shapes of 1 of 400"),
            ("sog", changed("scales", one, 60.0), "shapes of"),
            ("spz", changed("shN", slice(0, 40), 2.5), "harmonics of 40 of 400"),
            ("spz", changed("means", one, 1e30), "SPZ holds positions up to 4,194,304 units, found 1e+30"),
            ("gltf_spz", changed("means", one, 1e30), "SPZ holds positions up to 4,194,304 units, found"),
            ("spz", changed("means", one, 1e6), "positions of"),
            ("compressed_ply", changed("means", one, 1e4), "positions of"),
            ("compressed_ply", changed("scales", one, 60.0), "shapes of"),
            ("vq", changed("means", one, 1e6), "positions of"),
            ("ply", changed("sh0", one, float("nan")), "NaN or infinite sh0"),
            ("spz", changed("opacities", one, float("inf")), "NaN or infinite opacities")):
        path = tmp_path / f"x{FORMATS[kind].suffix}"
        path.write_bytes(b"old")
        with pytest.raises(UserError, match=re.escape(words)) as error:
            FORMATS[kind].write(splats, path, scene.train[:2])
        assert str(error.value).startswith(f"{path}: ") and path.read_bytes() == b"old"
        path.unlink()
        assert not list(tmp_path.iterdir())


def test_values_that_a_library_would_guess_about(tmp_path):
    """gsply takes log-scales above 0 for lengths and logits of 0 to 1 for opacities unless it is told."""
    splats = ours(300, 0)
    splats.scales[:] = splats.scales.abs() + 0.5
    splats.opacities[:] = splats.opacities.abs() / 4
    was = splats.clone()
    for name in ("compressed_ply", "spz", "sog", "splat"):
        stored = FORMATS[name].write(splats, tmp_path / f"x{FORMATS[name].suffix}")
        same_to({"scales": 0.2, "opacities": 0.05}, splats, stored)
    assert all(torch.equal(t, getattr(was, name)) for name, t in splats.items())  # nor are they changed


def test_a_quaternion_of_no_length_is_no_rotation(tmp_path):
    """As the rasterizer has it; other viewers would make NaN of it."""
    splats = ours(50, 0)
    splats.quats[:20] = 0
    save(splats, tmp_path / "x.ply")
    assert torch.equal(read(tmp_path / "x.ply").quats[:20], torch.tensor([1.0, 0, 0, 0]).expand(20, 4))
    rotated = splats.changed(quats=torch.from_numpy(unit_quaternions(splats.quats.numpy())))
    same_to({}, rotated, save(splats, tmp_path / "x.spz"))


def test_splat_files_that_are_none(tmp_path):
    path = tmp_path / "x.splat"
    save(ours(100, 0), path)
    raw, rng = path.read_bytes(), random.Random(0)
    for broken, words in ((b"", "0 bytes"), (raw[:-5], "multiple of 32"), (raw + bytes(13), "multiple of 32"),
                          (bytes(3200), "not above 0"), (rng.randbytes(4096), "not finite"),
                          (raw[:12] + struct.pack("<f", -1) + raw[16:], "not above 0")):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=words):
            read(path)


def test_a_sog_that_asks_for_more_than_it_holds(tmp_path):
    """In its description: refused before anything is decoded."""
    path = tmp_path / "x.sog"
    save(ours(300, 1), path)
    with zipfile.ZipFile(path) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    about = json.loads(parts["meta.json"])
    for change, words in (({"shN": {**about["shN"], "bands": 10**8}}, "found 100000000, expected 0 to 3"),
                          ({"count": 10**9}, "count of its Gaussians: found 1000000000"),
                          ({"count": "many"}, "expected int"), ({"means": []}, "found [], expected dict"),
                          ({"means": {"files": [None]}}, "expected str")):
        with zipfile.ZipFile(path, "w") as packed:
            for name, raw in (parts | {"meta.json": json.dumps(about | change).encode()}).items():
                packed.writestr(name, raw)
        with pytest.raises(UserError, match=re.escape(words)):
            read(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are those of Linux")
def test_a_decoder_does_not_run_for_ever(tmp_path):
    """Bands that nothing holds, given to the program itself: it takes a gigabyte at most, or its second is
    over."""
    path = tmp_path / "x.sog"
    save(ours(300, 1), path)
    with zipfile.ZipFile(path) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    about = json.loads(parts["meta.json"])
    about["shN"]["bands"] = 10**8
    with zipfile.ZipFile(path, "w") as packed:
        for name, raw in (parts | {"meta.json": json.dumps(about).encode()}).items():
            packed.writestr(name, raw)
    done = bounded.run([sys.executable, "-I", decode.__file__, "sog", path, tmp_path / "out.ply", "1"],
                       seconds=30)
    assert done.returncode != 0 and not (tmp_path / "out.ply").exists()
