"""How large a run is where nobody has said: as its preset has it on a GPU, minutes of work on a machine
without one."""

from dataclasses import replace
from typing import NamedTuple

from flexgs.config import Config
from flexgs.options import Typed


class Size(NamedTuple):
    """The most that a scene gets where there is no GPU, unless the user chooses: minutes on a laptop."""

    steps: int
    splats: int


LAPTOP = Size(steps=6000, splats=30_000)
DEMO = Size(steps=4000, splats=20_000)


def fitting(config: Config, gpu: bool, typed: Typed, size: Size = LAPTOP) -> Config:
    """The config for a machine with a GPU, or without one: cut down to size and said in a line, except for
    what the user chose.

    Of a --config everything is the user's choice.
    """
    if gpu or typed.has("--config"):
        return config
    steps = config.steps if typed.has("--steps") else min(config.steps, size.steps)
    splats = config.base.max_splats
    if not typed.has("--base.max-splats") and not config.base.ply:
        splats = min(splats, size.splats)
    smaller = replace(config, steps=steps, base=replace(config.base, max_splats=splats))
    if smaller != config:
        most, flags = ("", "--steps changes") if config.base.ply else (
            f" and at most {splats:,} Gaussians per scene", "--steps and --base.max-splats change")
        print(f"no GPU: laptop size, {steps:,} views{most}; {flags} that", flush=True)
    return smaller
