"""Known captures: downloads over a line that breaks, archives that are not as they should be, and the
catalogue."""

import base64
import hashlib
import io
import re
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from flexgs.datasets import download
from flexgs.datasets.catalog import CATALOG, DATASETS, Archive, Known, find_dataset, members
from flexgs.datasets.download import fetch, get, unpack
from flexgs.errors import UserError
from flexgs.files import write_json
from flexgs.scene import load_scene
from tests.test_cli import flexgs

QUICK = {"tries": 3, "pause": 0.01}


@dataclass
class Source:
    """What the server has, and how badly it behaves."""

    url: str
    body: bytes = b""
    etag: str | None = '"one"'
    md5: str | None = None
    breaks: list[int] = field(default_factory=list)
    """After so many bytes of the body each answer breaks off, until none is left."""
    then: bytes | None = None
    """Another file takes its place after the first answer."""
    ranges: bool = True
    if_range: bool = True
    """Whether it heeds If-Range."""
    length: bool = True
    status: int = 200
    first: list[int] = field(default_factory=list)
    """Statuses of the first answers, before that one."""
    piece: int | None = None
    """It sends no more than so many bytes of a range."""
    wrong: bool = False
    """Of a range it sends the start of the file."""
    asked: list[tuple[str | None, str | None, int]] = field(default_factory=list)
    """Range, If-Range and status of each request."""


class _Handler(BaseHTTPRequestHandler):
    source: Source

    def do_GET(self) -> None:
        source, asked = self.source, self.headers.get("Range")
        body, status, start = source.body, source.first.pop(0) if source.first else source.status, 0
        if status == 200 and asked and source.ranges and (self.headers.get("If-Range") == source.etag
                                                          or not source.if_range):
            start = 0 if source.wrong else int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status = 206 if start < len(body) else 416
        end = min(len(body), start + source.piece) if source.piece and status == 206 else len(body)
        source.asked.append((asked, self.headers.get("If-Range"), status))
        self.send_response(status)
        if source.etag:
            self.send_header("ETag", source.etag)
        if source.md5:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={source.md5}")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        if source.length:
            self.send_header("Content-Length", str(max(0, end - start)))
        self.end_headers()
        self.wfile.write(body[start:start + source.breaks.pop(0)] if source.breaks else body[start:end])
        if source.then is not None:
            source.body, source.then, source.etag = source.then, None, '"two"'

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def source() -> Iterator[Source]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    server.RequestHandlerClass.source = Source(f"http://127.0.0.1:{server.server_port}/some.zip")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.RequestHandlerClass.source
    server.shutdown()
    server.server_close()


def zipped(files: dict[str, bytes | Path]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.read_bytes() if isinstance(content, Path) else content)
    return out.getvalue()


def capture_files(capture: Path, inside: str) -> dict[str, bytes | Path]:
    return {f"{inside}/{path.relative_to(capture)}": path for path in sorted(capture.rglob("*"))
            if path.is_file()}


def known(source: Source, name: str = "one", sha256: str | None = None) -> Known:
    return Known(name, "mipnerf360", Archive(source.url, "some.zip", sha256=sha256), f"top/{name}", 1)


@pytest.fixture(scope="module")
def release(capture: Path) -> bytes:
    """An archive of two captures and a file that belongs to none."""
    return zipped({**capture_files(capture, "top/one"), **capture_files(capture, "top/two"),
                   "top/readme.txt": b"hello"})


@pytest.fixture
def junk() -> bytes:
    """A zip file that is large enough to break off in."""
    return zipped({"a": bytes(range(256)) * 2000})


