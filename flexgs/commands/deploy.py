"""The commands that use a trained model: flexgs cut | pack | serve | view | render | info."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import tyro

from flexgs.config import Config, check_ratio, count_at
from flexgs.errors import UserError, pasted, size_text
from flexgs.inputs import Range
from flexgs.options import RARE, Budget, OptionalCapture, Run

if TYPE_CHECKING:
    from flexgs.gaussians import Attributes
    from flexgs.model.elastic import Cuttable
    from flexgs.scene import Scene

Source = tyro.conf.Positional[Run]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
Pixels = Annotated[int, Range(16, 16_384)]
FrameSize = tuple[Pixels, Pixels]
Port = Annotated[int, Range(0, 65_535)]


@dataclass
class Cut:
    """Cut a model to a budget and write it as a file, as levels of detail, or as a web page.

    The model is a run, a packed file (.fgs) or its URL, or a file of splats from any program, whose Gaussians
    are merged.
    """

    source: Source
    """Run folder, .fgs file or http(s) URL, or a file of splats."""
    budget: Budget = None
    """5%, 0.05, 500k, 20MB (of the format of -o), 16ms (per frame, on this machine), or a device such as
    quest. A number up to 1 is a fraction of the Gaussians, 1 being all; a larger one is their number."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """NAME.ply, .compressed.ply, .spz, .v4.spz, .sog, .splat, .glb or .spz.glb. With --lod a new FOLDER for
    PLY files, or FOLDER/lod-meta.json."""
    lod: tuple[float, ...] = ()
    """Percentages, such as 100 50 25 12.5: a set of levels of detail, as PLY files or as streamed SOG (needs
    Node.js)."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="PAGE")] = None
    """PAGE.html: a page that opens without a network, the coarse model first."""
    web: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A new FOLDER for any web server: a page, the coarse model first, with the photographs of the test views
    if the capture is known."""
    by: Literal["merge", "prune"] = "merge"
    """How a file of splats is cut. merge: neighbours become one Gaussian; prune: the most important ones
    stay, for the views of --scene if it is given."""
    scene: OptionalCapture = None
    """Folder of the capture of a file of splats: merged Gaussians are trained at its cameras, as --seconds
    says; what a format loses is measured on its test views."""
    cameras: Annotated[Path | None, tyro.conf.arg(metavar="RUN_OR_CAPTURE"), RARE] = None
    """In place of --scene, a run or a capture whose photographs need not be there."""
    seconds: Annotated[Annotated[float, Range(0, 10**6)] | None, RARE] = None
    """Seconds to train merged Gaussians on renders of the whole model, at the cameras of --scene or
    --cameras, or else at some that are searched for. Default: 5 with these cameras, 0 without."""
    profile: Annotated[Path | None, RARE] = None
    """Frame times of the machine that a budget in ms is for, a file that `flexgs bench frame` writes.
    Default: this machine, measured now."""
    size: FrameSize = (1280, 720)
    """Width and height of the frames that a budget in ms is for."""
    local: Annotated[bool, RARE] = False
    """Write positions relative to the model's origin, which is printed, for formats whose numbers are too
    coarse for the coordinates of the capture."""

    def __call__(self) -> None:
        """Write what was asked for, and print its size and what the format loses."""
        from flexgs.deploy.lod import write_lod
        from flexgs.deploy.merged import MergedModel
        from flexgs.deploy.source import cameras_of, open_model
        from flexgs.ply import local

        if not self.html and not self.web and not self.output:
            raise UserError("cut: found neither --output nor --html nor --web; expected -o NAME.ply, for "
                            "instance")
        if self.output and bool(self.lod) == bool(self.budget):
            raise UserError("cut: expected either --budget or --lod with --output")
        if not self.output and (self.lod or self.budget):
            raise UserError("cut: found --budget or --lod without --output; --html and --web have stages of "
                            "their own")
        if self.scene and self.cameras:
            raise UserError("cut: found --scene and --cameras, expected one of them")
        self._check_places()
        scene = _capture(self.scene, self.source)
        model = open_model(self.source, scene, self.by)
        if self.by == "prune" and (Path(self.source).is_dir() or hasattr(model, "chunks")):
            raise UserError("cut: found --by prune, expected a file of splats with it: a run and a packed "
                            "model are cut in the order that they were trained in")
        if self.cameras and isinstance(model, MergedModel):
            model.cameras = cameras_of(self.cameras)
        if (self.cameras or self.seconds) and not (isinstance(model, MergedModel) and self.output):
            raise UserError(f"cut: found --{'cameras' if self.cameras else 'seconds'}, which train merged "
                            "Gaussians; expected a file of splats, --by merge and --output with it")
        title = Path(urlsplit(self.source).path.rstrip("/")).stem
        if self.web:  # before --html and --output, which may be files in this folder
            from flexgs.deploy.page import write_web
            from flexgs.model.elastic import ElasticModel
            from flexgs.scene.identity import GIVE_SCENE, check_same_capture

            shown = scene or _capture(_recorded_capture(self.source), self.source)
            if shown and isinstance(model, ElasticModel):
                check_same_capture(model.capture, shown.digest, Path(self.source), GIVE_SCENE)
            print(write_web(model, self.web, title, shown))
        if self.html:
            from flexgs.deploy.page import write_page

            print(write_page(model, self.html, title))
        if self.output and self.lod:
            def made(cut: "Attributes") -> "Attributes":
                cut = self._trained(model, cut)
                return local(cut) if self.local else cut

            print(write_lod(model, self.output, self.lod, made))
        elif self.output:
            assert self.budget
            self._write(model, self.budget, self.output, scene)

    def _check_places(self) -> None:
        """Raise UserError, before anything is written, if one of the results could not be."""
        from flexgs.deploy.lod import target_of
        from flexgs.formats import format_of
        from flexgs.model.budget import parse

        places = {}  # in the order in which they are written
        if self.web:
            from flexgs.deploy.page import check_web

            check_web(self.web)
            places["--web"] = self.web
        if self.html:
            from flexgs.deploy.page import check_page

            check_page(self.html)
            places["--html"] = self.html
        if self.output and self.lod:
            places["--output"] = target_of(self.output, self.lod)
        elif self.output:
            assert self.budget
            parse(self.budget)
            format_of(self.output)
            places["--output"] = self.output
        options = list(places)
        for i, option in enumerate(options):
            for later in options[i + 1:]:
                place, other = places[option].resolve(), places[later].resolve()
                if other in (place, *place.parents):
                    raise UserError(f"{later} {places[later]}: found {option} at the same place or within; "
                                    "expected places of their own")

    def _write(self, model: "Cuttable", budget: str, output: Path,
               scene: "Scene | None") -> None:
        from flexgs.deploy.merged import MergedModel, cut_of
        from flexgs.formats import FORMATS, format_of, localised
        from flexgs.model.budget import largest, parse
        from flexgs.ply import is_wide, place

        name = format_of(output)
        chosen, views, n = FORMATS[name], scene.train if scene else [], len(model)
        amount, unit = parse(budget)

        def write(cut: "Attributes", path: Path) -> "Attributes":
            cut, near = localised(cut, views) if self.local else (cut, views)
            return chosen.write(cut, path, near)

        def made(budget: str) -> "Attributes":
            return self._trained(model, cut_of(model, budget))

        if unit == "ms":
            cut = made(f"{self._profile(model).most(amount)} Gaussians")
        elif unit == "bytes" and (name != "ply" or self.local):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / output.name

                def size(cut: "Attributes") -> int:
                    write(cut, path)
                    return path.stat().st_size

                count = largest(n, amount, lambda count: size(cut_of(model, f"{count} Gaussians")))
                while count and size(cut := made(f"{count} Gaussians")) > amount:
                    count = int(0.98 * count)  # trained Gaussians may take more bytes
            if not count:
                raise UserError(f"budget {budget!r}: not enough for one Gaussian as {name}")
        else:
            cut = made(budget)
        stored = write(cut, output)
        line = f"{pasted(output)}: {len(cut):,} of {n:,} Gaussians, {size_text(output.stat().st_size)}"
        if (read := getattr(model, "offset", None)) is not None:  # a packed file
            line += f"; {size_text(read)} were read"
        if self.local:
            line += f"; positions from the model's origin, {place(cut)}"
        elif name == "ply" and is_wide(cut):
            line += ("; x y z are of type double, since float32 is too little about "
                     f"{place(cut)} (or else --local)")
        print(line)
        if name != "ply":
            stored = replace(stored, origin=cut.origin) if self.local else stored.at(cut.origin)
            if isinstance(model, MergedModel) and not scene:  # torch is not needed to compare the attributes
                lost = chosen.lost(cut, stored)
            else:
                lost = _loss(cut, stored, model, scene)
            print(f"{chosen.about} loses {chosen.loses}: {lost}")

    def _trained(self, model: "Cuttable", cut: "Attributes") -> "Attributes":
        """The cut; of merged Gaussians, after so many seconds of training on renders of the whole model."""
        from flexgs.deploy.merged import MergedModel

        seconds = self.seconds if self.seconds is not None else 5.0 if self.scene or self.cameras else 0.0
        if not isinstance(model, MergedModel) or not seconds or len(cut) == len(model):
            return cut
        from rich.console import Console
        from rich.progress import Progress

        from flexgs.device import pick_device
        from flexgs.splats import Splats
        from flexgs.training.distill import distill, within

        pick_device("cpu")  # which gives torch one thread: idle ones spin
        cameras = model.viewpoints
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"training {len(cut):,} Gaussians on renders of the whole", total=1)

            def shown() -> Iterator[float]:
                for done in within(seconds):
                    bar.update(task, completed=done)
                    yield done

            return distill(Splats.of(cut), model.splats, cameras, shown())

    def _profile(self, model: "Cuttable"):
        from flexgs.device import pick_device
        from flexgs.model.frame_time import Profile, measure_frames

        if self.profile:
            return Profile.load(self.profile)
        profile = measure_frames(model, self.size, pick_device("auto"))
        print(profile)
        return profile


@dataclass
class Pack:
    """Write a model as one file to be read from the front: the smallest cut first, each byte once.

    Of a file of splats from any program, the cuts at --ratios are merged ones.
    """

    source: Source
    """Run folder, its model folder, or a file of splats."""
    output: Output
    """NAME.fgs."""
    ratios: tuple[float, ...] = (0.01, 0.05, 0.15, 0.5, 1.0)
    """Ratios at which the chunks of the file end: a client may show a cut after each."""
    exact: bool = False
    """Keep every bit, in five to six times the bytes. Else numbers are rounded, so finely that the pictures
    look the same."""

    def __call__(self) -> None:
        """Write the file, and print how many bytes each ratio needs, and what they are off by at most."""
        from flexgs.deploy.merged import MergedModel
        from flexgs.deploy.nested import nested
        from flexgs.deploy.progressive import Progressive, write
        from flexgs.deploy.source import open_model
        from flexgs.model.elastic import ElasticModel
        from flexgs.ply import ply_bytes

        if self.output.suffix.lower() != ".fgs":
            raise UserError(f"--output {self.output}: expected a name that ends in .fgs")
        model = open_model(self.source)
        elastic = nested(model, self.ratios) if isinstance(model, MergedModel) else model
        if not isinstance(elastic, ElasticModel):
            raise UserError(f"{self.source}: found a packed model, expected a run or a file of splats")
        write(elastic, self.output, self.ratios, self.exact)
        packed, n, degree = Progressive.open(self.output), len(model), model.sh_degree
        for ratio in self.ratios:
            sent, count = packed.load(ratio), count_at(ratio, n)
            print(f"up to {100 * ratio:5.4g} %  {count:>11,} Gaussians  {size_text(sent):>12}  as PLY "
                  f"{size_text(ply_bytes(count, degree)):>12}")
            errors = ", ".join(f"{error:.2g} ({name})" for name, error in packed.bounds.items())
            print(f"    off by at most {errors}" if errors else "    exact to the bit")
        print(f"{pasted(self.output)}: {sent / ply_bytes(n, degree):.2f} of the whole PLY, "
              "which is not elastic")


@dataclass
class Serve:
    """Serve a folder over HTTP with byte ranges, as packed models need; by default to this machine alone.

    Of a run folder, only the cuts and the packed model are served; the packed model is made if it is missing.
    """

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder, or any other folder, all of whose files are served: that of `flexgs cut RUN --web` is."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines connect."""
    port: Port = 8000
    allow_host: tuple[str, ...] = ()
    """Further host names to answer to, such as a proxy's; requests for other names are refused."""
    cors: tuple[str, ...] = ()
    """Origins of pages on other servers that may read from here, such as https://shop.example; * for any."""

    def __call__(self) -> None:
        """Serve until Ctrl-C."""
        from flexgs.deploy.serve import serve

        serve(self.folder, self.host, self.port, self.allow_host, self.cors)


