"""Which scene trains with how many workers, and on which machine: the policy, over plain data and without
Ray.

Waiting scenes start with the fewest workers, the longest first, each on the machine with the least work per
device. While one waits, nothing else changes. Then spare devices go to the scenes that would end last, and
where none is spare, scenes that would end early give devices to those, once each. A scene that trains changes
its workers by stopping at a checkpoint and starting again, so it does that only where more time is saved than
the restart costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

SERIAL = 1 / 12
"""The part of a worker's time that more workers do not share: four then make 3.2 times the views of one, and
eight 5.1 times, as is reported for GPUs of one machine that share gradients over NVLink."""
RESTART_SECONDS = 20.0
"""From the end of a scene's workers to the first step of the next: 12 to 17 s for Ray Train's start, and
reading the scene."""
ASSUMED_RATE = 20.0
"""Views per second of one worker while no scene has been measured. It is the same for all, so it decides
little."""


class Placement(NamedTuple):
    """So many workers on a machine."""

    machine: str
    workers: int


@dataclass(frozen=True)
class SceneState:
    """A scene that is not finished."""

    name: str
    views: float
    """Left to train."""
    rate: float | None = None
    """Views per second of one worker; None: not measured, taken as the mean of those that are."""
    place: Placement | None = None
    """Where it trains; None: nowhere yet."""
    going: Placement | None = None
    """Where it is going to train, once it has stopped."""
    settled: bool = False
    """Whether it has been measured since it was started, so that it may be moved."""
    gave: bool = False
    """Whether it has gone on with fewer workers before; it does so once, lest unsteady rates move scenes to
    and fro."""


def speedup(workers: int) -> float:
    """How many times the views of one worker so many make in the same time (Amdahl)."""
    return workers / (1 + SERIAL * (workers - 1))


def plan(machines: Mapping[str, int], scenes: Sequence[SceneState],
         sizes: Sequence[int]) -> dict[str, Placement]:
    """What to do now, by scene: to start there if it waits, to stop and start again there if it trains.

    machines: devices of each that is alive; sizes: the numbers of workers that a scene may have, rising.
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
    if not starts and running and len(running) == len(scenes) and (given := _give(machines, running, givers,
                                                                                  left, sizes)):
        return given
    while True:
        grown = _fill(free, starts | running, left, sizes)
        wasted = [name for name, place in running.items() if name in grown
                  and not _pays(left[name], place, grown[name])]
        if not wasted:
            return starts | grown
        for name in wasted:  # what they would have got may serve others
            del running[name]


def _free(machines: Mapping[str, int], scenes: Sequence[SceneState]) -> dict[str, int]:
    """Devices that no scene has or is going to have; one that moves keeps what it has until it has moved."""
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
    """Places for those of the waiting that find one; takes them from free."""
    load = {machine: sum(left[s.name] for s in scenes if (place := s.going or s.place)
                         and place.machine == machine)
            for machine in machines}
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
    """Who goes on with fewer workers, where dealing each machine's devices out anew ends the last scene a
    tenth sooner. Those who end soon give nothing: their devices are free then. Who is to have more gets it
    when they are."""
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
    """Hand out what is free, size by size, to the scene that would end last, there or, unless all stay, on a
    machine with more room; the places that change."""
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
        elif more and free.get(roomiest, 0) >= more:  # its old place stays its own until it has moved
            free[roomiest] -= more
            now[last] = Placement(roomiest, more)
        else:
            candidates.remove(last)
    return {name: place for name, place in now.items() if place != places[name]}


def _pays(left: float, now: Placement, then: Placement) -> bool:
    """Whether more workers, after a restart, end the scene sooner by at least what the restart costs."""
    return left / speedup(now.workers) - left / speedup(then.workers) > 2 * RESTART_SECONDS
