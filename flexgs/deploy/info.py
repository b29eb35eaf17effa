"""Facts about a model, as text for `flexgs info`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from flexgs.config import percent
from flexgs.deploy.merged import MergedModel
from flexgs.errors import one_line
from flexgs.formats import FORMATS, format_at
from flexgs.gaussians import sigmoid
from flexgs.origin import WORLD
from flexgs.ply import is_wide, place

if TYPE_CHECKING:  # torch takes seconds to import
    from flexgs.deploy.progressive import Progressive
    from flexgs.model.elastic import Cuttable

NEEDED = ("means", "scales", "opacities")
"""The attributes of a file of Gaussians that describe() looks at."""


def describe(model: "Cuttable", source: str) -> Mapping[str, str]:
    """Return named facts about the model that open_model(source) has returned, one line of text each."""
    whole = model.gaussians if isinstance(model, MergedModel) else model.cut(1.0).arrays()
    low, high = np.quantile(whole.means, (0.01, 0.99), axis=0)
    opacity = sigmoid(whole.opacities)
    sizes = np.exp(whole.scales.max(axis=1).astype(np.float64).clip(max=700))
    path, config = Path(source), model.config
    if isinstance(model, MergedModel):
        kind = (f"{FORMATS[format_at(path)].about}; not elastic: cut by merging, or make it "
                "so with `flexgs adapt`")
    elif path.is_dir():
        kind = f"elastic model, preset {config.preset}"
    else:
        ends = ", ".join(percent(chunk.ratio) for chunk in cast("Progressive", model).chunks)
        kind = f"packed elastic model, chunks up to {ends}"
    lines = {
        "what": kind,
        "Gaussians": f"{len(model):,}, spherical harmonics of degree {model.sh_degree}",
        "extent": f"{' '.join(f'{a:.3g}..{b:.3g}' for a, b in zip(low, high, strict=True))} "
                  "(1 % to 99 % in x y z)",
        "opacity": f"median {np.median(opacity):.3f}, below 0.05: "
                   f"{100 * (opacity < 0.05).mean():.0f} %",
        "size": f"median of the largest axis {np.median(sizes):.3g} units",
        "cameras": str(len(model.cameras) or "none"),
    }
    if whole.origin != WORLD:
        number = "double" if is_wide(whole) else "float"
        lines["origin"] = f"{place(whole)}, from where the extent counts; x y z of a PLY are of type {number}"
    if not isinstance(model, MergedModel):
        lines["recipe"] = f"order {config.order.kind}, transform {config.transform.kind}"
        if model.cameras:  # a file that was packed as it is has seen no views
            lines["recipe"] += f", {config.steps:,} views, seed {config.seed}"
    if path.is_file():
        lines["bytes"] = f"{path.stat().st_size:,}"
    return {name: one_line(text) for name, text in lines.items()}
