"""A scene small enough to recompute by hand: cameras on a ring, random photographs and Gaussians, all in
memory."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import random_splats
from torch import Tensor

from flexgs.camera import Camera, look_at
from flexgs.config import Config
from flexgs.scene import Points, Scene
from flexgs.scene.views import ImageCache
from flexgs.splats import Splats
from flexgs.training.trainer import Trainer

SIZES = ((24, 18), (18, 24), (16, 12))
"""Width and height of the views, in turn: two lenses and more, not square."""
EXTENT = 1.7
"""Of the scene; not 1, so that what is multiplied by it shows."""
UNIT = 0.25
"""The length that the transform and raw inputs count in: the power of two nearest to a fifth of EXTENT."""


@dataclass(eq=False)
class TinyView:
    """What training and evaluation ask of a View, without files."""

    name: str
    camera: Camera
    pixels: Tensor = field(repr=False)
    covered: Tensor | None = field(default=None, repr=False)
    cache: ImageCache = field(default_factory=lambda: ImageCache(0), repr=False)

    def image(self) -> Tensor:
        return self.pixels

    def mask(self) -> Tensor | None:
        return self.covered

    def prefetch(self) -> None:
        """There is nothing to decode."""

    def arrays(self) -> list:
        """There is nothing to share."""
        return []


def camera(i: int, n: int = 8) -> Camera:
    """The i-th of n cameras on a ring around the origin; sizes and fields of view differ."""
    angle, (width, height) = 2 * math.pi * i / n, SIZES[i % len(SIZES)]
    eye = torch.tensor([4 * math.cos(angle), 1.0 + 0.3 * (i % 2), 4 * math.sin(angle)])
    return look_at(eye, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]), width, height, fov=50.0 + 10 * (i % 2))


def view(i: int, masked: bool) -> TinyView:
    g, at = torch.Generator().manual_seed(100 + i), camera(i)
    pixels = (255 * torch.rand(at.height, at.width, 3, generator=g)).to(torch.uint8)
    return TinyView(f"{i:03d}", at, pixels, torch.rand(at.height, at.width, generator=g) > 0.3 if masked
                    else None)


def tiny_scene(points: int = 40, train: int = 5, test: int = 3) -> Scene:
    """The odd training views and the even test views have masks."""
    g = torch.Generator().manual_seed(7)
    cloud = Points(torch.randn(points, 3, generator=g),
                   (255 * torch.rand(points, 3, generator=g)).to(torch.uint8))
    # type: ignore[misc]
    return Scene("tiny", Path("/nowhere/tiny"), [view(i, bool(i % 2)) for i in range(train)],
                 [view(train + i, not i % 2) for i in range(test)], cloud, EXTENT, {"digest": "tiny"})


def tiny_splats(n: int = 40, sh_degree: int = 2, seed: int = 0) -> Splats:
    """Large enough that all overlap in an image of some 20 pixels; most are seen."""
    splats = random_splats(n, sh_degree, seed)
    return splats.map(lambda t: t.clone() + (1.2 if t is splats.scales else 0.0))


def tiny_config(preset: str = "default", steps: int = 40) -> Config:
    """A preset of a few views; stage 1 and stage 2 are half each, nothing is measured but PSNR and SSIM."""
    config = Config.from_preset(preset)
    config.steps, config.base.stage1_fraction, config.base.sh_degree = steps, 0.5, 2
    config.evaluation.lpips, field = (), config.field
    field.resolution, field.channels, field.levels, field.width = (4, 5, 6, 7), 2, (1, 2), 8
    config.report_every = config.checkpoint_every = config.check_every = 10**6
    return config


def begun(trainer: Trainer, splats: Splats) -> Trainer:
    """The trainer with these Gaussians in the place of its own, which are as many."""
    for (_, mine), (_, given) in zip(trainer.splats.items(), splats.items(), strict=True):
        mine.data.copy_(given)
    return trainer


def same(a: Splats, b: Splats) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.items(), b.items(), strict=True))
