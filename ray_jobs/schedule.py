"""The schedule: which scene trains with how many workers on which machine, decided without Ray.

Waiting scenes start with the fewest workers, the scene with the most work first, each on the machine with the
least work per device. While a scene waits, no running scene is moved. When none waits, spare devices go to
the scenes that would end last; where no device is spare, scenes that would end early give some up, once each.
A running scene changes its workers by stopping at a checkpoint and starting again, so it does that only where
more time is saved than the restart costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

SERIAL = 1 / 12
"""The serial fraction in Amdahl's law: 4 workers are 3.2 times as fast as one and 8 are 5.1 times as fast, as
is reported for GPUs of one machine that share gradients over NVLink."""
RESTART_SECONDS = 20.0
"""Time from the end of a scene's workers to the first step of the next ones: 12 to 17 s for Ray Train to
start, and a few to read the scene."""
ASSUMED_RATE = 20.0
"""Views per second of one worker, assumed for all scenes alike until one has been measured."""


class Placement(NamedTuple):
    """A number of workers on a machine."""

    machine: str
    workers: int


@dataclass(frozen=True)
class SceneState:
    """An unfinished scene, as the schedule sees it."""

    name: str
    views: float
    """Views left to train."""
    rate: float | None = None
    """Views per second of one worker; None if not measured: the mean of the measured scenes is taken."""
    place: Placement | None = None
    """Where the scene trains; None while it waits."""
    going: Placement | None = None
    """Where the scene will train once it has stopped; None if it is not being moved."""
    settled: bool = False
    """Whether its rate has been measured since its last start; only then may it be moved."""
    gave: bool = False
    """Whether it has given up workers before; it does so once, lest unsteady rates move scenes to and fro."""


def speedup(workers: int) -> float:
    """Return how many times as fast as one worker so many are, by Amdahl's law: n / (1 + SERIAL (n - 1))."""
    return workers / (1 + SERIAL * (workers - 1))


def plan(machines: Mapping[str, int], scenes: Sequence[SceneState],
         sizes: Sequence[int]) -> dict[str, Placement]:
    """Decide what to do now.

    Args:
        machines: the number of devices of each machine that is alive.
        scenes: the unfinished scenes.
        sizes: the numbers of workers that a scene may have, rising.

    Returns:
        Where scenes should start, if they wait, or be moved to, if they train; other scenes stay as they are.
    """
    rates = [scene.rate for scene in scenes if scene.rate]
    usual = fmean(rates) if rates else ASSUMED_RATE
    left = {scene.name: scene.views / (scene.rate or usual) for scene in scenes}  # seconds of one worker
    free = _free(machines, scenes)
    waiting = [scene for scene in scenes if not scene.place and not scene.going]
    starts = _starts(machines, free, scenes, waiting, left, sizes[0])
    if len(starts) < len(waiting):
        return starts
    running = {s.name: s.place for s in scenes if s.place and s.settled and not s.going}
    givers = [scene.name for scene in scenes if not scene.gave]
    all_settled = running and len(running) == len(scenes)
    if not starts and all_settled and (given := _give(machines, running, givers, left, sizes)):
        return given
    while True:
        grown = _fill(free, starts | running, left, sizes)
        wasted = [name for name, place in running.items() if name in grown
                  and not _pays(left[name], place, grown[name])]
        if not wasted:
            return starts | grown
        for name in wasted:  # the devices that these would have got may serve other scenes
            del running[name]


def _free(machines: Mapping[str, int], scenes: Sequence[SceneState]) -> dict[str, int]:
    """Return the free devices of each machine; a scene that is being moved holds its old and new ones."""
    free = dict(machines)
    for scene in scenes:
        held: dict[str, int] = {}
        for place in (scene.place, scene.going):
            if place and place.machine in free:
                held[place.machine] = max(place.workers, held.get(place.machine, 0))
        for machine, workers in held.items():
            free[machine] -= workers
    return free


def _starts(machines: Mapping[str, int], free: dict[str, int], scenes: Sequence[SceneState],
            waiting: Sequence[SceneState], left: Mapping[str, float], workers: int) -> dict[str, Placement]:
    """Place the waiting scenes that find room, longest first, and subtract their devices from `free`."""
    load = dict.fromkeys(machines, 0.0)
    for scene in scenes:
        if (place := scene.going or scene.place) and place.machine in load:
            load[place.machine] += left[scene.name]
    starts = {}
    for scene in sorted(waiting, key=lambda s: left[s.name], reverse=True):
        fitting = [machine for machine, devices in free.items() if devices >= workers]
        if not fitting:
            break
        machine = min(fitting, key=lambda m: load[m] / machines[m])
        starts[scene.name] = Placement(machine, workers)
        free[machine] -= workers
        load[machine] += left[scene.name]
    return starts


def _give(machines: Mapping[str, int], running: Mapping[str, Placement], givers: Sequence[str],
          left: Mapping[str, float], sizes: Sequence[int]) -> dict[str, Placement]:
    """Choose running scenes that continue with fewer workers, so that the last scene ends a tenth sooner.

    The devices of each machine are dealt out anew; the scenes that get more receive them in a later plan,
    when they are free. Nothing changes if a scene that would give up devices ends soon and frees them anyway.
    """
    fewest = {**running, **{name: Placement(running[name].machine, sizes[0]) for name in givers}}
    free = _free(machines, [SceneState(name, 0, place=place) for name, place in fewest.items()])
    best = fewest | _fill(free, fewest, left, sizes, stay=True)
    ends = {name: left[name] / speedup(place.workers) for name, place in running.items()}
    sooner = max(left[name] / speedup(place.workers) + RESTART_SECONDS * (place != running[name])
                 for name, place in best.items())
    given = {name: place for name, place in best.items() if place.workers < running[name].workers}
    worth = sooner < 0.9 * max(ends.values()) and all(ends[name] > 20 * RESTART_SECONDS for name in given)
    return given if worth else {}


def _fill(free: Mapping[str, int], places: Mapping[str, Placement], left: Mapping[str, float],
          sizes: Sequence[int], stay: bool = False) -> dict[str, Placement]:
    """Hand out free devices, size by size, to the scene that would end last; return the places that change.

    A scene grows on its own machine or, unless `stay`, moves to the machine with the most free devices.
    """
    free, now = dict(free), dict(places)
    candidates = sorted(now)
    while candidates:
        last = max(candidates, key=lambda name: left[name] / speedup(now[name].workers))
        place = now[last]
        more = next((size for size in sizes if size > place.workers), None)
        roomiest = place.machine if stay else max(free, key=lambda machine: free[machine], default="")
        if more and free.get(place.machine, 0) >= more - place.workers:
            free[place.machine] -= more - place.workers
            now[last] = Placement(place.machine, more)
        elif more and free.get(roomiest, 0) >= more:  # its old devices are not free until it has moved
            free[roomiest] -= more
            now[last] = Placement(roomiest, more)
        else:
            candidates.remove(last)
    return {name: place for name, place in now.items() if place != places[name]}


def _pays(left: float, now: Placement, then: Placement) -> bool:
    """Whether more workers, after a restart, end the scene sooner by at least what the restart costs."""
    return left / speedup(now.workers) - left / speedup(then.workers) > 2 * RESTART_SECONDS
