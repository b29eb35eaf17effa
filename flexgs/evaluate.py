"""Quality of an elastic model at a list of ratios, under a protocol that is written into the result."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexgs.config import EvaluationConfig, ratio_name
from flexgs.device import clock
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.formats import FORMATS, as_stored, interchange
from flexgs.image import lpips, quality
from flexgs.image.lpips import Lpips
from flexgs.image.quality import psnr, ssim
from flexgs.model.elastic import ElasticModel
from flexgs.model.merge_tree import MergeTree
from flexgs.raster import render
from flexgs.raster.contract import DEFAULT, RasterConfig
from flexgs.scene import Scene, View
from flexgs.splats import Splats

DECIMATE: Mapping[str, Callable[[Splats, int], Splats]] = {
    "merged": lambda splats, count: MergeTree(splats).cut(count), "splat-transform": interchange.decimate}
"""How a whole model becomes so many Gaussians, by the name in EvaluationConfig.cuts."""


@dataclass(eq=False)
class Decimated(ElasticModel):
    """A trained model whose cuts are made from the whole of it, as if it were not elastic."""

    by: str = "merged"
    """A name in DECIMATE."""

    def first(self, kept: int, ratio: float) -> Splats:
        """Return `kept` Gaussians; all N are unchanged."""
        whole = self.splats.detach()
        return DECIMATE[self.by](whole, kept) if kept < len(whole) else whole


def cut_as(model: ElasticModel, options: EvaluationConfig) -> ElasticModel:
    """Return the model with the cuts that options.cuts asks for."""
    return model if options.cuts == "own" else Decimated(
        model.splats, model.transform, model.config, model.cameras, model.capture, options.cuts)


@torch.no_grad()
def measure(splats: Splats, view: View, background: Tensor, networks: Mapping[str, Lpips],
            raster: RasterConfig = DEFAULT) -> dict[str, float]:
    """Return PSNR, SSIM, LPIPS and ms (of one render) of a view; pixels outside its mask count as perfect."""
    device = splats.means.device
    camera = view.camera.to(device)
    start = clock(device)
    image = render(splats, camera, background=background, config=raster).image.clamp(0, 1)
    ms = 1000 * (clock(device) - start)
    target, mask = view.image().to(device) / 255, view.mask()
    if mask is not None:
        image = torch.where(mask.to(device)[:, :, None], image, target)
    return {"psnr": psnr(image, target), "ssim": ssim(image, target), "ms": ms,
            **{f"lpips_{name}": network(image, target) for name, network in networks.items()}}


def evaluate(model: ElasticModel, scene: Scene, options: EvaluationConfig, background: Sequence[float],
             group: Group | None = None) -> dict[str, Any]:
    """Measure the model's cuts on the test views, which are split over the workers.

    Returns {"protocol": ..., "ratios": {"0.05": {"psnr", "ssim", "lpips_vgg", "lpips_alex", "splats", "mb",
    "ms", "cut_seconds"}}}. Quality is the mean over the views; an LPIPS that was not computed is None, and
    the protocol says why. mb is the size in 10^6 bytes of a file in options.format, ms the median time of a
    render on this machine, cut_seconds the time to cut and, unless the format is PLY, to write and read back.
    """
    group, model = group or Group(), cut_as(model, options)
    colour = torch.tensor(background, device=model.splats.means.device)
    raster = RasterConfig(antialiased=model.config.antialiased)
    test, table = chosen(scene.test, options.views), {}
    smallest = _smallest(test)
    loaded = {net: lpips.load(net, options.lpips_weights, options.lpips_range) if smallest >= lpips.LEAST else
              f"its backbone needs images of {lpips.LEAST} pixels, found {smallest}" for net in options.lpips}
    networks: dict[str, Lpips] = {net: network for net, network in loaded.items()
                                  if isinstance(network, Lpips)}
    for ratio in options.ratios:
        start = clock(colour.device)
        cut = model.cut(ratio)
        cut_seconds = clock(colour.device) - start
        cut, size, encode_seconds = as_stored(cut, options.format, scene.train)
        mine = {i: measure(cut, test[i], colour, networks, raster) for i in group.my_indices(len(test))}
        views = {i: m for part in group.gather(mine) for i, m in part.items()}
        rows = [views[i] for i in sorted(views)]  # this order for any number of workers: sums are equal

        def mean(key: str, rows: list[dict[str, float]] = rows) -> float | None:
            return round(statistics.fmean(r[key] for r in rows), 5) if key in rows[0] else None

        table[ratio_name(ratio)] = {
            "psnr": mean("psnr"), "ssim": mean("ssim"), "lpips_vgg": mean("lpips_vgg"),
            "lpips_alex": mean("lpips_alex"), "splats": len(cut), "mb": round(size / 1e6, 4),
            "ms": round(statistics.median(r["ms"] for r in rows), 3),
            "cut_seconds": round(cut_seconds + encode_seconds, 4),
        }
    return {"ratios": table, "protocol": {
        "cuts": options.cuts, "test_views": len(test), "of_the_test_views": options.views,
        "background": list(background), "antialiased": model.config.antialiased,
        "pixels": "float, clamped to [0, 1]", **quality.PROTOCOL, "mb": FORMATS[options.format].about,
        "device": str(model.splats.means.device),
        **{f"lpips_{net}": f"inputs in {options.lpips_range}" if net in networks
           else f"not computed, because {loaded[net]}" for net in options.lpips}}}


def chosen(views: Sequence[View], which: str) -> Sequence[View]:
    """Return all views, or the even or odd ones; UserError if none is left or one is too small for SSIM."""
    found = views[{"all": 0, "even": 0, "odd": 1}[which]::1 if which == "all" else 2]
    if not found:
        raise UserError(f"--evaluation.views {which}: found {len(views)} test views, expected at least 2; "
                        "a smaller --data.test-every holds out more")
    if (smallest := _smallest(found)) < quality.LEAST:
        raise UserError(f"the test views: found {smallest} pixels across or down, expected at least "
                        f"{quality.LEAST}, which SSIM needs; a smaller --data.factor gives larger images")
    return found


def _smallest(views: Sequence[View]) -> int:
    return min(min(view.camera.width, view.camera.height) for view in views)
