"""Sheets that compare methods: quality, cost, and the difference to the figures in FlexGS's paper."""

import itertools
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgs.config import percent
from flexgs.files import atomic_file
from flexgs.report.published import PUBLISHED_AS
from flexgs.report.sheet import Sheet, TableCell
from flexgs.report.table import mean_ratios

Entry = Mapping[str, Any]
"""One training of a method: {"seed", "ratios": as evaluate() returns them, "train_seconds": of the whole
training, "stored_mb": 10^6 bytes on disk to serve all ratios}. All but "ratios" may be missing or None."""
Rows = Mapping[str, Sequence[Entry]]
"""An entry per seed for each method, as the user writes it. Methods need not have the same ratios."""

_OF_RATIO = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "splats", "mb", "ms", "cut_seconds")
_OF_ENTRY = ("train_seconds", "stored_mb")
CSV_HEADER = ("method", "seed", "ratio", *_OF_RATIO, *_OF_ENTRY)

Figure = tuple[str, str, int, Callable[..., float]]
"""Key of a figure, heading, decimals, and max or min, which picks the best value."""
_PSNR: Figure = ("psnr", "PSNR", 2, max)
_SSIM: Figure = ("ssim", "SSIM", 3, max)
_VGG: Figure = ("lpips_vgg", "LPIPS", 3, min)
_ALEX: Figure = ("lpips_alex", "LPIPS alex", 3, min)


def quality_figures(rows: Rows) -> tuple[Figure, ...]:
    """Return PSNR, SSIM and one LPIPS: of VGG, as in papers, or of AlexNet if there is no other."""
    measured = [lpips for lpips in (_VGG, _ALEX) if any(
        _values(entries, ratio, lpips[0]) for entries in rows.values() for ratio in _ratios(entries))]
    return _PSNR, _SSIM, *measured[:1]


def quality_sheet(rows: Rows, title: str = "Quality", more_digits: int = 0) -> Sheet:
    """Return a sheet with a row per method: PSNR (dB), SSIM and LPIPS at each ratio.

    The best figure of a column, as printed, is bold. Figures are means over the seeds; if there are several,
    ± the sample standard deviation follows PSNR. They have 2, 3 and 3 decimals as in the paper, or
    more_digits more.
    """
    columns = [(("", "method"), [TableCell(method) for method in rows])]
    for ratio, (key, heading, decimals, better) in itertools.product(_ratios(*rows.values()),
                                                                     quality_figures(rows)):
        form = f".{decimals + more_digits}f"
        values = [_values(entries, ratio, key) for entries in rows.values()]
        means = [_mean(v, form) for v in values]
        best = better((float(mean) for mean in means if mean), default=None)
        spreads = [f" ± {statistics.stdev(v):{form}}" if key == "psnr" and len(v) > 1 else "" for v in values]
        columns.append(((percent(ratio), heading),
                        [TableCell(mean + spread, best=bool(mean) and float(mean) == best)
                          for mean, spread in zip(means, spreads, strict=True)]))
    several = any(len(entries) > 1 for entries in rows.values())
    return Sheet.of(f"{title}, mean ± standard deviation over the seeds" if several else title, columns)


def cost_sheet(rows: Rows) -> Sheet:
    """Return a sheet with a row per method and ratio: Gaussians, size in 10^6 bytes and seconds to cut.

    The first row of a method adds the seconds of training, the size on disk for all ratios and the number of
    seeds. Figures are means over the seeds. The title says that times depend on what else the machine did.
    Milliseconds per frame are left out: at equal numbers of Gaussians they say more about the machine than
    about the method; `flexgs bench frame` measures them.
    """
    lines = [(method, ratio) for method, entries in rows.items() for ratio in _ratios(entries) or [""]]
    first = [i == 0 or lines[i - 1][0] != method for i, (method, _) in enumerate(lines)]
    columns = [(("", "method"),
                [TableCell(method if f else "") for (method, _), f in zip(lines, first, strict=True)]),
               (("", "kept"), [TableCell(ratio and percent(ratio)) for _, ratio in lines])]
    for key, heading, form in (("splats", "Gaussians", ",.0f"), ("mb", "MB", ",.2f"),
                               ("cut_seconds", "s to cut", ".3g")):
        columns.append((("", heading), [TableCell(_mean(_values(rows[method], ratio, key), form))
                                        for method, ratio in lines]))
    for key, heading, form in (("train_seconds", "s to train", ",.0f"), ("stored_mb", "MB stored", ",.2f")):
        columns.append((("", heading), [TableCell(_mean(_known(rows[method], key), form) if f else "")
                                        for (method, _), f in zip(lines, first, strict=True)]))
    seeds = [len(_known(rows[method], "seed")) for method, _ in lines]
    columns.append((("", "seeds"),
                    [TableCell(str(n) if n and f else "") for n, f in zip(seeds, first, strict=True)]))
    return Sheet.of("Cost (seconds are of this machine, with whatever else it did meanwhile)", columns)


