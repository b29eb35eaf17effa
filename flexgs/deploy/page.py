"""Web pages that show a model, the coarsest cut first: a folder for a server, or one file that opens offline.

Both hold the packed model (progressive.py) and flexgs.js, which web/ at the top of the repository is built
into and which is kept in deploy/web/, so that no Node.js is needed here.
"""

import base64
import gzip
import html
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image

from flexgs.camera import Camera, look_at
from flexgs.camera_path import around, fov, most_direct, start, upwards
from flexgs.config import count_at
from flexgs.deploy.merged import MergedModel
from flexgs.deploy.nested import as_deltas, nested
from flexgs.deploy.progressive import RATIOS, Progressive, write
from flexgs.errors import UserError, pasted, size_text
from flexgs.evaluate import Decimated
from flexgs.files import atomic_file, atomic_folder
from flexgs.model.elastic import Cuttable, ElasticModel
from flexgs.raster import render
from flexgs.scene import Scene, View
from flexgs.splats import Splats

WEB = Path(__file__).with_name("web")
LARGE, FIRST = 200_000, 0.001
"""Models of so many Gaussians have a stage before all others, at this ratio."""
VIEWS = 8
"""The most test views that a page offers."""
PHOTO, POSTER = 1280, 720
"""The longer side in pixels of photographs, at most, and of the poster."""


