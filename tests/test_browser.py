"""The viewer and the page in a real browser, headless; skipped where there is none."""

import io
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flexgs
from flexgs.camera import look_at
from flexgs.camera_path import fov, start
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.formats.node import UNREACHED
from flexgs.raster import render
from flexgs.scene import load_scene
from flexgs.view.live import Live
from flexgs.view.page import write_page
from flexgs.view.viewer import Viewer

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
    tab = browser.new_page(viewport={"width": 480, "height": 300})
    tab.set_default_timeout(60_000)
    tab.errors = []
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "studio.html"
    try:
        write_page(open_model(trained), path, "studio <1>")
    except UserError as e:
        if UNREACHED not in str(e) and shutil.which("npm"):
            raise
        pytest.skip(f"the page cannot be built here: {e}")
    return path


def picture(tab, differs_from: np.ndarray | None = None) -> np.ndarray:
    """The left of the window, which no panel covers, once it shows something new: software draws it, which
    takes a while."""
    for _ in range(60):
        seen = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"), float)[:225, :200]
        if seen.std() > 5 and (differs_from is None or np.abs(seen - differs_from).mean() > 1):
            return seen
        tab.wait_for_timeout(500)
    raise AssertionError("the picture does not change")


def expected(trained: Path, upside_down: bool = False) -> np.ndarray:
    """What picture() should see of the page at first."""
    model = open_model(trained)
    eye, target, up = (torch.from_numpy(vector).float() for vector in start(model.cameras))
    camera = look_at(eye, target, -up if upside_down else up, 480, 300, fov(model.cameras))
    background = torch.tensor(model.config.background)
    return 255 * render(model.cut(1.0), camera, background=background).image.clamp(0, 1).numpy()[:225, :200]


def test_a_page_opens_from_disk_without_a_network(tab, page, trained):
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("button:nth-of-type(4)")
    assert [button.inner_text()
            for button in tab.query_selector_all("button")] == ["1 %", "5 %", "15 %", "100 %"]
    assert "800 Gaussians" in tab.inner_text("#about") and tab.title() == "studio <1>"
    assert all(url.startswith(("file:", "blob:", "data:")) for url in asked) and not tab.errors
    whole = picture(tab)
    upright, turned = expected(trained), expected(trained, upside_down=True)
    for _ in range(20):  # software draws the stages one after another
        if np.abs(whole - upright).mean() < 0.5 * np.abs(whole - turned).mean():
            break
        tab.wait_for_timeout(500)
        whole = picture(tab)
    else:
        raise AssertionError("the page does not show what is rendered here")
    tab.click("text='1 %'")
    picture(tab, differs_from=whole)
    assert "8 Gaussians" in tab.inner_text("#about") and not tab.errors


@pytest.fixture
def slow(page) -> Iterator[tuple[str, threading.Event]]:
    """(a URL that sends the page up to its second stage and then waits, what it waits for)."""
    raw, go = page.read_bytes(), threading.Event()
    half = [match.start() for match in re.finditer(rb'<script type="text/plain">', raw)][2]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(raw) if self.path == "/" else 0))
            self.end_headers()
            if self.path == "/":
                self.wfile.write(raw[:half])
                self.wfile.flush()
                go.wait(60)
                self.wfile.write(raw[half:])

        def log_message(self, *args): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", go
        go.set()
        server.shutdown()


def test_a_page_shows_the_coarse_model_while_the_rest_arrives(tab, slow):
    url, go = slow
    tab.goto(url, wait_until="commit")
    tab.wait_for_selector("button:nth-of-type(2)")
    assert "40 Gaussians" in tab.inner_text("#about") and len(tab.query_selector_all("button")) == 2
    go.set()
    tab.wait_for_selector("button:nth-of-type(4)")
    assert "800 Gaussians" in tab.inner_text("#about")


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
    kept = tab.locator("input:visible").first
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
    kept.fill("1")
    kept.press("Enter")
    tab.wait_for_selector("text=8 Gaussians, 1 %")
    tab.get_by_text("next", exact=True).click()
    picture(tab, differs_from=one)
    assert not tab.errors


def test_the_slider_is_logarithmic_and_keys_do_everything(tab, viewer):
    tab.goto(viewer.url)
    tab.wait_for_selector("text=the nearest test view")
    kept = tab.locator("input:visible").first

    def shown(low: float, high: float) -> None:
        for _ in range(50):
            if low < float(kept.input_value()) < high:
                return
            tab.wait_for_timeout(200)
        raise AssertionError(kept.input_value())

    track = tab.locator(".multi-slider-track-container").first.bounding_box()
    for percent, place in ((1, 1 / 3), (10, 2 / 3)):
        tab.mouse.move(track["x"] + 0.9 * place * track["width"], track["y"] + track["height"] / 2)
        tab.mouse.down()
        tab.mouse.move(track["x"] + place * track["width"], track["y"] + track["height"] / 2, steps=4)
        tab.mouse.up()
        shown(0.9 * percent, 1.1 * percent)
    tab.mouse.click(200, 200)  # the keys are those of the window
    tab.keyboard.press("j")
    shown(7, 9)
    plain = picture(tab)
    while "photograph" not in [box.input_value() for box in tab.locator("input:visible").all()]:
        tab.keyboard.press("c")
        tab.wait_for_timeout(300)
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
    tab.keyboard.press("f")
    flown = picture(tab, differs_from=beside)
    picture(tab, differs_from=flown)
    tab.keyboard.press("f")
    assert not tab.errors


def test_a_model_is_watched_while_it_trains(tab, scene, config):
    """It changes in the browser and is the trained one in the end; being watched changes no bit of it."""
    config.steps, live, trained = 400, Live(scene, 0, "cpu"), []
    started = threading.Event()
    begin = live.begin
    live.begin = lambda trainer: (begin(trainer), started.set())
    thread = threading.Thread(target=lambda: trained.append(flexgs.train(scene, config, "cpu", [live])))
    thread.start()
    assert started.wait(60)
    tab.goto(live.viewer.url)
    tab.wait_for_selector("text=the nearest test view")
    early = picture(tab)
    thread.join(120)
    picture(tab, differs_from=early)
    tab.wait_for_selector(f"text={len(trained[0]):,} Gaussians, 100 %")
    live.viewer.stop()
    alone = flexgs.train(scene, config, "cpu", [])
    assert all(torch.equal(t, getattr(alone.splats, name)) for name, t in trained[0].splats.items())
