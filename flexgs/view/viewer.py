"""An interactive viewer in the browser: orbit, choose how much to keep, compare with photographs or a model.

The server is viser. This machine renders, with the rasterizer used for training, so no GPU is needed
anywhere. While somebody moves, images are small enough, and cuts coarse enough, to keep up; when they stop,
the image is rendered in full.
"""

import io
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexgs.camera import Camera
from flexgs.camera_path import around, orbit, path_text, start, views
from flexgs.config import count_at
from flexgs.device import clock
from flexgs.errors import MissingDependencyError, UserError
from flexgs.image.quality import psnr
from flexgs.model.elastic import Cuttable
from flexgs.ply import is_wide, ply_bytes
from flexgs.raster import render
from flexgs.raster.contract import RasterConfig
from flexgs.scene import Scene, View
from flexgs.splats import Splats
from flexgs.view.visitors import Visitors, url

DRAFT_MS, SMALLEST, WIDEST = 60.0, 0.3, 1280
"""Target milliseconds per image during motion; the smallest fraction of the window's size; the most pixels
across."""
NOTHING, PHOTOGRAPH = "nothing", "photograph"
WIPED, BESIDE = "wiped", "side by side"
LEAST, STEPS = 0.1, (0.1, 1, 5, 15, 50, 100)
"""Percentages of the Gaussians: the least that is offered, and the marks of the slider."""
FLIGHT = 240
"""Cameras of one round of the flight."""
BETWEEN = 60
"""Frames of a saved camera path from one key view to the next."""
KEYS = ("keys: **K** more, **J** fewer, **N** and **P** test view, **C** compare, **F** fly, **I** image, "
        "**V** key view")


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
    def image(self, name: str, percent: float, camera: Camera, antialiased: bool) -> tuple[Tensor, float]:
        """Render a cut: (image [H, W, 3] in [0, 1] on the CPU, milliseconds)."""
        splats = self.cut(name, percent)
        background = torch.tensor(self.models[name].config.background, device=splats.means.device)
        start = clock(splats.means.device)
        image = render(splats, camera.to(splats.means.device), background=background,
                       config=RasterConfig(antialiased=antialiased)).image.clamp(0, 1)
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
        self.flight: Iterator[Camera] | None = None
        """The cameras to come, while it flies."""
        self.shown = np.zeros((1, 1, 3), np.uint8)
        """The last image in full size."""
        self.kept = gui.add_number("% kept", min=LEAST, max=100.0, step=0.1, initial_value=100.0)
        marks = tuple((math.log10(step), f"{step:g}") for step in STEPS)
        # a slider with one thumb, which unlike viser's other slider does not show the logarithm as a number
        self.slider = gui.add_multi_slider("", min=marks[0][0], max=marks[-1][0], step=0.01,
                                           initial_value=(marks[-1][0],), marks=marks)
        choices = [NOTHING, *([PHOTOGRAPH] if viewer.test else []), *names[1:]]
        self.other = gui.add_dropdown("compare with", choices,
                                      initial_value=choices[-1] if names[1:] else NOTHING)
        self.how = gui.add_dropdown("how", (WIPED, BESIDE), initial_value=WIPED)
        self.wipe = gui.add_slider("wipe at %", min=0, max=100, step=1, initial_value=50)
        self.antialiased = gui.add_checkbox("anti-aliased",
                                            next(iter(viewer.models.values())).config.antialiased)
        self.text = gui.add_markdown("")
        if viewer.test:
            step = gui.add_button_group("test view", ("previous", "nearest", "next"))
            step.on_click(lambda _: self._go(step.value))
        self.key_views: list[Camera] = []
        """What a camera path is saved through."""
        path = gui.add_button_group("key views", ("add", "drop", "save"))
        path.on_click(lambda _: self._key_view(path.value))
        self.path = gui.add_markdown("", visible=False)
        buttons = gui.add_button_group("", ("fly", "image"))
        buttons.on_click(lambda _: {"fly": self._fly, "image": self._save}[buttons.value]())
        gui.add_markdown(KEYS)
        for label, key, do in (("keep more", "K", lambda: self._keep(self.percent * 1.25)),
                               ("keep fewer", "J", lambda: self._keep(self.percent / 1.25)),
                               ("next test view", "N", lambda: self._go("next")),
                               ("previous test view", "P", lambda: self._go("previous")),
                               ("compare with the next", "C", lambda: self._compare(choices)),
                               ("fly", "F", self._fly), ("save an image", "I", self._save),
                               ("add a key view", "V", lambda: self._key_view("add"))):
            gui.add_command(label, hotkey=key).on_trigger(lambda _, do=do: do())
        self.kept.on_update(lambda _: self._keep(self.percent))
        self.slider.on_update(lambda _: self._keep(10 ** self.slider.value[0], self.percent))
        for handle in (self.other, self.how, self.wipe, self.antialiased):
            handle.on_update(lambda _: self._arrange())
        self._arrange()
        client.camera.on_update(lambda _: self.changed.set())
        viewer.server.on_client_disconnect(lambda other: self._end() if other is client else None)

    def start(self) -> None:
        """Start rendering for this browser."""
        self.viewer.visits.append(self)
        threading.Thread(target=self._loop, daemon=True).start()
        self.changed.set()

    def _keep(self, percent: float, unless: float = math.nan) -> None:
        """Keep so many percent, with three digits; show it in the field and on the slider.

        Nothing happens if the slider was moved to where it stands for `unless` already, by this function.
        """
        percent = float(f"{min(max(percent, LEAST), 100.0):.3g}")
        if abs(math.log10(percent) - math.log10(unless)) < 0.006:
            return
        if self.kept.value != percent:
            self.kept.value = percent
        if abs(self.slider.value[0] - math.log10(percent)) >= 0.006:
            self.slider.value = (math.log10(percent),)
        self.changed.set()

    def _arrange(self) -> None:
        """Show what there is to choose, and draw anew."""
        self.how.visible = self.other.value != NOTHING
        self.wipe.visible = self.how.visible and self.how.value == WIPED
        self.changed.set()

    def _compare(self, choices: Sequence[str]) -> None:
        """Compare with the next of the choices."""
        self.other.value = choices[(choices.index(self.other.value) + 1) % len(choices)]

    def _fly(self) -> None:
        """Start the flight around the scene, or stop it."""
        model = next(iter(self.viewer.models.values()))
        self.flight = None if self.flight else itertools.cycle(
            orbit(model.cameras or around(model.cut(1.0)), FLIGHT, 640, 480))
        self.changed.set()

    def _key_view(self, action: str) -> None:
        """Add the view of now to the key views, drop the last, or have the browser save their path."""
        if action == "add":
            self.key_views.append(self.camera(1.0))
        elif action == "drop":
            self.key_views = self.key_views[:-1]
        elif self.key_views:
            first = self.key_views[0]
            path = views(self.key_views, BETWEEN * len(self.key_views), first.width, first.height)
            self.client.send_file_download("camera_path.json", path_text(path).encode(),
                                           save_immediately=True)
        count, self.path.visible = len(self.key_views), True
        self.path.content = (f"{count} key view{'s' * (count != 1)}; *save* makes camera_path.json, for "
                             "`flexgs render --path`" if count else "no key view yet; *add* one first")

    def _save(self) -> None:
        """Have the browser save the image that it shows, without the black beside it."""
        png = io.BytesIO()
        Image.fromarray(self.shown).save(png, "PNG")
        self.client.send_file_download(f"flexgs-{self.percent:g}pct.png", png.getvalue(),
                                       save_immediately=True)

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
                if self.flight:
                    self._look(next(self.flight))
                    self.changed.wait(0.04)
                    self.changed.set()
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
        viewer, right = self.viewer, self.other.value
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
            image, self.ms = viewer.image(first, percent, camera, self.antialiased.value)
            if right in viewer.models:
                target = viewer.image(right, percent, camera, self.antialiased.value)[0]
        if target is not None and self.how.value == BESIDE:
            image = torch.cat([image, target], dim=1)
        elif target is not None:
            middle = min(round(camera.width * self.wipe.value / 100), camera.width - 1)
            image[:, middle:] = target[:, middle:]
            image[:, middle] = 1
        self.shown = (255 * image).byte().numpy()
        self._show(self.shown, self.client.camera.aspect or 4 / 3)
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
            images = [self.viewer.image(name, self.percent, nearest.camera, self.antialiased.value)[0]
                      for name in self.viewer.models]
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
        self._look(test[at % len(test)].camera)

    def _look(self, camera: Camera) -> None:
        """Move the browser to a camera."""
        camera = camera.at(self.viewer.origin)
        turn, seen = camera.viewmat[:3, :3].T.double().numpy(), self.client.camera
        with self.client.atomic():
            seen.position = place = camera.center.double().numpy() / self.viewer.unit
            seen.look_at = place + turn[:, 2] * np.linalg.norm(np.asarray(seen.look_at) - seen.position)
            seen.fov = 2 * np.arctan(camera.height / 2 / float(camera.K[1, 1]))
        self.changed.set()
