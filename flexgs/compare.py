"""Methods side by side on one capture: the same stage 1, numbers of Gaussians, and number of views.

    seed_0/stage1/  seed_0/<method>/  seed_0/<method>-5pct/ ...
    compare.json  tables.md  tables.tex  table.csv  tradeoff.png

A method is a preset followed by any settings, for instance "default --deltas.knots 0.01 0.1". Stage 1, seed,
background and evaluation are common to all methods; they differ in stage 2. A cell is one model to train: a
method at all ratios, or at one ratio where the method trains a model for each. Cells are independent of each
other: after stage 1 they may run anywhere and in any order. A finished cell is not repeated, and an
unfinished one is continued.
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from flexgs.callbacks import Callback, Callbacks
from flexgs.config import PRESETS, BaseConfig, Config, check_same_method, count_at, percent_name, ratio_name
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.files import atomic_file, atomic_folder, write_json
from flexgs.inputs import regular_file, typed
from flexgs.report.comparison import Rows, Sheet, cost_sheet, published_sheet, quality_sheet, write_csv
from flexgs.report.pictures import write_tradeoff
from flexgs.report.table import mean_ratios
from flexgs.run import LocalSession, finished, git_sha, read_results, resume, run, train
from flexgs.scene import Scene
from flexgs.scene.identity import OTHER_OUTPUT, check_same_capture
from flexgs.stored import splats_of
from flexgs.tracking import Tracking, flatten
from flexgs.training.checkpoint import Checkpoint, latest_checkpoint
from flexgs.training.trainer import Trainer

COMMON = ("seed", "steps", "batch", "background", "report_every", "eval_every", "checkpoint_every",
          "checkpoint_seconds", "check_every", "data", "base", "evaluation")
"""Settings that all methods take from the comparison before their own flags are applied."""
TABLES = ("compare.json", "tables.md", "tables.tex", "table.csv", "tradeoff.png")
"""The files of a comparison's tables and figures."""
SAME = ("seed", "steps", "batch", "background", "data")
"""The settings among COMMON that no method may change, or its figures could not be compared."""

OpenSession = Callable[[Path, Path | None], LocalSession]
"""Called with a run folder, and a checkpoint to start from or None."""


def local_session(folder: Path, start: Path | None) -> LocalSession:
    """Open a session whose checkpoints are in the run folder only."""
    return LocalSession(folder, Group(), start=start)


@dataclass(frozen=True)
class Cell:
    """One model to train for a comparison."""

    method: str
    config: Config
    folder: Path
    ratio: float | None = None
    """The one ratio that this model is trained for; None: all ratios of the evaluation."""

    @property
    def stage1(self) -> Path:
        """The checkpoint from which all methods of a seed start."""
        return self.folder.parent / "stage1" / "done"

    @property
    def from_nothing(self) -> bool:
        """Whether the model is trained from the capture's points and takes only its size from stage 1."""
        return self.config.base.stage1_fraction == 1


def method_config(method: str, common: Config) -> Config:
    """Return the configuration of a method: its own stage 2, and everything else from `common`.

    Flags behind the preset's name have the last word. UserError if they change a setting that the methods
    must share.
    """
    from flexgs.options import fill

    preset, *flags = _words(method)
    config = Config.from_preset(preset)
    own_base = {name: value for name, value in vars(config.base).items()
                if config.base.stage1_fraction == 1 and value != getattr(BaseConfig(), name)}
    own_cuts = config.evaluation.cuts
    config = dataclasses.replace(config, **{name: getattr(common, name) for name in COMMON})
    config.base = dataclasses.replace(common.base, **own_base)
    if own_cuts != "own":
        config.evaluation = dataclasses.replace(common.evaluation, cuts=own_cuts)
    config.lr = dataclasses.replace(config.lr, **common.stage1()["lr"])
    config = fill(Config, flags, f"--methods {preset}", start := config).check()
    if differing := [name for name in ("preset", *SAME) if getattr(config, name) != getattr(start, name)]:
        raise UserError(f"--methods {method!r}: found another {', '.join(differing)}, which all "
                        "methods of a comparison have in common; expected a preset first, and such "
                        "flags beside --methods")
    if config.base.ply:
        raise UserError(f"--base.ply {config.base.ply}: expected none, methods start from a "
                        "stage 1 of their own; flexgs adapt takes a PLY")
    return config


