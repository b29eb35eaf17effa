"""The viewer and the page in a real browser, headless; skipped where there is none."""

import contextlib
import functools
import io
import json
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flexgs
from flexgs.camera import Camera
from flexgs.camera_path import read_path
from flexgs.config import Config
from flexgs.deploy.merged import MergedModel
from flexgs.deploy.nested import nested
from flexgs.deploy.page import write_page, write_web
from flexgs.deploy.progressive import Progressive
from flexgs.deploy.progressive import write as pack
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.model.elastic import Cuttable
from flexgs.raster import render
from flexgs.scene import load_scene
from flexgs.view.live import Live
from flexgs.view.viewer import BETWEEN, Viewer
from tests.conftest import random_splats
from tests.test_security import served
from tests.test_web import WEB, copied, run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("found no Chromium")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    tab = browser.new_page(viewport={"width": 480, "height": 300}, reduced_motion="reduce")
    tab.set_default_timeout(60_000)
    tab.errors = []
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "studio.html"
    write_page(open_model(trained), path, "studio <1>")
    return path


@pytest.fixture(scope="module")
def folder(trained, capture, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("web") / "studio"
    write_web(open_model(trained), path, "studio <1>", load_scene(capture))
    return path


def percent_of(tab):
    """The viewer's first field, once viser's own fields, shown while the page connects, have gone."""
    field = tab.locator("input:visible").first
    for _ in range(200):
        if field.input_value() == "100":
            return field
        tab.wait_for_timeout(200)
    raise AssertionError("the viewer shows no percentage")


def picture(tab, differs_from: np.ndarray | None = None, like: np.ndarray | None = None) -> np.ndarray:
    """The left of the window, which no panel covers, once it shows something, something new, or the same as
    before: the window shows what has been drawn some frames later, and software draws it."""
    for _ in range(60):
        seen = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"), float)[:225, :200]
        if (seen.std() > 5 and (differs_from is None or np.abs(seen - differs_from).mean() > 1)
                and (like is None or np.abs(seen - like).mean() < 0.5)):
            return seen
        tab.wait_for_timeout(500)
    raise AssertionError("the picture does not change" if like is None else "the picture stays another one")


def shows(tab, text: str, ratio: float | None = None) -> None:
    """Wait until a page says what is shown, and drawn it two frames ago: the window has it then."""
    tab.wait_for_function("""([text, ratio]) => {
        const view = document.querySelector("flexgs-view"), about = view?.shadowRoot?.querySelector("#about");
        return about?.textContent.includes(text) && (ratio === null || view.getAttribute("drawn") === ratio);
    }""", arg=[text, None if ratio is None else f"{ratio:g}"])
    tab.evaluate("new Promise((end) => requestAnimationFrame(() => requestAnimationFrame(end)))")


def element(tab, action: str) -> None:
    """Run a line of JavaScript on a page's element, `view`."""
    tab.evaluate(f"(() => {{ const view = document.querySelector('flexgs-view'); {action} }})()")


def held(tab, name: str) -> Callable:
    """Let no request for a file go on by itself; returns what waits for the next one, and gives its route."""
    requests = queue.SimpleQueue()
    tab.route(f"**/{name}", lambda route: requests.put(route))

    def asked():
        for _ in range(600):
            if not requests.empty():
                return requests.get()
            tab.wait_for_timeout(100)
        raise AssertionError(f"nobody asks for {name}")

    return asked


def rendered(model: Cuttable, camera: dict, budget: float, size: tuple[int, int]) -> np.ndarray:
    """What a page should show at one of its cameras, all of whose frame is in the window: [H, W, 3]."""
    width, height = size
    scale = min(width / camera["width"], height / camera["height"])
    fx, fy = scale * camera["fx"], scale * camera["fy"]
    cx = width / 2 + scale * (camera["cx"] - camera["width"] / 2)
    cy = height / 2 + scale * (camera["cy"] - camera["height"] / 2)
    K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    at = Camera(torch.tensor(camera["viewmat"]).view(4, 4), K, width, height)
    background = torch.tensor(model.config.background)
    return 255 * render(model.cut(budget), at, background=background).image.clamp(0, 1).numpy()


def test_a_page_opens_from_disk_without_a_network(tab, page, trained):
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    shows(tab, "100 % · 800 Gaussians")
    assert tab.title() == "studio <1>"
    assert all(url.startswith(("file:", "blob:", "data:")) for url in asked) and not tab.errors
    whole = picture(tab)
    tab.evaluate("document.querySelector('flexgs-view').model.setBudget('1%')")
    shows(tab, "1 % · 8 Gaussians")
    picture(tab, differs_from=whole)
    assert not tab.errors


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_a_page_draws_what_flexgs_renders(tab, folder, trained, budget):
    """The same Gaussians, projection and blending: only the rounding of each layer to 8 bits is between."""
    with served(folder) as port:
        tab.goto(f"http://127.0.0.1:{port}/")
        shows(tab, "800 Gaussians")
        tab.evaluate(f"document.querySelector('flexgs-view').model.setBudget({budget})")
        shows(tab, f"{100 * budget:g} % ·", budget)
        for part in ("#panel", "#hint"):
            tab.locator(part).evaluate("element => { element.hidden = true; }")
        seen = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"), float)
    camera = json.loads((folder / "manifest.json").read_text())["views"][0]
    error = seen - rendered(open_model(folder / "model.fgs"), camera, budget, (480, 300))
    assert np.abs(error.mean(axis=(0, 1))).max() < 3 and np.square(error).mean() < 5**2


def test_a_page_is_used_by_hand(tab, folder):
    with served(folder) as port:
        tab.goto(f"http://127.0.0.1:{port}/", wait_until="commit")
        tab.wait_for_selector("#panel")
        before = tab.locator("#panel").bounding_box()
        shows(tab, "100 % · 800 Gaussians", 1)
        assert tab.locator("#panel").bounding_box() == before, "the layout jumps"
        whole = picture(tab)
        tab.locator("#ratio").fill("0.5")  # between 0.1 and 100 %
        shows(tab, "3.2 % · 25 Gaussians")
        assert tab.locator("#auto").get_attribute("aria-pressed") == "false"
        tab.click("#auto")
        assert tab.locator("#auto").get_attribute("aria-pressed") == "true"
        tab.evaluate("document.querySelector('flexgs-view').model.setBudget('100%')")
        shows(tab, "100 % ·", 1)
        tab.locator("canvas").press("ArrowLeft")
        turned = picture(tab, differs_from=whole)
        tab.locator("canvas").press("r")
        still = picture(tab, differs_from=turned)
        fingers = tab.context.new_cdp_session(tab)
        for kind, apart in (("touchStart", 20), ("touchMove", 60), ("touchMove", 120), ("touchEnd", None)):
            points = [{"x": 240 + side * apart, "y": 80, "id": side + 1} for side in (-1, 1)] if apart else []
            fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        picture(tab, differs_from=still)
        tab.click("#compare")
        tab.wait_for_function(
            "document.querySelector('flexgs-view').shadowRoot.querySelector('#photo').naturalWidth === 64")
        count = len(json.loads((folder / "manifest.json").read_text())["views"])
        assert f"photograph 1 of {count}" in tab.inner_text("#which")
        tab.click("#before")
        assert f"photograph {count} of {count}" in tab.inner_text("#which")
        box = tab.locator("canvas").bounding_box()
        tab.mouse.move(box["width"] / 3, box["height"] / 3)
        tab.mouse.down()
        tab.mouse.move(box["width"] / 2, box["height"] / 3)
        tab.mouse.up()
        assert not tab.locator("#photo").is_visible() and not tab.errors


class Half(BaseHTTPRequestHandler):
    """Serves a folder of --web, and of a model up to its second stage only, until it may go on."""

    folder: Path
    go: threading.Event
    end: bytes | None = None
    """In place of waiting, what follows the second stage."""

    def do_GET(self):
        name = self.path.strip("/") or "index.html"
        raw = (self.folder / name).read_bytes()
        kinds = {".html": "text/html", ".js": "text/javascript", ".json": "application/json"}
        first, last = map(int, re.findall(r"\d+", self.headers.get("Range", f"0-{len(raw) - 1}")))
        part = raw[first:last + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Type", kinds.get(Path(name).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(part)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(raw)}")
        self.end_headers()
        if name == "model.fgs" and not self.go.is_set() and len(part) > 2000:
            packed = Progressive.open(self.folder / name)
            at = packed.load(0.05) - first
            self.wfile.write(part[:at + 10])
            self.wfile.flush()
            self.go.wait(0.01 if self.end is not None else 60)
            part = part[at + 10:] if self.end is None else self.end
        self.wfile.write(part)

    def log_message(self, *args): ...


@contextlib.contextmanager
def half(folder: Path, **options: object) -> Iterator[tuple[str, threading.Event]]:
    """(URL of a page whose model stops after the second stage, what it waits for)."""
    go = threading.Event()
    handler = type("Handler", (Half,), {"folder": folder, "go": go, **options})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", go
        go.set()
        server.shutdown()


def test_a_page_shows_the_coarse_model_while_the_rest_arrives(tab, folder):
    with half(folder) as (url, go):
        tab.goto(url, wait_until="commit")
        shows(tab, "5 % · 40 Gaussians", 0.05)
        go.set()
        shows(tab, "100 % · 800 Gaussians", 1)


def test_a_page_that_is_one_file_shows_the_coarse_model_while_it_arrives(tab, page, tmp_path):
    raw = page.read_bytes()
    third = [match.start() for match in re.finditer(rb'<script type="text/plain">', raw)][2]

    class Slowly(BaseHTTPRequestHandler):
        go = threading.Event()

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw[:third])
            self.wfile.flush()
            self.go.wait(60)
            self.wfile.write(raw[third:])

        def log_message(self, *args): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Slowly) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab.goto(f"http://127.0.0.1:{server.server_address[1]}/", wait_until="commit")
        shows(tab, "5 % · 40 Gaussians", 0.05)
        Slowly.go.set()
        shows(tab, "100 % · 800 Gaussians", 1)
        server.shutdown()


