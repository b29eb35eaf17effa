"""When a model is seen over a slow network: a page of `flexgs cut --web`, one SPZ in Spark, streamed SOG.

    python -m tests.web_study RUN [--npm FOLDER]

FOLDER has node_modules with esbuild, three, @sparkjsdev/spark and @playcanvas/supersplat-viewer; without it
only the page of flexgs is measured. A server on loopback sends so many bytes a second over all connections
together, and code compressed with gzip. Chromium is headless and renders in software. A picture counts when
the middle of the window is no longer one colour; the poster of the page of flexgs is left out, but for the
rows that are named after it. "cached": the code, and nothing of the model, has been loaded before. nan: not
known, or not drawn, since the next stage had come by then.
"""

import contextlib
import gzip
import io
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
from base64 import b64decode
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from playwright.sync_api import Browser, Error, sync_playwright

from flexgs.camera_path import fov, start
from flexgs.deploy.lod import write_lod
from flexgs.deploy.page import write_web
from flexgs.deploy.source import open_model
from flexgs.formats import save
from tests.test_browser import CHROMIUM, FLAGS

SPARK = """import * as THREE from "three";
import { SparkRenderer, SplatMesh } from "@sparkjsdev/spark";
const about = JSON.parse(document.body.dataset.start);
const renderer = new THREE.WebGLRenderer({ antialias: false }), scene = new THREE.Scene();
const camera = new THREE.PerspectiveCamera(about.fov, innerWidth / innerHeight, 0.01, 1000);
renderer.setSize(innerWidth, innerHeight);
document.body.append(renderer.domElement);
scene.add(new SparkRenderer({ renderer }));
camera.up.set(...about.up);
camera.position.set(...about.position);
camera.lookAt(...about.target);
scene.add(new SplatMesh({ url: "model.spz" }));
renderer.setAnimationLoop(() => renderer.render(scene, camera));
"""
CODE = (".js", ".css", ".html")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".json": "application/json",
         ".webp": "image/webp", ".jpg": "image/jpeg"}


class Slow(BaseHTTPRequestHandler):
    """Files of a folder, at so many bytes a second over all connections."""

    protocol_version = "HTTP/1.1"
    folder: Path
    rate: float
    poster: bool
    """Whether there is one."""
    lock = threading.Lock()
    free = 0.0
    """When the line is free again."""
    sent: dict[str, int] = {}  # noqa: RUF012

    def do_GET(self):
        path = self.path.partition("?")[0]
        file = self.folder / (path.lstrip("/") + ("index.html" if path.endswith("/") else ""))
        if not file.is_file() or (file.name == "poster.jpg" and not self.poster):
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        raw, code = file.read_bytes(), file.suffix in CODE
        body, asked = gzip.compress(raw) if code else raw, self.headers.get("Range") if not code else None
        self.send_response(206 if asked else 200)
        self.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
        self.send_header("Cache-Control", "max-age=9999" if code else "no-store")
        if code:
            self.send_header("Content-Encoding", "gzip")
        if asked:
            first, last = (int(n) if n else len(raw) - 1
                           for n in re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups())
            body = raw[first:last + 1]
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(raw)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for at in range(0, len(body), 2000):
            with Slow.lock:
                Slow.free = max(Slow.free, time.monotonic()) + len(body[at:at + 2000]) / self.rate
                wait = Slow.free - time.monotonic()
            time.sleep(max(0, wait))
            self.wfile.write(body[at:at + 2000])
            Slow.sent[file.name] = Slow.sent.get(file.name, 0) + len(body[at:at + 2000])

    def log_message(self, *args): ...


