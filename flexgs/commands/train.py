"""flexgs train | adapt: one scene on this machine, without Ray."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flexgs.config import Config
from flexgs.errors import pasted
from flexgs.files import only_one
from flexgs.inputs import Range
from flexgs.options import RARE, AnyConfig, Capture, ConfigFile, OptionalCapture, Recorded, Typed

Service = Literal["mlflow", "tensorboard", "wandb"]


@dataclass
class Train:
    """Train one scene on this machine, without Ray; the same command continues an unfinished run."""

    scene: tyro.conf.Positional[Capture]
    """Folder of the capture (COLMAP or transforms.json). Of a folder of photographs or a video a capture is
    made first, in the run folder."""
    output: Path = Path("runs/flexgs")
    """The run goes to OUTPUT/<scene>."""
    full_size: Annotated[bool, RARE] = False
    """Without a GPU: as many views and Gaussians, and images as large, as with one. This may take days."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    log: Annotated[tuple[Service, ...], tyro.conf.arg(metavar="SERVICES")] = ()
    """mlflow, tensorboard, wandb: services that get the figures too."""
    view: bool = False
    """Open the viewer, which shows the model as it grows, until Ctrl-C."""
    port: Annotated[int, Range(0, 65_535), RARE] = 8080
    """Port of the viewer, on this machine only."""
    config_file: Annotated[ConfigFile, RARE] = None
    """A config.json to start from instead of a preset."""
    config: AnyConfig = field(default_factory=Config)
    typed: Recorded = field(default_factory=Typed, init=False)

    def __call__(self) -> None:
        """Train or continue the run, unless it is finished; print its results and what to do next."""
        from flexgs.callbacks import Callback
        from flexgs.callbacks.loggers import logger
        from flexgs.callbacks.progress import progress
        from flexgs.device import pick_device
        from flexgs.distributed import Group
        from flexgs.model.elastic import ElasticModel
        from flexgs.report.table import print_results
        from flexgs.run import LocalSession, finished, run
        from flexgs.scene.colmap import find_models
        from flexgs.scene.load import load_capture
        from flexgs.sfm.capture import capture_name, is_source, make_capture
        from flexgs.sfm.options import CaptureOptions
        from flexgs.sizes import fitting
        from flexgs.training.memory import expected_memory

        device = pick_device(self.device)
        self.config.check()
        if self.view:
            from flexgs.view.live import check_ready

            check_ready(self.port)  # before minutes go into poses
        name = capture_name(self.scene)
        folder = self.output / name
        if is_source(self.scene) and not self.config.base.ply:
            around = self.scene.absolute().parent
            found = f"not that of {pasted(around)}" if find_models(around) else "no reconstruction"
            print(f"{pasted(self.scene)}: {found}; computing one from the photographs, into "
                  f"{pasted(folder / 'capture')}", flush=True)
            self.scene = make_capture(self.scene, folder / "capture", CaptureOptions())
        self.config = fitting(self.config, device != "cpu" or self.full_size, self.typed, capture=self.scene,
                              run=folder)
        scene = load_capture(self.scene, self.config, name)
        print(scene.summary(), flush=True)
        live = None
        with only_one(folder):
            results = finished(folder, self.config, scene)
            if results:
                model = ElasticModel.load(folder)  # UserError if it is not whole
                print(f"{pasted(folder)}: already finished at {results['steps']} views; "
                      "raise --steps to go on")
            else:
                print(f"{scene.name}: {expected_memory(scene, self.config)}", flush=True)
                callbacks: list[Callback] = [progress(scene.name),
                                             *(logger(service, folder) for service in self.log)]
                if self.view:
                    from flexgs.view.live import Live

                    callbacks.append(live := Live(scene, self.port, device))
                results = run(self.config, scene, folder, Group(), LocalSession(folder, Group()), device,
                              callbacks)
        print_results([results])
        print(where_to_go(folder))
        if live:
            live.wait()
        elif self.view:
            from flexgs.view.viewer import view

            view({scene.name: model}, scene, "127.0.0.1", self.port, device)


@dataclass
class Adapt(Train):
    """Make the Gaussians of any 3DGS PLY elastic; the whole model stays bit-equal.

    On the photographs of its capture or, without one, on renders of the model at viewpoints that are
    searched for; quality is then measured on such renders too.
    """

    scene: tyro.conf.Positional[OptionalCapture] = None  # type: ignore[assignment]
    """Folder of the capture. Default: renders of the model, in OUTPUT/renders."""
    ply: Annotated[Path, tyro.conf.arg(aliases=["-i"])] = field(kw_only=True)
    """The PLY, in the coordinates of the capture."""
    output: Path = Path("runs/adapted")
    """The run goes to OUTPUT/<scene>."""

    def __call__(self) -> None:
        """Train or continue the run, with the PLY in place of stage 1."""
        self.config.base.ply = str(self.ply)
        if self.scene is None:
            self.scene = self._renders()
            if not self.typed.has("--data.factor", "--config"):
                self.config.data.factor = 1
        super().__call__()

    def _renders(self) -> Path:
        """The folder of a capture of the model's own renders."""
        from flexgs.deploy.merged import MergedModel
        from flexgs.deploy.renders import write_renders
        from flexgs.device import pick_device
        from flexgs.formats import read_gaussians

        pick_device("cpu")  # which gives torch one thread: idle ones spin
        model = MergedModel(read_gaussians(self.ply), self.config, source=self.ply)
        folder = self.output / "renders" / self.ply.stem
        print(f"no capture: training on renders of the model, in {pasted(folder)}", flush=True)
        write_renders(model.splats, model.viewpoints, folder, self.ply)
        return folder


def where_to_go(folder: Path) -> str:
    """Say where a trained run is, and which commands use it, to be copied into a shell."""
    run, ply = pasted(folder), pasted(f"{folder.name}-20MB.ply")
    return (f"model, cuts and renders: {run}\nnext:\n  flexgs view {run}\n  flexgs cut {run} "
            f"--budget 20MB -o {ply}\n  flexgs eval {run} --ratios 0.02 0.07 0.3")
