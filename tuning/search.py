"""Search the settings of a scene by Optuna's TPE in Ray Tune; ASHA stops trials that fall behind.

    python tuning/search.py --scene fox --data-root ~/captures --trials 30
    python tuning/search.py --scene fox --preset paper --objective psnr/ratio_0.05 --time-budget 2h

Trial 0 has the settings that the search starts from. Trials are chosen by every second test view; the other
test views are for the report. The same command continues an interrupted search. It writes best.json (for
--config), report.md and figures to STORAGE/EXPERIMENT; docs/search.md says how to read them.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import tyro
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from flexgs.commands.guard import guard
from flexgs.config import Config
from flexgs.dataset_options import DatasetOptions
from flexgs.datasets.catalog import how_to_get
from flexgs.demo.synthetic import SYNTHETIC
from flexgs.errors import UserError, pasted
from flexgs.files import make_folder, only_one, write_json
from flexgs.inputs import read_json
from flexgs.options import parse
from flexgs.report.sheet import Sheet
from flexgs.report.table import print_table
from flexgs.scene import Scene
from flexgs.scene.identity import check_same_capture
from flexgs.scene.load import load_capture
from flexgs.store import Store
from flexgs.tracking import metric_name
from flexgs.training import warmup
from ray_jobs.cluster import Cluster, Workers
from tuning import report
from tuning.progress import Progress
from tuning.runner import DEATHS, Room, room_for_trial, run_to_the_end, train_first_base, trainable
from tuning.space import check_only
from tuning.study import PARETO, Suggest, best, first_number, goal, history
from tuning.trial import RUNGS, Record, Search


@dataclass
class SearchScene(DatasetOptions):
    """Search the settings of a scene, around those of a preset. The same command continues."""

    scenes: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    dataset: Annotated[None, tyro.conf.Suppress] = None
    protocol: Annotated[str, tyro.conf.Suppress] = "paper"
    scene: str = "studio"
    """A folder of DATA_ROOT, or a built-in scene."""
    trials: int = 30
    """Number of trials, including those of an earlier start."""
    time_budget: str | None = None
    """Stop after this long: 90m, 2h."""
    objective: str = "psnr_auc"
    """psnr_auc, the mean PSNR over the logarithm of the ratio; or the figure of one ratio, psnr/ratio_0.05 or
    ssim/ratio_0.05; or pareto: psnr_auc against the bytes of the elastic model."""
    early_stopping: bool = True
    """Stop the worse half of the trials after a quarter, and again after half of stage 2; pareto stops
    none."""
    only: tuple[str, ...] = ()
    """Search these settings alone, or groups of them: gsnet.temperature field.resolution loss. The others,
    also order and transform, stay as the search starts. Default: all of tuning/space.py."""
    max_concurrent: int | None = None
    """Trials at a time. Default: as many as there is room for. With --gpu, waits for GPUs for so many."""
    gpus_per_trial: float = 1.0
    """GPUs per worker, if there are any: with 0.5 or 0.25, several small trials share one."""
    workers: int = 1
    """Workers per trial; several train it together through Ray Train, with a GPU each, or a CPU."""
    confirm: int = 2
    """Number of further seeds at which the best trial is compared with trial 0; it wins if its mean over all
    seeds is better."""
    resume: bool = True
    """Continue the search in the folder; otherwise the folder is renamed and a new search begins."""
    smoke: bool = False
    """Run two tiny trials, to see whether a search works here."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if no trial succeeded, 2 for a user's mistake, 130 if interrupted."""
    return guard(lambda: search_scene(parse(SearchScene, args, "search.py")))