def seeded(common: Config, seeds: Sequence[int]) -> list[Config]:
    """Return `common` at each of the seeds, without repeats; at its own seed if there are none."""
    return [dataclasses.replace(common, seed=seed) for seed in dict.fromkeys(seeds or (common.seed,))]


def cells(methods: Sequence[str], common: Config, folder: Path) -> list[Cell]:
    """List the models to train for one seed, each with its folder below folder/seed_<common.seed>."""
    folder = folder / f"seed_{common.seed}"
    found = []
    if not methods:
        raise UserError(f"--methods: found none, expected some of {', '.join(PRESETS)}")
    for method in dict.fromkeys(methods):
        config = method_config(method, common)
        if config.order.keep == 1 and config.base.stage1_fraction < 1:
            found.append(Cell(method, config, folder / _name(method)))
            continue
        for ratio in (r for r in config.evaluation.ratios if r < 1):
            evaluation = dataclasses.replace(config.evaluation, ratios=(1.0,))
            one = dataclasses.replace(config, evaluation=evaluation)
            if config.order.keep < 1:
                one.order = dataclasses.replace(config.order, keep=ratio)
            found.append(Cell(method, one, folder / f"{_name(method)}-{percent_name(ratio)}pct", ratio))
    return found


def train_stage1(scene: Scene, common: Config, folder: Path, device: str,
                 callbacks: Sequence[Callback] = (), open_session: OpenSession = local_session) -> None:
    """Train the model that all methods start from, into folder/seed_<common.seed>/stage1."""
    folder = folder / f"seed_{common.seed}" / "stage1"
    if (folder / "done").exists():
        check_same_capture(Checkpoint(folder / "done").about.get("capture"), scene.digest, folder,
                           OTHER_OUTPUT)
    else:
        session, told = open_session(folder, None), Callbacks(callbacks)
        trainer = Trainer(common, scene, device=device)
        resume(trainer, session)
        with told.told(trainer):
            train(trainer, session, told.report, trainer.base_steps, told)
        with atomic_folder(folder / "done") as out:
            trainer.save(out)


def train_cell(cell: Cell, scene: Scene, device: str, callbacks: Sequence[Callback] = (),
               open_session: OpenSession = local_session) -> None:
    """Train and measure one cell into its folder, after stage 1; a finished cell is left as it is.

    A cell that differs from a finished one only in its evaluation is measured, not trained again.
    """
    if not done(cell, scene):
        # a cell that was not trained itself has no checkpoint
        last = [latest_checkpoint(folder / "checkpoints") for folder in trained_alike(cell)]
        start = next(filter(None, last), None if cell.from_nothing else cell.stage1)
        run(_sized(cell), scene, cell.folder, Group(), open_session(cell.folder, start), device, callbacks)


def done(cell: Cell, scene: Scene) -> bool:
    """Whether the cell is trained and measured; UserError if its folder holds results of another one."""
    return cell.stage1.exists() and finished(cell.folder, _sized(cell), scene) is not None


