"""Writes PlayCanvas SOG: lossless WebP images of 8-bit numbers, and meta.json, which explains them, in a zip.

As its specification has it: https://developer.playcanvas.com/user-manual/gaussian-splatting/formats/sog

Scales, colours and harmonics are numbers of a codebook of 256 levels each. All harmonics of a Gaussian are an
entry of a palette: up to ENTRIES Gaussians have an entry each, more share them, by k-means within groups of
similar ones. The time is then linear in the number of Gaussians, which one k-means over all is not.
"""

import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from flexgs.gaussians import Gaussians

ENTRIES = 65536
"""Largest number of entries in the palette: a label has 16 bits."""
GROUP = 4096
"""Largest number of Gaussians in a group. Smaller groups are clustered faster, and a little worse."""
ROUNDS = 5
"""Rounds of k-means: 10 have no smaller error in the fourth digit."""
TAIL = 16
"""Levels of a codebook at each end, for the values far from all others."""
ROW = 64
"""Entries of the palette in a row of its image."""


def write(gaussians: Gaussians, path: Path) -> None:
    """Write Gaussians in their order; neighbours in space should follow each other.

    Equal Gaussians make equal bytes.
    """
    means, quats, scales, opacities, sh0, shN = (values for _, values in gaussians.items())
    n, coefficients = shN.shape[:2]
    about: dict[str, object] = {"version": 2, "asset": {"generator": "flexgs"}, "count": n}
    images = {}

    spread = np.sign(means) * np.log1p(np.abs(means.astype(np.float64)))
    low, high = spread.min(0), spread.max(0)
    numbers = np.rint((spread - low) / np.where(high > low, high - low, 1) * 65535).astype(int)
    images["means_l.webp"], images["means_u.webp"] = _square(numbers & 255), _square(numbers >> 8)
    about["means"] = {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]}

    largest = np.abs(quats).argmax(1)[:, None]
    unit = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    unit = unit * np.where(np.take_along_axis(unit, largest, 1) < 0, -1, 1)  # q and -q are the same rotation
    others = unit[np.arange(4) != largest].reshape(n, 3)  # at most 1 / sqrt(2) each
    images["quats.webp"] = _square(np.hstack([np.rint(255 * (others / np.sqrt(2) + 0.5)), 252 + largest]))
    about["quats"] = {"files": ["quats.webp"]}

    numbers, levels = _coded(scales)
    images["scales.webp"] = _square(numbers)
    about["scales"] = {"codebook": levels, "files": ["scales.webp"]}

    numbers, levels = _coded(sh0)
    alphas = 255 / (1 + np.exp(-opacities.astype(np.float64).clip(-700)))
    images["sh0.webp"] = _square(np.hstack([numbers, np.rint(alphas)[:, None]]))
    about["sh0"] = {"codebook": levels, "files": ["sh0.webp"]}

    if coefficients:
        labels, entries = palette(shN.reshape(n, -1), ENTRIES)
        numbers, levels = _coded(entries)
        full = np.pad(numbers.reshape(-1, coefficients, 3), ((0, -len(entries) % ROW), (0, 0), (0, 0)))
        images["shN_centroids.webp"] = full.reshape(-1, ROW * coefficients, 3)
        images["shN_labels.webp"] = _square(np.stack([labels & 255, labels >> 8, 0 * labels], axis=1))
        about["shN"] = {"count": len(entries), "bands": gaussians.sh_degree, "codebook": levels,
                        "files": ["shN_centroids.webp", "shN_labels.webp"]}

    with zipfile.ZipFile(path, "w") as packed:
        for name, pixels in images.items():
            packed.writestr(zipfile.ZipInfo(name), _webp(pixels))  # without the time of writing
        packed.writestr(zipfile.ZipInfo("meta.json"), json.dumps(about, separators=(",", ":")))


def palette(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace rows by those of a palette.

    Args:
        values: [N, D].
        size: the largest number of entries.

    Returns:
        labels [N] and entries [M, D] with M <= size, so that entries[labels[i]] is near values[i]; equal if
        N <= size.
    """
    from scipy.cluster.vq import kmeans2  # takes a third of a second to import

    if len(values) <= size:
        return np.arange(len(values)), values
    labels, parts, found = np.empty(len(values), int), [], 0
    for group in _groups(values, np.arange(len(values))):
        rows = values[group]
        start = rows[np.linspace(0, len(rows) - 1, size * len(rows) // len(values)).astype(int)]
        with warnings.catch_warnings(action="ignore"):  # an entry of no row: there are equal ones
            entries, labels[group] = kmeans2(rows, start, iter=ROUNDS, minit="matrix")
        labels[group] += found
        found += len(entries)
        parts.append(entries)
    return labels, np.concatenate(parts)


def _groups(values: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """Halve the chosen rows of values [N, D], across the direction in which they vary most, down to GROUP."""
    if len(chosen) <= GROUP:
        return [chosen]
    rows, half = values[chosen], len(chosen) // 2
    sample = rows[::len(rows) // GROUP]
    direction = np.linalg.eigh(np.cov(sample.T))[1][:, -1].astype(values.dtype)
    order = np.argpartition(rows @ direction, half)
    return _groups(values, chosen[order[:half]]) + _groups(values, chosen[order[half:]])


def _coded(values: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Quantise values to 256 levels: numbers 0 to 255 of their shape, and the levels.

    All but TAIL levels at each end are evenly spaced over twice the range of 99.8 % of the values, or over
    the range of all: a few far values do not make the others coarse.
    """
    low, first, last, high = np.quantile(values, [0, 0.001, 0.999, 1])
    first, last = max(low, first - (last - first) / 2), min(high, last + (last - first) / 2)
    levels = np.concatenate([np.linspace(low, first, TAIL, endpoint=False),
                             np.linspace(first, last, 256 - 2 * TAIL),
                             np.linspace(last, high, TAIL + 1)[1:]]).round(6)  # fewer digits, fewer bytes
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values), levels.tolist()


def _square(numbers: np.ndarray) -> np.ndarray:
    """Lay out rows [N, C] as the pixels of an image [H, W, C] that is about square."""
    width = int(np.ceil(np.sqrt(len(numbers))))
    full = np.pad(numbers, ((0, -len(numbers) % width), (0, 0)), constant_values=255)
    return full.reshape(-1, width, numbers.shape[1])


def _webp(pixels: np.ndarray) -> bytes:
    """Pack numbers 0 to 255 [H, W, 3 or 4] as a WebP image, also where it is transparent."""
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "WEBP", lossless=True, exact=True)
    return out.getvalue()
