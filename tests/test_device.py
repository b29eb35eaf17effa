"""A training step keeps to its device and does not wait for it.

torch's meta device has shapes and no values: most operations that mix it with the CPU's tensors fail there as
on a GPU (sums, products by element, concatenation; not matrix products), and so does reading a value, for
which a GPU would have to finish first. What a step may read, once, is `totals`.
"""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.fx.experimental._config
from torch import Tensor

from flexgs import seeds
from flexgs.camera import Camera
from flexgs.config import Config
from flexgs.model import importance, order
from flexgs.raster.contract import Projection, RasterConfig, RenderOutput
from flexgs.splats import Splats
from flexgs.training import trainer as module
from flexgs.training.trainer import Trainer


def project(splats: Splats, camera: Camera, *, sh_degree: int | None = None, mask: Tensor | None = None,
            config: RasterConfig | None = None) -> Projection:  # fmt: skip
    """Stands in for the rasterizer of a GPU: no projection, but a function of all that is given."""
    means2d = splats.means @ (camera.K @ camera.viewmat[:3, :3])[:2].T
    values = sum(t.flatten(1).sum(1) if t.dim() > 1 else t for _, t in splats.items())
    threes = values[:, None].expand(-1, 3)
    radii = torch.ones(len(splats), 2, dtype=torch.int32, device=values.device)
    return Projection(means2d, threes, values if mask is None else values * mask, threes, values, radii)


def rasterize(projection: Projection, camera: Camera, *, background: Tensor | None = None,
              contributions: str | None = None, config: RasterConfig | None = None
              ) -> RenderOutput:  # fmt: skip
    values = torch.cat([projection.means2d, projection.conics, projection.opacities[:, None],
                        projection.colors], 1).sum()
    image = values.expand(camera.height, camera.width, 3) + (0 if background is None else background)
    sums = torch.ones(len(projection.means2d), 3 if contributions == "all" else 1, device=values.device)
    return RenderOutput(image, image[..., 0], projection.means2d, projection.radii,
                        sums if contributions else None)


def render(splats: Splats, camera: Camera, contributions: str | None = None) -> RenderOutput:
    return rasterize(project(splats, camera), camera, contributions=contributions)


@pytest.fixture(autouse=True)
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "project", project)
    monkeypatch.setattr(module, "rasterize", rasterize)
    monkeypatch.setattr(importance, "render", render)
    monkeypatch.setattr(module, "totals", lambda named: dict.fromkeys(named, 0.0))
    for drawing in (module, order):  # there is no generator of this device
        monkeypatch.setattr(drawing, "generator", lambda *key, device="cpu": seeds.generator(*key))
    # How many Gaussians GsNet draws is the one size that depends on values; here it takes all.
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


@pytest.mark.parametrize("preset",
                         ["default", "fast", "paper", "official", "mended", "matryoshka", "lightgs"])
def test_step(preset: str, scene) -> None:
    config = Config.from_preset(preset, steps=6)
    config.base.max_splats, config.deltas.merge = 200, 0.0  # merging is done on the CPU, once
    config.order.kind = "sampled" if config.order.kind == "tree" else config.order.kind
    trainer = Trainer(config, scene, device="meta")
    for _ in range(6):
        trainer.train_step()
    assert trainer.stage == 2 and trainer.elastic
    assert {t.device.type for t in trainer._tensors().values()} == {"meta"}


def test_a_tensor_of_the_cpu_is_found(scene) -> None:
    trainer = Trainer(Config.from_preset("plain", steps=6), scene, device="meta")
    trainer.background = torch.zeros(3)
    with pytest.raises(RuntimeError, match="device"):
        trainer.train_step()


def test_a_value_that_is_read_is_found(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "totals", lambda named: {"loss": float(named["loss"]), "other": math.nan})
    with pytest.raises(RuntimeError, match="item"):
        Trainer(Config.from_preset("plain", steps=6), scene, device="meta").train_step()
