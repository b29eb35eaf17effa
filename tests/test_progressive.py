"""The progressive file: cuts as the model makes them, each byte once; rounded within bounds; broken files;
over HTTP."""

import asyncio
import contextlib
import json
import lzma
import math
import os
import random
import shutil
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from aiohttp import web
from test_model import elastic

from flexgs.camera import Camera
from flexgs.deploy import coding, progressive
from flexgs.deploy import packed as shared
from flexgs.deploy.packed import HEAD
from flexgs.deploy.progressive import Progressive, write
from flexgs.deploy.quantise import levels_of
from flexgs.deploy.serve import application
from flexgs.deploy.source import open_model
from flexgs.deploy.worth import worth
from flexgs.errors import UserError
from flexgs.http import Remote
from flexgs.model.elastic import ElasticModel
from flexgs.ply import ply_bytes, read_ply
from flexgs.splats import rotation_matrices
from flexgs.view.visitors import Visitors
from tests.test_cli import flexgs


def same(a, b) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))


@pytest.mark.parametrize("ratios", [(0.01, 0.05, 0.15, 0.5, 1.0), (0.02, 0.032, 1.0), (1.0,)])
@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_every_cut_is_that_of_the_model_and_bytes_are_read_once(kind, ratios, tmp_path):
    model = elastic(kind)
    write(model, tmp_path / "m.fgs", ratios, exact=True)
    packed, sizes = Progressive.open(tmp_path / "m.fgs"), []
    for ratio in (0.004, 0.01, 0.0123, 0.03, 0.05, 0.1, 0.15, 0.2, 0.33, 0.5, 0.77, 1.0):
        assert same(packed.cut(ratio), model.cut(ratio)), ratio
        sizes.append(packed.offset)
        at_once = Progressive.open(tmp_path / "m.fgs")
        assert same(at_once.cut(ratio), model.cut(ratio)) and at_once.offset == packed.offset
    assert (sizes == sorted(sizes) and len(set(sizes)) == len(ratios)
            and sizes[-1] == (tmp_path / "m.fgs").stat().st_size)
    assert same(packed.cut(0.01), model.cut(0.01)) and not packed.bounds  # and back


@pytest.mark.parametrize("ratios", [(0.01, 0.05, 0.15, 0.5, 1.0), (0.02, 0.032, 1.0), (1.0,)])
@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_a_rounded_file_has_the_same_cuts_within_its_bounds(kind, ratios, tmp_path):
    """Each byte once, whatever was cut before, and no number further off than the file says."""
    model, path = elastic(kind), tmp_path / "m.fgs"
    write(model, path, ratios)
    packed, sizes = Progressive.open(path), []
    for ratio in (0.004, 0.01, 0.0123, 0.03, 0.05, 0.15, 0.33, 0.77, 1.0):
        cut, exact = packed.cut(ratio), model.cut(ratio)
        sizes.append(packed.offset)
        at_once = Progressive.open(path)
        assert same(at_once.cut(ratio), cut) and at_once.offset == packed.offset
        off = packed.bounds
        assert len(cut) == len(exact)
        if kind != "field":  # which is no sum of numbers of the file
            assert (cut.means - exact.means).abs().max() <= 2.01 * off["means"]
            assert (cut.opacities - exact.opacities).abs().max() <= 2.01 * off["opacities"]
        assert (cut.shN - exact.shN).abs().max() <= off["shN"]
        torch.testing.assert_close(shapes(cut), shapes(exact), atol=3e-3, rtol=0)
    assert sizes == sorted(sizes) and len(set(sizes)) == len(ratios)
    assert sizes[-1] + packed.packed.last[0] == path.stat().st_size
    for name in ("means", "sh0", "shN"):
        error = (getattr(packed.model.splats, name) - getattr(model.splats, name)).abs().max()
        assert 0 < error <= packed.bounds[name] < 0.2
    assert packed.config == model.config and packed.offset == path.stat().st_size