def test_only_the_wanted_captures_arrive_and_the_archive_is_used_again(source, release, capture, tmp_path):
    source.body, source.md5 = release, base64.b64encode(hashlib.md5(release).digest()).decode()
    (one,) = get([known(source)], tmp_path, **QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["downloads", "one"]
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["some.zip"]
    assert load_scene(one, factor=1).protocol["digest"] == load_scene(capture, factor=1).protocol["digest"]
    assert get([known(source), known(source, "two")], tmp_path, **QUICK) == [one, tmp_path / "two"]
    assert len(source.asked) == 1  # neither what is there nor the archive is fetched again


def test_a_download_goes_on_where_the_line_broke(source, junk, tmp_path):
    source.body, source.breaks = junk, [100_000, 0, 200_000]
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == junk
    assert source.asked == [(None, None, 200), *[("bytes=100000-", '"one"', 206)] * 2,
                            ("bytes=300000-", '"one"', 206)]


def test_a_download_goes_on_in_another_process(source, junk, tmp_path):
    source.body, source.breaks = junk, [150_000, 0, 0, 0]
    with pytest.raises(UserError, match=rf"{source.url}: the connection broke; try again later, or do "
                                        r"it by hand: put the "
                                        rf"archive at {tmp_path}/downloads/x.zip and give"):
        fetch(Archive(source.url, "x.zip"), tmp_path / "downloads", **QUICK)
    assert not (tmp_path / "downloads" / "x.zip").exists()
    source.breaks = []
    assert fetch(Archive(source.url, "x.zip"), tmp_path / "downloads", **QUICK).read_bytes() == junk
    assert source.asked[-1] == ("bytes=150000-", '"one"', 206)


def test_killed_when_all_had_arrived(source, junk, tmp_path):
    part = tmp_path / "x.zip.part"
    part.mkdir()
    (part / "data").write_bytes(junk)
    write_json(part / "version.json", {"validator": '"one"', "size": len(junk), "md5": None})
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == junk and not source.asked


@pytest.mark.parametrize("if_range", [True, False])
def test_another_file_on_the_server_is_fetched_from_its_start(source, junk, tmp_path, if_range):
    other = zipped({"b": bytes(reversed(range(256))) * 2001})
    source.body, source.breaks, source.then, source.if_range = junk, [300_000], other, if_range
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == other
    assert [status for _, _, status in source.asked] == ([200, 200] if if_range else [200, 206, 200])


def test_a_file_that_has_become_shorter(source, junk, tmp_path):
    source.body, source.breaks, source.then, source.if_range = junk, [300_000], zipped({"b": b"short"}), False
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == source.body
    assert [status for _, _, status in source.asked] == [200, 416, 200]


@pytest.mark.parametrize("kind", ["no ranges", "no etag", "weak etag"])
def test_a_server_that_cannot_go_on_is_asked_for_all_of_it(source, junk, tmp_path, kind):
    source.body, source.breaks = junk, [100_000, 200_000]
    source.ranges = kind != "no ranges"
    source.etag = {"no etag": None, "weak etag": 'W/"one"'}.get(kind, '"one"')
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == junk
    assert [status for _, _, status in source.asked] == [200, 200, 200]


def test_a_wrong_checksum_is_tried_once_more_and_leaves_nothing(source, junk, tmp_path):
    source.body, source.md5 = junk, base64.b64encode(bytes(16)).decode()
    with pytest.raises(UserError, match=r"arrived damaged twice \(found md5 .*, expected "
                                        rf"{'0' * 32}\); nothing is kept"):
        fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK)
    assert len(source.asked) == 2 and not list(tmp_path.rglob("data")) and not (tmp_path / "x.zip").exists()
    source.md5 = None
    with pytest.raises(UserError, match=r"found sha256 .*, expected abc"):
        fetch(Archive(source.url, "x.zip", sha256="abc"), tmp_path, **QUICK)


def test_a_page_in_place_of_the_file_and_an_end_that_nobody_announced(source, junk, tmp_path):
    source.body = b"<html>Moved</html>"
    with pytest.raises(UserError, match=r"arrived damaged twice \(not a zip file\)"):
        fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK)
    # no length: only the zip file itself shows the loss
    source.body, source.length, source.breaks = junk, False, [100_000]
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == junk


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 3)])
def test_a_server_that_refuses_is_named_with_the_way_by_hand(source, release, tmp_path, status, requests):
    source.status = status
    with pytest.raises(UserError, match=rf"{source.url}: the server says {status} .*; try again later, "
                                        r"or do it by hand: put "
                                        rf"the archive at {tmp_path}/downloads/some.zip and "
                       rf".*, into {tmp_path}$"):
        get([known(source)], tmp_path, **QUICK)
    assert len(source.asked) == requests and not (tmp_path / "one").exists()
    (tmp_path / "downloads" / "some.zip").write_bytes(release)
    assert get([known(source)], tmp_path, **QUICK) == [tmp_path / "one"] and len(source.asked) == requests


