"""A self-contained web page that shows a model: viewer and Gaussians in one file, the coarsest cut first.

The viewer is Spark on three.js, fetched by npm and bundled once by esbuild; the bundle is kept in the user's
cache. Each stage of the model is a script of its own, so that a browser shows the first stage while the rest
of the page is still loading, from disk as over HTTP.
"""

import base64
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np

from flexgs.camera import Camera
from flexgs.camera_path import around, fov, start
from flexgs.config import percent
from flexgs.errors import UserError, pasted
from flexgs.files import atomic_file
from flexgs.formats import node, save
from flexgs.model.elastic import Cuttable
from flexgs.origin import WORLD
from flexgs.splats import Splats

WEB = Path(__file__).with_name("web")
RATIOS = (0.01, 0.05, 0.15, 1.0)


def write_page(model: Cuttable, path: Path, title: str, ratios: Sequence[float] = RATIOS) -> str:
    """Write a page with one stage per ratio, and return a sentence about it; UserError without Node.js."""
    if path.suffix.lower() != ".html":
        raise UserError(f"--html {path}: expected a name that ends in .html")
    program = viewer()
    cameras = model.cameras or around(model.cut(1.0))
    unit = 100 * cameras[0].near
    stages, sizes, last = [], [], 0
    for ratio in ratios:
        cut = model.cut(ratio)
        if len(cut) == last:
            continue  # a small model has no further cut at this ratio
        last = len(cut)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stage.spz"
            save(_in_units(cut, unit), file)
            raw = file.read_bytes()
        about = {"label": percent(ratio), "about": f"{len(cut):,} Gaussians, {len(raw) / 1e6:.2f} MB"}
        stages.append(f'<script type="text/plain">{base64.b64encode(raw).decode()}</script>\n'
                      f"<script>flexgs.stage({json.dumps(about)})</script>")
        sizes.append(len(raw))
    page = Template((WEB / "page.html").read_text()).substitute(
        title=title.replace("&", "&amp;").replace("<", "&lt;"),
        program=program.replace("</script", "<\\/script"),
        start=json.dumps(_start(cameras, unit, model.config.background)), stages="\n".join(stages))
    with atomic_file(path) as out:
        out.write_text(page)
    return (f"{pasted(path)}: {path.stat().st_size / 1e6:.2f} MB, of which the viewer "
            f"{len(program) / 1e6:.2f}; stages of "
            f"{', '.join(f'{size / 1e6:.2f}' for size in sizes)} MB (SPZ)")


def viewer() -> str:
    """Return the JavaScript of the page's viewer, built on first use and then kept in the user's cache."""
    built = node.cache() / f"viewer-{node.digest(WEB)}.js"
    if not built.exists():
        with tempfile.TemporaryDirectory() as temporary, atomic_file(built) as out:
            folder = Path(temporary)
            node.fetch(WEB, folder, doing="--html")
            node.run(folder, "esbuild", folder / "viewer.js", "--bundle", "--minify", "--format=iife",
                     "--global-name=flexgs", "--charset=ascii", f"--outfile={out}", seconds=120,
                     doing="--html")
    return built.read_text()


def _in_units(splats: Splats, unit: float) -> Splats:
    """Scale the Gaussians about their origin so that `unit` becomes 1, as viewers and SPZ expect."""
    return replace(splats, means=splats.means / unit, scales=splats.scales - math.log(unit), origin=WORLD)


def _start(cameras: Sequence[Camera], unit: float, background: Sequence[float]) -> dict:
    """Return the initial camera and the background of the page, in the axes of SPZ."""
    eye, target, up = (np.array([1, -1, -1]) * vector for vector in start(cameras))  # in the axes of SPZ
    return {"position": _plain(eye / unit), "target": _plain(target / unit), "up": _plain(up),
            "fov": round(fov(cameras), 2), "background": list(background)}


def _plain(values: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in values]
