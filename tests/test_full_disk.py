"""A disk that fills up while a file is written: an error, and the file that was there before stays, alone."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import random_splats

from flexgs.camera_path import around
from flexgs.errors import UserError
from flexgs.formats import FORMATS
from flexgs.view.video import write_video


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system refuses to make files longer, to this process and to those that it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kept(path: Path, write) -> None:
    path.write_bytes(b"old")
    with no_file_above(4000), pytest.raises((OSError, UserError)):
        write()
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gltf"])
def test_formats(scene, tmp_path, name):
    splats, path = random_splats(2000, 1), tmp_path / f"x{FORMATS[name].suffix}"
    splats.shN.clamp_(-0.9, 0.9)
    FORMATS[name].write(splats, path, scene.train[:2])  # there is room
    kept(path, lambda: FORMATS[name].write(splats, path, scene.train[:2]))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_videos_and_stills(tmp_path, suffix):
    splats, path = random_splats(300), tmp_path / f"x{suffix}"
    cameras = around(splats, 6)
    size = cameras[0].width, cameras[0].height
    assert not size[0] % 2 and not size[1] % 2
    kept(path, lambda: write_video(splats, cameras, path, 30, (0.0, 0.0, 0.0)))