def test_a_page_says_what_is_wrong_and_keeps_what_it_shows(tab, folder, tmp_path):
    with half(folder, end=b"\0" * 100_000) as (url, go):  # another file's bytes
        tab.goto(url)
        tab.wait_for_selector("text=is damaged, or the file has changed while it was read; load the page")
        assert "What has been loaded stays." in tab.inner_text("#text") and "5 %" in tab.inner_text("#about")
        picture(tab)
    with half(folder, end=b"") as (url, go):  # the connection ends there, again and again
        tab.goto(url)
        tab.wait_for_selector("text=the connection was lost after")
        assert "5 %" in tab.inner_text("#about")
        go.set()
        tab.click("#again")
        shows(tab, "100 % · 800 Gaussians")
        assert not tab.locator("#message").is_visible()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.fgs").write_text("<title>404</title>")
    with served(broken) as port:
        tab.goto(f"http://127.0.0.1:{port}/")
        tab.wait_for_selector("text=not a packed model; expected a file of `flexgs pack`")
    assert not tab.errors


def test_the_element_follows_its_attributes_and_may_be_moved(tab, folder, tmp_path):
    """As frameworks use it: src comes after the element is in the page, changes, and the element moves."""
    web = tmp_path / "web"
    shutil.copytree(folder, web)
    pack(nested(MergedModel(random_splats(300).arrays(), Config.from_preset("plain")), (0.1, 1.0)),
         web / "other.fgs", (0.1, 1.0))
    (web / "broken.json").write_text("<title>404</title>")
    (web / "index.html").write_text('<!doctype html><script src="flexgs.js"></script>'
                                    "<flexgs-view></flexgs-view><main></main>")
    with served(web) as port:
        tab.goto(f"http://127.0.0.1:{port}/")
        tab.wait_for_selector("text=expected <flexgs-view src")
        element(tab, "view.setAttribute('budget', '50%'); view.setAttribute('src', 'model.fgs')")
        shows(tab, "50 % · 400 Gaussians", 0.5)
        first = picture(tab)
        element(tab, "view.setAttribute('budget', '100%')")
        shows(tab, "100 % · 800 Gaussians", 1)
        element(tab, "view.setAttribute('src', 'none.fgs'); view.setAttribute('src', 'other.fgs')")
        shows(tab, "100 % · 300 Gaussians", 1)
        picture(tab, differs_from=first)
        element(tab, "document.querySelector('main').append(view)")
        shows(tab, "100 % · 300 Gaussians", 1)
        picture(tab)
        asked = held(tab, "other.fgs")  # the model comes after the manifest
        element(tab, "view.setAttribute('manifest', 'broken.json')")
        tab.wait_for_selector("text=broken.json: no manifest of `flexgs cut --web`")
        for _ in ("the model", "its cameras"):
            asked().continue_()
        shows(tab, "100 % · 300 Gaussians", 1)
        assert tab.is_visible("text=broken.json: no manifest of `flexgs cut --web`"), "the cut took it away"
    assert not tab.errors


