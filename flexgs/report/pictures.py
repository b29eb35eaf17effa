"""PNG pictures of results: renders beside the photograph, and quality over the size of a cut."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexgs.config import percent
from flexgs.files import atomic_file
from flexgs.model.elastic import ElasticModel
from flexgs.raster import render
from flexgs.raster.contract import RasterConfig
from flexgs.report.comparison import Rows, mean_entry, quality_figures
from flexgs.scene import Scene

_MARKERS = "os^Dv<>PXph*"


@torch.no_grad()
def write_grid(model: ElasticModel, scene: Scene, ratios: Sequence[float], background: Sequence[float],
               path: Path, views: int = 3) -> None:
    """Write a row of images per test view (evenly chosen): one per ratio, and the photograph last."""
    plt = pyplot()
    device = model.splats.means.device
    colour = torch.tensor(background, device=device)
    raster = RasterConfig(antialiased=model.config.antialiased)
    chosen = [scene.test[i * len(scene.test) // views] for i in range(min(views, len(scene.test)))]
    cuts = [model.cut(r) for r in ratios]
    titles = [f"{percent(r)}\n{len(c):,} Gaussians" for r, c in zip(ratios, cuts, strict=True)]
    titles.append("photograph")
    shape = (len(chosen), len(titles))
    aspect = chosen[0].camera.height / chosen[0].camera.width
    figure, axes = plt.subplots(*shape, figsize=(2.2 * shape[1], 2.2 * aspect * shape[0] + 0.5),
                                squeeze=False, layout="constrained")
    for row, view in zip(axes, chosen, strict=True):
        images = [render(c, view.camera.to(device), background=colour, config=raster).image.clamp(0, 1)
                  for c in cuts]
        for ax, image in zip(row, [*(image.cpu() for image in images), view.image()], strict=True):
            ax.imshow(np.asarray(image))
            ax.set_axis_off()
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    save(figure, path)


def write_curve(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw PSNR over ratio, one line per named table {"0.05": {"psnr": ...}}."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, table in tables.items():
        points = sorted((float(r), m["psnr"]) for r, m in table.items())
        ax.plot([100 * r for r, _ in points], [p for _, p in points], "o-", label=name)
    ax.set(xscale="log", xlabel="Gaussians kept (%)", ylabel="PSNR of the test views (dB)")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    save(figure, path)


def write_tradeoff(rows: Rows, path: Path) -> None:
    """Draw PSNR, SSIM and LPIPS, means over seeds, over the number of Gaussians and MB: a line per method."""
    plt = pyplot()
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    kinds = quality_figures(rows)
    means = {method: mean_entry(entries)["ratios"].values() for method, entries in rows.items() if entries}
    sizes = (("splats", "Gaussians", EngFormatter(sep="")), ("mb", "MB", "{x:g}"))
    figure, axes = plt.subplots(len(kinds), len(sizes), figsize=(10, 2.5 * len(kinds) + 0.3), squeeze=False,
                                sharex="col", sharey="row", layout="constrained")
    for j, (size, label, form) in enumerate(sizes):
        for (key, heading, _, better), ax in zip(kinds, axes[:, j], strict=True):
            for i, (method, cuts) in enumerate(means.items()):
                points = sorted((cut[size], cut[key]) for cut in cuts if size in cut and key in cut)
                ax.plot([x for x, _ in points], [y for _, y in points], color=f"C{i % 10}",
                        marker=_MARKERS[i % len(_MARKERS)], linestyle="-" if i < 10 else "--", linewidth=1.3,
                        markersize=4.5, label=method)
            ax.grid(alpha=0.25, linewidth=0.6)
            ax.tick_params(labelsize=8)
            if j == 0:
                ax.set_ylabel(f"{heading}{' (dB)' if key == 'psnr' else ''} {'↑' if better is max else '↓'}")
        ax.set(xscale="log", xlabel=label)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(form)
        ax.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8,
                  frameon=False)
    save(figure, path)


def pyplot() -> Any:
    """Import matplotlib's pyplot, which takes a while, so that it draws without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write the figure as a PNG, atomically, and close it."""
    with atomic_file(path) as out:
        figure.savefig(out, dpi=110, format="png")
    pyplot().close(figure)
