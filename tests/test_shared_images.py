"""Photographs that the workers of a machine decode once: real processes, which may be killed."""

import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.scene import load_scene, shared_images, views
from flexgs.scene.shared_images import SharedImages, arranged, share_images
from flexgs.training.trainer import Trainer
from tests.test_distributed import spawn


def _train(group: Group, capture: Path, config: Config, room: Path, budget: int | None) -> None:
    """Two epochs; every photograph is decoded once if all fit, and together never more than the budget."""
    shared_images.ROOM, shared_images.ROOM_AHEAD = room, 3
    decoded, decode = [], views.decode
    views.decode = lambda path: decoded.append(path) or decode(path)
    scene, alone = load_scene(capture, factor=1, cache_bytes=budget), load_scene(capture, factor=1)
    cache = scene.train[0].cache
    cache.limit //= group.world  # as LOCAL_WORLD_SIZE does
    trainer = Trainer(config, scene, group)
    assert not list(room.iterdir())  # nothing would be left after a kill
    for _ in range(2 * len(scene.train) // config.batch):
        trainer.train_step()
    trainer._ahead.shutdown()
    names = [path.name for part in group.gather(decoded) for path in part]
    held = sum(group.gather(cache.bytes))
    if budget is None:
        assert len(names) == len(set(names)) == len(scene.train) and held == 0
        assert min(map(len, group.gather(decoded))) > 0  # the work is divided
    else:
        assert held + sum(slot.nbytes for slot in cache.shared.slots.values()) <= budget
        assert 0 < len(cache.shared.slots) < len(scene.train)
        once = [str(key[0]) for key in cache.shared.slots]
        assert all(names.count(Path(path).name) <= 1 for path in once) and len(set(names)) == len(scene.train)
    for mine, same in zip([*scene.train, *scene.test], [*alone.train, *alone.test], strict=True):
        assert torch.equal(mine.image(), same.image())


SIZE = 64 * 48 * 3


@pytest.mark.parametrize("budget", [None, 12 * SIZE])
def test_two_workers_decode_a_photograph_once(capture, config, tmp_path, budget):
    config.batch, config.base.refine_start = 2, 0.9
    spawn(2, _train, capture, config, tmp_path, budget)


def _without_room(group: Group, capture: Path, room: Path, budget: int) -> None:
    """No such file system, or a budget for less than what each worker decodes ahead: all as alone."""
    shared_images.ROOM = room
    scene = load_scene(capture, factor=1, cache_bytes=budget)
    share_images(scene, group)
    assert scene.train[0].cache.shared is None and scene.train[0].cache.limit == budget
    assert scene.train[0].image().shape == (48, 64, 3)


def test_without_shared_memory_each_worker_has_its_own(capture, tmp_path):
    spawn(2, _without_room, capture, tmp_path / "missing", 1 << 20)
    spawn(2, _without_room, capture, tmp_path, SIZE)


def _never_done(file: Path, slots: dict, key: tuple, begun) -> None:
    def make() -> np.ndarray:
        begun.set()
        multiprocessing.Event().wait()

    SharedImages(file, slots).get(key, make)


def test_what_a_killed_worker_was_decoding_another_decodes(scene, tmp_path):
    slots, size, _ = arranged(scene.train, 1 << 30, 2, 1 << 30)
    file, (key, slot) = tmp_path / "images", next(iter(slots.items()))
    file.touch()
    with file.open("r+b") as out:
        out.truncate(size)
    context = multiprocessing.get_context("forkserver")
    begun = context.Event()
    other = context.Process(target=_never_done, args=(file, slots, key, begun))
    other.start()
    while not begun.wait(0.1):
        assert other.is_alive()
    other.kill()
    other.join()
    made = np.full(slot.shape, 7, slot.dtype)
    mine = SharedImages(file, slots)
    for make in (lambda: made, partial(pytest.fail, "it is decoded again")):
        assert (mine.get(key, make) == 7).all()
    with pytest.raises(ZeroDivisionError):
        mine.get(list(slots)[1], lambda: 1 / 0)
    assert (mine.get(list(slots)[1], lambda: made + 1) == 8).all()  # a failure is tried again


def test_a_full_memory_leaves_it_to_each_worker(scene, tmp_path, monkeypatch):
    slots, size, _ = arranged(scene.train, 1 << 30, 2, 1 << 30)
    (tmp_path / "images").write_bytes(bytes(size))

    def full(*args: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shared_images.os, "posix_fallocate", full)
    view, cache = scene.train[0], scene.train[0].cache
    cache.shared = SharedImages(tmp_path / "images", slots)
    assert torch.equal(view.image(), view.image()) and cache.bytes == SIZE


def test_what_has_no_room_in_shared_memory_stays_with_the_workers(scene):
    """As in a container, whose /dev/shm has 64 MB."""
    limit, room = 3 * len(scene.train) * SIZE, 4 * SIZE
    slots, size, left = arranged(scene.train, limit, 2, room)
    assert len(slots) == 3 and size <= room and size + 2 * left <= limit < size + 2 * left + 2
    slots, size, left = arranged(scene.train, limit, 2, limit)
    assert len(slots) == len(scene.train) and left == 0
    assert not arranged(scene.train, SIZE, 2, limit)[0]


def test_the_budget_is_the_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert views.cache_limit(800) == 100
    few = views.cache_limit()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    assert views.cache_limit() < few <= 16 << 30
