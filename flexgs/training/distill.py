"""Distillation: train Gaussians to look like a larger model, from cameras alone, without photographs."""

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from flexgs.camera import Camera, scene_scale_of
from flexgs.config import LearningRatesConfig
from flexgs.image.losses import photometric
from flexgs.raster import render
from flexgs.seeds import generator
from flexgs.splats import Splats
from flexgs.training.optim import Optimizer, splat_groups


def within(seconds: float) -> Iterator[float]:
    """Yield the elapsed fraction of so many seconds, 0 to 1, until they are over."""
    began = time.monotonic()
    while (done := (time.monotonic() - began) / seconds) < 1:
        yield done


def distill(start: Splats, model: Splats, cameras: Sequence[Camera], progress: Iterable[float]) -> Splats:
    """Train a copy of start on renders of model, with the loss and the learning rates of 3DGS.

    Args:
        start: fewer Gaussians than model has, which look about like it.
        model: what is to be looked like; it stays as it is.
        cameras: every one has its turn, in random order, before one comes again.
        progress: a step of one camera for each number, which says how far the training is, 0 to 1.

    Returns:
        As many Gaussians as start has.
    """
    splats = start.clone().at(model.origin).requires_grad_()
    optimizer = Optimizer(splat_groups(splats, LearningRatesConfig(), scene_scale_of(cameras)), 1)
    targets: dict[int, Tensor] = {}
    turns: list[int] = []
    for step, done in enumerate(progress):
        if not turns:
            turns = torch.randperm(len(cameras), generator=generator(0, "distill", step)).tolist()
        i = turns.pop()
        if i not in targets:
            with torch.no_grad():
                targets[i] = render(model, cameras[i]).image.clamp(0, 1)
        photometric(render(splats, cameras[i]).image, targets[i]).backward()
        optimizer.step(optimizer.take_gradients(), done)
    return splats.detach()