@pytest.mark.parametrize("first", [[429], [503, 408], [425]])
def test_a_server_that_is_busy_is_asked_again(source, junk, tmp_path, first):
    source.body, source.first = junk, first
    asked = [*first, 200]
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == junk
    assert [status for _, _, status in source.asked] == asked


def test_a_range_that_was_not_asked_for_is_not_taken(source, junk, tmp_path):
    source.body, source.breaks, source.wrong = junk, [100_000], True
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == junk
    assert [status for _, _, status in source.asked] == [200, 206, 200]  # from its start, then
    source.status, source.asked = 206, []
    with pytest.raises(UserError, match="the server says 206 Partial Content; try again later"):
        fetch(Archive(source.url, "y.zip"), tmp_path, **QUICK)


def test_a_server_that_sends_less_of_a_range_than_there_is(source, junk, tmp_path):
    source.body, source.breaks, source.piece = junk, [100_000], 150_000
    assert fetch(Archive(source.url, "x.zip"), tmp_path, **QUICK).read_bytes() == junk
    assert [status for _, _, status in source.asked] == [200, 206, 206, 206]


def test_a_download_has_an_end(source, junk, tmp_path, monkeypatch):
    source.body, source.breaks = junk, list(range(100_000, 100_050))  # each a little, without end
    with pytest.raises(UserError, match=r"some\.zip: .*; try again later"):
        fetch(Archive(source.url, "x.zip"), tmp_path, tries=50, pause=0.05, longest=0.2)
    assert 1 < len(source.asked) < 10 and (tmp_path / "x.zip.part" / "data").exists()
    source.length, source.breaks = False, []  # and so has a body that nobody knows the length of
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="found more than 100,000 bytes"):
        fetch(Archive(source.url, "y.zip"), tmp_path, **QUICK)


def test_secrets_in_the_address_of_an_archive_are_not_shown(source, tmp_path, capsys):
    source.status = 503
    url = source.url.replace("//", "//me:hunter2@") + "?token=hunter2"
    with pytest.raises(UserError, match=r"some\.zip\?token=\*\*\*: the server says 503 "
                                        r"Service Unavailable; try") as error:
        fetch(Archive(url, "x.zip"), tmp_path, **QUICK)
    assert "hunter2" not in str(error.value) + capsys.readouterr().out


def test_nobody_listens(source, tmp_path):
    gone = Known("one", "mipnerf360", Archive("http://127.0.0.1:9/some.zip", "some.zip"), "one", 1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/some\.zip: no connection "
                                        r"\(.*refused.*\); try again later, or"):
        get([gone], tmp_path, **QUICK)


@pytest.mark.parametrize("name",
                         ["../evil", "top/one/../../evil", "/evil", "top\\..\\evil", "C:/evil",
                          "top/one/link"])
def test_an_archive_that_would_write_elsewhere_is_refused_as_a_whole(capture, tmp_path, name):
    file, root = tmp_path / "x.zip", tmp_path / "root"
    with zipfile.ZipFile(file, "w") as archive:
        for member, path in capture_files(capture, "top/one").items():
            archive.write(path, member)
        info = zipfile.ZipInfo("x")
        info.filename = name  # as it stands in the file; ZipInfo itself would tidy it up
        if name.endswith("link"):
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, b"/etc/passwd")
    with pytest.raises(UserError, match=r"the member .* is a link or lies outside of the archive; "
                                        r"nothing was unpacked"):
        unpack(file, "top/one", root / "one")
    assert not list(root.iterdir()) and not list(tmp_path.glob("**/evil"))


