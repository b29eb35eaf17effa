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
from flexgs.raster.contract import RasterConfig, RenderOutput
from flexgs.splats import Splats
from flexgs.training import trainer as module
from flexgs.training.trainer import Trainer


def render(splats: Splats, camera: Camera, *, background: Tensor | None = None, sh_degree: int | None = None,
           mask: Tensor | None = None, contributions: str | None = None, config: RasterConfig | None = None
           ) -> RenderOutput:  # fmt: skip
    """Stands in for the rasterizer of a GPU: no image, but a function of all that is given."""
    n, device = len(splats), splats.means.device
    means2d = splats.means @ (camera.K @ camera.viewmat[:3, :3])[:2].T
    values = torch.cat([means2d, *(t.reshape(n, -1) for _, t in splats.items())],
                       1).sum() + (0 if mask is None else mask.sum())
    image = values.expand(camera.height, camera.width, 3) + (0 if background is None else background)
    radii = torch.ones(n, 2, dtype=torch.int32, device=device)
    sums = torch.ones(n, 3 if contributions == "all" else 1, device=device)
    return RenderOutput(image, image[..., 0], means2d, radii, sums if contributions else None)


@pytest.fixture(autouse=True)
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "render", render)
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
