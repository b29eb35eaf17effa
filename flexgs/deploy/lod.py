"""Levels of detail: cuts between which renderers of large scenes switch."""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flexgs.deploy.merged import cut_of
from flexgs.errors import UserError, pasted, size_text
from flexgs.files import atomic_folder
from flexgs.formats import save
from flexgs.formats.interchange import splat_transform
from flexgs.gaussians import Attributes
from flexgs.ply import in_world, is_wide, ply_bytes

if TYPE_CHECKING:  # torch takes seconds to import
    from flexgs.model.elastic import Cuttable

META = "lod-meta.json"
PARTS = 8
"""Chunks that a model is divided into at least, where none gets smaller than LEAST."""
LEAST, MOST = 8, 512
"""Limits of a chunk, all levels together, in 1,024 Gaussians: splat-transform's own."""


def target_of(output: Path, percentages: Sequence[float]) -> Path:
    """Return the new folder that write_lod() writes; UserError where write_lod() raises one."""
    if (any(not 0 < p <= 100 for p in percentages)
        or list(percentages) != sorted(set(percentages), reverse=True)):
        found = " ".join(f"{p:g}" for p in percentages)
        raise UserError(f"--lod: found {found}, expected falling percentages such as 100 50 25 12.5")
    if output.suffix and output.name != META:
        raise UserError(f"--output {output}: expected a folder, or FOLDER/{META} for streamed SOG")
    target = output.parent if output.name == META else output
    if target.exists():
        raise UserError(f"--output {output}: {target.absolute()} is there already; expected a new "
                        "folder, or remove it")
    return target


def write_lod(model: "Cuttable", output: Path, percentages: Sequence[float],
              change: Callable[[Attributes], Attributes] = lambda cut: cut) -> str:
    """Write cuts of falling size, and return a sentence about them.

    Args:
        model: the model to cut.
        output: a new folder for lod0.ply, lod1.ply, ...; or FOLDER/lod-meta.json, for PlayCanvas's
            streamed SOG, which splat-transform makes in the new folder FOLDER.
        percentages: how much of the model each level keeps, falling.
        change: applied to every cut before it is written.

    Raises:
        UserError: the folder exists (it would be replaced), or an argument is none of the above.
    """
    streamed, target = output.name == META, target_of(output, percentages)
    levels = [in_world(cut, output) if streamed else cut
              for cut in (change(cut_of(model, p / 100)) for p in percentages)]
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(target) as folder:
        plain = [(Path(temporary) if streamed else folder) / f"lod{i}.ply" for i in range(len(levels))]
        for level, path in zip(levels, plain, strict=True):
            save(level, path)
        if streamed:
            tagged = [part for i, path in enumerate(plain) for part in (path, "--tag-lod", str(i))]
            splat_transform([*tagged, *_chunks(levels)], folder / META)
        whole = ply_bytes(len(model), model.sh_degree, is_wide(change(cut_of(model, 1.0))))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    counts = ", ".join(f"{len(level):,}" for level in levels)
    return (f"{pasted(output)}: levels of {counts} Gaussians, {size_text(size)}; the whole as PLY "
            f"{size_text(whole)}")


def _chunks(levels: Sequence[Attributes]) -> list[str]:
    """Return splat-transform's options for chunks that fit the model.

    Its own are for millions of Gaussians in metres: most captures would be one chunk, of which a viewer draws
    one level from everywhere.
    """
    thousands = math.ceil(sum(map(len, levels)) / PARTS / 1024)
    low, high = np.percentile(levels[0].means, (5, 95), axis=0)
    extent = max(1, math.ceil((high - low).max() / 4))  # whole units: it takes no others
    return ["--lod-chunk-count", str(min(MOST, max(LEAST, thousands))), "--lod-chunk-extent", str(extent)]
