"""Methods side by side on real captures at full length, through flexgs.compare: cells that are finished are
not repeated."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from flexgs import compare
from flexgs.callbacks import Callback
from flexgs.callbacks.progress import progress_line
from flexgs.compare import Cell
from flexgs.config import Config
from flexgs.report.published import SCENES, published
from flexgs.scene import Scene
from flexgs.scene.load import load_capture
from tests.gpu.captures import OfCaptures
from tests.gpu.record import OutOfTimeError, Part, Row


@dataclass
class Quality(OfCaptures):
    """PSNR, SSIM and LPIPS of methods at all ratios, from one stage 1 for each capture and seed.

    A training ends at the first report after the minutes are over, and goes on from its last checkpoint.
    compare's own tables are in OUTPUT/quality/<steps>/<capture>.
    """

    steps: int = 7000
    """Views in all, stage 1 and stage 2."""
    methods: tuple[str, ...] = ("official", "paper", "default", "lightgs", "plain")
    seeds: tuple[int, ...] = (0,)
    factor: int = 1
    """Downscaling of the images."""

    TINY: ClassVar[Row] = {"steps": 20, "methods": ("default", "plain")}
    stops_itself = True

    def parts(self) -> Iterable[Part]:
        for path in self.captures():
            folder = self.output / "quality" / str(self.steps) / path.name
            commons = [self.common(seed) for seed in self.seeds]
            scene = load_capture(path, commons[0])
            cells = [cell for common in commons for cell in compare.cells(self.methods, common, folder)]
            for common in commons:
                yield f"{path.name}, seed {common.seed}, stage 1", partial(self.stage1, scene, common, folder)
                for cell in (cell for cell in cells if cell.config.seed == common.seed):
                    name = f"{path.name}, seed {common.seed}, {cell.folder.name}"
                    yield name, partial(self.cell, scene, cell, commons[0], cells, folder)

    def common(self, seed: int) -> Config:
        config = Config(seed=seed, steps=self.steps, checkpoint_every=1000)
        config.data.factor = self.factor
        if self.tiny:
            config.base.max_splats, config.base.sh_degree, config.report_every = 500, 1, 10
            config.evaluation = dataclasses.replace(config.evaluation, ratios=(0.1, 1.0), lpips=())
        return config

    def stage1(self, scene: Scene, common: Config, folder: Path) -> list[Row]:
        compare.train_stage1(scene, common, folder, self.device,
                             [Watched(self, f"{scene.name} stage 1")])
        state = json.loads((folder / f"seed_{common.seed}" / "stage1" / "done" / "state.json").read_text())
        return [{"train s": state["seconds"]}]

    def cell(self, scene: Scene, cell: Cell, common: Config, cells: list[Cell],
             folder: Path) -> Iterator[Row]:
        """A row for each ratio; compare's tables are written anew."""
        if not cell.stage1.exists():
            raise OutOfTimeError
        compare.train_cell(cell, scene, self.device, [Watched(self, f"{scene.name} {cell.folder.name}")])
        beside = published(scene.name) if scene.name in SCENES else None
        compare.write(scene.name, compare.measured(cells), beside, common, folder)
        results = json.loads((cell.folder / "results.json").read_text())
        for ratio, row in results["ratios"].items():
            yield {"ratio": float(ratio) if cell.ratio is None else cell.ratio, "Gaussians": row["splats"],
                   "PSNR": row["psnr"], "SSIM": row["ssim"], "LPIPS (VGG)": row["lpips_vgg"], "ms": row["ms"],
                   "train s": results["train_seconds"]}


class Watched(Callback):
    """Prints how a training goes, and ends it when the time is over."""

    def __init__(self, study: "Quality", name: str):
        self.study, self.name = study, name

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        print(progress_line(self.name, step, metrics), file=sys.stderr, flush=True)
        if self.study.left < 0 and step < self.study.steps:
            raise OutOfTimeError