def search_scene(options: SearchScene) -> int:
    """Run the search, write and print its results, and return the exit code (see main)."""
    seconds = _checked(options)
    capture = _capture(options)
    options.experiment = options.experiment or f"flexgs-search-{options.scene}"
    config, store = options.checked(), options.store()
    folder = make_folder(store.folder)
    if not options.resume:
        _put_aside(store)
    with (warmup.in_background() as wait_for_kernels, only_one(folder),
          Cluster(options.ray_address, options.gpu, options.dashboard or options.workers > 1) as cluster):
        config = options.fitting(config, cluster.has_gpu)
        if options.smoke:
            config, options.trials, options.confirm = _smaller(config), 2, 0
        search = Search(capture, store, replace(config, evaluation=replace(config.evaluation, views="even")),
                        options.only)
        scene = load_capture(capture, search.start)
        store.pull("search.json", "mlflow.json", *store.find("trials/*/mlflow.json"))
        _same_as_before(search, options.objective, scene)
        cluster.wait_for_gpus(math.ceil(options.workers * options.gpus_per_trial
                                        * (options.max_concurrent or 1)))
        room, most = room_for_trial(cluster, options.workers, options.gpus_per_trial)
        if not room.gpus:
            wait_for_kernels()
        progress = Progress(search, options.objective, options.tracking(), seconds)
        ended = _search(search, options, progress, cluster, room, min(most, options.max_concurrent or most),
                        seconds)
        records = search.records()
        if not any(record.status == "finished" for record in records):
            progress.end("FAILED" if ended else "KILLED")
            print("flexgs: no trial was finished" + ("" if ended else "; the same command continues"),
                  file=sys.stderr)
            return 1 if ended else 130
        winner, verdict = (best(records, options.objective),
                           "not compared with trial 0 on other views, as it was interrupted")
        if ended:
            winner, verdict = _confirmed(search, options, winner, scene, room)
        command = options.typed.command("tuning/search.py")
        sheet = report.write(search, options.objective, winner, verdict, command)
        _send(search, progress, winner, verdict, sheet)
    return 0 if ended else 130


def _search(search: Search, options: SearchScene, progress: Progress, cluster: Cluster, room: Room, most: int,
            seconds: float | None) -> bool:
    """Run the missing trials, `most` at a time; return whether the search came to its end."""
    journal = search.folder / "optuna.log"  # optuna-dashboard shows it
    for old in search.folder.glob(f"{journal.name}*"):
        old.unlink()
    storage = JournalStorage(JournalFileBackend(str(journal)))
    records, study = search.records(), history(search, options.objective, storage)
    missing = options.trials - sum(record.status != "interrupted" for record in records)
    if missing <= 0:
        return True
    spent = train_first_base(search, cluster, room)
    print(f"{missing} of {options.trials} trials, {most} at a time, in {search.store.place()}; stage 1 took "
          f"{spent:.0f} s and serves all that do not change it: {spent * (missing - 1) / 60:.0f} min saved",
          flush=True)
    pareto, aim = options.objective == PARETO, goal(options.objective)
    suggest = Suggest(search.start, pareto, search.only, first_number(records))
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prevents a table that verbose=0 does not
    early = ASHAScheduler(time_attr="rung", max_t=RUNGS, grace_period=1, reduction_factor=2)
    tuner = tune.Tuner(
        trainable(search, room),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(suggest, storage=storage, study_name=study.study_name,
                                    sampler=study.sampler, **aim),
            scheduler=early if options.early_stopping and not pareto else None, num_samples=missing,
            time_budget_s=seconds, max_concurrent_trials=most, **({} if pareto else aim)),
        # Tune's own files are not needed: a search continues from the records of its trials.
        run_config=tune.RunConfig(name="tune", storage_path=search.store.place(), callbacks=[progress],
                                  storage_filesystem=search.store.files, verbose=0,
                                  failure_config=tune.FailureConfig(max_failures=DEATHS)))
    try:
        found = tuner.fit()
    except KeyboardInterrupt:  # SIGTERM, since Tune itself takes Ctrl-C for the end of its trials
        progress.end("KILLED")
        raise
    shutil.rmtree(search.folder / "tune", ignore_errors=True)
    search.store.push("tune", journal.name)
    return (len(found) >= missing and progress.ended >= missing) or seconds is not None


def _confirmed(search: Search, options: SearchScene, first: Record, scene: Scene,
               room: Room) -> tuple[Record, str]:
    """Compare the trial `first` with trial 0 at further seeds; return the better one and a sentence."""
    if not first.number:
        return first, "no trial is better than where the search started"
    if search.records()[0].error:
        return first, "trial 0 has failed, so there is nothing to compare it with"
    seeds = range(search.start.seed + 1, search.start.seed + 1 + options.confirm)
    searches = [search, *(Search(search.capture, search.store / "seeds" / str(seed),
                                 replace(search.start, seed=seed), search.only)
                          for seed in seeds)]
    zero = search.records()[0]
    print(f"trial {first.number} is compared with trial 0 at {len(searches)} seed{'s' * (len(searches) > 1)}",
          flush=True)
    run_to_the_end([(s, record.params, record.number) for s in searches for record in (zero, first)], room)
    gained = report.gain(searches, first.params, zero.params, scene, options.objective)
    if fmean(gained.seen) > 0:
        return first, f"it gains {gained} over trial 0"
    return search.records()[0], f"trial {first.number} was ahead at the first seed, but gains {gained}"