def shapes(splats) -> torch.Tensor:
    """Covariances [N, 3, 3], which do not depend on how axes are named."""
    axes = rotation_matrices(splats.quats) * splats.scales.exp()[:, None, :]
    return axes @ axes.mT


def test_the_header_is_small(tmp_path):
    """In a distant place, with all cameras: these stand behind the chunks."""
    model = elastic("deltas")
    model.splats.origin = (512345.678901, 5412345.678901, 123.456789)
    model.cameras = [Camera(torch.eye(4) + 1e-7 * i, torch.eye(3), 64, 48, 0.0123456, model.splats.origin)
                     for i in range(30)]
    write(model, tmp_path / "m.fgs")
    packed = Progressive.open(tmp_path / "m.fgs")
    assert packed.offset < 500
    packed.load(0.01)
    before = packed.offset
    assert packed.cameras[0].near == 0.0123456 and packed.cut(0.01).origin == model.splats.origin
    assert packed.offset == before + packed.packed.last[0]


def test_what_is_written_is_read_back_first(tmp_path, monkeypatch):
    """An error of our own that puts one number out of bounds: nothing is written."""
    def wrong(columns):
        columns[5][3] += 2
        return planes(columns)

    planes = coding.planes
    monkeypatch.setattr(coding, "planes", wrong)
    with pytest.raises(UserError, match=r"1 %: found splats\.means off by .*, expected at most .* --exact"):
        write(elastic("deltas"), tmp_path / "m.fgs")
    assert not list(tmp_path.iterdir())


def test_numbers_that_cannot_be_rounded_are_refused(tmp_path):
    model = elastic("deltas")
    model.splats.opacities[7] = 1e9
    with pytest.raises(UserError, match=r"m\.fgs: found a number too large to be rounded .* --exact"):
        write(model, tmp_path / "m.fgs")
    assert not list(tmp_path.iterdir())
    write(model, tmp_path / "m.fgs", exact=True)
    assert same(Progressive.open(tmp_path / "m.fgs").cut(1.0), model.cut(1.0))


def test_strange_gaussians_are_held(tmp_path):
    """Needles, points of no size, far away, of quaternions of any length, none of which a camera sees."""
    model = elastic("none")
    s = model.splats
    s.means[:300] *= 1e6
    s.scales[100:400, 0] = -60
    s.scales[400:500] = 20
    s.quats[500:600] *= 1e-6
    s.quats[600] = 0
    s.opacities[700:] = -30
    model.cameras = [Camera(torch.diag(torch.tensor([1.0, 1, -1, 1])), torch.eye(3), 64, 48)]
    write(model, tmp_path / "m.fgs")
    packed = Progressive.open(tmp_path / "m.fgs")
    assert (packed.cut(1.0).means - s.means).abs().max() <= packed.bounds["means"]
    torch.testing.assert_close(shapes(packed.cut(1.0)[:400]), shapes(s[:400]), atol=2e-2, rtol=0)


def test_a_trained_model_takes_less_than_separate_cuts(trained, tmp_path, capsys):
    """And, to the bit, about what the whole takes as PLY: degree 1 has few harmonics beside the deltas."""
    ratios = "--ratios", "0.01", "0.05", "0.15", "1"
    assert flexgs("pack", trained, "-o", tmp_path / "small.fgs", *ratios) == 0
    assert "(means)" in capsys.readouterr().out
    assert flexgs("pack", trained, "-o", tmp_path / "m.fgs", "--exact", *ratios) == 0
    assert "up to     5 %" in (said := capsys.readouterr().out) and "exact to the bit" in said
    model = ElasticModel.load(trained)
    n, degree = len(model.splats), model.splats.sh_degree
    assert (tmp_path / "m.fgs").stat().st_size <= 1.1 * ply_bytes(n, degree)
    assert (tmp_path / "small.fgs").stat().st_size < 0.3 * (tmp_path / "m.fgs").stat().st_size
    assert flexgs("cut", tmp_path / "m.fgs", "--budget", "5%", "-o", tmp_path / "cut.ply") == 0
    assert flexgs("cut", trained, "--budget", "5%", "-o", tmp_path / "other.ply") == 0
    assert (tmp_path / "cut.ply").read_bytes() == (tmp_path / "other.ply").read_bytes()
    assert len(read_ply(tmp_path / "cut.ply")) == n // 20


