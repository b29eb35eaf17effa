"""PLY files, budgets, atomic writes."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import random_splats
from plyfile import PlyData, PlyElement

from flexgs.errors import UserError
from flexgs.files import atomic_file, atomic_folder
from flexgs.gaussians import SH_C0
from flexgs.model.budget import largest, parse, resolve
from flexgs.ply import ply_bytes, ply_properties, read_ply, write_ply


def read_independently(path):
    """A PLY reader that shares nothing with ours: header by regular expression, rows by numpy."""
    data = path.read_bytes()
    head, body = data.split(b"end_header\n", 1)
    names = re.findall(rb"property float (\w+)", head)
    n = int(re.search(rb"element vertex (\d+)", head)[1])
    return {k.decode(): v for k,
            v in zip(names, np.frombuffer(body, "<f4").reshape(n, len(names)).T, strict=True)}


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_ply_round_trip_and_size(tmp_path, degree):
    splats, path = random_splats(37, degree), tmp_path / "x.ply"
    write_ply(splats, path)
    assert path.stat().st_size == ply_bytes(37, degree)
    again = read_ply(path)
    for name, t in splats.items():
        expected = torch.nn.functional.normalize(t, dim=1) if name == "quats" else t
        assert torch.equal(getattr(again, name), expected), name


def test_ply_has_the_order_that_viewers_expect(tmp_path):
    splats, path = random_splats(11, 3), tmp_path / "x.ply"
    write_ply(splats, path)
    columns = read_independently(path)
    assert list(columns) == ply_properties(3)
    assert list(columns)[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert list(columns)[-8:] == ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2",
                                  "rot_3"]
    # f_rest is channel by channel: 15 coefficients of red, then green, then blue
    assert np.array_equal(columns["f_rest_16"], splats.shN[:, 1, 1].numpy())
    assert np.array_equal(columns["opacity"], splats.opacities.numpy())


@pytest.mark.parametrize("cut", [0, 5, 200, 1500, 2000])
def test_broken_ply_is_a_user_error(tmp_path, cut):
    path = tmp_path / "x.ply"
    write_ply(random_splats(20), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"x\.ply: not a"):
        read_ply(path)


def test_ply_of_points_only_is_refused(tmp_path):
    path = tmp_path / "points.ply"
    path.write_text("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float "
                    "y\nproperty float z\nend_header\n0 0 0\n")
    with pytest.raises(UserError, match="not a 3DGS PLY"):
        read_ply(path)


def test_budgets():
    n = 1_000_000
    assert resolve("5%", n, 3) == resolve(0.05, n, 3) == resolve("0.05", n, 3) == (50_000, 0.05)
    assert resolve("500k", n, 3) == (500_000, 0.5)
    assert resolve("1.2M", n, 3) == (n, 1)  # more than there are
    assert resolve("20000", n, 3).gaussians == 20_000
    assert resolve("Quest", n, 3).gaussians == 500_000 and resolve("quest", 1000, 3).gaussians == 1000
    assert resolve("1%", 5, 3) == (1, 0.01)  # the transform is that of the ratio asked for, as for a number
    for size in ("20MB", "700kB"):
        k = resolve(size, n, 3).gaussians
        limit = float(size[:-2]) * {"MB": 1e6, "kB": 1e3}[size[-2:]]
        assert ply_bytes(k, 3) <= limit < ply_bytes(k + 2, 3)
    for everything in (1, 1.0, "1", "1.0", "100%"):  # one meaning, however it is written
        assert resolve(everything, n, 3) == (n, 1)
    assert resolve("1 Gaussian", n, 3).gaussians == 1
    # a table of numbers makes floats of all
    assert resolve(20_000, n, 3) == resolve("20000", n, 3) == resolve(20_000.0, n, 3)
    assert resolve(1e-6, n, 3).gaussians == 1
    assert parse("16ms") == (16, "ms") and parse("2 MB") == (2e6, "bytes")


@pytest.mark.parametrize("budget", ["", "many", "-5%", "0%", "101%", "0.0", "5 parsecs", "1kB", "0k", "0ms",
                                    "16ms", 1.5, "1.5", 0, "0", -1, "1e400", "1e400MB", "1e400k", math.nan,
                                    math.inf, "0 Gaussians"])
def test_bad_budgets(budget):
    with pytest.raises(UserError):
        resolve(budget, 1000, 3)


@pytest.mark.parametrize("cost", [lambda k: 250.0 * k, lambda k: 7000 + 30 * k**0.97,
                                  lambda k: 1e4 + 25 * k + 300 * (k % 7)])
def test_the_largest_that_fits(cost):
    """Within the slack of the best, after few measurements; everything or nothing at the ends."""
    tried = []

    def measured(k: int) -> float:
        tried.append(k)
        return cost(k)

    n, limit = 900_000, 5e6
    best = max(k for k in range(1, n, 50) if cost(k) <= limit)
    found = largest(n, limit, measured)
    assert cost(found) <= limit and found > 0.98 * best and len(tried) <= 12
    assert largest(n, 1e12, cost) == n and largest(3, 1e12, cost) == 3
    assert largest(n, 1.0, cost) == 0


def test_atomic_writes_leave_the_old_one_when_they_fail(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as out:
        out.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    folder = tmp_path / "d"
    with atomic_folder(folder) as out:
        (out / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as out:
        (out / "a").write_text("2")
        raise ZeroDivisionError
    assert (folder / "a").read_text() == "1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "f"]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_ply(random_splats(3), tmp_path / "file" / "x.ply")


def test_a_ply_without_numbers_is_a_user_error(splats, tmp_path):
    write_ply(splats[:1], tmp_path / "one.ply")
    head = (tmp_path / "one.ply").read_bytes().split(b"end_header\n")[0]
    (tmp_path / "none.ply").write_bytes(head.replace(b"vertex 1", b"vertex 0") + b"end_header\n")
    with pytest.raises(UserError, match="no Gaussians"):
        read_ply(tmp_path / "none.ply")
    splats.scales[3, 1] = float("nan")
    write_ply(splats, tmp_path / "nan.ply")
    with pytest.raises(UserError, match="NaN or infinite scales"):
        read_ply(tmp_path / "nan.ply")


def heads(raw: bytes, n: int):
    """(what is done to the head, the same Gaussians under such a head)."""
    head, body = raw.split(b"end_header\n", 1)
    rows = np.frombuffer(body, "<f4").reshape(n, -1)
    yield "comment", raw.replace(b"\nelement", "\ncomment C:\\写真\n\nobj_info x\nelement".encode(), 1)
    yield "latin", raw.replace(b"\nelement", b"\ncomment M\xfcller\nelement", 1)
    yield "crlf", head.replace(b"\n", b"\r\n") + b"end_header\r\n" + body
    two = head.replace(b"element vertex", b"element camera 2\nproperty uchar id\nelement vertex")
    yield "before", two + b"end_header\n\1\2" + body
    yield "big", head.replace(b"little", b"big") + b"end_header\n" + rows.astype(">f4").tobytes()
    yield "double", head.replace(b"float", b"double") + b"end_header\n" + rows.astype("<f8").tobytes()
    yield "text", (head.replace(b"binary_little_endian", b"ascii") + b"end_header\n\n"
                   + "\n\n".join(" ".join(f"{v:.9g}" for v in row) for row in rows).encode())
    yield "from one", re.sub(rb"f_rest_(\d+)", lambda m: b"f_rest_%d" % (int(m[1]) + 1),
                             head) + b"end_header\n" + body


def test_heads_of_other_programs(tmp_path):
    splats = random_splats(20)
    write_ply(splats, tmp_path / "x.ply")
    expected = read_ply(tmp_path / "x.ply")
    for title, raw in heads((tmp_path / "x.ply").read_bytes(), 20):
        (tmp_path / "y.ply").write_bytes(raw)
        found = read_ply(tmp_path / "y.ply")
        assert all(torch.equal(t, getattr(found, name)) for name, t in expected.items()), title


def test_colours_of_points_in_place_of_harmonics(splats, tmp_path):
    """As nerfstudio's `ns-export --ply-color-mode rgb` writes them."""
    path = tmp_path / "rgb.ply"
    write_ply(splats, path)
    rows = PlyData.read(path)["vertex"].data
    colours = np.random.default_rng(0).integers(0, 256, (len(rows), 3))
    kept = [name for name in rows.dtype.names if not name.startswith("f_")]
    new = np.empty(len(rows),
                   [*((name, "<f4") for name in kept), *((name, "u1") for name in ("red", "green", "blue"))])
    for name in kept:
        new[name] = rows[name]
    for i, name in enumerate(("red", "green", "blue")):
        new[name] = colours[:, i]
    PlyData([PlyElement.describe(new, "vertex")]).write(path)
    back = read_ply(path)
    assert back.sh_degree == 0
    np.testing.assert_allclose(0.5 + SH_C0 * back.sh0.numpy(), colours / 255, atol=1e-6)


def test_heads_that_promise_what_is_not_there(tmp_path):
    """Nothing of that size is taken; gaps, lists and values beyond float32 are no Gaussians."""
    write_ply(random_splats(20), tmp_path / "x.ply")
    raw, path = (tmp_path / "x.ply").read_bytes(), tmp_path / "y.ply"
    for old, new, words in (
            (b"vertex 20", b"vertex 1000000000000", "found 2,719 bytes, expected 104,000,000,000,639"),
            (b"vertex 20", b"vertex -1", "line 3"), (b"f_rest_7\n", b"f_rest_77\n", "gaps"),
            (b"float x\n", b"list uchar int x\n", "found lists"), (b"float", b"quad", "line 4"),
            (b"element vertex", b"element point", "found the elements 'point'")):
        path.write_bytes(raw.replace(old, new, 1))
        with pytest.raises(UserError, match=words) as error:
            read_ply(path)
        assert "\n" not in str(error.value)
