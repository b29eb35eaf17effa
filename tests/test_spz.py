"""SPZ: which way its axes point, what its head says, and how fine its positions are."""

import gzip
import struct

import numpy as np
import pytest
import torch
from conftest import random_splats

from flexgs.camera import Camera, look_at
from flexgs.errors import UserError
from flexgs.formats import FORMATS, read, save, spz
from flexgs.formats.axes import turned
from flexgs.gaussians import unit_quaternions
from flexgs.raster import render
from flexgs.splats import Splats


def bounded(n: int, degree: int) -> Splats:
    """Of harmonics that 8 bits can hold."""
    splats = random_splats(n, degree)
    splats.shN.clamp_(-0.9, 0.9)
    return splats


def stored_positions(path) -> np.ndarray:
    """[N, 3] as they stand in the file, read with nothing but gzip and struct."""
    raw = gzip.decompress(path.read_bytes())
    n, fraction = struct.unpack_from("<I", raw, 8)[0], raw[13]
    b = np.frombuffer(raw, np.uint8, 9 * n, 16).reshape(n, 3, 3).astype(np.int32)
    v = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
    return np.where(v >= 1 << 23, v - (1 << 24), v) / (1 << fraction)


def tagged(path, number: int) -> None:
    """Give a file of version 3 or 4 the record of its axes, behind another record."""
    raw = path.read_bytes()
    record = struct.pack("<II3s", 0xADBE0002, 3, b"abc") + struct.pack("<III", 0xADBE0003, 4, number)
    if raw[:4] == b"NGSP":
        head = bytearray(raw[:32])
        head[14] |= 2
        head[16:20] = struct.pack("<I", 32 + len(record))
        path.write_bytes(bytes(head) + record + raw[32:])
    else:
        plain = bytearray(gzip.decompress(raw))
        plain[14] |= 2
        path.write_bytes(gzip.compress(bytes(plain) + record))


@pytest.mark.parametrize("axes", ["RUB", "LUF", "LDF", "RUF"])
def test_a_turned_model_looks_the_same_from_a_turned_camera(axes):
    splats = random_splats(60, 3)
    signs = torch.tensor([1.0 if a == b else -1.0 for a, b in zip("RDF", axes, strict=True)])
    camera = look_at(torch.tensor([1.0, 2.0, -6.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.2]), 40, 30)
    viewmat = camera.viewmat.clone()
    viewmat[:3, :3] *= signs
    mirrored = Camera(viewmat, camera.K, camera.width, camera.height)
    was, now = render(splats, camera).image, render(Splats.of(turned(splats.arrays(), axes)), mirrored).image
    assert float(was.std()) > 0.05
    torch.testing.assert_close(now, was, atol=1e-5, rtol=0)
    again = turned(turned(splats.arrays(), axes), axes)
    assert all(np.array_equal(t, getattr(again, name)) for name, t in splats.items())


def test_files_are_right_up_back(tmp_path):
    """As the standard and three.js have it; a PLY is right down front."""
    splats = bounded(50, 3)
    stored = save(splats, tmp_path / "x.spz")
    expected = stored.means.numpy() * [1, -1, -1]
    assert np.array_equal(stored_positions(tmp_path / "x.spz"), expected)
    assert float(torch.cdist(splats.means.double(), stored.means.double()).min(1).values.max()) < 3e-4


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(("number", "axes"), [(0, "RUB"), (1, "LDB"), (4, "RUB"), (6, "RDF"), (8, "RUF")])
def test_a_tag_says_which_way_the_axes_point(tmp_path, version, number, axes):
    gsply = pytest.importorskip("gsply")
    path, splats = tmp_path / "x.spz", bounded(50, 1)
    theirs = turned(splats.arrays(), axes)
    theirs = theirs.changed(quats=unit_quaternions(theirs.quats))
    gsply.write_spz(path, gsply.GSData(**dict(theirs.items())), version=version)
    tagged(path, number)
    found = read(path)
    assert float((found.means - splats.means).abs().max()) < 2e-4
    assert float((found.shN - splats.shN).abs().max()) < 0.01


def test_heads_that_are_refused(tmp_path):
    path = tmp_path / "x.spz"
    save(bounded(50, 1), path)
    whole = gzip.decompress(path.read_bytes())

    def refuses(words: str, at: int, value: int, size: int = 1) -> None:
        path.write_bytes(gzip.compress(whole[:at] + value.to_bytes(size, "little") + whole[at + size:]))
        with pytest.raises(UserError, match=words) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    refuses("found SPZ of version 9, expected 1 to 4", 4, 9)
    refuses("too few for 4,000,000,000 Gaussians", 8, 4_000_000_000, 4)
    refuses("of degree 7", 12, 7)
    path.write_bytes(gzip.compress(whole))
    tagged(path, 12)
    with pytest.raises(UserError, match="found axes number 12"):
        read(path)


@pytest.mark.parametrize(("unit", "fraction"), [(1.0, 12), (2e-3, 16), (1000.0, 10), (40_000.0, None)])
def test_positions_are_as_fine_as_the_scene_needs(tmp_path, unit, fraction):
    """In small units finer, in large ones coarser; beyond what it can hold a line, and the file that was
    there stays."""
    splats, path = bounded(300, 0), tmp_path / "x.spz"
    own = splats.changed(means=splats.means * unit, scales=splats.scales + float(np.log(unit)))
    if fraction is None:
        path.write_bytes(b"old")
        with pytest.raises(UserError, match=r"x\.spz: Niantic SPZ 3 cannot hold .*shapes of "
                                            r".*expected NAME\.ply"):
            save(own, path)
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.spz"]
        return
    stored = save(own, path)
    assert gzip.decompress(path.read_bytes())[13] == fraction == spz.bits(own.arrays(), path)
    assert float(torch.cdist(own.means.double(), stored.means.double()).min(1).values.max()) < 2.0**-fraction
    assert FORMATS["spz"].read(path).means.equal(stored.means)
