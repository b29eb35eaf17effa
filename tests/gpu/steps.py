"""The steps that are timed and weighed: gsplat's plain one, and ours of each recipe, on the same Gaussians
and views."""

from functools import cache
from typing import Protocol

import torch

from flexgs.bench.ddp import bench_scene
from flexgs.bench.scenes import random_splats
from flexgs.config import Config, LearningRatesConfig
from flexgs.image.losses import as_float, photometric
from flexgs.scene import Scene, ViewSampler
from flexgs.splats import Splats
from flexgs.training.optim import splat_groups
from flexgs.training.trainer import Trainer

ELASTIC = ("default", "fast", "paper")
STEPS = ("gsplat", "plain", *ELASTIC)

start = cache(random_splats)
"""N Gaussians of all sizes; neighbours are searched for, which takes seconds for millions."""


class Steps(Protocol):
    def train_step(self) -> None: ...


class GsplatSteps:
    """The step of gsplat 1.5.3's simple trainer, without its densification: rasterization(), loss, Adam per
    attribute.

    The loss is ours, because fused-ssim, which that trainer takes, is not on PyPI.
    """

    def __init__(self, scene: Scene, splats: Splats, device: str):
        import gsplat  # compiles itself on a machine without a GPU, and fails

        self.rasterization, self.scene, self.device, self.position = gsplat.rasterization, scene, device, 0
        self.sampler = ViewSampler(len(scene.train), 0)
        self.splats = splats.clone().to(device).requires_grad_()
        self.adams = [torch.optim.Adam(g["params"], lr=g["lr"], eps=1e-15, fused=True)
                      for g in splat_groups(self.splats, LearningRatesConfig(), scene.scene_scale)]

    def train_step(self) -> None:
        view, s = self.scene.train[self.sampler[self.position]], self.splats
        camera, target = view.camera.to(self.device), as_float(view.image().to(self.device), torch.float32)
        image, _, _ = self.rasterization(
            s.means, s.quats, s.scales.exp(), s.opacities.sigmoid(), torch.cat([s.sh0[:, None], s.shN], 1),
            camera.viewmat[None], camera.K[None], camera.width, camera.height, sh_degree=3, packed=False,
            absgrad=False, rasterize_mode="classic")
        photometric(image[0], target).backward()
        for adam in self.adams:
            adam.step()
            adam.zero_grad(set_to_none=True)
        self.position += 1


class _From(Trainer):
    """Starts from given Gaussians, not from the capture's points."""

    def __init__(self, splats: Splats, config: Config, scene: Scene, device: str):
        self.given = splats
        super().__init__(config, scene, device=device)

    def _initial_splats(self) -> Splats:
        return self.given.clone()


def trainer(preset: str, scene: Scene, splats: Splats, device: str) -> Trainer:
    """In the middle of stage 1 for plain, at the beginning of stage 2 for the others; the number of Gaussians
    stays."""
    config = Config.from_preset(preset)
    config.base.max_splats, config.base.refine_start = len(splats), 1.0
    ours = _From(splats, config, scene, device)
    ours.step = ours.base_steps // 2 if preset == "plain" else ours.base_steps
    return ours


def steps(name: str, scene: Scene, count: int, device: str) -> Steps:
    """One of STEPS."""
    return (GsplatSteps(scene, start(count), device) if name == "gsplat"
            else trainer(name, scene, start(count), device))


def scene_of(image: tuple[int, int]) -> Scene:
    """Sixteen views of this width and height near the middle of the Gaussians."""
    return bench_scene(20_000, *image)