@dataclass
class ViewCommand:
    """Show a model in the browser: a slider for the ratio, the nearest test photograph and its PSNR.

    Of a file of splats, the slider keeps the most important Gaussians; those that `flexgs cut` merges are
    better.
    """

    source: Source
    """Run folder, .fgs file or http(s) URL, or a file of splats."""
    other: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="RUN")]] = None
    """A second model, shown on the right half."""
    scene: OptionalCapture = None
    """Folder of the capture. Default: where the run found it, if it is still there."""
    host: str = "127.0.0.1"
    """Address to listen at; over SSH keep it and forward the port: ssh -L 8080:127.0.0.1:8080 MACHINE."""
    port: Port = 8080
    allow_host: tuple[str, ...] = ()
    """Further host names to answer to, such as a proxy's; requests for other names are refused."""
    device: str = "auto"

    def __call__(self) -> None:
        """Serve the viewer until Ctrl-C; UserError if a model was trained on another capture."""
        from flexgs.deploy.source import open_model
        from flexgs.device import pick_device
        from flexgs.model.elastic import ElasticModel
        from flexgs.scene.identity import GIVE_SCENE, check_same_capture
        from flexgs.urls import public
        from flexgs.view.viewer import view

        scene = _capture(self.scene or _recorded_capture(self.source), self.source)
        models = {public(name): open_model(name, scene, "prune")  # each move of the slider is another cut
                  for name in [self.source, *([self.other] if self.other else [])]}
        for name, model in models.items():
            if scene and isinstance(model, ElasticModel):
                check_same_capture(model.capture, scene.digest, Path(name), GIVE_SCENE)
        view(models, scene, self.host, self.port, pick_device(self.device), self.allow_host)