def measured(cells: Sequence[Cell]) -> dict[str, list[dict[str, Any]]]:
    """Collect the figures of the finished cells by method, with one row per seed.

    Returns:
        {method: [{"seed", "ratios", "train_seconds", "stored_mb"}, ...]}. "ratios" is as in results.json,
        with cut_seconds: the time to make a cut at a new ratio, training included where the method trains a
        model for each ratio. train_seconds covers all ratios and stage 1; stored_mb is the size of what has
        to be kept to serve all ratios.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        if (results := read_results(cell.folder)) is None:
            continue
        before = 0.0 if cell.from_nothing else Checkpoint(cell.stage1).about["seconds"]
        row = found.setdefault(cell.method, {}).setdefault(cell.config.seed, {
            "seed": cell.config.seed, "ratios": {}, "train_seconds": before, "stored_mb": 0.0})
        own = results["train_seconds"] - before
        model = regular_file(cell.folder / "model" / "model.safetensors", "the model of a finished cell")
        row["train_seconds"] = round(row["train_seconds"] + own, 1)
        row["stored_mb"] = round(row["stored_mb"] + model.stat().st_size / 1e6, 3)
        if cell.ratio is None:
            row["ratios"] = results["ratios"]
        else:
            figures = results["ratios"].get("1", {})
            seconds = typed(float, figures.get("cut_seconds"),
                            f"{cell.folder}/results.json: cut_seconds at ratio 1")
            row["ratios"][ratio_name(cell.ratio)] = {**figures, "cut_seconds": round(own + seconds, 3)}
    return {method: list(seeds.values()) for method, seeds in found.items()}


def write(scene: str, rows: Rows, published: Rows | None, common: Config, folder: Path) -> list[Sheet]:
    """Write compare.json, tables (Markdown, LaTeX, CSV) and the figure into folder; return the tables."""
    sheets = [quality_sheet(rows), cost_sheet(rows)]
    sheets += [published_sheet(rows, published)] if published else []
    write_json(folder / "compare.json",
               {"scene": scene, "steps": common.steps, "git_sha": git_sha(), "methods": rows})
    tables = {"tables.md": [*(sheet.markdown() for sheet in sheets), legend(rows)],
              "tables.tex": [sheet.latex() for sheet in sheets]}
    for name, parts in tables.items():
        with atomic_file(folder / name) as out:
            out.write_text("\n".join(parts) + "\n")
    write_csv(rows, folder / "table.csv")
    write_tradeoff(rows, folder / "tradeoff.png")
    return sheets


def legend(methods: Iterable[str]) -> str:
    """Say what each preset among the methods reproduces and leaves out, in one line each."""
    presets = dict.fromkeys(_words(method)[0] for method in methods)
    return "\n".join(f"- {name}: {' '.join((PRESETS[name].__doc__ or '').split())}" for name in presets)


def log_to_mlflow(scene: str, rows: Rows, common: Config, folder: Path, tracking: Tracking) -> str:
    """Log the comparison to MLflow, and return how to open it on the chart of PSNR over ratio.

    Each method is a run below one parent run. A method's figures are its means over the seeds; the parent's
    figures are, at each ratio, those of the method with the highest PSNR.
    """
    parent = tracking.run(folder, f"{scene}: comparison", kind="comparison",
                          tags={"scene": scene, "git_sha": git_sha()})
    runs, means = [], {}
    for method, entries in rows.items():
        means[method] = mean_ratios(entries)
        config = method_config(method, common)
        run = tracking.run(folder / "mlflow" / _name(method), method, kind="method", parent=parent,
                           params=flatten(config.to_dict()), tags={"scene": scene, "preset": config.preset})
        run.log_summary(means[method], common.steps,
                        {"train_seconds": fmean(e["train_seconds"] for e in entries),
                         "stored_mb": fmean(e["stored_mb"] for e in entries)})
        run.finish()
        runs.append(run)
    ratios = dict.fromkeys(ratio for table in means.values() for ratio in table)
    parent.log_summary({ratio: max((t[ratio] for t in means.values() if ratio in t),
                                   key=lambda row: row["psnr"])
                        for ratio in ratios}, common.steps)
    parent.describe((folder / "tables.md").read_text())
    parent.log_files([folder / name for name in ("compare.json", "tables.md", "table.csv", "tradeoff.png")])
    parent.finish()
    return tracking.how_to_open(runs)


def trained_alike(cell: Cell) -> list[Path]:
    """Return the folders of finished cells that were trained exactly as this cell is to be."""
    found = []
    for results in sorted(cell.folder.parent.glob("*/results.json")):
        try:
            theirs = Config.load(results.with_name("config.json"))
            check_same_method(theirs, _sized(cell), True, results.parent)
        except UserError:
            continue
        if theirs.steps == cell.config.steps:
            found.append(results.parent)
    return found


def _sized(cell: Cell) -> Config:
    """Return the cell's settings; a model from nothing is limited to its ratio of stage 1's number."""
    if not cell.from_nothing or cell.ratio is None:
        return cell.config
    stage1 = Checkpoint(cell.stage1)
    n = len(splats_of(stage1.heads, str(stage1.file)))
    base = dataclasses.replace(cell.config.base, max_splats=count_at(cell.ratio, n))
    return dataclasses.replace(cell.config, base=base)


def _name(method: str) -> str:
    """Make a folder name: "default --deltas.knots 0.01 0.1" -> "default-deltas.knots-0.01-0.1"."""
    return "-".join(word.lstrip("-").replace("/", "_") for word in _words(method))


def _words(method: str) -> list[str]:
    """Split a method into its preset and flags; UserError for no preset or an unclosed quotation mark."""
    try:
        words = shlex.split(method)
    except ValueError as e:
        raise UserError(f"--methods {method!r}: {e}; expected a preset and flags") from None
    if not words:
        raise UserError(f"--methods {method!r}: found nothing, expected a preset, one of "
                        f"{', '.join(PRESETS)}")
    return words
