"""Facts about a model, as text for `flexgs info`."""

from collections.abc import Mapping
from pathlib import Path

import torch

from flexgs.camera import WORLD
from flexgs.config import percent
from flexgs.deploy.progressive import Progressive
from flexgs.errors import one_line
from flexgs.formats import FORMATS, format_at
from flexgs.model.elastic import Cuttable
from flexgs.ply import is_wide, place
from flexgs.splats import quantile


def describe(model: Cuttable, source: str) -> Mapping[str, str]:
    """Return named facts about the model that open_model(source) has returned, one line of text each."""
    whole = model.cut(1.0)
    low, high = (quantile(whole.means, q).tolist() for q in (0.01, 0.99))
    opacity, sizes = torch.sigmoid(whole.opacities), whole.scales.amax(dim=1).double().clamp(max=700).exp()
    path, config = Path(source), model.config
    if isinstance(model, Progressive):
        ends = ", ".join(percent(chunk.ratio) for chunk in model.chunks)
        kind = f"packed elastic model, chunks up to {ends}"
    elif path.is_dir():
        kind = f"elastic model, preset {config.preset}"
    else:
        kind = (f"{FORMATS[format_at(path)].about}; not elastic: cut by merging, or make it "
                "so with `flexgs adapt`")
    lines = {
        "what": kind,
        "Gaussians": f"{len(model):,}, spherical harmonics of degree {model.sh_degree}",
        "extent": f"{' '.join(f'{a:.3g}..{b:.3g}' for a, b in zip(low, high, strict=True))} "
                  "(1 % to 99 % in x y z)",
        "opacity": f"median {float(opacity.median()):.3f}, below 0.05: "
                   f"{100 * float((opacity < 0.05).float().mean()):.0f} %",
        "size": f"median of the largest axis {float(sizes.median()):.3g} units",
        "cameras": str(len(model.cameras) or "none"),
    }
    if whole.origin != WORLD:
        number = "double" if is_wide(whole) else "float"
        lines["origin"] = f"{place(whole)}, from where the extent counts; x y z of a PLY are of type {number}"
    if isinstance(model, Progressive) or path.is_dir():
        lines["recipe"] = (f"order {config.order.kind}, transform {config.transform.kind}, "
                           f"{config.steps:,} views, seed {config.seed}")
    if path.is_file():
        lines["bytes"] = f"{path.stat().st_size:,}"
    return {name: one_line(text) for name, text in lines.items()}