@dataclass
class Render:
    """Render a model along a camera path, as a video (.mp4, .gif) or a still (.png)."""

    source: Source
    """Run folder, .fgs file or http(s) URL, or a file of splats."""
    output: Output
    """NAME.mp4, NAME.gif or NAME.png (the first frame)."""
    path: Annotated[str, tyro.conf.arg(metavar="orbit|views|FILE")] = "orbit"
    """orbit: an ellipse through where the cameras stood; views: from training view to training view; FILE: a
    camera_path.json as of nerfstudio, in the coordinates of the capture, one frame for each camera of it."""
    ratio: float | None = None
    """Fraction of the Gaussians that is kept, above 0 and at most 1. Default: all."""
    budget: Budget = None
    """In place of a ratio: 5%, 0.05, 500k, 20MB, or a device such as quest, as in `flexgs cut`."""
    frames: Annotated[int, Range(1, 10**6)] | None = None
    """Default: 120, or those of FILE."""
    fps: Annotated[int, Range(1, 1000)] = 30
    size: FrameSize = (1280, 720)
    """Width and height in pixels, both even."""
    device: str = "auto"

    def __call__(self) -> None:
        """Write the video or still, and print how many Gaussians it shows."""
        from flexgs.camera_path import PATHS, read_path
        from flexgs.deploy.source import open_model
        from flexgs.device import pick_device
        from flexgs.view.video import write_video

        if self.size[0] % 2 or self.size[1] % 2:
            raise UserError(f"--size: found {self.size[0]} {self.size[1]}, expected width and height even")
        if self.budget is not None and self.ratio is not None:
            raise UserError(f"render: found --ratio {self.ratio:g} and --budget {self.budget}, "
                            "expected one of them")
        ratio = 1.0 if self.ratio is None else check_ratio(self.ratio, "--ratio")
        model = open_model(self.source)
        cut = model.cut(ratio if self.budget is None else self.budget)
        if self.path in PATHS:
            cameras = PATHS[self.path](_cameras(model), self.frames or 120, *self.size)
        elif self.path.endswith(".json"):
            if self.frames is not None:
                raise UserError(f"render: found --frames {self.frames} and --path {self.path}, which has a "
                                "camera for each frame; leave out --frames")
            cameras = read_path(self.path, _cameras(model)[0], *self.size)
        else:
            raise UserError(f"--path: found {self.path}, expected orbit, views, or the name of a .json file")
        write_video(cut.to(pick_device(self.device)), cameras, self.output, self.fps, model.config.background,
                    model.config.antialiased)
        print(f"{pasted(self.output)}: {len(cut):,} of {len(model):,} Gaussians, "
              f"{size_text(self.output.stat().st_size)}")