def bare(folder: Path, to: Path) -> Path:
    """A copy of a folder of --web whose page has an element without attributes, window.kept too."""
    shutil.copytree(folder, to)
    (to / "index.html").write_text(
        '<!doctype html><script src="flexgs.js"></script><flexgs-view></flexgs-view>'
        "<script>window.kept = document.querySelector('flexgs-view')</script>")
    return to


def test_the_picture_comes_back_with_the_graphics(tab, folder, tmp_path):
    """A browser takes WebGL away when it likes, such as on a phone whose page was in the background."""
    with served(bare(folder, tmp_path / "web")) as port:
        tab.goto(f"http://127.0.0.1:{port}/")
        element(tab, "view.setAttribute('budget', '100%'); view.setAttribute('src', 'model.fgs')")
        shows(tab, "100 %", 1)
        whole = picture(tab)
        element(tab, "window.lose = view.shadowRoot.querySelector('canvas').getContext('webgl2')"
                     ".getExtension('WEBGL_lose_context')")

        def lost() -> None:
            tab.evaluate("lose.loseContext()")
            tab.wait_for_selector("text=this browser has lost its graphics (WebGL)")
            assert not tab.locator("flexgs-view[drawn]").count()

        lost()
        tab.evaluate("lose.restoreContext()")
        shows(tab, "100 %", 1)
        picture(tab, like=whole)
        assert not tab.locator("#message").is_visible()
        lost()
        element(tab, "view.setAttribute('budget', '5%')")  # cut while there is nothing to draw on
        shows(tab, "5 % · 40 Gaussians")
        tab.evaluate("lose.restoreContext()")
        shows(tab, "5 %", 0.05)
        picture(tab, differs_from=whole)
        lost()
        tab.evaluate("kept.setAttribute('budget', '100%'); kept.remove(); document.body.append(kept)")
        tab.wait_for_selector("text=this browser has lost its graphics (WebGL)")
        tab.evaluate("lose.restoreContext()")
        shows(tab, "100 %", 1)
        picture(tab, like=whole)
        lost()
        tab.evaluate("kept.remove(); lose.restoreContext()")
        tab.wait_for_function("!kept.shadowRoot.querySelector('canvas').getContext('webgl2').isContextLost()")
        tab.evaluate("document.body.append(kept)")
        shows(tab, "100 %", 1)
        picture(tab, like=whole)
        assert not tab.errors


