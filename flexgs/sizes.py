"""The size of a run that the user has not chosen: the preset's with a GPU, a laptop's without one."""

from dataclasses import replace
from typing import NamedTuple

from flexgs.config import Config
from flexgs.options import Typed


class Size(NamedTuple):
    """Limits of a scene on a machine without a GPU, where it trains for minutes."""

    steps: int
    """Views to train on."""
    splats: int
    """Gaussians."""


LAPTOP = Size(steps=6000, splats=30_000)
DEMO = Size(steps=4000, splats=20_000)


def fitting(config: Config, gpu: bool, typed: Typed, size: Size = LAPTOP) -> Config:
    """Return the config with steps and Gaussians limited to `size` if there is no GPU, and print that.

    What the user has typed is not limited, nor is anything if the settings come from --config.
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
