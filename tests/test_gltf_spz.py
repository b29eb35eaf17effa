"""glTF with the Gaussians as SPZ: what the extension asks for, its axes, and files of others."""

import json
import struct

import pytest
import torch
from conftest import random_splats

from flexgs.errors import UserError
from flexgs.formats import FORMATS, format_at, read
from flexgs.formats.axes import turned
from flexgs.splats import Splats
from tests.test_cli import flexgs
from tests.test_spz import stored_positions

SPZ_2 = "KHR_gaussian_splatting_compression_spz_2"


def bounded(n: int, degree: int) -> Splats:
    """Of harmonics that 8 bits can hold."""
    splats = random_splats(n, degree)
    splats.shN.clamp_(-0.9, 0.9)
    return splats


def parts(path) -> tuple[dict, bytes]:
    """The JSON and the bytes behind it, by the layout of glTF's binary files."""
    raw = path.read_bytes()
    magic, version, total, length, kind = struct.unpack_from("<4sIII4s", raw)
    size, second = struct.unpack_from("<I4s", raw, 20 + length)
    assert (magic, version, total, kind, second) == (b"glTF", 2, len(raw), b"JSON", b"BIN\0")
    assert length % 4 == size % 4 == 0 and 28 + length + size == total
    return json.loads(raw[20:20 + length]), raw[28 + length:]


def packed(path, about: dict, body: bytes) -> None:
    text = json.dumps(about).encode()
    path.write_bytes(struct.pack("<4sIII4s", b"glTF", 2, 28 + len(text) + len(body), len(text), b"JSON")
                     + text + struct.pack("<I4s", len(body), b"BIN\0") + body)


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_the_file_has_what_the_extension_asks_for(tmp_path, degree):
    """https://github.com/KhronosGroup/glTF/pull/2531, and of the base extension the required properties."""
    stored = FORMATS["gltf_spz"].write(bounded(50, degree), tmp_path / "x.spz.glb")
    about, body = parts(tmp_path / "x.spz.glb")
    for listed in ("extensionsUsed", "extensionsRequired"):
        assert set(about[listed]) == {"KHR_gaussian_splatting", SPZ_2}
    assert about["asset"]["version"] == "2.0"
    assert about["nodes"][about["scenes"][about["scene"]]["nodes"][0]]["mesh"] == 0
    primitive = about["meshes"][0]["primitives"][0]
    extension = primitive["extensions"]["KHR_gaussian_splatting"]
    assert primitive["mode"] == 0 and {"kernel", "colorSpace"} <= set(extension)
    view = about["bufferViews"][extension["extensions"][SPZ_2]["bufferView"]]
    assert view["byteLength"] <= about["buffers"][view["buffer"]]["byteLength"] <= len(body)
    floats = {"POSITION": "VEC3", "KHR_gaussian_splatting:SCALE": "VEC3",
              "KHR_gaussian_splatting:ROTATION": "VEC4",
              **{f"KHR_gaussian_splatting:SH_DEGREE_{l}_COEF_{m}": "VEC3"
                 for l in range(1, degree + 1) for m in range(2 * l + 1)}}
    accessors = {name: about["accessors"][at] for name, at in primitive["attributes"].items()}
    assert set(accessors) == {*floats, "COLOR_0"}
    for name, accessor in accessors.items():
        assert accessor["count"] == 50 and "bufferView" not in accessor
        assert (accessor["componentType"], accessor["type"]) == (5126, floats[name]) if name in floats else \
            (accessor["componentType"], accessor["type"], accessor["normalized"]) == (5121, "VEC4", True)
    means = turned(stored, "LUF").means
    assert accessors["POSITION"]["min"] == means.amin(0).tolist()
    assert accessors["POSITION"]["max"] == means.amax(0).tolist()


def test_what_is_inside_is_spz_2_right_up_back(tmp_path):
    import gzip

    stored = FORMATS["gltf_spz"].write(bounded(50, 2), tmp_path / "x.spz.glb")
    about, body = parts(tmp_path / "x.spz.glb")
    inside = tmp_path / "inside.spz"
    inside.write_bytes(body[:about["bufferViews"][0]["byteLength"]])
    assert struct.unpack_from("<4sI", gzip.decompress(inside.read_bytes())) == (b"NGSP", 2)
    alone = read(inside)
    assert all(torch.equal(t, getattr(alone, name)) for name, t in stored.items())
    assert torch.equal(torch.from_numpy(stored_positions(inside)).float(), turned(stored, "RUB").means)


def test_files_of_others(tmp_path):
    """Another version of SPZ, an earlier name of the extension, a buffer view in the middle."""
    splats, path = bounded(50, 1), tmp_path / "x.glb"
    for key in ("spz", "spz4"):
        stored = FORMATS[key].write(splats, tmp_path / f"x{FORMATS[key].suffix}")
        spz = (tmp_path / f"x{FORMATS[key].suffix}").read_bytes()
        extension = {"extensions": {"KHR_gaussian_splatting_compression_spz": {"bufferView": 1}}}
        primitives = [{"attributes": {}}, {"extensions": {"KHR_gaussian_splatting": extension}}]
        packed(path, {"asset": {"version": "2.0"}, "meshes": [{"primitives": primitives}],
                      "bufferViews": [{}, {"byteOffset": 6, "byteLength": len(spz)}]},
               b"before" + spz + b"after")
        assert format_at(path) == "gltf_spz"
        assert torch.equal(read(path).means, stored.means)


def test_broken_files(tmp_path):
    path = tmp_path / "x.spz.glb"
    FORMATS["gltf_spz"].write(bounded(50, 1), path)
    about, body = parts(path)
    extension = about["meshes"][0]["primitives"][0]["extensions"]["KHR_gaussian_splatting"]["extensions"]
    size = about["bufferViews"][0]["byteLength"]
    for inner in ({}, {"bufferView": 1}, {"bufferView": -1}, {"bufferView": "0"}, [], None, 3):
        extension[SPZ_2] = inner
        refused(path, about, body)
    extension[SPZ_2] = {"bufferView": 0}
    for view in ({}, {"byteLength": size - 9}, {"byteLength": 10**30}, {"byteLength": size, "byteOffset": 8},
                 {"byteLength": size, "byteOffset": -8}, {"byteLength": "all"}, []):
        about["bufferViews"] = [view]
        refused(path, about, body)
    about["bufferViews"] = [{"byteLength": size}]
    for wrong in (b"", bytes(size), b"\x1f\x8b" + bytes(size), body[:size // 2]):
        refused(path, about, wrong)
    for name in ("KHR_meshopt", SPZ_2):  # of another extension, or of none of these types
        about["meshes"][0]["primitives"][0]["extensions"]["KHR_gaussian_splatting"] = {"extensions": [name]}
        refused(path, about, body)


def refused(path, about: dict, body: bytes) -> None:
    packed(path, about, body)
    with pytest.raises(UserError, match=r"x\.spz\.glb: ") as error:
        read(path)
    assert "\n" not in str(error.value) and "packed.spz" not in str(error.value)


def test_a_cut_is_written_by_its_suffix(tmp_path, capsys):
    FORMATS["ply"].write(bounded(200, 1), tmp_path / "a.ply")
    for name in ("b.spz.glb", "b.v4.spz"):
        assert flexgs("cut", tmp_path / "a.ply", "--budget", "25%", "-o", tmp_path / name) == 0
        assert len(read(tmp_path / name)) == 50
        assert f"{name}: 50 of 200 Gaussians" in capsys.readouterr().out
    assert (tmp_path / "b.v4.spz").read_bytes().startswith(b"NGSP\4\0\0\0")