def test_each_message_stays_until_it_is_no_longer_true(tab, folder, tmp_path):
    """That loading has stopped is hidden by no wrong budget, nor by a cut of what is there."""
    web = bare(folder, tmp_path / "web")
    raw, gone = (web / "model.fgs").read_bytes(), threading.Event()
    end = Progressive.open(web / "model.fgs").load(0.05)

    def answer(route) -> None:
        if route.request.headers["range"].startswith("bytes=0-"):
            part = {"Content-Range": f"bytes 0-{end - 1}/{len(raw)}"}
            route.fulfill(status=206, body=raw[:end], headers=part)
        elif gone.is_set():
            route.continue_()
        else:
            route.fulfill(status=404)

    tab.route("**/model.fgs", answer)
    with served(web) as port:
        tab.goto(f"http://127.0.0.1:{port}/")
        element(tab, "view.setAttribute('manifest', 'manifest.json'); view.setAttribute('src', 'model.fgs')")
        stopped, again = tab.locator("text=the server says 404"), tab.locator("#again")
        shows(tab, "5 %", 0.05)
        stopped.wait_for()
        element(tab, "view.setAttribute('budget', 'lots')")
        tab.wait_for_selector("text=budget lots: expected something like 5%")
        assert stopped.is_visible() and again.is_visible()
        element(tab, "view.setAttribute('budget', '10%')")
        tab.wait_for_selector("text=budget lots", state="detached")
        assert stopped.is_visible() and again.is_visible()
        element(tab, "view.setAttribute('budget', '2%')")  # for which nothing is missing
        shows(tab, "2 % · 16 Gaussians", 0.02)
        stopped.wait_for(state="detached")
        element(tab, "view.setAttribute('budget', '100%')")  # tries again
        stopped.wait_for()
        shows(tab, "5 %", 0.05)
        gone.set()
        again.click()
        shows(tab, "100 % · 800 Gaussians", 1)
        assert not tab.locator("#message").is_visible()
        element(tab, "view.setAttribute('src', 'none.fgs')")
        stopped.wait_for()
        assert tab.inner_text("#about") == "loading" and not tab.locator("#compare").is_visible()
    assert not tab.errors