def test_a_damaged_member_leaves_no_half_of_a_capture(source, release, tmp_path):
    at = release.index(b"IHDR", 20_000)
    source.body = release[:at + 200] + bytes(64) + release[at + 264:]
    with pytest.raises(UserError, match=r"some\.zip: damaged \(Bad CRC-32 for file .*\): remove it, "
                                        r"and the same command"):
        get([known(source)], tmp_path, **QUICK)
    assert {p.name for p in tmp_path.iterdir()} == {"downloads"}
    (tmp_path / "downloads" / "some.zip").unlink()
    source.body, source.etag = release, '"mended"'
    assert load_scene(get([known(source)], tmp_path, **QUICK)[0], factor=1)


def test_what_is_not_in_the_archive_and_what_is_in_the_way(source, release, tmp_path):
    source.body = release
    with pytest.raises(UserError, match=r"found no COLMAP capture in top/three/ of it, but top; unpack "
                                        r"it by hand to .*three"):
        get([known(source), known(source, "three")], tmp_path, **QUICK)
    assert (tmp_path / "one").is_dir() and not (tmp_path / "three").exists()
    (tmp_path / "two").mkdir()
    with pytest.raises(UserError, match="two: exists and is not a capture"):
        get([known(source, "two")], tmp_path, **QUICK)


def test_a_disk_without_room(source, release, tmp_path, monkeypatch):
    source.body = release
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"found 0\.00 GB free on this disk, expected .* GB; free "
                                        r"some of it, or choose"):
        get([known(source)], tmp_path, **QUICK)
    assert not list(tmp_path.rglob("data")) and not (tmp_path / "one").exists()


def test_one_process_at_a_time(source, release, tmp_path):
    source.body = release
    part = tmp_path / "downloads" / "some.zip.part"
    part.mkdir(parents=True)
    with FileLock(part / ".lock"), pytest.raises(UserError, match="another process works here now"):
        get([known(source)], tmp_path, **QUICK)
    assert not source.asked and get([known(source)], tmp_path, **QUICK) == [tmp_path / "one"]


