"""The progressive file: cuts as the model makes them, each byte once; broken files; over HTTP."""

import asyncio
import contextlib
import json
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
from flexgs.deploy import progressive
from flexgs.deploy.progressive import HEAD, Progressive, write
from flexgs.deploy.serve import application
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.http import Remote
from flexgs.model.elastic import ElasticModel
from flexgs.ply import ply_bytes, read_ply
from flexgs.view.visitors import Visitors
from tests.test_cli import flexgs


def same(a, b) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))


@pytest.mark.parametrize("ratios", [(0.01, 0.05, 0.15, 0.5, 1.0), (0.02, 0.032, 1.0), (1.0,)])
@pytest.mark.parametrize("kind", ["deltas", "field", "none"])
def test_every_cut_is_that_of_the_model_and_bytes_are_read_once(kind, ratios, tmp_path):
    model = elastic(kind)
    write(model, tmp_path / "m.fgs", ratios)
    packed, sizes = Progressive.open(tmp_path / "m.fgs"), []
    for ratio in (0.004, 0.01, 0.0123, 0.03, 0.05, 0.1, 0.15, 0.2, 0.33, 0.5, 0.77, 1.0):
        assert same(packed.cut(ratio), model.cut(ratio)), ratio
        sizes.append(packed.offset)
        at_once = Progressive.open(tmp_path / "m.fgs")
        assert same(at_once.cut(ratio), model.cut(ratio)) and at_once.offset == packed.offset
    assert (sizes == sorted(sizes) and len(set(sizes)) == len(ratios)
            and sizes[-1] == (tmp_path / "m.fgs").stat().st_size)
    assert same(packed.cut(0.01), model.cut(0.01))  # and back


def test_a_trained_model_takes_less_than_separate_cuts(trained, tmp_path, capsys):
    """And at most 1.05 of the whole as PLY."""
    assert flexgs("pack", trained, "-o", tmp_path / "m.fgs", "--ratios", "0.01", "0.05", "0.15", "1") == 0
    assert "up to     5 %" in capsys.readouterr().out
    model = ElasticModel.load(trained)
    n, degree = len(model.splats), model.splats.sh_degree
    assert (tmp_path / "m.fgs").stat().st_size <= 1.05 * ply_bytes(n, degree)
    assert flexgs("cut", tmp_path / "m.fgs", "--budget", "5%", "-o", tmp_path / "cut.ply") == 0
    assert flexgs("cut", trained, "--budget", "5%", "-o", tmp_path / "other.ply") == 0
    assert (tmp_path / "cut.ply").read_bytes() == (tmp_path / "other.ply").read_bytes()
    assert len(read_ply(tmp_path / "cut.ply")) == n // 20


def damaged(kind: str, raw: bytes, rng: random.Random) -> bytes:
    if kind == "cut off":
        return raw[: rng.randrange(len(raw))]
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1:]


@pytest.mark.parametrize("kind", ["cut off", "flipped"])
def test_damage_at_any_place_is_a_clear_error(kind, tmp_path):
    write(elastic("deltas"), tmp_path / "m.fgs")
    raw, rng = (tmp_path / "m.fgs").read_bytes(), random.Random(0)
    for _ in range(50):
        (tmp_path / "bad.fgs").write_bytes(damaged(kind, raw, rng))
        with pytest.raises(UserError, match=r"bad\.fgs: ") as error:
            Progressive.open(tmp_path / "bad.fgs").cut(1.0)
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
    write(model, path)
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
        monkeypatch.setattr(progressive, "_zeros", lambda like: pytest.fail("took memory for a model"))
    with pytest.raises(UserError, match=rf"bad\.fgs: .*({says})") as error:
        Progressive.open(forged(packed, change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("raw", "says"), [
    (b"ply\n", "not a progressive model"), (b"", "not a progressive model"),
    (HEAD.pack(b"FLEXGS", 2, 0, 0), "format 2, this version reads 1"),
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
    ready.wait(10)
    yield f"http://127.0.0.1:{found[0]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    with serving(tmp_path) as url:
        yield url


def test_a_run_is_served_packed_and_nothing_else_of_it(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with serving(run) as url:
        assert same(Progressive.open(f"{url}/model.fgs").cut(0.05), ElasticModel.load(run).cut(0.05))
        assert b"studio_005.00pct.ply" in urllib.request.urlopen(f"{url}/cuts/", timeout=10).read()
        for hidden in ("config.json", "results.json", "model/model.json", "cuts/../config.json",
                       "checkpoints/"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}/{hidden}", timeout=10)
    (run / ".published").mkdir()  # killed while it published: these count, wherever they are
    for part in ("model", "cuts"):
        (run / part).rename(run / ".published" / part)
    with serving(run) as url:
        assert same(Progressive.open(f"{url}/model.fgs").cut(0.05), ElasticModel.load(run).cut(0.05))
        assert b"studio_005.00pct.ply" in urllib.request.urlopen(f"{url}/cuts/", timeout=10).read()
    (run / "model.fgs").write_bytes(b"of an earlier model")
    os.utime(run / "model.fgs", (0, 0))
    application(run, Visitors("127.0.0.1"))
    assert same(Progressive.open(run / "model.fgs").cut(0.05), ElasticModel.load(run).cut(0.05))


def test_over_http_only_what_a_cut_needs_is_sent(served, tmp_path, monkeypatch):
    model, sent, read = elastic("deltas"), [], Remote.read
    write(model, tmp_path / "m.fgs")
    monkeypatch.setattr(Remote, "read", lambda *args: sent.append(read(*args)) or sent[-1])
    remote, local = Progressive.open(f"{served}/m.fgs"), Progressive.open(tmp_path / "m.fgs")
    for ratio in (0.01, 0.05, 1.0):
        assert same(remote.cut(ratio), model.cut(ratio))
        local.load(ratio)
        assert sum(map(len, sent)) == local.offset
    (tmp_path / "empty.fgs").touch()
    with pytest.raises(UserError, match="not a progressive model"):
        Progressive.open(f"{served}/empty.fgs")
    shutil.copy(tmp_path / "m.fgs", tmp_path / "é b.fgs")
    assert same(open_model(f"{served}/é b.fgs").cut(0.01), model.cut(0.01))
    for url, says in ((f"{served}/none.fgs", "/none.fgs: the server says 404 Not Found"),
                      ("HTTP://me:secret@127.0.0.1:9/m.fgs",
                       r"^HTTP://127\.0\.0\.1:9/m\.fgs: no connection \(Connection ref"),
                      ("s3://bucket/m.fgs", "s3://bucket/m.fgs: found s3, expected http or https")):
        with pytest.raises(UserError, match=says):
            open_model(url)