def test_what_comes_late_is_not_taken_for_what_is_shown(tab, folder, tmp_path):
    """Answers about another model, its manifest, and a photograph that is no longer compared."""
    web = bare(folder, tmp_path / "web")
    shutil.copy(web / "manifest.json", web / "old.json")
    shutil.copy(web / "model.fgs", web / "old.fgs")
    pack(nested(MergedModel(random_splats(300).arrays(), Config.from_preset("plain")), (0.1, 1.0)),
         web / "other.fgs", (0.1, 1.0))
    views = json.loads((web / "manifest.json").read_text())["views"]
    with served(web) as port:
        for late in ("manifest", "model"):
            asked = held(tab, "old.json" if late == "manifest" else "old.fgs")
            tab.goto(f"http://127.0.0.1:{port}/")
            element(tab, "view.setAttribute('manifest', 'old.json'); view.setAttribute('src', 'old.fgs');"
                         "view.setAttribute('budget', '100%')")
            request = asked()
            element(tab, "view.removeAttribute('manifest'); view.setAttribute('src', 'other.fgs')")
            shows(tab, "100 % · 300 Gaussians", 1)
            other = picture(tab)
            with contextlib.suppress(Exception):  # the browser may have ended it
                request.fulfill(body="{}") if late == "manifest" else request.abort()
            element(tab, "view.setAttribute('budget', '50%')")
            shows(tab, "50 % · 150 Gaussians", 0.5)
            picture(tab, differs_from=other)
            assert not tab.locator("#message").is_visible() and not tab.locator("#compare").is_visible()
        element(tab, "view.setAttribute('manifest', 'manifest.json'); view.setAttribute('src', 'model.fgs')")
        shows(tab, "50 % · 400 Gaussians", 0.5)
        photographs = [held(tab, view["photo"]) for view in views[:2]]
        tab.click("#compare")
        first = photographs[0]()
        assert not tab.locator("#photo").is_visible()
        first.continue_()
        tab.locator("#photo").wait_for()
        tab.click("#next")
        second = photographs[1]()
        assert not tab.locator("#photo").is_visible(), "the photograph of another view"
        tab.click("#compare")
        second.abort()
        tab.wait_for_function("kept.shadowRoot.querySelector('#photo').complete")
        assert not tab.locator("#message").is_visible()
        tab.click("#compare")
        tab.click("#next")
        photographs[1]().abort()
        tab.wait_for_selector("text=the photograph cannot be loaded")
        assert not tab.locator("flexgs-view[comparing]").count() and not tab.errors


def test_a_model_of_another_degree_takes_the_place_of_one(tab, folder, tmp_path):
    """Harmonics lie in the graphics memory in rows that depend on their number."""
    web = bare(folder, tmp_path / "web")
    for degree in (3, 2):
        splats = random_splats(300, sh_degree=degree).arrays()
        model = nested(MergedModel(splats, Config.from_preset("plain")), (1.0,))
        pack(model, web / f"{degree}.fgs", (1.0,))
    seen = []
    with served(web) as port:
        for before in ([], ["3.fgs"]):
            tab.goto(f"http://127.0.0.1:{port}/")
            for name in (*before, "2.fgs"):
                element(tab, f"view.setAttribute('src', '{name}')")
                tab.wait_for_function("name => kept.model?.cut?.shDegree === Number(name[0])", arg=name)
                shows(tab, "100 % · 300 Gaussians", 1)
            element(tab, "view.shadowRoot.querySelector('#hint').hidden = true")  # it fades in
            seen.append(picture(tab))
    assert np.abs(seen[0] - seen[1]).max() < 3 and not tab.errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spark", "playcanvas"])
