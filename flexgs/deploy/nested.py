"""Models as deltas at some ratios: of a file of Gaussians that is merged, and of any other transform."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from flexgs.config import Config, DeltasConfig, OrderConfig, TransformConfig
from flexgs.deploy.merged import MergedModel
from flexgs.deploy.packed import check_ratios
from flexgs.errors import UserError
from flexgs.model.deltas import WIDTHS, Deltas
from flexgs.model.elastic import ElasticModel
from flexgs.model.merge_tree import MergeTree
from flexgs.model.transform import Transform
from flexgs.origin import unit_of


def nested(model: MergedModel, ratios: Sequence[float]) -> ElasticModel:
    """Return the Gaussians in the order of the merge tree, with deltas that make them the merged ones.

    A cut at one of the ratios is the merged cut, but for its harmonics above the constant ones, which are
    those of the heaviest Gaussian of each cluster; in between, deltas are interpolated, which is worse.

    Args:
        model: the file.
        ratios: they rise, and the last is 1.

    Raises:
        UserError: the ratios are others, too many or too small, or changes are too large for float16.
    """
    check_ratios(ratios)
    config = replace(Config.from_preset("plain"), order=OrderConfig(kind="tree"),
                     transform=TransformConfig("deltas"),
                     deltas=DeltasConfig(knots=tuple(r for r in ratios if r < 1) or (1.0,), start="tree",
                                         merge=1.0))
    try:
        config.check()
    except UserError as e:
        raise UserError(f"--ratios: {e}, for a file of splats") from None
    splats = model.splats[torch.from_numpy(MergeTree(model.gaussians).order())]
    means = model.gaussians.means.astype(np.float64)
    away = means - np.median(means, axis=0)
    unit = unit_of(2 * float(np.median(np.linalg.norm(away, axis=1))))
    deltas = Deltas(config.deltas, len(splats), unit, config.order)
    deltas.start(splats, None)
    stored = deltas.stored()
    if broken := [name for name, values in stored.state_dict().items() if not values.isfinite().all()]:
        raise UserError(f"{model.source}: found {', '.join(broken)} of neighbours that differ by more than "
                        "float16 can hold, expected those of a trained model; `flexgs cut` merges them all "
                        "the same")
    return ElasticModel(splats, stored, config, model.cameras)


@torch.no_grad()
def as_deltas(model: ElasticModel, ratios: Sequence[float]) -> ElasticModel:
    """Return a model whose transform is another one with deltas in its place, which a browser computes.

    A cut at one of the ratios is the model's own, to float16; in between, changes are interpolated.
    """
    if isinstance(model.transform, Deltas) or type(model.transform) is Transform:
        return model
    config = replace(model.config, transform=TransformConfig("deltas"),
                     deltas=DeltasConfig(knots=tuple(r for r in ratios if r < 1) or (1.0,)))
    deltas = Deltas(config.deltas, len(model), model.transform.unit, config.order)
    first = 0
    for knot, count in zip(deltas.knots, deltas.counts, strict=True):
        cut, base = model.first(count, knot), model.splats[:count]
        for name, width in WIDTHS.items():
            change = (getattr(cut, name) - getattr(base, name)).reshape(count, width)
            getattr(deltas, name)[first:first + count] = change / deltas.unit if name == "means" else change
        first += count
    return ElasticModel(model.splats, deltas.stored(), config, model.cameras, model.capture)
