"""The table at the end of a run: quality and size of every scene at every ratio."""

import io
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from flexgs.config import percent

_COLUMNS = (  # key in results.json, heading, format
    ("psnr", "PSNR", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips_vgg", "LPIPS vgg", "{:.4f}"),
    ("lpips_alex", "LPIPS alex", "{:.4f}"),
    ("splats", "Gaussians", "{:,.0f}"),
    ("mb", "MB", "{:.2f}"),
    ("ms", "ms", "{:.1f}"),
)


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of contents of results.json: a row per scene and ratio, and the mean of several scenes.

    Columns without any value are left out.
    """
    results = list(results)
    columns = [c for c in _COLUMNS
               if any(row.get(c[0]) is not None for r in results for row in r["ratios"].values())]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("scene", overflow="fold")
    table.add_column("kept", justify="right", no_wrap=True)
    for _, heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    presets = {r.get("preset") for r in results}
    for r in results:
        name = r["scene"] if len(presets) == 1 else f"{r['scene']} ({r.get('preset')})"
        _add(table, name, r["ratios"], columns)
    if len(results) > 1:
        _add(table, "mean", mean_ratios(results), columns)
    return table


def mean_ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean over results of every figure that all have, at the ratios that all have."""
    common = [ratio for ratio in results[0]["ratios"] if all(ratio in r["ratios"] for r in results)]
    means: dict[str, dict[str, float]] = {}
    for ratio in common:
        rows = [r["ratios"][ratio] for r in results]
        keys = [k for k, v in rows[0].items() if v is not None
                and all(row.get(k) is not None for row in rows)]
        means[ratio] = {k: statistics.fmean(row[k] for row in rows) for k in keys}
    return means


def psnr_auc(ratios: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the mean PSNR (dB) of a model over the logarithm of the ratio, by the trapezoidal rule.

    On this scale the ratios from 1 to 10 % count as much as those from 10 to 100 %. Two models can be
    compared only at the same ratios.
    """
    curve = sorted((math.log(float(ratio)), row["psnr"]) for ratio, row in ratios.items())
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(curve))
    return area / (curve[-1][0] - curve[0][0]) if len(curve) > 1 else curve[0][1]


def print_results(results: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print results_table(results) by print_table."""
    print_table(results_table(results), console)


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table to the console, by default standard output; in a file or pipe it is never folded.

    A narrow terminal folds names between words. If that is not enough, lines are longer than the terminal:
    figures are never cut.
    """
    if console is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an encoding without ± gets ? instead of an error
        console = Console()
    need = Measurement.get(console, console.options.update(width=10_000), table)
    console.width = max(console.width, need.minimum) if console.is_terminal else need.maximum
    console.print(table, crop=False)


def _add(table: Table, name: str, ratios: Mapping[str, Mapping[str, Any]],
         columns: Sequence[tuple[str, str, str]]) -> None:
    for ratio in sorted(ratios, key=float):
        row = ratios[ratio]
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, _, form in columns]
        table.add_row(name, percent(ratio), *cells)
        name = ""
    table.add_section()