def damaged(kind: str, raw: bytes, rng: random.Random) -> bytes:
    if kind == "cut off":
        return raw[: rng.randrange(len(raw))]
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1:]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["cut off", "flipped"])
def test_damage_at_any_place_is_a_clear_error(kind, exact, tmp_path):
    write(elastic("deltas"), tmp_path / "m.fgs", exact=exact)
    raw, rng = (tmp_path / "m.fgs").read_bytes(), random.Random(0)
    for _ in range(50):
        (tmp_path / "bad.fgs").write_bytes(damaged(kind, raw, rng))
        with pytest.raises(UserError, match=r"bad\.fgs: ") as error:
            bad = Progressive.open(tmp_path / "bad.fgs")
            bad.cut(1.0)
            assert bad.cameras is None
        assert "\n" not in str(error.value)


def forged(path: Path, change) -> Path:
    """The file with another header and perhaps other chunks, as change(header, chunks) makes them, its
    checksums right."""
    raw = path.read_bytes()
    length = HEAD.unpack(raw[:HEAD.size])[2]
    about, at, bodies = json.loads(raw[HEAD.size:HEAD.size + length]), HEAD.size + length, []
    for chunk in about["chunks"]:
        bodies.append(raw[at:at + chunk["bytes"]])
        at += chunk["bytes"]
    whole = list(bodies)
    change(about, bodies)
    for chunk, old, new in zip(about.get("chunks", ()), whole, bodies, strict=False):
        if new is not old:
            chunk |= {"bytes": len(new), "crc32": zlib.crc32(new)}
    header = about if isinstance(about := about.get("raw", about), bytes) else json.dumps(about).encode()
    bad = path.with_name("bad.fgs")
    bad.write_bytes(HEAD.pack(b"FLEXGS", 1, len(header), zlib.crc32(header)) + header + b"".join(bodies))
    return bad


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "m.fgs"
    model = elastic("deltas")
    model.cameras = [Camera(torch.eye(4), torch.eye(3), 64, 48)]
    write(model, path, exact=True)
    return path


def set_field(about, resolution: int, **changes) -> None:
    about["config"]["transform"]["kind"] = "field"
    about["config"]["field"] |= {"resolution": [resolution] * 4, **changes}