@dataclass
class Info:
    """Say what a run, a packed file or a file of splats holds."""

    source: Source
    """Run folder, .fgs file or http(s) URL, or a file of splats."""

    def __call__(self) -> None:
        """Print what is known of the model, its size at several ratios and, of a run, its results."""
        from flexgs.deploy.info import NEEDED, describe
        from flexgs.deploy.source import open_model
        from flexgs.ply import ply_bytes

        model = open_model(self.source, attributes=NEEDED)
        for name, value in describe(model, self.source).items():
            print(f"{name:12} {value}")
        for ratio in (0.01, 0.05, 0.15, 0.5, 1.0):
            count = count_at(ratio, len(model))
            print(f"{100 * ratio:10g} % {count:>13,} Gaussians "
                  f"{size_text(ply_bytes(count, model.sh_degree)):>12} as PLY")
        if Path(self.source).is_dir():
            from flexgs.report.table import print_results
            from flexgs.run import read_results

            if results := read_results(Path(self.source)):
                print_results([results])


def _cameras(model: "Cuttable"):
    """Return the cameras of the model's capture, or cameras around the model if it has none."""
    from flexgs.camera_path import around

    return model.cameras or around(model.cut(1.0))


def _capture(path: Path | None, source: str) -> "Scene | None":
    """Load the capture at path, with the settings of the run at source if it is a run; None without path."""
    if path is None:
        return None
    from flexgs.scene.load import load_capture

    recorded = Path(source) / "config.json"
    return load_capture(path, Config.load(recorded) if recorded.is_file() else Config())


