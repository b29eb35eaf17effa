"""The size of a run that the user has not chosen: one that fits the machine and the capture."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flexgs.config import Config
from flexgs.errors import UserError
from flexgs.options import Typed
from flexgs.pool import get_num_threads
from flexgs.scene.load import photograph_size


class Size(NamedTuple):
    """Limits of a scene on a machine without a GPU, where it trains for minutes."""

    steps: int
    """Views to train on."""
    splats: int
    """Gaussians."""


LAPTOP = Size(steps=6000, splats=30_000)
DEMO = Size(steps=4000, splats=20_000)
FACTORS = (1, 2, 4, 8)
"""The images are reduced by the first of these factors that makes them small enough, or else by the last."""
PIXELS = 200_000
"""Most pixels of an image without a GPU."""
SIDE = 1600
"""Most pixels along a side of an image with a GPU, as in the experiments of 3DGS (Kerbl et al. 2023)."""
SECONDS_PER_PIXEL, SECONDS_PER_SPLAT = 3e-7, 1.5e-6
"""What a view costs one core, per pixel and per Gaussian: the mean of both stages of the default."""
SLOWER = 2.0
"""A machine takes up to so many times the estimate, in which no speed of this machine is measured."""


def fitting(config: Config, gpu: bool, typed: Typed, size: Size = LAPTOP, capture: Path | None = None,
            run: Path | None = None) -> Config:
    """Return the config at a size that fits the machine and the capture, and print that size.

    Without a GPU, views and Gaussians are limited to `size`. What the user has typed stays, and everything
    does if the settings come from --config.

    Args:
        config: the settings to start from.
        gpu: whether there is a GPU, or the run is to be as large as with one.
        typed: the words of the command line.
        size: the limits without a GPU.
        capture: the folder of the capture, whose images are reduced to fit; without it, and with a typed
            --preset or --dataset, which have protocols of their own, the factor of the config stays.
        run: the run folder. A run that has begun keeps its size.
    """
    if typed.has("--config"):
        return config
    begun = Config.load(run / "config.json") if run and (run / "config.json").is_file() else None
    steps, splats, factor = config.steps, config.base.max_splats, config.data.factor
    if begun:
        steps, splats, factor = begun.steps, begun.base.max_splats, begun.data.factor
    elif not gpu:
        steps, splats = min(steps, size.steps), min(splats, size.splats)
    pixels = None
    if capture:
        with suppress(UserError):  # whoever loads the capture next says what is wrong with it
            pixels = photograph_size(capture, config.data.model)
    if pixels and not begun and not typed.has("--preset", "--dataset"):
        factor = next((f for f in FACTORS if _fits(pixels, f, gpu)), FACTORS[-1])
    fitted = replace(
        config, steps=config.steps if typed.has("--steps") else steps,
        data=replace(config.data, factor=config.data.factor if typed.has("--data.factor") else factor),
        base=replace(config.base, max_splats=config.base.max_splats
                     if typed.has("--base.max-splats") or config.base.ply else splats))
    if fitted != config and (pixels or not capture):
        where = f"{capture.name}: " if capture else ""
        print(f"{where}{_said(fitted, gpu, pixels, bool(begun))}", flush=True)
    return fitted


def _fits(pixels: tuple[int, int], factor: int, gpu: bool) -> bool:
    width, height = pixels[0] / factor, pixels[1] / factor
    return max(width, height) <= SIDE if gpu else width * height <= PIXELS


def _cost(config: Config) -> float:
    """Return about how long a view takes, over both stages, as a multiple of one of stage 1."""
    return 1 + (1 - config.base.stage1_fraction) * (config.ratios.cost - 1)


def _said(config: Config, gpu: bool, pixels: tuple[int, int] | None, begun: bool) -> str:
    """Say the size of a run in one line, and without a GPU about how long it takes."""
    said = f"{'as begun' if begun else 'GPU' if gpu else 'no GPU'}: {config.steps:,} views"
    if not config.base.ply:
        said += f", at most {config.base.max_splats:,} Gaussians"
    if pixels:
        width, height = (max(1, round(side / config.data.factor)) for side in pixels)
        said += f", images at 1/{config.data.factor} ({width}x{height})"
        if not gpu:
            per_view = SECONDS_PER_PIXEL * width * height + SECONDS_PER_SPLAT * config.base.max_splats
            cost = per_view * _cost(config) / _cost(Config.from_preset("default"))
            least = max(1, round(config.steps * cost / get_num_threads() / 60))
            said += f"; some {least} to {round(SLOWER * least)} minutes"
    return f"{said}; --steps, --base.max-splats and --data.factor change that"