@dataclass
class Study:
    """Measure and print a table."""

    run: Annotated[Path, tyro.conf.Positional]
    npm: Path | None = None
    rates: tuple[float, ...] = (200e3, 2e6)
    repeats: int = 3
    sog: Path | None = None
    """Streamed SOG of the run, where it has been made before: that takes minutes."""

    def __call__(self) -> None:
        """Make the pages, show each of them several times, and print the least, the least disturbed."""
        with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
            folder = Path(temporary)
            self._pages(folder)
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            print(f"{'':28}{'kB/s':>6}  {'first':>6}{'5 %':>7}{'15 %':>7}{'100 %':>7}   kB sent: model, code")
            pages = [("flexgs", "web/"), ("flexgs, poster counted", "web/"), ("Spark, one SPZ", "spark/"),
                     ("SuperSplat, streamed SOG",
                      "sog/?content=/model/lod-meta.json&webgl&noanim&noui&settings=/sog/s.json")]
            for rate in self.rates:
                for name, page in pages if self.npm else pages[:2]:
                    for cached in (False, True):
                        rows = [self._measured(browser, folder, page, rate, cached, "poster" in name)
                                for _ in range(self.repeats)]
                        least = np.fmin.reduce(rows)  # nan where no run knows
                        said = "".join(f"{value:7.2f}" for value in least[:4])
                        print(f"{name + (', cached' if cached else ''):28}{rate / 1e3:6.0f} {said}   "
                              f"{least[4] / 1e3:.0f}, {least[5] / 1e3:.0f}", flush=True)
            browser.close()

    def _pages(self, folder: Path) -> None:
        model = open_model(self.run)
        write_web(model, folder / "web", "study")
        index = folder / "web/index.html"
        index.write_text(index.read_text().replace('src="model.fgs"', 'src="model.fgs" budget="100%"'))
        if not self.npm:
            return
        (folder / "spark").mkdir()
        save(model.cut(1.0), folder / "spark/model.spz")
        eye, target, up = (np.array([1, -1, -1]) * vector for vector in start(model.cameras))
        angle = fov(model.cameras)
        about = {"position": eye.tolist(), "target": target.tolist(), "up": up.tolist(), "fov": angle}
        (folder / "spark/index.html").write_text(
            "<!doctype html><style>body { margin: 0; background: #000 }</style>"
            f"<body data-start='{json.dumps(about)}'>"
            '<script type="module" src="spark.js"></script>')
        (self.npm / "study.js").write_text(SPARK)
        subprocess.run([self.npm / "node_modules/.bin/esbuild", "study.js", "--bundle", "--minify",
                        "--format=esm", "--log-level=error", f"--outfile={folder / 'spark/spark.js'}"],
                       cwd=self.npm, check=True)
        viewer = self.npm / "node_modules/@playcanvas/supersplat-viewer/public"
        (folder / "sog").mkdir()
        for file in ("index.html", "index.js", "index.css"):
            (folder / "sog" / file).write_bytes((viewer / file).read_bytes())
        turned = [(vector * [-1, -1, 1]).tolist() for vector in (eye, target)]
        camera = {"initial": {"position": turned[0], "target": turned[1], "fov": angle}}
        (folder / "sog/s.json").write_text(json.dumps({"version": 2, "cameras": [camera], "background": {
            "color": [0, 0, 0]}}))
        if self.sog:
            shutil.copytree(self.sog, folder / "model")
        else:
            write_lod(model, folder / "model/lod-meta.json", (100, 50, 25, 12.5))

    def _measured(self, browser: Browser, folder: Path, page: str, rate: float, cached: bool,
                  poster: bool) -> list[float]:
        """Seconds to the first picture, to 5, 15 and 100 % (nan: unknown); bytes of the model and of code."""
        handler = type("Handler", (Slow,), {"folder": folder, "rate": 1e9, "poster": poster})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}/"
            context = browser.new_context(viewport={"width": 640, "height": 400})
            if cached:
                tab = context.new_page()
                tab.goto(url + page)
                tab.wait_for_timeout(3000)
                tab.close()
            handler.rate, Slow.free = rate, 0.0
            Slow.sent.clear()
            tab = context.new_page()
            seconds = _watched(tab, context, url + page)
            context.close()
            server.shutdown()
        code = sum(size for name, size in Slow.sent.items() if Path(name).suffix in CODE)
        return [*seconds, sum(Slow.sent.values()) - code, code]


def _watched(tab, context, url: str) -> list[float]:
    """Seconds until the window shows something, and until a page of flexgs has drawn 5, 15 and 100 %."""
    shown, session = [], context.new_cdp_session(tab)

    def frame(event: dict) -> None:
        with contextlib.suppress(Error):  # the window has been closed
            session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})
        image = np.asarray(Image.open(io.BytesIO(b64decode(event["data"]))).convert("L"), float)
        h, w = image.shape
        if image[h // 4:h // 2, w // 4:3 * w // 4].std() > 6:
            shown.append(event["metadata"]["timestamp"])

    session.on("Page.screencastFrame", frame)
    tab.add_init_script("""new MutationObserver(() => {
        const ratio = document.querySelector("flexgs-view")?.getAttribute("drawn");
        if (ratio) (window.drawn ??= {})[ratio] ??= performance.timeOrigin + performance.now();
    }).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["drawn"] })""")
    session.send("Page.startScreencast", {"format": "jpeg", "quality": 50, "everyNthFrame": 1})
    begun = time.time()
    tab.goto(url, wait_until="commit", timeout=120_000)
    for _ in range(2400):
        tab.wait_for_timeout(25)
        drawn = tab.evaluate("window.drawn ?? {}")
        if "web/" in url and "1" in drawn and shown:
            break
        quiet = time.monotonic() - Slow.free
        if "web/" not in url and shown and quiet > 3:
            break
    session.remove_listener("Page.screencastFrame", frame)
    first = min(shown) - begun if shown else float("nan")
    stages = [drawn.get(ratio, float("nan")) / 1000 - begun for ratio in ("0.05", "0.15", "1")]
    all_sent = Slow.free + time.time() - time.monotonic() - begun
    return [first, *(stages if drawn else [float("nan"), float("nan"), max(first, all_sent)])]


if __name__ == "__main__":
    tyro.cli(Study)()
