"""The search: its space, what it remembers, what it refuses; and real searches that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
import pytest

from flexgs.config import PRESETS, Config
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.evaluate import chosen
from flexgs.store import Store
from flexgs.tracking import Tracking, Writer, sqlite_uri
from ray_jobs import train_all
from tests.conftest import ended_while_mlflow_comes_back
from tuning import search as command
from tuning.progress import Progress
from tuning.report import Gain, agreement, table
from tuning.runner import Room, _direct, _noted, trainable
from tuning.space import SHAPE, Own, applied, flags, space
from tuning.study import Suggest, best, first_number, front, history
from tuning.trial import NUMBER, Record, Search, base_folder, begun, run_trial

ELASTIC = [name for name, preset in PRESETS.items()
           if name not in ("plain", "lightgs", "c3dgs", "eagles", "decimate", "decimate-st", "decimate-ft",
                           "scratch", "mcmc", "gns")]
TINY = ["--preset", "smoke", "--steps", "80", "--data.factor", "1", "--base.max-splats", "400",
        "--base.refine-every", "20", "--evaluation.ratios", "0.05", "1", "--evaluation.lpips",
        "--ray-address", "local"]


@pytest.mark.parametrize("size", [False, True])
@pytest.mark.parametrize("preset", ELASTIC)
def test_trial_0_is_what_the_search_starts_from(preset, size):
    start = Config.from_preset(preset)
    own = Own(start)
    space(own, start, size)
    assert applied(own.params, start) == start


def test_what_is_suggested_can_be_trained_and_depends_on_the_structure():
    start = Config()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    structures = set()
    for _ in range(16):
        trial = study.ask()
        space(trial, start, True)
        config = applied(trial.params, start)  # checks it
        structures.add(trial.params[SHAPE])
        names = set(trial.params)
        assert ("gsnet.temperature" in names) == (config.order.kind == "gsnet")
        assert ("order.temperature" in names) == (config.order.kind == "sampled")
        is_field = config.transform.kind == "field"
        assert ("field.resolution.e" in names) == is_field == ("deltas.merge" not in names)
        again = flags(trial.params)
        assert "--order.kind" in again and applied(trial.params, start) == config
    assert len(structures) == 4


def record(number: int, psnr: float, mb: float = 1.0, rungs: int = 3, size: bool = False, **more) -> Record:
    own = Own(Config())
    space(own, Config(), size)
    at = {str(r): {"psnr_auc": psnr - 4 + r, "mb": mb, "ratios": {"0.05": {"psnr": psnr, "ssim": 0.5}}}
          for r in (1, 2, 4)[:rungs]}
    return Record({**own.params, "loss.elastic_l1": 0.2 + number / 100}, number, at, **more)


def saved(folder: Path, *records: Record) -> Search:
    search = Search(folder / "capture", Store(folder), Config())
    for r in records:
        r.save(search.trial(r.params).folder.mkdir(parents=True) or search.trial(r.params).folder)
    return search


def test_a_study_knows_what_is_over_and_asks_for_what_was_interrupted(tmp_path):
    search = saved(tmp_path, record(0, 20.0), record(1, 22.0, rungs=1, stopped=True),
                   record(2, 0, rungs=0, error="NaN"), record(3, 21.0, rungs=2), record(4, 23.0))
    study = history(search, "psnr_auc")
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "WAITING"]
    # a stopped one counts with what it had reached
    assert [t.value for t in study.trials[:2]] == [20.0, 19.0]
    trial = study.ask()
    space(trial, search.start)
    assert trial.params == dict(search.records()[3].params)
    assert best(search.records(), "psnr_auc").number == 4
    new = saved(tmp_path / "new")
    assert history(new, "psnr_auc").trials[0].state.name == "WAITING"  # trial 0
    for before, records in ((new, []), (search, search.records())):
        study, suggest = history(before, "psnr_auc"), Suggest(search.start, False, (), first_number(records))
        numbers = [suggest(study.ask())[NUMBER] for _ in range(3)]
        assert numbers == ([0, 1, 2] if not records else [4, 5, 6])  # trial 3 goes on, under its old number


def test_what_mlflow_has_missed_of_a_search_is_sent_at_its_end(tmp_path):
    """While the search waits for it."""
    search = saved(tmp_path, record(0, 20.0), record(1, 22.0), record(2, 0, rungs=0, error="NaN"))
    (tmp_path / "report.md").write_text("how it went")

    def begin(tracking: Tracking) -> tuple[Writer, Callable]:
        progress = Progress(search, "psnr_auc", tracking, None)
        return progress.mlflow, lambda: progress.finish(search.records()[1], [])

    tracking = ended_while_mlflow_comes_back(tmp_path, begin)
    runs = {run.info.run_name: run for run in tracking.client.search_runs([tracking.id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "capture: search": "FINISHED", "trial 0": "FINISHED", "trial 1": "FINISHED", "trial 2": "FAILED"}
    assert runs["capture: search"].data.metrics["best_trial"] == 1
    assert runs["trial 1"].data.metrics["psnr_auc"] == 22 and not tracking.missed


def test_figures_of_a_trial_that_goes_on_after_its_stop_are_sent_once(tmp_path):
    """Trial 0 is compared with the best at the end; others have the figures of where they were stopped."""
    stopped = [record(number, 20.0, rungs=2, stopped=True) for number in (0, 1)]
    search = saved(tmp_path, *stopped)
    (tmp_path / "report.md").write_text("how it went")
    tracking = Tracking(sqlite_uri(tmp_path / "mlflow.db"), "search", tmp_path / "artifacts")
    progress = Progress(search, "psnr_auc", tracking, None)
    for r in stopped:
        progress.send(r)
    search.save(record(0, 21.0))
    progress.finish(search.records()[0], [])
    runs = {run.info.run_name: run for run in tracking.client.search_runs([tracking.id])}
    steps, half = search.start.steps, (search.start.steps + search.start.base_steps) // 2
    for name, step, psnr in (("trial 0", steps, 21), ("trial 1", half, 20)):
        for key, at in (("psnr/ratio_0.05", step), ("curve/psnr_by_ratio_permille", 50)):
            history = tracking.client.get_metric_history(runs[name].info.run_id, key)
            assert [(metric.step, metric.value) for metric in history] == [(at, psnr)], name


def test_the_front_is_what_nothing_beats_in_quality_and_bytes(tmp_path):
    figures = [(20, 5), (21, 6), (19, 6), (18, 2)]
    records = [record(i, *both, size=True) for i,
               both in enumerate(figures)] + [record(4, 30, 1, rungs=2, size=True)]
    assert [r.number for r in front(records)] == [3, 0, 1]
    study = history(saved(tmp_path, *records), "pareto")
    assert [t.values for t in study.trials[:2]] == [[20, 5], [21, 6]]


def test_tables_and_figures_of_a_report():
    records = [record(i, 20 + i % 3) for i in range(4)] + [record(4, 0, rungs=0,
                                                                  error="MemoryError (out "
                                                                  "of memory: lower x)")]
    text = table(records, "psnr_auc").markdown()
    assert "failed: MemoryError" in text and "\\-\\-loss.elastic" in text.replace("--loss", "\\-\\-loss")
    assert "1.00 after a quarter, 1.00 after half" in agreement(records, "psnr_auc")
    assert str(Gain((0.5,), (0.1, 0.3))).startswith("+0.20 ± 0.14 (2 seeds) on the views that "
                                                    "the search has not seen")


def test_trials_are_chosen_and_reported_on_different_views(scene):
    even, odd = chosen(scene.test, "even"), chosen(scene.test, "odd")
    names = [{view.name for view in views} for views in (even, odd, scene.train)]
    assert all(names) and not names[0] & names[1] and not (names[0] | names[1]) & names[2]
    assert names[0] | names[1] == {view.name for view in scene.test}
    with pytest.raises(UserError, match=r"--evaluation\.views odd: found 1 test views, expected at least 2"):
        chosen(scene.test[:1], "odd")


@pytest.mark.parametrize(("args", "message"), [
    (["--scene", "berlin"], "/data/berlin: no such folder, and no --data-root; berlin is a capture of "
                            "Zip-NeRF, to be had by `flexgs data get berlin` or at "
     "https://jonbarron.info/zipnerf/; unpack it there"),
    (["--scene", "berlin", "--data-root", "{root}"],
     "no capture named berlin; found studio; berlin is a capture of Zip-NeRF"),
    (["--objective", "psnr/ratio_0.03"], "--objective psnr/ratio_0.03: expected one of psnr_auc, "
                                         "pareto, psnr/ratio_0.01"),
    (["--time-budget", "soon"], "--time-budget soon: expected something like 90m or 2h"),
    (["--trials", "0"], "--trials: found 0, expected at least 1"),
    (["--workers", "2"], "--workers 2: found --batch 1"),
    (["--only", "loss", "gsnet.temperature"], "--only gsnet.temperature: found no such setting in the search "
                                              "from --order.kind tree --transform.kind deltas"),
    (["--preset", "mended", "--only", "field.resolution.x"], "--only field.resolution.x: found no such"),
    (["--preset", "lightgs"], "--preset lightgs: makes a model for each ratio"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, message, capture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([arg.format(root=capture.parent) for arg in args]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_search_of_some_settings_leaves_the_others():
    start = Config.from_preset("mended")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    space(trial, start, only=("gsnet.temperature", "field.resolution", "loss"))
    assert set(trial.params) == {"gsnet.temperature", *(f"field.resolution.{axis}" for axis in "xyze"),
                                 "loss.elastic_l1", "loss.elastic_ssim", "loss.elastic_fade"}
    config = applied(trial.params, start)
    assert replace(config, loss=start.loss, field=start.field, gsnet=start.gsnet) == start
    assert replace(config.gsnet, temperature=start.gsnet.temperature) == start.gsnet != config.gsnet


def test_another_search_in_the_folder_is_refused(scene, tmp_path):
    search = saved(tmp_path)
    command._same_as_before(search, "psnr_auc", scene)
    command._same_as_before(search, "psnr_auc", scene)
    other = replace(scene, protocol={"digest": f"9{scene.digest}"})
    with pytest.raises(UserError, match=r"other number of images \(918, here 18\)|other number of "
                                        r"images \(18, here 918\)"):
        command._same_as_before(search, "psnr_auc", other)
    with pytest.raises(UserError, match="the search there has another objective"):
        command._same_as_before(search, "pareto", scene)
    with pytest.raises(UserError, match="the search there has another start"):
        command._same_as_before(replace(search, start=Config(steps=7)), "psnr_auc", scene)


def test_a_trial_is_measured_on_the_way_and_continues_where_it_was(capture, scene, config, tmp_path, s3):
    """Also on another machine, which has nothing but the object store."""
    config.evaluation = replace(config.evaluation, ratios=(0.05, 1.0), views="even")
    whole = Search(capture, Store(tmp_path / "whole"), config)
    parts = Search(capture, Store.open(s3.format("search"), tmp_path / "parts"), config)
    there, elsewhere = (parts.copied_to(tmp_path / name) for name in ("there", "elsewhere"))
    own = Own(config)
    space(own, config)
    reports: dict[str, list] = {"whole": [], "parts": [], "again": []}

    def cut_off(figures: dict) -> None:
        reports["parts"].append(figures)
        if len(reports["parts"]) == 2:
            raise KeyboardInterrupt

    for s in (whole, parts):
        begun(s, own.params, 0)
    run_trial(whole, own.params, scene, "cpu", Group(), reports["whole"].append)
    with pytest.raises(KeyboardInterrupt):
        run_trial(there, own.params, scene, "cpu", Group(), cut_off)
    assert parts.records()[0].status == "interrupted"
    assert there.trial(own.params).latest_step()
    run_trial(elsewhere, own.params, scene, "cpu", Group(), reports["again"].append)
    stage1 = base_folder(elsewhere, config).folder / "seed_0" / "stage1"
    assert not stage1.exists()  # it was not needed again
    assert [r["rung"] for r in reports["whole"]] == [1, 2, 4] == [r["rung"] for r in reports["again"]]
    for a, b in zip(reports["whole"], reports["again"], strict=True):
        assert a["psnr_auc"] == b["psnr_auc"] and set(a) > {"mb", "psnr/ratio_0.05", "ssim/ratio_1.00"}
    assert parts.records()[0].status == "finished" == whole.records()[0].status
    for search in (whole, elsewhere):
        assert {p.name for p in search.trial(own.params).folder.iterdir()
                if not p.name.startswith(".")} >= {"trial.json", "model"}
    trial = parts.trial(own.params)
    assert {name.split("/")[0] for name in trial._kept("")} == {"trial.json", "model"}
    parts.drop(own.params, "model")
    assert set(trial._kept("")) == {"trial.json"}


def test_why_a_trial_fails_is_written_down(capture, config, tmp_path):
    config.lr = replace(config.lr, sh0=float("nan"))
    search = Search(capture, Store(tmp_path), config)
    own = Own(config)
    space(own, config)
    with pytest.raises(UserError, match=r"lr\.sh0: found nan"):
        _direct({**own.params, NUMBER: 3}, search, Room(0.0))
    (failed,) = search.records()
    assert failed.status == "failed" and "lr.sh0: found nan" in str(failed.error) and failed.number == 3
    with pytest.raises(UserError, match=r"lr\.sh0: found nan"), _noted(search, own.params, 9):
        raise AssertionError("it is not tried again")


def test_a_trial_that_only_waits_for_its_workers_holds_no_cpu(tmp_path):
    """Else trials hold the CPUs that their workers wait for, and the search hangs."""
    search = Search(tmp_path, Store(tmp_path), Config())
    alone, together = (trainable(search, Room(0.0, workers=n))._resources for n in (1, 2))
    assert alone.required_resources["CPU"] == 1 and not together.required_resources.get("CPU")


# ---------------------------------------------------------------------- real Ray


def start(root: Path, storage: Path | str, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "tuning/search.py", "--data-root", str(root), "--scene",
                             "studio", "--storage", str(storage), *TINY, *more], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "200"},
                            cwd=Path(__file__).parents[1], start_new_session=True)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(process: subprocess.Popen, done, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)


def ended_without(search: subprocess.Popen, process: Callable[[], psutil.Process | None]) -> str:
    """What a search says that ends well after a process of it, once there is one, was killed."""
    wait_for(search, process)
    victim = process()
    assert victim
    victim.kill()
    out = search.communicate(timeout=300)[0]
    assert search.returncode == 0, out
    return out


@pytest.mark.ray
def test_killed_and_started_again_a_search_goes_on(capture, tmp_path):
    """SIGKILL to the search and, after it goes on, to one trial: nothing is repeated, the trial goes on and
    the search ends."""
    folder = tmp_path / "flexgs-search-studio"

    def records() -> dict[int, Record]:
        return {r.number: r for r in Search(capture, Store(folder), Config()).records()}

    first = start(capture.parent, tmp_path, "--trials", "3", "--confirm", "0", "--max-concurrent", "1")
    wait_for(first, lambda: any(r.status == "finished" for r in records().values()))
    # else MLflow may have a run that no folder knows of
    wait_for(first, lambda: any(folder.glob("trials/*/mlflow.json")))
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("trials/*/trial.json")
              if json.loads(file.read_text())["rungs"].get("4")}
    assert before

    second = start(capture.parent, tmp_path, "--trials", "3", "--confirm", "0", "--max-concurrent", "1")
    known = len(records())

    def new_trial() -> psutil.Process | None:
        begun = len(records()) > known
        running = [p for p in psutil.Process(second.pid).children(recursive=True)
                   if "ImplicitFunc" in title(p)]
        # the one before it may not have ended yet
        return max(running, key=psutil.Process.create_time) if running and begun else None

    out = ended_without(second, new_trial)
    ended = records()
    assert sorted(ended) == [0, 1, 2] and {r.status for r in ended.values()} <= {"finished", "stopped"}, out
    assert "its process died; goes on from its checkpoint" in out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "best: trial" in out and "compare-runs" in out and "curve%2Fpsnr_by_ratio" in out

    options = train_all.parse(train_all.TrainAll, ["--config", str(folder / "best.json")], "")
    assert options.config.evaluation.views == "all" and options.config.steps == 80
    report = (folder / "report.md").read_text()
    assert "Of 3 trials" in report and (folder / "curve.png").exists() and (folder / "settings.png").exists()
    tracking = Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}", "flexgs-search-studio")
    assert tracking.available()
    runs = tracking.client.search_runs([tracking.id])
    parents = [r for r in runs if r.data.tags["kind"] == "search"]
    trials = [r for r in runs if r.data.tags["kind"] == "trial"]
    assert len(parents) == 1 and len(trials) == 3
    assert parents[0].data.metrics["psnr_auc"] == max(r.figures["psnr_auc"] for r in ended.values()
                                                      if r.status == "finished")


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_is_kept_in_an_object_store(capture, s3, tmp_path, monkeypatch):
    """Another machine goes on with it; nothing is repeated."""
    storage, tracking = s3.format("searches"), ("--mlflow-uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    store = Store.open(storage, tmp_path / "look") / "flexgs-search-studio"
    for home, trials in (("first", 2), ("second", 3)):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        process = start(capture.parent, storage, "--trials", str(trials), "--confirm", "1", *tracking)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0, out
        records = Search(capture, store, Config()).records()
        assert len(records) == trials and records[0].status == "finished", out
        assert f"of {trials} trials, " in out and (f"{trials - 2 or 2} of {trials}" in out)
        assert {"best.json", "report.md", "curve.png", "search.json", "mlflow.json"} <= set(store._kept(""))
        assert not store._kept("tune")
    tracked = Tracking(tracking[1], "flexgs-search-studio")
    assert tracked.available()
    runs = tracked.client.search_runs([tracked.id])
    assert sorted(run.data.tags["kind"] for run in runs) == ["search", "trial", "trial", "trial"]


@pytest.mark.ray
@pytest.mark.slow
def test_trials_of_several_workers_do_not_wait_for_each_other(capture, tmp_path):
    """Two trials at a time of two workers each on two CPUs would hang if a trial held a CPU; against bytes,
    none is stopped."""
    process = start(capture.parent, tmp_path, "--trials", "2", "--workers", "2", "--batch", "2",
                    "--max-concurrent", "2",
                    "--objective", "pareto", "--confirm", "0")
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0, out
    records = Search(capture, Store(tmp_path / "flexgs-search-studio"), Config()).records()
    assert [r.status for r in records] == ["finished"] * 2, out
    assert {f"trial_{r.number}.json" for r in front(records)} == {
        p.name for p in (tmp_path / "flexgs-search-studio" / "front").iterdir()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_goes_on_after_one_of_its_workers_died(capture, tmp_path):
    """From its checkpoint; neither that nor the end of its workers, once others were better, is a failure."""
    folder = tmp_path / "flexgs-search-studio"
    process = start(capture.parent, tmp_path, "--trials", "3", "--workers", "2", "--batch", "2",
                    "--confirm", "0", "--steps", "400")

    def worker() -> psutil.Process | None:
        running = [p for p in psutil.Process(process.pid).children(recursive=True)
                   if "RayTrainWorker" in title(p)]
        return running[-1] if any(folder.glob("trials/*/checkpoints/step_*")) and running else None

    out = ended_without(process, worker)
    records = Search(capture, Store(folder), Config()).records()
    assert records[0].status == "finished" and len(records[0].rungs) == 3, out
    assert len(records) == 3 and {r.status for r in records} <= {"finished", "stopped"}, out
    (died,) = folder.glob("trials/*/failures.jsonl")
    assert died.read_text().count("\n") == 1