def _send(search: Search, progress: Progress, winner: Record, verdict: str, sheet: Sheet) -> None:
    """Show the results of the search in the terminal and in MLflow."""
    files = [search.folder / name for name in ("best.json", "report.md")]
    files += sorted(search.folder.glob("*.png"))
    search.store.push(*(file.name for file in files), "front")
    runs = progress.finish(winner, files)
    print_table(replace(sheet, headings=sheet.headings[:-1],
                        rows=tuple(row[:-1] for row in sheet.rows)).rich())
    print(f"best: trial {winner.number}; {verdict}")
    print(f"{pasted(search.folder)}/best.json (for --config), report.md")
    for page in progress.pages(runs):
        print(f"MLflow: {page}")


def _checked(options: SearchScene) -> float | None:
    """Return the time budget in seconds; UserError for options that are not possible."""
    for name, least in {"trials": 1, "confirm": 0, "workers": 1, "max_concurrent": 1,
                        "gpus_per_trial": 0.01}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: found {value}, expected at least {least}")
    Workers.parse(str(options.workers), options.config.batch)
    check_only(options.config, options.objective == PARETO, options.only)
    ratios = [metric_name(ratio) for ratio in options.config.evaluation.ratios]
    known = ["psnr_auc", PARETO, *(f"{figure}/{ratio}" for figure in ("psnr", "ssim") for ratio in ratios)]
    if options.objective not in known:
        raise UserError(f"--objective {options.objective}: expected one of {', '.join(known)}")
    if options.config.base.ply:
        raise UserError(f"--base.ply {options.config.base.ply}: expected none, a search trains "
                        "a stage 1 of its own")
    if options.config.base.stage1_fraction >= 1 or options.config.order.keep < 1:
        raise UserError(f"--preset {options.config.preset}: makes a model for each ratio; "
                        "expected one that is elastic")
    if options.time_budget is None:
        return None
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", options.time_budget)):
        raise UserError(f"--time-budget {options.time_budget}: expected something like 90m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _capture(options: SearchScene) -> Path:
    """Return the folder of the capture; without --data-root, a scene that is not built in is in ./data."""
    options.scenes = (options.scene,)
    if options.data_root is None and options.scene not in SYNTHETIC:
        root = Path("data").absolute()
        if not (root / options.scene).is_dir():
            raise UserError(f"{root / options.scene}: no such folder, and no "
                            f"--data-root{how_to_get(options.scene)}; unpack it there or name the folder "
                            f"that it is in with --data-root (built in: {', '.join(SYNTHETIC)})")
        options.data_root = root
    return options.captures()[0]


def _same_as_before(search: Search, objective: str, scene: Scene) -> None:
    """Record capture, settings and objective; UserError if the folder's search has other ones."""
    about = json.loads(json.dumps({"objective": objective, "start": search.start.to_dict(),
                                   "only": search.only or None}))
    path, advice = search.folder / "search.json", "choose another --experiment, or --no-resume to begin anew"
    if path.exists():
        before = read_json(path, advice=advice)
        check_same_capture(before.get("digest"), scene.digest, path, advice)
        if isinstance(before.get("start"), dict):  # as it is written today
            before["start"] = json.loads(json.dumps(Config.from_dict(before["start"], str(path)).to_dict()))
        if differing := [key for key in about if before.get(key) != about[key]]:
            raise UserError(f"{path}: the search there has another {', '.join(differing)}; repeat "
                            f"its options, {advice}")
    write_json(path, {"capture": str(search.capture), "digest": scene.digest, **about})
    search.store.push(path.name)


def _put_aside(store: Store) -> None:
    """Rename the folder of an earlier search; UserError in an object store, where nothing can be renamed."""
    if store.remote:
        if store.exists("search.json"):
            raise UserError(f"--no-resume: {store.place()} is in an object store, where a search cannot be "
                            "renamed; choose another --experiment")
        return
    folder = store.folder
    if any(folder.iterdir()):
        with only_one(folder):  # nobody is at work there
            pass
        aside = next(path for i in range(1, 1000)
                     if not (path := folder.with_name(f"{folder.name}-{i}")).exists())
        shutil.move(folder, aside)
        print(f"the earlier search is in {pasted(aside)}", flush=True)


def _smaller(config: Config) -> Config:
    return replace(config, steps=80, base=replace(config.base, max_splats=600, refine_every=20))


if __name__ == "__main__":
    sys.exit(main())
