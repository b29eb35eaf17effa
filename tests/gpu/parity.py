"""The CUDA backend (gsplat) against the CPU backend: the same image, gradients, contributions and loss.

Bounds are looser than for the oracle: depths equal to 1e-7 may swap, single pixels flip at alpha = 1/255, and
gsplat's exp is approximate.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flexgs.bench.scenes import front_camera, random_splats
from flexgs.camera import Camera
from flexgs.config import Config
from flexgs.image.losses import photometric
from flexgs.image.quality import ssim
from flexgs.raster import render
from flexgs.raster.contract import RenderOutput
from flexgs.raster.reference import relative_l2
from flexgs.scene.load import load_capture
from flexgs.splats import Splats
from flexgs.training.trainer import Trainer
from tests.gpu.captures import OfCaptures
from tests.gpu.record import Part, Row

GRADIENTS = ("means", "quats", "scales", "opacities", "sh0", "shN", "mask", "means2d")
SUMS = ("sum alpha T", "pixels", "sum T")
RASTER_BOUNDS = {"image max": 5e-3, "image mean": 1e-5, "alpha max": 5e-3,
                 "radii": 1e-3, **dict.fromkeys(SUMS, 1e-3),
                 **dict.fromkeys(GRADIENTS, 1e-3)}
"""Largest and mean difference, share of the Gaussians that only one backend sees, and |a - b| / |b| of sums
and gradients."""
LOSS_BOUNDS = {"loss": 1e-5, "loss gradient": 1e-3, "ssim": 1e-5}
"""Differences of the loss and of the metric, |a - b| / |b| of the gradient. On the CPU, flexgs's kernel and
the convolutions of torch in float32 differ by 5e-7 and 4e-5; convolutions rounded to TensorFloat-32 (imitated
once), which cuDNN may choose, by 6e-3 and 8e-2, which is why they are grouped: torch does those itself."""
CAMERAS = 3


@dataclass
class Parity(OfCaptures):
    """Image, gradients, contributions and loss of the CUDA backend against those of the CPU backend."""

    splats: int = 20_000
    """Random ones; those of a capture are at most as many."""
    image: tuple[int, int] = (200, 150)
    """Width and height for random Gaussians."""
    steps: int = 400
    """Of plain training on the CPU, which makes the Gaussians of a capture."""
    factor: int = 4
    """Downscaling of the captures' images; the built-in one is used at its own size."""

    TINY: ClassVar[Row] = {"splats": 500, "image": (64, 48), "steps": 20}

    def parts(self) -> Iterable[Part]:
        yield "bound", lambda: [{"camera": None, "Gaussians": None, **RASTER_BOUNDS, **LOSS_BOUNDS}]
        yield "loss", lambda: [judged(loss_differences(*self.image, self.device))]
        for degree in (0, 2, 3):
            yield f"random, SH {degree}", partial(self.random, degree)
        for capture in self.captures():
            yield capture.name, partial(self.of_capture, capture)

    def random(self, degree: int) -> list[Row]:
        splats, camera = random_splats(self.splats), front_camera(*self.image)
        return [{"Gaussians": len(splats), **judged(raster_differences(splats, camera, self.device, degree))}]

    def of_capture(self, path: Path) -> Iterator[Row]:
        """A row for each of three cameras."""
        config = Config.from_preset("plain", steps=self.steps)
        config.base.stage1_fraction, config.base.reset_every, config.base.max_splats = 1.0, 2.0, self.splats
        config.base.refine_every = 50
        config.data.factor = self.factor if self.scenes else 1
        scene = load_capture(path, config)
        trainer = Trainer(config, scene)
        trainer.fit(lambda step, metrics: None, lambda step, write: None)
        for view in scene.train[:: -(-len(scene.train) // CAMERAS)]:
            yield {"camera": view.name, "Gaussians": len(trainer.splats),
                   **judged(raster_differences(trainer.splats, view.camera, self.device))}


def judged(differences: Row) -> Row:
    return {**differences, "pass": not exceeded(differences)}


def exceeded(differences: Row) -> Row:
    """Those that are not below their bound; NaN is not."""
    bounds = RASTER_BOUNDS | LOSS_BOUNDS
    return {name: value for name, value in differences.items() if not value < bounds[name]}


def raster_differences(splats: Splats, camera: Camera, device: str, sh_degree: int | None = None) -> Row:
    """What RASTER_BOUNDS names, of the backend of device against the CPU's."""
    (a, grads_a), (b, grads_b) = (_rendered(splats, camera, d, sh_degree) for d in (device, "cpu"))
    image, alpha = ((x.detach().cpu() - y.detach()).abs() for x,
                    y in ((a.image, b.image), (a.alpha, b.alpha)))
    assert a.contributions is not None and b.contributions is not None
    return {
        "image max": float(image.max()), "image mean": float(image.mean()),
        "alpha max": float(alpha.max()),
        "radii": float(((a.radii.cpu() > 0) != (b.radii > 0)).any(dim=1).float().mean()),
        **{name: relative_l2(a.contributions[:, i].cpu(), b.contributions[:, i]) for i,
           name in enumerate(SUMS)},
        **{name: relative_l2(grads_a[name], grads_b[name]) for name in GRADIENTS},
    }


def _rendered(splats: Splats, camera: Camera, device: str,
              sh_degree: int | None) -> tuple[RenderOutput, dict[str, Tensor]]:
    """The render, and the gradients of a random sum of its pixels."""
    g = torch.Generator().manual_seed(0)
    cotangent, mask = torch.randn(camera.height, camera.width, 3,
                                  generator=g), torch.rand(len(splats), generator=g)
    splats = splats.clone().to(device).detach().requires_grad_()
    mask = mask.to(device).requires_grad_()
    out = render(splats, camera.to(device), background=torch.tensor([0.1, 0.6, 0.3], device=device),
                 mask=mask, sh_degree=sh_degree, contributions="all")
    out.means2d.retain_grad()
    ((out.image * cotangent.to(device)).sum() + out.alpha.sum()).backward()
    gradients = {**dict(splats.items()), "mask": mask, "means2d": out.means2d}
    return out, {name: t.grad.cpu() for name, t in gradients.items() if t.grad is not None}


def loss_differences(width: int, height: int, device: str) -> Row:
    """What LOSS_BOUNDS names, of a render, with its flat background, and the same with noise."""
    target = render(random_splats(500), front_camera(width, height)).image.clamp(0, 1)
    found, noisy = [], target + 0.02 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    for d in (device, "cpu"):
        image = noisy.to(d).requires_grad_()
        loss = photometric(image, target.to(d))
        loss.backward()
        assert image.grad is not None
        found.append((loss.item(), image.grad.cpu(), ssim(noisy.to(d), target.to(d))))
    (loss_a, gradient_a, ssim_a), (loss_b, gradient_b, ssim_b) = found
    return {"loss": abs(loss_a - loss_b), "loss gradient": relative_l2(gradient_a, gradient_b),
            "ssim": abs(ssim_a - ssim_b)}
