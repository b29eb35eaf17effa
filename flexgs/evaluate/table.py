"""The table that a run ends with: quality and size of every scene at every ratio."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# key in results.json, heading, format
_COLUMNS = (
    ("psnr", "PSNR", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips_vgg", "LPIPS vgg", "{:.4f}"),
    ("lpips_alex", "LPIPS alex", "{:.4f}"),
    ("splats", "Gaussians", "{:,.0f}"),
    ("mb", "MB", "{:.2f}"),
    ("ms", "ms", "{:.1f}"),
)


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row per scene and ratio of results.json dictionaries; several scenes are followed by their mean.

    A column that no result has a value for is left out.
    """
    results = list(results)
    columns = [c for c in _COLUMNS if any(row.get(c[0]) is not None for r in results for row in r["ratios"].values())]
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
    """The mean over scenes of every figure, at the ratios that all scenes have."""
    common = [ratio for ratio in results[0]["ratios"] if all(ratio in r["ratios"] for r in results)]
    means: dict[str, dict[str, float]] = {}
    for ratio in common:
        rows = [r["ratios"][ratio] for r in results]
        keys = [k for k, v in rows[0].items() if v is not None and all(row.get(k) is not None for row in rows)]
        means[ratio] = {k: statistics.fmean(row[k] for row in rows) for k in keys}
    return means


def methods_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per method of compare(): PSNR at each ratio, the best in bold, and the seconds that its stage 2 took."""
    ratios = sorted({ratio for row in rows.values() for ratio in row["ratios"]}, key=float)
    psnr = {method: {ratio: round(r["psnr"], 2) for ratio, r in row["ratios"].items()} for method, row in rows.items()}
    best = {ratio: max(p[ratio] for p in psnr.values() if ratio in p) for ratio in ratios}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("PSNR", overflow="fold")
    for ratio in ratios:
        table.add_column(f"{100 * float(ratio):g} %", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for method, row in rows.items():
        cells = [f"{p:.2f}" if (p := psnr[method].get(ratio)) is not None else "" for ratio in ratios]
        bold = [f"[bold]{cell}[/]" if psnr[method].get(ratio) == best[ratio] else cell
                for ratio, cell in zip(ratios, cells, strict=True)]
        seconds = row["seconds"]
        table.add_row(method, *bold, f"{sum(seconds.values()) if isinstance(seconds, dict) else seconds:.0f}")
    return table


def print_results(results: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print results_table; 120 columns wide where the output is not a terminal."""
    print_table(results_table(results), console)


def print_table(table: Table, console: Console | None = None) -> None:
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=120)
    console.print(table)


def _add(table: Table, name: str, ratios: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> None:
    for ratio in sorted(ratios, key=float):
        row = ratios[ratio]
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, _, form in columns]
        table.add_row(name, f"{100 * float(ratio):g} %", *cells)
        name = ""
    table.add_section()
