"""The progressive file: cuts as the model makes them, each byte once; broken files; over HTTP."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import struct
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp import web
from test_model import elastic

from flexgs.deploy import progressive
from flexgs.deploy.progressive import HEAD, Progressive, write
from flexgs.deploy.serve import application
from flexgs.errors import UserError
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
    assert sizes == sorted(sizes) and len(set(sizes)) == len(ratios) and sizes[-1] == (tmp_path / "m.fgs").stat().st_size
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


def forged(path: Path, **changes) -> Path:
    """A file with a header that says something else, its checksum right."""
    raw = path.read_bytes()
    length = HEAD.unpack(raw[:HEAD.size])[2]
    about = json.loads(raw[HEAD.size:HEAD.size + length]) | changes
    header = json.dumps(about).encode()
    bad = path.with_name("bad.fgs")
    bad.write_bytes(HEAD.pack(b"FLEXGS", 1, len(header), zlib.crc32(header)) + header + raw[HEAD.size + length:])
    return bad


def test_headers_that_lie_are_refused(tmp_path):
    path = tmp_path / "m.fgs"
    write(elastic("deltas"), path)
    for changes in ({"splats": 10**12}, {"splats": 0}, {"splats": 999}, {"splats": "many"}, {"sh_degree": 3},
                    {"chunks": []}, {"config": {"steps": "x"}}, {"config": None}):
        with pytest.raises(UserError, match=r"bad\.fgs: "):
            Progressive.open(forged(path, **changes)).cut(1.0)
    for raw, message in ((b"ply\n", "not a progressive model"),
                         (HEAD.pack(b"FLEXGS", 2, 0, 0), "format 2, this version reads 1"),
                         (HEAD.pack(b"FLEXGS", 1, 1 << 31, 0), "cut off or damaged")):
        (tmp_path / "bad.fgs").write_bytes(raw)
        with pytest.raises(UserError, match=message):
            Progressive.open(tmp_path / "bad.fgs")
    bomb = zlib.compress(bytes(1 << 24))
    chunks = json.loads(json.dumps(Progressive.open(path).chunks))
    chunks[0] |= {"bytes": len(bomb), "crc32": zlib.crc32(bomb)}
    bad = forged(path, chunks=chunks)
    offset = HEAD.size + struct.unpack_from("<I", bad.read_bytes(), 8)[0]
    bad.write_bytes(bad.read_bytes()[:offset] + bomb)
    with pytest.raises(UserError, match=r"the chunk of 1 % has .* bytes, expected"):
        Progressive.open(bad).cut(0.01)


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
        for hidden in ("config.json", "results.json", "model/model.json", "cuts/../config.json", "checkpoints/"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}/{hidden}", timeout=10)
    (run / "model.fgs").write_bytes(b"of an earlier model")
    os.utime(run / "model.fgs", (0, 0))
    application(run, Visitors("127.0.0.1"))
    assert same(Progressive.open(run / "model.fgs").cut(0.05), ElasticModel.load(run).cut(0.05))


def test_over_http_only_what_a_cut_needs_is_sent(served, tmp_path, monkeypatch):
    model, sent = elastic("deltas"), []
    write(model, tmp_path / "m.fgs")
    http = progressive._http

    def counting(url: str) -> progressive.Read:
        read = http(url)
        return lambda offset, length: sent.append(read(offset, length)) or sent[-1]

    monkeypatch.setattr(progressive, "_http", counting)
    remote, local = Progressive.open(f"{served}/m.fgs"), Progressive.open(tmp_path / "m.fgs")
    for ratio in (0.01, 0.05, 1.0):
        assert same(remote.cut(ratio), model.cut(ratio))
        local.load(ratio)
        assert sum(map(len, sent)) == local.offset
    with pytest.raises(UserError, match=r"/none\.fgs: HTTP Error 404"):
        Progressive.open(f"{served}/none.fgs")
    with pytest.raises(UserError, match="no answer"):
        Progressive.open("http://127.0.0.1:9/m.fgs")
