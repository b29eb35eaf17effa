"""Take the pictures of the viewer and of the page that are in docs/.

    python docs/viewer_screenshots.py --run runs/flexgs-demo/studio --scene runs/demo-data/studio

Needs Chromium or Chrome.
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from flexgs.commands.guard import guard
from flexgs.config import Config
from flexgs.deploy.page import write_page
from flexgs.deploy.source import open_model
from flexgs.errors import UserError
from flexgs.options import parse
from flexgs.scene.load import load_capture
from flexgs.view.viewer import PHOTOGRAPH, Viewer

SOFTWARE = ["--no-sandbox", "--disable-background-networking", "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@dataclass
class Screenshots:
    """Take the pictures of the viewer and of the page that are in docs/."""

    run: Path = Path("runs/flexgs-demo/studio")
    scene: Path = Path("runs/demo-data/studio")
    output: Path = Path(__file__).parent

    def __call__(self) -> None:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if not found:
            raise UserError("viewer_screenshots: found no Chromium in PATH")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=found, args=SOFTWARE)
            self._viewer(browser)
            self._page(browser)
            browser.close()

    def _viewer(self, browser: Browser) -> None:
        scene = load_capture(self.scene, Config.load(self.run / "config.json"))
        viewer = Viewer({self.run.name: open_model(self.run)}, scene, "127.0.0.1", 0, "cpu")
        tab = browser.new_page(viewport={"width": 960, "height": 600})
        tab.goto(viewer.url)
        tab.wait_for_selector("text=the nearest test view", timeout=120_000)
        tab.locator("input:visible").first.fill("10")
        tab.locator("input:visible").first.press("Enter")
        tab.get_by_role("combobox", name="compare with").click()
        tab.get_by_role("option", name=PHOTOGRAPH).click()
        tab.get_by_text("nearest", exact=True).click()
        close = tab.locator(".mantine-Notification-closeButton")
        if close.count():
            close.first.click()
        tab.wait_for_timeout(8000)
        tab.screenshot(path=self.output / "viewer.png")
        tab.close()
        viewer.stop()

    def _page(self, browser: Browser) -> None:
        tab = browser.new_page(viewport={"width": 960, "height": 600})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "page.html"
            write_page(open_model(self.run), path, self.run.name)
            tab.goto(path.as_uri())
            tab.wait_for_selector("flexgs-view[drawn='1']", timeout=120_000)
            tab.evaluate("document.querySelector('flexgs-view').model.setBudget('15%')")
            tab.wait_for_selector("flexgs-view[drawn='0.15']", timeout=120_000)
            tab.wait_for_timeout(1000)
            tab.screenshot(path=self.output / "page.png")
        tab.close()


if __name__ == "__main__":
    sys.exit(guard(lambda: parse(Screenshots, sys.argv[1:], "viewer_screenshots.py")()))
