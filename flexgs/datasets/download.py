"""Download of known captures: an archive, resumed when the connection breaks, then one capture unpacked.

Files below DATA_ROOT:
    downloads/360_v2.zip        a whole archive, downloaded or put there by hand
    downloads/360_v2.zip.part/  a partial download, with the lock of the process at work on it
    bicycle/                    a whole capture
"""

import base64
import binascii
import hashlib
import os
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flexgs.datasets.catalog import Archive, Known, is_capture
from flexgs.errors import UserError
from flexgs.files import make_folder, only_one, write_json
from flexgs.http import Answer, HTTPError, request
from flexgs.inputs import read_json, regular_file
from flexgs.scene.colmap import find_models
from flexgs.urls import public

CHUNK = 1 << 20
LONGEST_PAUSE = 60.0
LONGEST = 24 * 3600.0
"""Seconds that all attempts of one call to fetch may take."""


@dataclass(frozen=True)
class Version:
    """The version of a file on a server, by its headers; only the same version can be resumed."""

    validator: str | None
    """Value for If-Range: a strong ETag, or else the date; None if a download cannot be resumed."""
    size: int | None
    """Size of the whole file in bytes; None if the server does not say it."""
    md5: str | None
    """MD5 in base64 from the header x-goog-hash of Google Cloud Storage; None if there is none."""


def get(wanted: Sequence[Known], data_root: Path, *, tries: int = 6, pause: float = 1.0) -> list[Path]:
    """Return the folders of captures under data_root, downloading and unpacking those that are absent.

    A capture's folder appears only once it is whole, and the same call resumes an interrupted one. `tries`
    and `pause` are passed to fetch. UserError if the server does not answer (with how to do it by hand), the
    disk is full, the archive is damaged or would write elsewhere, or another process works on it.
    """
    targets = {known: known.find(data_root) or data_root / known.name for known in wanted}
    for target in targets.values():
        if target.exists() and not is_capture(target):
            raise UserError(f"{target}: exists and is not a capture; expected none or a "
                            "whole one: move it away")
    missing = sorted((known for known, target in targets.items() if not target.exists()),
                     key=lambda known: known.archive.file)
    for archive, group in groupby(missing, lambda known: known.archive):
        downloads = make_folder(data_root / "downloads")
        part = downloads / f"{archive.file}.part"
        with only_one(part):
            file = fetch(archive, downloads, tries=tries, pause=pause)
            for known in group:
                if not targets[known].exists():
                    unpack(file, known.inside, targets[known])
            shutil.rmtree(part)
    return list(targets.values())


def fetch(archive: Archive, folder: Path, *, tries: int = 6, pause: float = 1.0,
          longest: float = LONGEST) -> Path:
    """Download the archive into folder, unless it is there with the right checksum, and return its path.

    Args:
        archive: the archive.
        folder: the folder of downloads.
        tries: number of successive failures, each without any progress, after which to give up.
        pause: seconds before the next attempt, doubled after each failure without progress.
        longest: seconds that all attempts together may take.

    Raises:
        UserError: the download failed, as in get().
    """
    file, part = folder / archive.file, make_folder(folder / f"{archive.file}.part")
    url = public(archive.url)
    if file.exists():
        if wrong := _wrong(file, archive, None):
            raise UserError(f"{file}: {wrong}: it is cut off or damaged, or another archive than "
                            f"{url}: remove it, and the same command downloads it")
        return file
    data, left, before, end = part / "data", tries, "", time.monotonic() + longest
    most = _size(data)
    while True:
        try:
            version = _attempt(archive, part, end - time.monotonic())
        except HTTPError as e:
            if longer := e.status == 416:  # the data here are longer than the file on the server
                data.unlink(missing_ok=True)
            left = tries if _size(data) > most else left - 1
            most = max(most, _size(data))
            if left <= 0 or not (e.transient or longer) or time.monotonic() > end:
                raise UserError(f"{e}; {_by_hand(file)}") from None
            print(f"{archive.file}: {e.reason}; goes on from {_size(data) / 1e6:,.1f} MB", flush=True)
            time.sleep(min(pause * 2 ** (tries - left), LONGEST_PAUSE))
            continue
        wrong = _wrong(data, archive, version)
        if not wrong:
            os.replace(data, file)
            return file
        data.unlink()
        if before:
            raise UserError(f"{url}: arrived damaged twice ({wrong}); nothing is kept; {_by_hand(file)}")
        before = wrong
        print(f"{archive.file}: arrived damaged ({wrong}); once more", flush=True)


def _by_hand(file: Path) -> str:
    return (f"try again later, or do it by hand: put the archive at {file} and give the same "
            f"command, or what is in it, a folder for each capture, into {file.parent.parent}")


