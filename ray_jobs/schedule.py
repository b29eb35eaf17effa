"""The schedule: which scenes get workers that nobody uses, decided without Ray.

Scenes start with the fewest workers, where and when Ray has room. When none waits, free devices go to the
scenes that would end last, on their machines. A running scene gets more workers by stopping at a checkpoint
and starting again, so only where more time is saved than the restart costs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

SERIAL = 1 / 12
"""The serial fraction in Amdahl's law: 4 workers are 3.2 times as fast as one and 8 are 5.1 times as fast, as
is reported for GPUs of one machine that share gradients over NVLink."""
RESTART_SECONDS = 20.0
"""Time from the end of a scene's workers to the first step of the next ones: 12 to 17 s for Ray Train to
start, and a few to read the scene."""


class Running(NamedTuple):
    """A scene that trains."""

    name: str
    machine: str
    """Ray's id of the machine of its workers."""
    workers: int
    seconds: float
    """Time until it ends with these workers."""


def speedup(workers: int) -> float:
    """Return how many times as fast as one worker so many are, by Amdahl's law: n / (1 + SERIAL (n - 1))."""
    return workers / (1 + SERIAL * (workers - 1))


def growth(free: Mapping[str, int], scenes: Sequence[Running], sizes: Sequence[int]) -> dict[str, int]:
    """Hand out free devices, size by size, to the scene that would end last.

    Args:
        free: the free devices of each machine.
        scenes: the scenes that train.
        sizes: the numbers of workers that a scene may have, rising.

    Returns:
        The new number of workers of each scene that is to start again with more.
    """
    free, now = dict(free), {scene.name: scene.workers for scene in scenes}

    def seconds(scene: Running) -> float:
        return scene.seconds * speedup(scene.workers) / speedup(now[scene.name])

    candidates = list(scenes)
    while candidates:
        last = max(candidates, key=seconds)
        more = next((size for size in sizes if size > now[last.name]), None)
        if more and free.get(last.machine, 0) >= more - now[last.name]:
            free[last.machine] -= more - now[last.name]
            now[last.name] = more
        else:
            candidates.remove(last)
    return {scene.name: now[scene.name] for scene in scenes
            if scene.seconds - seconds(scene) > 2 * RESTART_SECONDS}
