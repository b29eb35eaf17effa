"""How large a run is where nobody has said: as its preset has it on a GPU, minutes of work on a machine
without one."""

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from flexgs.config import Config


class Size(NamedTuple):
    """The most that a scene gets where there is no GPU, unless the user chooses: minutes on a laptop."""

    steps: int
    splats: int


LAPTOP = Size(steps=6000, splats=30_000)
DEMO = Size(steps=4000, splats=20_000)


def fitting(config: Config, gpu: bool, chosen: Collection[str], size: Size = LAPTOP) -> Config:
    """The config for a machine with a GPU, or without one: cut down to size and said in a line, except for
    what the user chose.

    chosen: the flags that were typed; of a --config everything is the user's.
    """
    if gpu or "--config" in chosen:
        return config
    steps = config.steps if "--steps" in chosen else min(config.steps, size.steps)
    splats = config.base.max_splats
    if "--base.max-splats" not in chosen and not config.base.ply:
        splats = min(splats, size.splats)
    smaller = replace(config, steps=steps, base=replace(config.base, max_splats=splats))
    if smaller != config:
        most, flags = ("", "--steps changes") if config.base.ply else (
            f" and at most {splats:,} Gaussians per scene", "--steps and --base.max-splats change")
        print(f"no GPU: laptop size, {steps:,} views{most}; {flags} that", flush=True)
    return smaller