def _recorded_capture(source: str) -> Path | None:
    """Return the folder of the capture that a run has recorded; None if it is gone or source is no run."""
    from flexgs.run import recorded_capture

    try:
        return recorded_capture(Path(source)) if Path(source).is_dir() else None
    except UserError:
        return None


def _loss(cut: "Attributes", stored: "Attributes", model: "Cuttable", scene: "Scene | None") -> str:
    """Say what storing a cut in a format costs, in dB: on the test views, or against renders of the cut."""
    import statistics

    from flexgs.camera_path import orbit
    from flexgs.image.quality import psnr
    from flexgs.raster import render
    from flexgs.splats import Splats

    def image(gaussians: "Attributes", camera):
        return render(Splats.of(gaussians), camera).image.clamp(0, 1)

    if scene and scene.test:
        was, now = (statistics.fmean(psnr(image(s, v.camera), v.image() / 255) for v in scene.test)
                    for s in (cut, stored))
        return f"{was - now:.2f} dB of {was:.2f} on the test views"
    cameras = orbit(_cameras(model), 4, 320, 240)
    same = statistics.fmean(psnr(image(stored, c), image(cut, c)) for c in cameras)
    return (f"its renders have a PSNR of {same:.1f} dB against those of the cut; the higher the closer, 50 "
            "dB is not to be seen")
