"""Distillation: Gaussians are trained to look like a larger model, from cameras alone, without photographs."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexgs.camera import Camera
from flexgs.config import LearningRatesConfig
from flexgs.image.losses import photometric
from flexgs.model.viewpoints import scale_of
from flexgs.raster import render
from flexgs.seeds import generator
from flexgs.splats import Splats
from flexgs.training.optim import Optimizer, splat_groups


def distill(start: Splats, model: Splats, cameras: Sequence[Camera], seconds: float, *,
            progress: Callable[[float], None] = lambda done: None) -> Splats:
    """start, of fewer Gaussians, trained for some seconds on renders of model at cameras.

    The loss and the learning rates are those of 3DGS. A step renders one camera; every camera has its turn
    before one comes again. How many steps are made depends on the machine.
    """
    splats = start.clone().at(model.origin).requires_grad_()
    optimizer = Optimizer(splat_groups(splats, LearningRatesConfig(), scale_of(cameras)), 1)
    targets: dict[int, Tensor] = {}
    order: list[int] = []
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / seconds) < 1:
        if not order:
            order = torch.randperm(len(cameras), generator=generator(0, "distill", step)).tolist()
        i = order.pop()
        if i not in targets:
            with torch.no_grad():
                targets[i] = render(model, cameras[i]).image.clamp(0, 1)
        photometric(render(splats, cameras[i]).image, targets[i]).backward()
        optimizer.step(optimizer.take_gradients(), done)
        step += 1
        progress(done)
    return splats.detach()