@pytest.mark.parametrize(("change", "says"), [
    (lambda about, _: about.update(splats=10**12), "Gaussians|not those of such a model"),
    (lambda about, _: about.update(splats=0), "splats: found 0, expected 1 to"),
    (lambda about, _: about.update(splats=999), "the chunks are not those of such a model"),
    (lambda about, _: about.update(splats="many"), "splats: found 'many', expected int"),
    (lambda about, _: about.update(splats=True), "splats: found True, expected int"),
    (lambda about, _: about.update(sh_degree=0), "which is no size that they deflate to"),
    (lambda about, _: about.update(sh_degree=4), "sh_degree: found 4, expected 0 to 3"),
    (lambda about, _: about.update(chunks=[]), "chunks: found 0 entries, expected 1 to 200"),
    (lambda about, _: about.update(more=1), "unknown setting .'more'."),
    (lambda about, _: about.update(config={"steps": "x"}), "config: steps: found 'x', expected int"),
    (lambda about, _: about.update(config=None), "config: found None, expected dict"),
    (lambda about, _: about.pop("chunks"), "found no chunks"),
    (lambda about, _: about.update(unit=0), "unit: found 0.*, expected"),
    (lambda about, _: about.update(origin=[1, 2]), "origin: found .*, expected 3 values"),
    (lambda about, _: about["chunks"][0].pop("crc32"), "found no crc32"),
    (lambda about, _: about["chunks"][0].update(ratio=10**400), "an integer of 401 digits"),
    (lambda about, _: about["chunks"][0].update(ratio=0.5), "the chunks do not rise to all of the model"),
    (lambda about, bodies: (about["chunks"].pop(), bodies.pop()),
     "the chunks do not rise to all of the model"),
    (lambda about, _: about["chunks"][0]["parts"][0].__setitem__(2, 5.0), "parts: found 5.0, expected int"),
    (lambda about, _: about["chunks"][0]["parts"].pop(), "the chunks are not those of such a model"),
    (lambda about, _: about["chunks"][0].update(bytes=1 << 40),
     r"found [\d,]+ bytes, expected 1,099,\S+ as its header says"),
    (lambda about, bodies: bodies.__setitem__(0, bytes(1 << 20)), "which is no size that they deflate to"),
    (lambda about, bodies: bodies.append(b"more"), r"found [\d,]+ bytes, expected [\d,]+ as its header says"),
    (lambda about, _: set_field(about, 4000), "--field.resolution.*expected at most"),
    (lambda about, _: set_field(about, 800, levels=[1], channels=16),
     "which is no size|not those of such a model"),
    (lambda about, _: about["cameras"][0].__setitem__(0, 0), "found camera 1 of 0x48 pixels"),
    (lambda about, _: about["cameras"][0].__setitem__(2, 7), "found camera 1 .* a rotation"),
    (lambda about, _: about["cameras"][0].pop(), "cameras: found 26 entries, expected 27 to 27 entries"),
    (lambda about, _: about.update(raw=b"[" * 5000), "too many brackets within each other"),
    (lambda about, _: about.update(raw=b"\xff"), "not UTF-8"),
    (lambda about, _: about.update(raw=b"[1]"), "unknown setting"),
    (lambda about, _: about.update(raw=b'{"unit": NaN}'), "NaN"),
])
def test_headers_that_lie_are_refused_before_memory_is_taken(packed, change, says, monkeypatch):
    if "camera " not in says:
        monkeypatch.setattr(shared, "_zeros", lambda like: pytest.fail("took memory for a model"))
    with pytest.raises(UserError, match=rf"bad\.fgs: .*({says})") as error:
        Progressive.open(forged(packed, change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("raw", "says"), [
    (b"ply\n", "not a progressive model"), (b"", "not a progressive model"),
    (HEAD.pack(b"FLEXGS", 3, 0, 0), "format 3, expected one of 1, 2"),
    (HEAD.pack(b"FLEXGS", 1, 1 << 31, 0), "cut off or damaged")])
def test_other_files_are_refused(raw, says, tmp_path):
    (tmp_path / "bad.fgs").write_bytes(raw)
    with pytest.raises(UserError, match=says):
        Progressive.open(tmp_path / "bad.fgs")


def with_nan(body: bytes) -> bytes:
    plain = bytearray(zlib.decompress(body))
    plain[:] = b"\xff" * len(plain)
    return zlib.compress(bytes(plain))


@pytest.mark.parametrize(("other", "says"), [
    (lambda body: b"x" * len(body), r"is not deflated \(.*\)"),
    (lambda body: zlib.compress(bytes(20_000)), "is of another length than its .* bytes deflated"),
    (lambda body: zlib.compress(zlib.decompress(body)[:-1]), "is of another length"),
    (lambda body: body[:-1], "is of another length"),
    (lambda body: body + b"x", "is of another length"),
    (with_nan, r"found NaN or infinite numbers in splats\.means")])
def test_chunks_with_a_right_checksum_and_wrong_contents_are_refused(packed, other, says):
    bad = Progressive.open(forged(packed, lambda about, bodies: bodies.__setitem__(0, other(bodies[0]))))
    with pytest.raises(UserError, match=rf"bad\.fgs: the chunk of 1 %:? {says}"):
        bad.cut(0.01)
    assert not bad.model.splats.means.any()  # nothing of it was taken


@pytest.fixture(scope="module")
def rounded(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rounded") / "m.fgs"
    model = elastic("deltas")
    model.cameras = [Camera(torch.eye(4), torch.eye(3), 64, 48)]
    write(model, path)
    return path


def forged2(path: Path, change) -> Path:
    """A file of version 2 with another header, chunks or last part, as change(header, chunks, last) makes
    them of what they hold, its checksums right."""
    raw = path.read_bytes()
    at = HEAD.size + HEAD.unpack(raw[:HEAD.size])[2]
    about, bodies = json.loads(zlib.decompress(raw[HEAD.size:at])), []
    for size in [*(chunk[1] for chunk in about["chunks"]), about["last"][0]]:
        bodies.append(raw[at:at + size])
        at += size
    whole, last = [bytearray(lzma.decompress(body)) for body in bodies[:-1]], json.loads(
        zlib.decompress(bodies[-1]))
    before = [bytes(body) for body in whole]
    ends = [list(chunk) for chunk in about["chunks"]]
    change(about, whole, last)
    for i, (new, old) in enumerate(zip(whole, before, strict=True)):
        if new != old and about["chunks"][i] == ends[i]:
            bodies[i] = new if isinstance(new, bytes) else coding.compress(bytes(new))
            about["chunks"][i][1:] = len(bodies[i]), zlib.crc32(bodies[i])
    bodies[-1] = zlib.compress(json.dumps(last).encode())
    about["last"] = about.get("last") and [len(bodies[-1]), zlib.crc32(bodies[-1])]
    header = zlib.compress(json.dumps(about).encode())
    bad = path.with_name("bad.fgs")
    bad.write_bytes(HEAD.pack(b"FLEXGS", 2, len(header), zlib.crc32(header)) + header + b"".join(bodies))
    return bad


@pytest.mark.parametrize(("change", "says"), [
    (lambda about: about.update(splats=10**12), "which is no size that they compress to"),
    (lambda about: about.update(splats=999), "is damaged .*, which is not what its columns have"),
    (lambda about: about.update(sh_degree=0), "is damaged .*, which is not what its columns have"),
    (lambda about: about.update(chunks=[]), "chunks: found 0 entries, expected 1 to 200"),
    (lambda about: about.update(more=1), "unknown setting .'more'."),
    (lambda about: about.update(config=None), "config: found None, expected dict"),
    (lambda about: about.update(config={"transform": {"kind": "none"}}), "not what its columns have"),
    (lambda about: about.pop("last"), "last: found None|found no last"),
    (lambda about: about["chunks"][0].pop(), "chunks: found .*, expected 3 values"),
    (lambda about: about["chunks"][0].__setitem__(0, 0.5), "the chunks do not rise to all of the model"),
    (lambda about: about["chunks"][0].__setitem__(1, 1 << 40), "bytes, expected 1,099,.* as its header says"),
    (lambda about: about["chunks"][0].__setitem__(2, 1), "the chunk of 1 % is cut off or damaged"),
])
def test_headers_of_version_2_that_lie_are_refused(rounded, change, says, monkeypatch):
    if "damaged" not in says and "columns" not in says:
        monkeypatch.setattr(shared, "_zeros", lambda like: pytest.fail("took memory for a model"))
    with pytest.raises(UserError, match=rf"bad\.fgs: .*({says})") as error:
        Progressive.open(forged2(rounded, lambda about, *_: change(about))).cut(0.01)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def put(at: int, new: bytes):
    return lambda chunk: chunk.__setitem__(slice(at, at + len(new)), new)


BASIS = 3 * 3  # of degree 1, at the end of 16 float32
WIDTHS = 64 + BASIS


@pytest.mark.parametrize(("change", "says"), [
    (put(0, b"\xff" * 4), "found NaN or infinite numbers in splats.scales"),
    (put(0, b"\xff\xff\x7f\x7f"), "found NaN or infinite numbers in splats"),
    (put(WIDTHS, b"\0"), "is damaged .*, which is not what its columns have"),
    (put(WIDTHS + 3, b"\4"), "is damaged .*, which is not what its columns have"),
    (lambda chunk: chunk.append(0), "is damaged .*, which is not what its columns have"),
    (lambda chunk: chunk.pop(), "is damaged .*, which is not what its columns have"),
    (lambda chunk: chunk.__delitem__(slice(5, None)), "is damaged .*, which is not what its columns have"),
    (lambda chunk: chunk.extend(bytes(10**6)), "is damaged .of another length than its at most"),
])
def test_chunks_of_version_2_with_wrong_contents_are_refused(rounded, change, says):
    bad = Progressive.open(forged2(rounded, lambda about, chunks, _: change(chunks[0])))
    with pytest.raises(UserError, match=rf"bad\.fgs: the chunk of 1 %:? {says}") as error:
        bad.cut(0.01)
    assert "\n" not in str(error.value)
    assert not bad.model.splats.means.any()  # nothing of it was taken


@pytest.mark.parametrize(("body", "says"), [
    (lambda raw: b"x" * 700, r"is damaged \(no LZMA data: .*\)"),
    (lambda raw: coding.compress(raw)[:-6], "is damaged"),
    (lambda raw: coding.compress(raw) + b"more", "is damaged .of another length"),
    (lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE, preset=9), r"is damaged \(no LZMA data: memory usage"),
])
def test_chunks_that_are_no_lzma_of_ours_are_refused(rounded, body, says):
    """A dictionary of 64 MiB among them."""
    def change(about, chunks, last):
        chunks[0] = bytes(body(bytes(chunks[0])))

    with pytest.raises(UserError, match=rf"bad\.fgs: the chunk of 1 %:? {says}"):
        Progressive.open(forged2(rounded, change)).cut(0.01)


@pytest.mark.parametrize(("change", "says"), [
    (lambda last: last["config"]["transform"].update(kind="none"), "found other settings than in the header"),
    (lambda last: last.update(more=1), "unknown setting"),
    (lambda last: last["config"].update(steps="x"), "config: steps: found 'x', expected int"),
    (lambda last: last["cameras"][0].__setitem__(0, 0), "found camera 1 of 0x48 pixels"),
    (lambda last: last["cameras"][0].pop(), "cameras: found 26 entries, expected 27 to 27 entries"),
])
def test_a_last_part_that_is_wrong_is_refused_when_it_is_read(rounded, change, says):
    bad = Progressive.open(forged2(rounded, lambda about, chunks, last: change(last)))
    assert len(bad.cut(0.01)) == 10
    with pytest.raises(UserError, match=rf"bad\.fgs: the part behind the chunks.*{says}"):
        _ = bad.cameras


def test_worth_is_what_cameras_see():
    """The nearer, larger and more opaque, the more; what none of them sees counts like the least seen."""
    splats = elastic("none", 6).splats
    splats.means[:] = torch.tensor([[0, 0, 4.0], [0, 0, 8], [0, 0, 4], [0, 0, 4], [0, 0, -4], [9, 0, 4]])
    splats.scales[:], splats.opacities[:] = -3.0, 0.0
    splats.scales[2], splats.opacities[3] = -2.0, 3.0
    K = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    seen = worth(splats, [Camera(torch.eye(4), K, 64, 48)])
    assert seen[[0, 2, 3]] / seen[0] == pytest.approx([1, math.e, 1.90515], rel=1e-4)
    assert seen[[1, 4, 5]] / seen[0] == pytest.approx([0.5, 0.5, 0.5], rel=1e-4)
    blind = worth(splats, [])
    assert blind / blind[0] == pytest.approx([1, 1, math.e, 1.90515, 1, 1], rel=1e-4)
    assert levels_of(seen)[2] < levels_of(seen)[0] < levels_of(seen)[1] == levels_of(seen)[4]


def test_integers_of_any_sign_and_width_come_back():
    columns = [torch.tensor(column).numpy() for column in
               ([0, -1, 1, 127, -128], [128, -129, 0, 0, 0], [2**31 - 1, -2**31, 5, -5, 0], [], [0])]
    widths, raw = coding.planes(columns)
    assert list(widths) == [1, 2, 4, 1, 1]
    back = list(coding.columns_of(widths, raw, [len(column) for column in columns]))
    assert all((a == b).all() for a, b in zip(columns, back, strict=True))
    with pytest.raises(OverflowError):
        coding.planes([torch.tensor([2**31]).numpy()])


def test_a_chunk_that_the_machine_has_no_room_for_is_not_asked_for(packed, monkeypatch):
    monkeypatch.setattr(progressive.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match=r"the chunk of 1 % takes 0\.0 GB of memory, found 0\.0 GB free"):
        Progressive.open(packed).cut(0.01)


@pytest.mark.parametrize(("ratios", "found"), [
    ((0.1, 0.05, 1.0), "0.1 0.05 1"), ((0.1,), "0.1"), ((0.5, 0.5, 1.0), "0.5 0.5 1")])
def test_chunks_end_at_rising_ratios(ratios, found, tmp_path):
    with pytest.raises(UserError, match=f"found {found}, expected rising ones, the last of them 1"):
        write(elastic("none"), tmp_path / "m.fgs", ratios)
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of folder, on loopback."""
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = web.AppRunner(application(folder, Visitors("127.0.0.1")))
        loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        loop.run_until_complete(site.start())
        found.append(runner.addresses[0][1])
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{found[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    with serving(tmp_path) as url:
        yield url


def test_a_run_is_served_packed_and_nothing_else_of_it(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)

    def check(packed) -> None:
        served, model = Progressive.open(packed), ElasticModel.load(run)
        error = (served.cut(0.05).means - model.cut(0.05).means).abs().max()
        assert len(served) == len(model) and error <= 4 * served.bounds["means"]

    with serving(run) as url:
        check(f"{url}/model.fgs")
        assert b"studio_005.00pct.ply" in urllib.request.urlopen(f"{url}/cuts/", timeout=10).read()
        for hidden in ("config.json", "results.json", "model/model.json", "cuts/../config.json",
                       "checkpoints/"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}/{hidden}", timeout=10)
    (run / ".published").mkdir()  # killed while it published: these count, wherever they are
    for part in ("model", "cuts"):
        (run / part).rename(run / ".published" / part)
    with serving(run) as url:
        check(f"{url}/model.fgs")
        assert b"studio_005.00pct.ply" in urllib.request.urlopen(f"{url}/cuts/", timeout=10).read()
    (run / "model.fgs").write_bytes(b"of an earlier model")
    os.utime(run / "model.fgs", (0, 0))
    application(run, Visitors("127.0.0.1"))
    check(run / "model.fgs")


def test_over_http_only_what_a_cut_needs_is_sent(served, tmp_path, monkeypatch):
    model, sent, read = elastic("deltas"), [], Remote.read
    write(model, tmp_path / "m.fgs")
    monkeypatch.setattr(Remote, "read", lambda *args: sent.append(read(*args)) or sent[-1])
    remote, local = Progressive.open(f"{served}/m.fgs"), Progressive.open(tmp_path / "m.fgs")
    for ratio in (0.01, 0.05, 1.0):
        assert same(remote.cut(ratio), local.cut(ratio))
        assert sum(map(len, sent)) == local.offset
    assert remote.config == model.config == local.config and sum(map(len, sent)) == local.offset
    (tmp_path / "empty.fgs").touch()
    with pytest.raises(UserError, match="not a progressive model"):
        Progressive.open(f"{served}/empty.fgs")
    shutil.copy(tmp_path / "m.fgs", tmp_path / "é b.fgs")
    assert same(open_model(f"{served}/é b.fgs").cut(0.01), local.cut(0.01))
    for url, says in ((f"{served}/none.fgs", "/none.fgs: the server says 404 Not Found"),
                      ("HTTP://me:secret@127.0.0.1:9/m.fgs",
                       r"^HTTP://127\.0\.0\.1:9/m\.fgs: no connection \(Connection ref"),
                      ("s3://bucket/m.fgs", "s3://bucket/m.fgs: found s3, expected http or https")):
        with pytest.raises(UserError, match=says):
            open_model(url)