def published_sheet(rows: Rows, published: Rows) -> Sheet:
    """Return a sheet with three rows per method: reproduced, published (see published()), and the difference.

    The figures are PSNR (dB), SSIM and LPIPS by VGG. Methods, ratios and figures that are not on both sides
    are left out, so that the sheet may be empty.
    """
    pairs = {method: name for method, entries in rows.items()
             if (name := PUBLISHED_AS.get(shlex.split(method)[0]))
             and set(_ratios(entries)) & set(_ratios(published.get(name, ())))}
    words = [(text, kind) for method, name in pairs.items()
             for text, kind in ((method, "reproduced"), ("", f"published ({name})"), ("", "difference"))]
    columns = [(("", "method"), [TableCell(text) for text, _ in words]),
               (("", ""), [TableCell(kind) for _, kind in words])]
    ratios = _ratios(*(rows[method] for method in pairs))
    for ratio, (key, heading, decimals, _) in itertools.product(ratios, (_PSNR, _SSIM, _VGG)):
        form = f".{decimals}f"
        cells = []
        for method, name in pairs.items():
            ours, theirs = _values(rows[method], ratio, key), _values(published[name], ratio, key)
            difference = (f"{statistics.fmean(ours) - statistics.fmean(theirs):+z{form}}" if ours and theirs
                          else "")
            cells += [TableCell(text if difference else "")
                      for text in (_mean(ours, form), _mean(theirs, form), difference)]
        columns.append(((percent(ratio), heading), cells))
    return Sheet.of("Reproduced and published", columns)


def mean_entry(entries: Sequence[Entry]) -> Entry:
    """Return an entry, without a seed, with the mean of every number that all entries have."""
    totals = {key: _known(entries, key) for key in _OF_ENTRY}
    return {"ratios": mean_ratios(entries), **{key: statistics.fmean(values) for key, values in totals.items()
                                               if len(values) == len(entries)}}


def mean_rows(scenes: Sequence[Rows]) -> Rows:
    """Return one entry per method that all scenes have: the mean over scenes of the means over seeds."""
    return {method: [mean_entry([mean_entry(rows[method]) for rows in scenes])]
            for method in scenes[0] if all(rows.get(method) for rows in scenes)}


def write_csv(rows: Rows, path: Path) -> None:
    """Write unrounded figures, one line per method, seed and ratio; a missing figure is an empty field."""
    import pandas as pd  # not at the top: every training imports this file

    lines = [{**entry, **entry["ratios"][ratio], "method": method, "ratio": ratio}
             for method, entries in rows.items() for entry in entries for ratio in _ratios([entry])]
    with atomic_file(path) as out:
        pd.DataFrame(lines, columns=CSV_HEADER, dtype=object).to_csv(out, index=False, lineterminator="\r\n")


def _ratios(*methods: Sequence[Entry]) -> list[str]:
    """Return the ratios that any entry has, rising."""
    return sorted({ratio for entries in methods for entry in entries for ratio in entry["ratios"]}, key=float)


def _values(entries: Sequence[Entry], ratio: str, key: str) -> list[float]:
    """Return a figure at a ratio from the entries that have it."""
    return _known([entry["ratios"].get(ratio, {}) for entry in entries], key)


def _known(entries: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in entries if entry.get(key) is not None]


def _mean(values: Sequence[float], form: str) -> str:
    return format(statistics.fmean(values), form) if values else ""
