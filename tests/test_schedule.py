"""Who gets the devices that nobody uses."""

import random

import pytest

from ray_jobs.schedule import RESTART_SECONDS, Running, growth, speedup

SIZES = (1, 2, 4, 8)


def running(name: str, seconds: float, workers: int = 1, machine: str = "a") -> Running:
    return Running(name, machine, workers, seconds)


def test_the_scene_that_would_end_last_gets_what_is_free_on_its_machine():
    late, early = running("late", 9000), running("early", 1000)
    assert growth({"a": 7}, [late, early], SIZES) == {"late": 8}
    assert growth({"a": 2}, [late], SIZES) == {"late": 2}  # 4 would need 3 more
    assert growth({"b": 7}, [late, early], SIZES) == growth({}, [late, early], SIZES) == {}
    assert growth({"a": 7}, [late, early], (1,)) == {}
    assert growth({"a": 1, "b": 3}, [late, running("other", 9000, machine="b")], SIZES) == {
        "late": 2, "other": 4}


def test_scenes_as_long_as_each_other_share():
    assert growth({"a": 6}, [running("x", 9000), running("y", 9000)], SIZES) == {"x": 4, "y": 4}


def test_a_scene_is_not_started_again_for_less_than_that_costs():
    saved = 1 - 1 / speedup(2)
    assert growth({"a": 1}, [running("x", 1.9 * RESTART_SECONDS / saved)], SIZES) == {}
    assert growth({"a": 1}, [running("x", 2.1 * RESTART_SECONDS / saved)], SIZES) == {"x": 2}


@pytest.mark.parametrize("seed", range(20))
def test_no_more_is_handed_out_than_is_free_and_no_scene_ends_later(seed):
    rng = random.Random(seed)
    free = {machine: rng.randint(0, 8) for machine in "abc"}
    scenes = [running(str(i), rng.uniform(10, 9000), rng.choice(SIZES), rng.choice("abcd")) for i in range(9)]
    grown = growth(free, scenes, SIZES)
    for machine in "abcd":
        more = sum(grown.get(s.name, s.workers) - s.workers for s in scenes if s.machine == machine)
        assert 0 <= more <= free.get(machine, 0)
    assert all(grown[s.name] in SIZES and grown[s.name] > s.workers for s in scenes if s.name in grown)