def check_web(folder: Path) -> None:
    """Raise UserError unless write_web() may write this folder: it is new, or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--web {folder}: is there already; expected a new or empty folder")


def check_page(path: Path) -> None:
    """Raise UserError unless write_page() may write this file."""
    if path.suffix.lower() != ".html":
        raise UserError(f"--html {path}: expected a name that ends in .html")
    if path.is_dir():
        raise UserError(f"--html {path}: is a folder; expected the name of a file")


def write_web(model: Cuttable, folder: Path, title: str, scene: Scene | None = None) -> str:
    """Write a folder with a page, its module, the model, a poster and a manifest; return a sentence about it.

    Args:
        model: the model.
        folder: it must not exist yet, or be empty.
        title: the title of the page.
        scene: the capture, whose test views are shown beside the model. None: no photographs.

    Raises:
        UserError: the folder holds something, or a browser cannot cut the model.
    """
    check_web(folder)
    with atomic_folder(folder) as out:
        sizes = _pack(model, out / "model.fgs")
        cameras, photographs, poster = _shown(model, scene)
        about = _about(model, cameras, title)
        (out / "poster.jpg").write_bytes(poster)
        if photographs:
            (out / "photographs").mkdir()
        for i, photograph in enumerate(photographs):
            about["views"][i]["photo"] = f"photographs/{i + 1}.jpg"
            (out / "photographs" / f"{i + 1}.jpg").write_bytes(photograph)
        (out / "manifest.json").write_text(json.dumps(about, separators=(",", ":")))
        shutil.copyfile(WEB / "flexgs.js", out / "flexgs.js")
        (out / "flexgs.js.gz").write_bytes(gzip.compress((WEB / "flexgs.js").read_bytes(), mtime=0))
        (out / "index.html").write_text(_page(title, "poster.jpg", 'src="model.fgs" manifest="manifest.json"',
                                              '<script src="flexgs.js" async></script>'))
    shared = f"; {len(photographs)} photographs of test views are in it" if photographs else ""
    return f"{pasted(folder)}: {_stages(sizes)}{shared}; flexgs serve {pasted(folder)} shows it"


def write_page(model: Cuttable, path: Path, title: str) -> str:
    """Write a page that is one file and needs no network, first stage first; return a sentence about it."""
    check_page(path)
    with atomic_file(path) as out:
        packed = out.with_suffix(".fgs")
        sizes = _pack(model, packed)
        cameras, _, poster = _shown(model, None)
        manifest = html.escape(json.dumps(_about(model, cameras, title), separators=(",", ":")))
        with packed.open("rb") as file:
            pieces = [file.read(size) for size in sizes]
        packed.unlink()
        push = 'document.querySelector("flexgs-view").push(document.currentScript.previousElementSibling)'
        pushed = "\n".join(f'<script type="text/plain">{_base64(piece)}</script>\n<script>{push}</script>'
                           for piece in pieces)
        # a classic script runs before the rest of the page has arrived, which a module would wait for
        program = f"<script>{(WEB / 'flexgs.js').read_text()}</script>\n{pushed}"
        out.write_text(_page(title, f"data:image/jpeg;base64,{_base64(poster)}", f'manifest="{manifest}"',
                             program))
    return f"{pasted(path)}: {size_text(path.stat().st_size)}; {_stages(sizes)}"


def _pack(model: Cuttable, path: Path) -> list[int]:
    """Write the model as a browser reads it; return the bytes up to the first stage, then of each part."""
    if isinstance(model, Progressive):
        model.load(1.0)
        model.cameras  # noqa: B018  # read with all settings, which the repacked file has too
        elastic: Cuttable = model.model
    else:
        elastic = model
    ratios = ((FIRST,) if len(model) >= LARGE else ()) + RATIOS
    ratios = tuple(r for r, after in zip(ratios, (*ratios[1:], 2.0), strict=True)
                   if after > 1 or count_at(r, len(model)) < count_at(after, len(model)))
    if isinstance(elastic, Decimated):  # its cuts are merged from the whole
        elastic = nested(MergedModel(elastic.splats.arrays(), elastic.config, elastic.cameras), ratios)
    elif isinstance(elastic, MergedModel):
        elastic = nested(elastic, ratios)
    assert isinstance(elastic, ElasticModel)
    write(as_deltas(elastic, ratios), path, ratios)
    packed = Progressive.open(path)
    first, *others = (chunk.bytes for chunk in packed.chunks)
    return [packed.ends + first, *others, packed.packed.last[0]]


def _shown(model: Cuttable, scene: Scene | None) -> tuple[list[Camera], list[bytes], bytes]:
    """Return the cameras that a page offers, the best first, their photographs if any, and a poster."""
    whole = model.cut(1.0)
    if scene and scene.test:
        views = scene.test[::1 + (len(scene.test) - 1) // VIEWS]
        best = views[most_direct([view.camera for view in views])]
        views = [best, *(view for view in views if view is not best)]
        cameras, photos = [view.camera.at(whole.origin) for view in views], [_photo(view) for view in views]
    else:
        known = model.cameras or around(whole)
        eye, target, _ = (torch.from_numpy(vector).float() for vector in start(known))
        up = torch.from_numpy(upwards(known)).float()
        cameras = [look_at(eye, target, up, 1280, 720, fov(known), known[0].near, known[0].origin)]
        photos = []
    return cameras, photos, _poster(whole, cameras[0], model.config.background)


def _about(model: Cuttable, cameras: Sequence[Camera], title: str) -> dict[str, Any]:
    """Return the manifest, with cameras about the model's origin; the viewer's view.ts describes it."""
    lenses = [_plain(camera.K[[0, 1, 0, 1], [0, 1, 2, 2]]) for camera in cameras]
    views = [{"width": camera.width, "height": camera.height, "viewmat": _plain(camera.viewmat),
              **dict(zip(("fx", "fy", "cx", "cy"), lens, strict=True))}
             for camera, lens in zip(cameras, lenses, strict=True)]
    return {"title": title, "model": "model.fgs", "poster": "poster.jpg",
            "background": list(model.config.background), "near": cameras[0].near,
            "up": _plain(torch.from_numpy(upwards(model.cameras or cameras))), "views": views}


def _page(title: str, poster: str, attributes: str, program: str) -> str:
    return Template((WEB / "page.html").read_text()).substitute(
        title=html.escape(title), poster=poster, attributes=attributes, program=program)


def _photo(view: View) -> bytes:
    photo = Image.fromarray(view.image().numpy())
    photo.thumbnail((PHOTO, PHOTO), Image.Resampling.LANCZOS)
    return _jpeg(photo)


def _poster(splats: Splats, camera: Camera, background: Sequence[float]) -> bytes:
    scale = POSTER / max(camera.width, camera.height)
    small = camera.scaled(max(1, round(camera.width * scale)), max(1, round(camera.height * scale)))
    image = render(splats, small, background=torch.tensor(background)).image.clamp(0, 1)
    return _jpeg(Image.fromarray((255 * image).round().byte().numpy()))


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80, optimize=True)
    return out.getvalue()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _plain(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.9g}") for value in values.flatten().tolist()]


def _stages(sizes: Sequence[int]) -> str:
    return f"stages end at {', '.join(map(size_text, np.cumsum(sizes[:-1])))}"