def test_an_example_shows_a_model(tab, folder, tmp_path, name):
    """With the package as it is built, in Spark on three.js and in PlayCanvas of the npm registry."""
    web = copied(WEB, tmp_path / "web")
    copied(WEB / "examples", web / "examples")
    run(web, "node", "build.mjs", tmp_path / "page.js")
    shutil.copy(folder / "model.fgs", web / "examples")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=web)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab.goto(f"http://127.0.0.1:{server.server_address[1]}/examples/{name}.html?budget=100%25")
        tab.wait_for_function("document.title === '800 Gaussians'")
        picture(tab)
        server.shutdown()
    assert not tab.errors


def test_a_page_of_another_server_embeds_a_model(tab, folder, tmp_path):
    """One script and one element, with a server that lets this page read (--cors)."""
    (tmp_path / "flexgs.js").write_bytes((folder / "flexgs.js").read_bytes())
    with served(tmp_path) as shop:
        origin = f"http://127.0.0.1:{shop}"
        for cors, said in (((origin,), "100 % · 800 Gaussians"), ((), "loading")):
            with served(folder, cors=cors) as port:
                (tmp_path / "index.html").write_text(
                    '<!doctype html><script type="module" src="flexgs.js"></script>'
                    f'<flexgs-view src="http://127.0.0.1:{port}/model.fgs" budget="100%"></flexgs-view>')
                tab.goto(origin)
                if not cors:
                    tab.wait_for_selector("text=or a server that allows no page of another origin")
                shows(tab, said)


@pytest.fixture(scope="module")
def viewer(trained, capture, tmp_path_factory) -> Iterator[Viewer]:
    pytest.importorskip("viser", reason="viser is not installed")
    models = {"a": open_model(trained), "b": open_model(trained / "cuts" / "studio_010.00pct.ply")}
    viewer = Viewer(models, load_scene(capture), "127.0.0.1", 0, "cpu")
    yield viewer
    viewer.stop()


def test_the_viewer_says_where_it_cannot_listen(trained, viewer):
    taken = int(viewer.url.rstrip("/").rpartition(":")[2])
    for host, port in (("203.0.113.1", 0), ("127.0.0.1", taken), ("127.0.0.1", 99999)):
        with pytest.raises(UserError, match=f"--host {host} --port {port}: .*; choose another"):
            Viewer({"a": open_model(trained)}, None, host, port, "cpu")


def test_the_viewer_cuts_compares_and_measures(tab, viewer):
    tab.goto(viewer.url)
    tab.wait_for_selector("text=the nearest test view")
    text = tab.inner_text("body")
    assert "800 Gaussians, 100 %" in text and "80 Gaussians, 100 %" in text and "ms per frame" in text
    assert re.search(r"PSNR [\d.]+ dB and [\d.]+ dB at \d+\.png", text)
    whole = picture(tab)
    kept = percent_of(tab)
    kept.fill("5")  # percent, as its label says
    kept.press("Enter")
    tab.wait_for_selector("text=40 Gaussians, 5 %")
    tab.keyboard.press("Tab")  # out of the field, or keys would go there
    kept.fill("1")
    kept.press("Enter")
    tab.wait_for_selector("text=8 Gaussians, 1 %")
    one = picture(tab, differs_from=whole)
    for typed, shown in (("5000", "800 Gaussians, 100 %"), ("-3", "1 Gaussians, 0.1 %")):
        kept.fill(typed)
        kept.press("Enter")
        tab.wait_for_selector(f"text={shown}")
    kept.fill("100")
    kept.press("Enter")
    tab.wait_for_selector("text=800 Gaussians, 100 %")
    again = picture(tab, differs_from=one)
    tab.get_by_text("next", exact=True).click()
    picture(tab, differs_from=again)
    assert not tab.errors