def _attempt(archive: Archive, part: Path, seconds: float) -> Version:
    """Complete part/data in one request of at most `seconds`; HTTPError, and the received data stay."""
    data, about = part / "data", part / "version.json"
    have, version, headers = _size(data), _read(about), {}
    if have and version and version.validator:
        if have == version.size:
            return version
        headers = {"Range": f"bytes={have}-", "If-Range": version.validator}
    with request(archive.url, headers, seconds) as answer:
        before = version if answer.span else None
        now = _version(answer)
        if before:
            assert answer.span
            if (answer.span.first != have or now.validator != before.validator
                or now.size not in (None, before.size)):
                data.unlink()
                raise HTTPError(archive.url, "the file has changed on the server", transient=True)
            now = before
        else:
            data.unlink(missing_ok=True)  # before version.json: these data are of another version
            have = 0
            write_json(about, asdict(now))
        if now.size is not None:
            _check_room(part, now.size - have)
        with data.open("ab" if before else "wb") as out, _progress() as progress:
            task = progress.add_task(archive.file, total=now.size, completed=have)
            for chunk in answer.chunks(shutil.disk_usage(part).free if now.size is None else now.size - have):
                out.write(chunk)
                progress.advance(task, len(chunk))
    if now.size is not None and _size(data) != now.size:  # the server sent fewer bytes than asked for
        raise HTTPError(archive.url, "the connection broke", transient=True)
    return now


def unpack(file: Path, inside: str, target: Path) -> None:
    """Unpack the folder `inside` of a zip file as the folder target, as a whole or not at all.

    UserError if the archive is damaged, has no such capture, or has a member that is a link or would be
    written outside the target.
    """
    regular_file(file, "an archive")
    work = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(work, ignore_errors=True)
    make_folder(work)
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.header_offset < 0:
                    raise zipfile.BadZipFile("a member that begins before the file")
                if _is_evil(info):
                    raise UserError(f"{file}: the member {info.filename!r} is a link or lies outside of "
                                    "the archive; nothing was unpacked: do not use this file, "
                                    "get it from the source")
            chosen = [info for info in archive.infolist() if info.filename.startswith(f"{inside}/")
                      and not info.is_dir()]
            total = sum(info.file_size for info in chosen)
            _check_room(work, total)
            with _progress() as progress:
                task = progress.add_task(f"unpacking {target.name}", total=total)
                for info in chosen:
                    path = work / info.filename[len(inside) + 1:]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as source, path.open("wb") as out:
                        shutil.copyfileobj(source, out, CHUNK)
                    progress.advance(task, info.file_size)
            if not find_models(work):
                tops = sorted({info.filename.partition("/")[0] for info in archive.infolist()})
                raise UserError(f"{file}: found no COLMAP capture in {inside}/ of it, but "
                                f"{', '.join(tops[:12])}; unpack it by hand to {target}")
        os.rename(work, target)
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError,
            FileExistsError, NotADirectoryError, IsADirectoryError) as e:
        raise UserError(f"{file}: damaged ({e}): remove it, and the same command downloads it "
                        "again") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_evil(info: zipfile.ZipInfo) -> bool:
    """Whether unpacking a member could write outside the folder, or make other than files and folders."""
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    return (name.startswith("/") or "\\" in name or ":" in name.partition("/")[0] or ".." in name.split("/")
            or kind not in (0, stat.S_IFREG, stat.S_IFDIR))


def _version(answer: Answer) -> Version:
    etag, hashes = answer.header("ETag"), answer.header("x-goog-hash").split(",")
    validator = etag if etag and not etag.startswith("W/") else answer.header("Last-Modified")
    return Version(validator if validator and validator.isascii() and validator.isprintable() else None,
                   answer.span.total if answer.span else answer.length,
                   dict(one.strip().partition("=")[::2] for one in hashes).get("md5"))


def _read(file: Path) -> Version | None:
    try:
        return read_json(file, Version)
    except UserError:  # absent or damaged: the download begins again
        return None


def _wrong(file: Path, archive: Archive, version: Version | None) -> str:
    """Say why the file is not the whole archive, by its zip directory and checksums; "" if it is."""
    if not zipfile.is_zipfile(regular_file(file, "an archive")):
        return "not a zip file"
    for kind, expected in (("sha256", archive.sha256), ("md5", _hex(version.md5) if version else None)):
        if expected:
            with file.open("rb") as data:
                found = hashlib.file_digest(data, kind).hexdigest()
            if found != expected:
                return f"found {kind} {found}, expected {expected}"
    return ""


def _hex(text: str | None) -> str | None:
    try:
        return base64.b64decode(text, validate=True).hex() if text else None
    except binascii.Error:
        return None


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{folder}: found {free / 1e9:.2f} GB free on this disk, expected "
                        f"{need / 1e9:.2f} GB; free some of it, or choose another --data-root")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                    TimeRemainingColumn())
