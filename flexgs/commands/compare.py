"""flexgs compare | eval: the quality of methods side by side, and of one model at any ratios."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from flexgs.config import METHODS, Config, EvaluationConfig
from flexgs.errors import UserError, pasted
from flexgs.files import make_folder, only_one
from flexgs.options import RARE, AnyConfig, ConfigFile, OptionalCapture, Recorded, Typed


@dataclass
class Compare:
    """Compare methods on a capture, from one stage 1 at equal counts; or print the paper's table."""

    scene: tyro.conf.Positional[OptionalCapture] = None
    """Folder of the capture (COLMAP or transforms.json)."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PRESETS")] = METHODS
    """Presets, each with settings of its own in quotes: "default --deltas.knots 0.01 0.1"."""
    ratios: Annotated[tuple[float, ...], tyro.conf.arg(metavar="RATIOS")] = ()
    """Fractions of the Gaussians to compare at. Default: --evaluation.ratios."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEEDS")] = ()
    """Random seeds; several give means and spread. Default: --seed."""
    published: Annotated[str | None, tyro.conf.arg(metavar="SCENE")] = None
    """Scene of the paper whose published figures are shown too; without a capture, only those. Default: the
    one named as the capture."""
    output: Path = Path("runs/compare")
    """Everything goes to OUTPUT/<scene>."""
    mlflow_uri: Annotated[str | None, RARE] = None
    """MLflow's server or database. Default: $MLFLOW_TRACKING_URI, else OUTPUT/mlflow.db."""
    device: Annotated[str, RARE] = "auto"
    config_file: Annotated[ConfigFile, RARE] = None
    """A config.json to start from instead of a preset."""
    config: AnyConfig = field(default_factory=Config)
    typed: Recorded = field(default_factory=Typed, init=False)

    def __call__(self) -> None:
        """Train and measure what is missing, then write, print and log the tables."""
        from flexgs import compare
        from flexgs.callbacks.progress import progress
        from flexgs.device import pick_device
        from flexgs.report.comparison import quality_sheet
        from flexgs.report.published import SCENES, published
        from flexgs.report.table import print_table
        from flexgs.scene.load import load_capture
        from flexgs.sizes import fitting
        from flexgs.tracking import Tracking, sqlite_uri

        if self.scene is None:
            if self.published is None:
                raise UserError("compare: found no capture; expected its folder, or --published and "
                                "a scene of the paper")
            title = f"{self.published}, as published (FlexGS, CVPR 2025, supplementary)"
            print_table(quality_sheet(published(self.published), title, more_digits=1).rich())
            return
        self.config.evaluation.ratios = self.ratios or self.config.evaluation.ratios
        device = pick_device(self.device)
        self.config = fitting(self.config.check(), device != "cpu", self.typed)
        scene = load_capture(self.scene, self.config)
        print(scene.summary(), flush=True)
        name = self.published or (scene.name if scene.name in SCENES else None)
        beside = published(name) if name else None
        folder = make_folder(self.output / scene.name)
        commons = compare.seeded(self.config, self.seeds)
        cells = [cell for common in commons for cell in compare.cells(self.methods, common, folder)]
        with only_one(folder):
            for common in commons:
                compare.train_stage1(scene, common, folder, device, [progress(f"{scene.name} stage 1")])
            for cell in cells:
                compare.train_cell(cell, scene, device, [progress(cell.folder.name)])
            rows = compare.measured(cells)
            for sheet in compare.write(scene.name, rows, beside, self.config, folder):
                print_table(sheet.rich())
        print(compare.legend(rows))
        uri = (self.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
               or sqlite_uri(self.output / "mlflow.db"))
        tracking = Tracking(uri, "flexgs-compare", self.output / "mlartifacts")
        page = compare.log_to_mlflow(scene.name, rows, self.config, folder, tracking)
        print(f"tables and figure: {pasted(folder)}\nMLflow: {page}")


@dataclass
class Eval:
    """Measure a trained model at any ratios on the test views of its capture."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder, or its model folder."""
    scene: OptionalCapture = None
    """Folder of the capture. Default: where the run found it."""
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)
    device: str = "auto"
    json: bool = False
    """Print JSON instead of a table."""

    def __call__(self) -> None:
        """Print the figures; UserError if the capture is not the one that the model was trained on."""
        from flexgs.device import pick_device
        from flexgs.evaluate import cut_as, evaluate
        from flexgs.model.elastic import ElasticModel
        from flexgs.report.table import print_results
        from flexgs.run import recorded_capture
        from flexgs.scene.identity import GIVE_SCENE, check_same_capture
        from flexgs.scene.load import load_capture

        self.evaluation.check()
        model = ElasticModel.load(self.run).to(pick_device(self.device))
        model = cut_as(model, model.config.evaluation)  # a rival whose own cuts are made from the whole
        scene = load_capture(self.scene or recorded_capture(self.run), model.config)
        check_same_capture(model.capture, scene.digest, self.run, GIVE_SCENE)
        measured = evaluate(model, scene, self.evaluation, model.config.background)
        if self.json:
            print(json.dumps(measured, indent=1))
        else:
            print_results([{"scene": scene.name, "preset": model.config.preset, **measured}])