def test_the_slider_is_logarithmic_and_keys_do_everything(tab, viewer):
    tab.goto(viewer.url)
    tab.wait_for_selector("text=the nearest test view")
    kept = percent_of(tab)

    def shown(low: float, high: float) -> None:
        for _ in range(50):
            if low < float(kept.input_value()) < high:
                return
            tab.wait_for_timeout(200)
        raise AssertionError(kept.input_value())

    def drag(place: float) -> None:
        track = tab.locator(".multi-slider-track-container").first.bounding_box()
        tab.mouse.move(track["x"] + 0.9 * place * track["width"], track["y"] + track["height"] / 2)
        tab.mouse.down()
        tab.mouse.move(track["x"] + place * track["width"], track["y"] + track["height"] / 2, steps=4)
        tab.mouse.up()

    for _ in range(50):  # while the panel is still being laid out, the track moves away
        drag(1 / 3)
        tab.wait_for_timeout(500)
        if float(kept.input_value()) < 100:
            break
    for percent, place in ((1, 1 / 3), (10, 2 / 3)):
        drag(place)
        shown(0.9 * percent, 1.1 * percent)
    tab.mouse.click(200, 200)  # the keys are those of the window
    tab.keyboard.press("j")
    shown(7, 9)
    kept.fill("100")  # of which every picture differs
    kept.press("Enter")
    tab.mouse.click(200, 200)
    plain = picture(tab)
    for _ in range(50):
        if "photograph" in [box.input_value() for box in tab.locator("input:visible").all()]:
            break
        tab.keyboard.press("c")
        tab.wait_for_timeout(300)
    else:
        raise AssertionError("no key compares with the photograph")
    wiped = picture(tab, differs_from=plain)
    tab.get_by_role("combobox", name="how", exact=True).click()
    tab.get_by_role("option", name="side by side").click()
    beside = picture(tab, differs_from=wiped)
    tab.mouse.click(200, 200)
    with tab.expect_download() as saved:
        tab.keyboard.press("i")
    width, height = Image.open(saved.value.path()).size
    assert saved.value.suggested_filename.startswith("flexgs-")
    assert width / height == pytest.approx(8 / 3, rel=0.02)  # two photographs of 4:3
    tab.keyboard.press("c")  # a second model, or nothing: from the photographs one would see test views only
    still = picture(tab, differs_from=beside)
    tab.keyboard.press("f")
    picture(tab, differs_from=picture(tab, differs_from=still))
    tab.keyboard.press("f")
    assert not tab.errors


def test_a_path_through_key_views_is_saved(tab, viewer, tmp_path):
    """As `flexgs render --path` takes it: from the one test view to the other, and back."""
    tab.goto(viewer.url)
    at: list[str | None] = [None]

    def moved() -> str:
        """The test view that the browser has gone to."""
        return tab.wait_for_function("""before => {
            const name = document.body.innerText.match(/dB at (\\S+), the nearest/)?.[1];
            return name !== before && name;
        }""", arg=at[-1]).json_value()

    at.append(moved())
    for count in (1, 2):
        tab.get_by_text("next", exact=True).click()
        at.append(moved())
        tab.get_by_role("button", name="add", exact=True).click()
        tab.wait_for_selector(f"text={count} key view")
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="save", exact=True).click()
    saved.value.save_as(tmp_path / "path.json")
    found = read_path(str(tmp_path / "path.json"), viewer.test[0].camera, 64, 48)
    assert saved.value.suggested_filename == "camera_path.json" and len(found) == 2 * BETWEEN
    centres = {view.name: view.camera.center for view in viewer.test}
    for name, camera in zip(at[2:], found[::BETWEEN], strict=True):
        assert (camera.center - centres[name]).norm() < 1e-3 * viewer.unit
    assert at[2] != at[3] and not tab.errors


def test_a_model_is_watched_while_it_trains(tab, scene, config):
    """It changes in the browser and is the trained one in the end; being watched changes no bit of it."""
    config.steps, live, trained = 400, Live(scene, 0, "cpu"), []
    started, seen = threading.Event(), threading.Event()
    begin, step = live.begin, live.step
    live.begin = lambda trainer: (begin(trainer), started.set())
    live.step = lambda views: (step(views), seen.wait(0.1))  # slowly, until the browser has its first picture
    thread = threading.Thread(target=lambda: trained.append(flexgs.train(scene, config, "cpu", [live])))
    thread.start()
    assert started.wait(60)
    tab.goto(live.viewer.url)
    tab.wait_for_selector("text=the nearest test view")
    early = picture(tab)
    seen.set()
    thread.join(120)
    picture(tab, differs_from=early)
    tab.wait_for_selector(f"text={len(trained[0]):,} Gaussians, 100 %")
    live.viewer.stop()
    alone = flexgs.train(scene, config, "cpu", [])
    assert all(torch.equal(t, getattr(alone.splats, name)) for name, t in trained[0].splats.items())
