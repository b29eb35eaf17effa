"""An interactive viewer in the browser: orbit, choose how much to keep, compare with photographs or a model.

The server is viser. This machine renders, with the rasterizer used for training, so no GPU is needed
anywhere. While somebody moves, images are small enough, and cuts coarse enough, to keep up; when they stop,
the image is rendered in full.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexgs.camera import Camera
from flexgs.camera_path import around, start
from flexgs.config import count_at
from flexgs.device import clock
from flexgs.errors import MissingDependencyError, UserError
from flexgs.image.quality import psnr
from flexgs.model.elastic import Cuttable
from flexgs.ply import is_wide, ply_bytes
from flexgs.raster import render
from flexgs.scene import Scene, View
from flexgs.splats import Splats
from flexgs.view.visitors import Visitors, url

DRAFT_MS, SMALLEST, WIDEST = 60.0, 0.3, 1280
"""Target milliseconds per image during motion; the smallest fraction of the window's size; the most pixels
across."""
NOTHING, PHOTOGRAPH = "the same", "photograph"
LEAST, STEPS = 0.1, (1, 5, 15, 50, 100)
"""Percentages of the Gaussians: the least that the slider offers, and those of the buttons."""


def view(models: Mapping[str, Cuttable], scene: Scene | None, host: str, port: int, device: str,
         names: Sequence[str] = ()) -> None:
    """Serve the viewer until Ctrl-C. For names see Visitors."""
    viewer = Viewer(models, scene, host, port, device, names)
    print(f"{viewer.url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        viewer.stop()


class Viewer:
    """A viewer served at `url`; every browser that connects gets a camera and a panel of its own."""

    def __init__(self, models: Mapping[str, Cuttable], scene: Scene | None, host: str, port: int, device: str,
                 names: Sequence[str] = ()):
        try:
            from flexgs.view import viser_server
        except ImportError:
            raise MissingDependencyError("viser", "view", "flexgs view") from None
        self.models, self.scene, self.device = models, scene, device
        self.test = list(scene.test) if scene else []
        self.rendering = threading.Lock()  # the rasterizer uses all cores
        self._cuts: OrderedDict[tuple[str, float, int], Splats] = OrderedDict()
        self.version = 0
        """Rises whenever the models have changed."""
        self.server = viser_server.start(host, port, Visitors(host, names))
        self.url = url(host, self.server.get_port())
        first = next(iter(models.values()))
        cameras = first.cameras or ([view.camera for view in scene.train] if scene
                                    else around(first.cut(1.0)))
        self.near, self.origin = cameras[0].near, cameras[0].origin
        self.wide = bool(first.cameras) and is_wide(first.cut(1.0))
        self.unit = 100 * self.near
        """The scene length that browsers see as 1: three.js works in float32 and expects lengths about 1."""
        initial, (position, target, up) = self.server.initial_camera, start(cameras)
        initial.position, initial.look_at, initial.up = position / self.unit, target / self.unit, up
        self.server.scene.set_up_direction(up)
        self.visits: list[Visit] = []
        self.server.on_client_connect(lambda client: Visit(self, client).start())

    def stop(self) -> None:
        """Stop the server."""
        self.server.stop()

    def refresh(self) -> None:
        """Draw anew in every browser: the models have changed."""
        self.version += 1
        for visit in list(self.visits):
            visit.changed.set()

    def cut(self, name: str, percent: float) -> Splats:
        """Return the cut of a model at a percentage; the most recently used cuts are cached."""
        key, model = (name, percent, self.version), self.models[name]
        if key not in self._cuts:
            self._cuts[key] = model.cut(min(1.0, max(percent / 100, 1 / len(model)))).to(self.device)
            if len(self._cuts) > 2 * len(self.models):
                self._cuts.popitem(last=False)
        self._cuts.move_to_end(key)
        return self._cuts[key]

    @torch.no_grad()
    def image(self, name: str, percent: float, camera: Camera) -> tuple[Tensor, float]:
        """Render a cut: (image [H, W, 3] in [0, 1] on the CPU, milliseconds)."""
        splats = self.cut(name, percent)
        background = torch.tensor(self.models[name].config.background, device=splats.means.device)
        start = clock(splats.means.device)
        image = render(splats, camera.to(splats.means.device), background=background).image.clamp(0, 1)
        return image.cpu(), 1000 * (clock(splats.means.device) - start)

    def nearest(self, camera: Camera) -> View:
        """Return the test view nearest to the camera; among equally near ones, the most parallel."""
        def distance(view: View) -> float:
            other = view.camera.at(self.origin)
            alike = float(other.viewmat[2, :3].double() @ camera.viewmat[2, :3].double())
            return float((other.center - camera.center).norm()) / self.unit - 1e-3 * alike

        return min(self.test, key=distance)


class Visit:
    """One connected browser: its panel, and a thread that renders for it."""

    def __init__(self, viewer: Viewer, client: Any):
        self.viewer, self.client = viewer, client
        self.changed, self.gone = threading.Event(), False
        # during motion: fraction of the window's size, and fraction of the Gaussians kept
        self.scale, self.coarse = 0.5, 1.0
        gui, names = client.gui, list(viewer.models)
        self.kept = gui.add_slider("% kept", min=LEAST, max=100.0, step=0.1, initial_value=100.0)
        steps = gui.add_button_group("", [f"{step} %" for step in STEPS])
        steps.on_click(lambda _: setattr(self.kept, "value", float(steps.value.removesuffix(" %"))))
        halves = [NOTHING, *([PHOTOGRAPH] if viewer.test else []), *names[1:]]
        self.right = gui.add_dropdown("right half", halves,
                                      initial_value=halves[-1] if names[1:] else NOTHING)
        self.text = gui.add_markdown("")
        if viewer.test:
            step = gui.add_button_group("test view", ("previous", "nearest", "next"))
            step.on_click(lambda _: self._go(step.value))
        for handle in (self.kept, self.right):
            handle.on_update(lambda _: self.changed.set())
        client.camera.on_update(lambda _: self.changed.set())
        viewer.server.on_client_disconnect(lambda other: self._end() if other is client else None)

    def start(self) -> None:
        """Start rendering for this browser."""
        self.viewer.visits.append(self)
        threading.Thread(target=self._loop, daemon=True).start()
        self.changed.set()

    def _end(self) -> None:
        self.gone = True
        self.viewer.visits.remove(self)
        self.changed.set()

    def _loop(self) -> None:
        while self.changed.wait() and not self.gone:
            self.changed.clear()
            try:
                self._draw(self.scale, self.percent * self.coarse)
                self._keep_up()
                if not self.changed.wait(0.2):
                    self._draw(1.0, self.percent)
                    self._show_text(self._quality())
            except UserError as e:
                self.text.content = f"**{e}**"

    @property
    def percent(self) -> float:
        """The percentage to keep, clamped to the slider's range: a browser may send any number."""
        value = float(self.kept.value)
        return min(max(value, LEAST), 100.0) if np.isfinite(value) else 100.0

    def camera(self, scale: float) -> Camera:
        """Return the browser's camera, at `scale` times the size of its window."""
        seen = self.client.camera
        aspect = float(np.clip(seen.aspect or 4 / 3, 0.2, 5))
        width = max(16, int(min(seen.image_width or 640, WIDEST) * scale))
        height = max(16, int(width / aspect))
        w, x, y, z = seen.wxyz
        turn = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                         [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                         [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
        viewmat = np.eye(4)
        viewmat[:3, :3], viewmat[:3, 3] = turn.T, -turn.T @ (self.viewer.unit * np.asarray(seen.position))
        focal = height / 2 / np.tan(seen.fov / 2)
        K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        return Camera(torch.from_numpy(viewmat).float(), torch.from_numpy(K).float(), width, height,
                      self.viewer.near, self.viewer.origin)

    def _keep_up(self) -> None:
        """Adapt the image size during motion to DRAFT_MS; keep fewer Gaussians if that is not enough."""
        hurry = DRAFT_MS / max(self.ms, 1.0)
        if hurry < 1 and self.scale <= SMALLEST:
            self.coarse = max(self.coarse * max(hurry, 0.25), 0.01)
        elif hurry > 2 and self.coarse < 1:
            self.coarse = min(1.0, 1.5 * self.coarse)
        else:
            self.scale = float(np.clip(self.scale * hurry**0.5, SMALLEST, 0.9))

    def _draw(self, scale: float, percent: float) -> None:
        viewer, right = self.viewer, self.right.value
        first = next(iter(viewer.models))
        camera, target = self.camera(scale), None
        if right == PHOTOGRAPH:
            nearest = viewer.nearest(camera)
            width, height = nearest.camera.width, nearest.camera.height
            enlarge = min(camera.width / width, camera.height / height)
            camera = nearest.camera.scaled(max(16, round(enlarge * width)), max(16, round(enlarge * height)))
            photograph = Image.fromarray(nearest.image().numpy()).resize((camera.width, camera.height))
            target = torch.from_numpy(np.array(photograph)) / 255
        with viewer.rendering:
            image, self.ms = viewer.image(first, percent, camera)
            if right in viewer.models:
                target = viewer.image(right, percent, camera)[0]
        if target is not None:
            middle = camera.width // 2
            image[:, middle:] = target[:, middle:]
            image[:, middle] = 1
        self._show((255 * image).byte().numpy(), self.client.camera.aspect or 4 / 3)
        self._show_text("")

    def _show(self, pixels: np.ndarray, aspect: float) -> None:
        """Show the image, padded with black to the shape of the window, to which browsers stretch it."""
        height, width = pixels.shape[:2]
        down, across = max(0, round(width / aspect) - height), max(0, round(height * aspect) - width)
        if down > 1 or across > 1:
            pixels = np.pad(pixels,
                            ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0)))
        self.client.scene.set_background_image(pixels, format="jpeg", jpeg_quality=90)

    def _quality(self) -> str:
        """Return the PSNR of each model at the nearest test view, as text."""
        if not self.viewer.test:
            return ""
        nearest = self.viewer.nearest(self.camera(0.1))
        with self.viewer.rendering:
            images = [self.viewer.image(name, self.percent, nearest.camera)[0] for name in self.viewer.models]
            values = [f"{psnr(image, nearest.image() / 255):.2f} dB" for image in images]
        return f"\n\nPSNR {' and '.join(values)} at {nearest.name}, the nearest test view"

    def _show_text(self, more: str) -> None:
        lines = []
        for model in self.viewer.models.values():
            count = count_at(min(1.0, max(self.percent / 100, 1 / len(model))), len(model))
            size = ply_bytes(count, model.sh_degree, self.viewer.wide) / 1e6
            lines.append(f"**{count:,}** Gaussians, {self.percent:.3g} %, {size:.2f} MB as PLY")
        self.text.content = "\n\n".join([*lines, f"{self.ms:.1f} ms per frame"]) + more

    def _go(self, where: str) -> None:
        """Move the browser to the nearest test view, or to the one before or after that."""
        test = self.viewer.test
        at = test.index(self.viewer.nearest(self.camera(0.1))) + {"previous": -1, "nearest": 0,
                                                                  "next": 1}[where]
        camera = test[at % len(test)].camera.at(self.viewer.origin)
        turn, seen = camera.viewmat[:3, :3].T.double().numpy(), self.client.camera
        with self.client.atomic():
            seen.position = place = camera.center.double().numpy() / self.viewer.unit
            seen.look_at = place + turn[:, 2] * np.linalg.norm(np.asarray(seen.look_at) - seen.position)
            seen.fov = 2 * np.arctan(camera.height / 2 / float(camera.K[1, 1]))
        self.changed.set()