def test_killed_while_it_unpacks(source, release, tmp_path):
    """Nothing is under the capture's name, and the next start clears up and makes it whole."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "some.zip").write_bytes(release)
    script = ("import os, signal, sys; from pathlib import Path; from flexgs.datasets import download\n"
              "from flexgs.datasets.catalog import Archive, Known\n"
              "copy, seen = download.shutil.copyfileobj, []\n"
              "def stop(*args):\n    copy(*args); seen.append(1)\n    len(seen) == 5 and "
              "os.kill(os.getpid(), signal.SIGKILL)\ndownload.shutil.copyfileobj = stop\n"
              "download.get([Known('one', 'mipnerf360', Archive('', 'some.zip'), 'top/one', "
              "1)], Path(sys.argv[1]))")
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)],
                          stdout=subprocess.DEVNULL).returncode == -9
    assert {p.name for p in tmp_path.iterdir()} == {"downloads", ".one.unpacking"}
    (tmp_path / ".one.unpacking" / "older").touch()
    get([known(source)], tmp_path, **QUICK)
    assert {p.name for p in tmp_path.iterdir()} == {"downloads", "one"}
    assert (len(load_scene(tmp_path / "one", factor=1).train) == 15
            and not (tmp_path / "one" / "older").exists())


# -- the catalogue and the command
# ------------------------------------------------------------------------------------


def test_the_catalogue_is_of_a_piece():
    assert {dataset: len(members(dataset)) for dataset in DATASETS} == {
        "mipnerf360": 9, "tanksandtemples": 2, "deepblending": 2, "zipnerf": 4, "zipnerf-fisheye": 4}
    archives = {one.archive for one in CATALOG.values()}
    # 360_v2, extra, tandt_db, and eight of Zip-NeRF
    assert len({archive.file for archive in archives}) == len(archives) == 11
    assert all(archive.url.startswith("https://") for archive in archives)
    assert {name: (one.factor_of("paper"), one.factor_of("standard")) for name, one in CATALOG.items()
            if name in ("garden", "bonsai", "truck")} == {"garden": (4, 4), "bonsai": (4, 2), "truck": (4, 1)}
    assert CATALOG["garden"].memory(4) == 3 * 185 * 1297 * 840 and CATALOG["berlin"].memory(4) is None


def test_captures_of_a_dataset_are_found_and_missed(capture, tmp_path):
    for place in ("garden", "mipnerf360/bonsai", "truck"):
        shutil.copytree(capture, tmp_path / place)
    found, absent = find_dataset(tmp_path, "mipnerf360")
    assert found == [tmp_path / "mipnerf360/bonsai", tmp_path / "garden"]
    assert absent == ["bicycle", "counter", "flowers", "kitchen", "room", "stump", "treehill"]
    for dataset, names, says in (("mipnerf360", ["truck"],
                                  "--scenes truck: not in mipnerf360; expected of bicycle, "),
                                 ("mipnerf360", ["garden", "room"], "found no capture room of Mip-NeRF 360"),
                                 ("zipnerf", [],
                                  f"`flexgs data get berlin london nyc alameda --data-root {tmp_path}`")):
        with pytest.raises(UserError, match=re.escape(says)):
            find_dataset(tmp_path, dataset, names)


def test_the_command_gets_lists_and_checks(capture, tmp_path, capsys):
    archive = tmp_path / "downloads" / "zipnerf_nyc.zip"  # as if put there by hand
    archive.parent.mkdir()
    archive.write_bytes(zipped(capture_files(capture, "nyc")))
    shutil.copytree(capture, tmp_path / "mine")
    assert flexgs("data", "get", "nyc", "--data-root", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "nyc")
    assert flexgs("data", "list", "--data-root", tmp_path) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^ *nyc +zipnerf +PINHOLE .*{tmp_path / 'nyc'}", out,
                     re.M) and f"also in {tmp_path}: mine\n" in out
    assert flexgs("data", "get", "nyc", "sydney", "--data-root", tmp_path) == 2
    assert ("data get sydney: found no such capture or dataset; expected of mipnerf360, "
            in capsys.readouterr().err)
    assert flexgs("data", "check", tmp_path / "mine", tmp_path / "nyc") == 2
    out, err = capsys.readouterr()
    line = f"{tmp_path}/mine: mine: 18 photographs, 18 with a pose, 15 to train on, 3 to test on"
    assert line in out and f"{tmp_path}/mine: whole\n" in out
    assert f"{tmp_path}/nyc: found no images_2/, images_4/, images_8/, which the released capture has" in out
    assert err == f"flexgs: data check: {tmp_path}/nyc is not whole\n"


def test_a_check_finds_what_is_missing_and_broken(capture, tmp_path, capsys):
    bonsai, small = tmp_path / "bonsai", tmp_path / "bonsai" / "images_2"
    shutil.copytree(capture, bonsai)
    small.mkdir()
    for path in (bonsai / "images").iterdir():
        with Image.open(path) as image:
            image.resize((32, 24)).save(small / path.name)
    shutil.copytree(bonsai / "images", bonsai / "images_3")
    (small / "003.png").unlink()
    (small / "004.png").write_bytes(b"not a picture")
    assert flexgs("data", "check", bonsai, tmp_path / "no") == 2
    out, err = capsys.readouterr()
    assert f"1 of 18 images are not there, for instance {small}/003.png" in out
    assert (f"1 of 18 images are not what they should be, for instance {small}/004.png: "
            "cannot be read as an image" in out)
    assert ("18 of 18 images are not what they should be" in out
            and "found 64x48 pixels, which is not 1/3 of " in out)
    assert ("found 18 images with a camera, but the released capture has 292" in out
            and "found no images_4/, images_8/" in out)
    assert (f"{tmp_path}/no: no such folder" in out and err.endswith("are not whole\n")
            and err.count("\n") == 1)
