"""The Ray jobs: shares of a cluster, settings, bad input; and real Ray with real MLflow on a batch of two
scenes."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import ray
from PIL import Image
from ray.train import ControllerError

from flexgs import dataset_options, ray_library
from flexgs.config import Config
from flexgs.demo.synthetic import write_synthetic
from flexgs.distributed import Group
from flexgs.errors import UserError
from flexgs.files import only_one, read_jsonl, write_json
from flexgs.options import parse
from flexgs.run import LocalSession, run
from flexgs.scene.camera_model import CameraModel
from flexgs.scene.load import load_capture
from flexgs.store import Store
from flexgs.store_session import STOP
from flexgs.tracking import Tracking
from flexgs.training import warmup
from ray_jobs import batch, callback, cluster, compare_all, failures, schedule, train_all, train_scene
from ray_jobs.cluster import this_python

TINY = ["--preset", "smoke", "--steps", "80", "--data.factor", "1", "--base.max-splats", "600",
        "--base.refine-every", "20", "--report-every", "20", "--checkpoint-every", "40",
        "--evaluation.ratios", "0.05", "1", "--evaluation.lpips"]
LONG = ["--steps", "2400", "--checkpoint-every", "1200", "--batch", "2", "--workers", "1:2"]


@pytest.mark.parametrize(("nodes", "scenes", "workers", "expected"), [
    ([{"CPU": 2}], 2, None, ("1", 1, [2])),
    # one scene: the CPUs become threads
    ([{"CPU": 2}], 1, None, ("1", 2, [1])),
    ([{"CPU": 16}], 3, None, ("1", 5, [3])),
    ([{"CPU": 2}], 5, "2", ("2", 1, [2])),
    ([{"CPU": 2}], 2, "1:2", ("1:2", 1, [2])),
    ([{"CPU": 1}] * 3, 1, "2", ("2", 1, [1, 1, 1])),                          # on several machines
    ([{"CPU": 8}, {"CPU": 2}], 2, None, ("1", 4, [2, 0])),                    # five each would not fit
    ([{"CPU": 32, "GPU": 8}], 13, None, ("1:8", 4, [8])),
    ([{"CPU": 32, "GPU": 8}], 3, "2:4", ("2:4", 4, [8])),
    ([{"CPU": 64, "GPU": 8}] * 2, 1, None, ("1:8", 8, [8, 8])),
    ([{"CPU": 64, "GPU": 4}] * 2, 1, None, ("1:4", 16, [4, 4])),              # a scene keeps to a machine ...
    ([{"CPU": 64, "GPU": 8}] * 2, 1, "16", ("16", 8, [8, 8])),                # ... unless it is asked not to
    # the head has no GPU
    ([{"CPU": 8}, {"CPU": 4, "GPU": 1}, {"CPU": 16, "GPU": 1}], 4, None, ("1", 4, [0, 1, 1])),
])
def test_shares(nodes, scenes, workers, expected):
    nodes = {str(i): node for i, node in enumerate(nodes)}
    allocation = cluster.allocate(nodes, scenes, workers and cluster.Workers.parse(workers, 240), batch=240)
    sizes = ":".join(map(str, sorted({allocation.sizes[0], allocation.sizes[-1]})))
    assert (sizes, allocation.cpus, list(allocation.room(nodes).values())) == expected
    assert allocation.gpu == any("GPU" in node for node in nodes.values())


def test_workers_divide_the_batch():
    nodes = {"a": {"CPU": 32, "GPU": 8}}
    assert cluster.allocate(nodes, 1, None, batch=6).sizes == (1, 2, 3, 6)
    assert cluster.allocate(nodes, 1, cluster.Workers.parse("2:8", 9), batch=9).sizes == (3,)
    assert cluster.allocate(nodes, 1).sizes == (1,)  # a step of one view cannot be shared
    with pytest.raises(UserError, match=r"--workers 2:3: found --batch 7, .* such as --batch 2, which"):
        cluster.Workers.parse("2:3", 7)


@pytest.mark.parametrize("workers", ["0", "two", "3:2", "1:2:3", ":4", ""])
def test_workers_are_a_number_or_a_range(workers):
    with pytest.raises(UserError, match=f"--workers {workers}: expected a number of at least 1, "
                                        "or a range such as 1:4"):
        cluster.Workers.parse(workers, 12)


def test_more_workers_than_devices_are_refused():
    nodes = {"a": {"CPU": 32, "GPU": 8}}
    with pytest.raises(UserError, match="--workers 9: found 8 GPUs on 1 machine, expected at most 8"):
        cluster.allocate(nodes, 1, cluster.Workers(9, 9), batch=9)
    with pytest.raises(UserError, match=r"found room for 4 workers of one CPU and one GPU, .* expected 6"):
        cluster.allocate({"a": {"CPU": 4, "GPU": 8}}, 1, cluster.Workers(6, 8), batch=6)


def test_settings_come_from_flags_a_preset_or_a_file(tmp_path):
    args = "--preset paper --field.resolution 32 32 32 50 --scenes a b"
    options = parse(train_all.TrainAll, args.split(), "")
    assert options.config.preset == "paper" and options.config.order.kind == "gsnet"
    assert options.config.field.resolution == (32, 32, 32, 50) and options.scenes == ("a", "b")
    (tmp_path / "c.json").write_text(json.dumps(Config.from_preset("paper", steps=77, seed=3).to_dict()))
    config = parse(train_all.TrainAll, ["--config", str(tmp_path / "c.json"), "--seed", "4"], "").config
    assert (config.preset, config.steps, config.seed) == ("paper", 77, 4)


def test_what_was_typed_is_no_flag():
    with pytest.raises(UserError, match=r"--typed\.words"):
        parse(train_all.TrainAll, ["--typed.words", "x"], "")
    assert parse(train_all.TrainAll, ["--rates.sh0=1e-3", "--gpu"], "").typed.has("--lr.sh0")


def test_a_relative_storage_is_refused_in_a_submitted_job(monkeypatch):
    monkeypatch.setattr(dataset_options, "IN_JOB", True)
    assert dataset_options.storage_folder(None) == Path.home() / "flexgs-runs"
    with pytest.raises(UserError, match="absolute"):
        dataset_options.storage_folder("runs")


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 9"),
])
def test_a_scene_that_ran_out_of_memory_says_what_to_turn_and_what_is_left(tmp_path, error):
    store = Store(tmp_path) / "scene"
    (store.folder / "checkpoints" / "step_00000040").mkdir(parents=True)
    line = str(failures.cause_of(error, store))
    assert "out of memory: lower --base.max-splats or raise --data.factor" in line and "\n" not in line
    assert f"last checkpoint: {store.folder}/checkpoints/step_00000040" in line


def test_why_a_run_failed_is_kept_where_the_run_is(s3, tmp_path):
    """A search's trial has its copy of an object store in a folder that goes with it."""
    run = Store.open(s3.format("failed"), tmp_path / "copy") / "trial"
    run.folder.mkdir(parents=True)
    line = str(failures.cause_of(RuntimeError("lost"), run))
    assert line == f"RuntimeError: lost; no checkpoint yet; details in {run.place('error.txt')}"
    assert run.exists("error.txt")


def test_what_a_worker_raised_is_noted_or_ends_the_run(tmp_path):
    noted = callback.Failures(Store(tmp_path), None)
    noted.after_exception(None, {0: RuntimeError("lost\nmore"), 1: MemoryError()})
    errors = read_jsonl(tmp_path / "failures.jsonl")[0]["errors"]
    assert errors["0"] == "RuntimeError: lost" and "--base.max-splats" in errors["1"]
    with pytest.raises(UserError, match="no such image"):
        noted.after_exception(None, {0: RuntimeError("lost"), 1: UserError("no such image")})


@pytest.mark.parametrize(("args", "message"), [
    (["--data-root", "/nowhere"], "/nowhere: no such folder"),
    (["--data-root", "{root}", "--scenes", "fox"], "no capture named fox; found studio"),
    (["--scenes", "fox"], "the built-in scenes are"),
    (["--dataset", "zipnerf", "--data-root", "{root}"],
     "found no capture berlin, london, nyc, alameda of Zip-NeRF"),
    (["--dataset", "mipnerf360"], "/data: found no capture bicycle, bonsai"),
    (["--dataset", "mipnerf360", "--scenes", "truck"],
     "--scenes truck: not in mipnerf360; expected of bicycle"),
    (["--dataset", "kitti"], "--dataset"),
    (["--data-root", "{root}", "--storage", "/dev/null/x"], "/dev/null/x: cannot be written"),
    (["--data-root", "{root}", "--ray-address", "127.0.0.1:9"],
     "--ray-address 127.0.0.1:9: no Ray cluster answers"),
    (["--ray-adress", "local"], "--ray-adress"),
    (["--steps", "many"], "--steps"),
    (["--steps", "0"], "--steps: found 0"),
    (["--workers", "0"], "--workers 0"),
    (["--workers", "2:x"], "--workers 2:x: expected a number"),
    (["--workers", "2", "--batch", "3"], "--batch"),
    (["--preset", "best"], "--preset best: unknown"),
    (["--config", "/nowhere.json"], "/nowhere.json"),
    (["--evaluation.ratios", "0.1", "2"], "--evaluation.ratios: found 2.0"),
])
def test_bad_input_is_one_line_and_exit_code_2(args, message, capture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert train_all.main([arg.format(root=capture.parent) for arg in args]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and "Traceback" not in errors
    assert not list(tmp_path.rglob("*.json"))


def test_the_same_command_twice_leaves_the_first_alone(capture, tmp_path, capsys):
    """Also its run in MLflow, which it would mark as failed."""
    folder = tmp_path / f"flexgs-{capture.parent.name}" / "studio"
    with only_one(folder):
        code = train_all.main(["--data-root", str(capture.parent), "--storage", str(tmp_path), *TINY])
    assert code == 2 and f"{folder}: another process works here now" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {folder.parent.name}
    assert not [path for path in folder.parent.rglob("*") if not path.name.startswith(".") and path != folder]


# ---------------------------------------------------------------------- real Ray


@pytest.fixture(scope="module")
def ray_here(s3):
    """Ray on this machine, as quick as it gets; its workers inherit the keys of s3."""
    quick = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
             "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.update(quick)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
             runtime_env=this_python())
    yield
    ray.shutdown()
    for name in quick:
        del os.environ[name]


@pytest.mark.ray
def test_a_local_ray_has_no_process_for_its_dashboard():
    code = ("import psutil; from ray_jobs.cluster import Cluster\nwith Cluster('local') as cluster:\n"
            "    cluster.nodes()\n    for child in psutil.Process().children(recursive=True):\n"
            "        print(*child.cmdline())")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "raylet" in said and "dashboard.py" not in said


def test_kernels_are_compiled_again_only_where_numba_would(tmp_path, monkeypatch):
    note = tmp_path / "compiled.json"
    monkeypatch.setattr(warmup, "_note", lambda: note)
    assert not warmup.compiled()
    note.write_text("{")
    assert not warmup.compiled()
    write_json(note, warmup._compiled_from())
    assert warmup.compiled()
    with warmup.in_background() as wait:  # starts no process, which could not be waited for
        monkeypatch.setattr("subprocess.Popen.wait", None)
        wait()
    monkeypatch.setattr("numba.__version__", "0.1")
    assert not warmup.compiled()


def start(root: Path, storage: Path | str, *more: str) -> tuple[int, str, str]:
    """Run the job in this process: exit code, stdout, stderr."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = train_all.main(["--data-root", str(root), "--storage", str(storage), *TINY, *more])
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def two_scenes(ray_here, capture, tmp_path_factory):
    """A batch of a good scene and one with an image that is damaged in its middle: data, storage and what the
    job said.

    The good one has enough to do to be still training when the other fails.
    """
    root, storage = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("storage")
    for name in ("good", "torn"):
        shutil.copytree(capture, root / name)
    image = sorted((root / "torn" / "images").iterdir())[5]
    raw = image.read_bytes()
    image.write_bytes(raw[:500] + b"\xff" * (len(raw) - 700) + raw[-200:])  # whole by its head and its end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "RESTART_SECONDS", 0.1)  # a test is shorter than what a real restart is worth
        return root, storage, start(root, storage, *LONG)


@pytest.mark.ray
def test_a_failing_scene_does_not_disturb_the_other(two_scenes):
    root, storage, (code, out, errors) = two_scenes
    folder = storage / f"flexgs-{root.name}"
    assert code == 2, errors
    assert errors.startswith(f"flexgs: torn failed: {root}/torn/images/") and errors.count("\n") == 1
    assert "good: finished" in out and "100 %" in out and " server --host 127.0.0.1" in out

    results = json.loads((folder / "good" / "results.json").read_text())
    assert results["scene"] == "good" and results["steps"] == 2400 and set(results["ratios"]) == {"0.05", "1"}
    assert len(list((folder / "good" / "cuts").glob("*.ply"))) == 2
    kept = sorted(p.name for p in (folder / "good" / "checkpoints").iterdir())
    # the other is that of 1200, or of the stop for another worker
    assert len(kept) == 2 and kept[-1] == "step_00002400"
    steps = list(range(20, 2401, 20))
    assert [r["step"] for r in read_jsonl(folder / "good" / "metrics.jsonl")] == steps
    assert (not (folder / "torn" / "results.json").exists()
            and not (folder / "torn" / "failures.jsonl").exists())

    tracking = Tracking(f"sqlite:///{storage / 'mlflow.db'}", f"flexgs-{root.name}")
    assert tracking.available()
    batch, good, torn = sorted(tracking.client.search_runs([tracking.id]), key=lambda run: run.info.run_name)
    assert [run.info.run_name for run in (batch, good, torn)] == ["all scenes", "good", "torn"]
    assert (good.info.status, torn.info.status, batch.info.status) == ("FINISHED", "FAILED", "FAILED")
    assert "images" in torn.data.tags["error"] and good.data.tags["mlflow.parentRunId"] == batch.info.run_id
    assert good.data.metrics["psnr/ratio_0.05"] == results["ratios"]["0.05"]["psnr"]
    assert good.data.metrics["splats/ratio_1.00"] == results["ratios"]["1"]["splats"]
    assert [m.step for m in tracking.client.get_metric_history(good.info.run_id, "train/loss")] == steps
    assert {a.path
            for a in tracking.client.list_artifacts(good.info.run_id)} >= {"cuts", "renders", "results.json"}


@pytest.mark.ray
def test_a_scene_gets_the_workers_that_another_leaves(two_scenes):
    """torn dies, good stops at a report, goes on with both CPUs, and misses no view."""
    root, storage, (_, out, _) = two_scenes
    folder = storage / f"flexgs-{root.name}" / "good"
    assert "good: is going to continue with 2 workers" in out
    (stopped,) = re.findall(r"good: continues from (\d+) of 2400 with 2 workers", out)
    assert 0 < int(stopped) < 2400 and int(stopped) % 20 == 0  # at a report, between two checkpoints
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [r["workers"] for r in rows] == [1 + (r["step"] > int(stopped)) for r in rows]
    assert not (folder / STOP).exists() and not (folder / "failures.jsonl").exists()
    assert ("1 of 2 scenes failed: torn. To continue them:\npython "
            f"ray_jobs/train_all.py --data-root {root}" in out)


@pytest.mark.ray
def test_finished_scenes_are_skipped(two_scenes):
    """More steps continue: test_runs_are_kept_in_an_object_store."""
    root, storage, _ = two_scenes
    folder = storage / f"flexgs-{root.name}" / "good"
    before = (folder / "results.json").stat().st_mtime_ns
    code, out, _ = start(root, storage, "--scenes", "good", *LONG)
    assert code == 0 and "good: already finished, 2400 views" in out and "PSNR" in out
    assert (folder / "results.json").stat().st_mtime_ns == before


@pytest.mark.ray
def test_runs_are_kept_in_an_object_store(two_scenes, s3, tmp_path, monkeypatch):
    """Nothing but the bucket is shared: the job goes on from another machine, whose copy is empty."""
    root, storage = two_scenes[0], s3.format("runs/of/mine")
    tracking = ("--mlflow-uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(dataset_options, "HOME", tmp_path / "first")
    code, out, errors = start(root, storage, "--scenes", "good", *tracking)
    assert code == 0, errors
    assert f"runs go to bucket/runs/of/mine/flexgs-{root.name}" in out
    first = tmp_path / "first" / "bucket/runs/of/mine" / f"flexgs-{root.name}" / "good"
    assert [r["step"] for r in read_jsonl(first / "metrics.jsonl")] == [20, 40, 60, 80]
    assert {p.name for p in first.iterdir() if not p.name.startswith(".")} == {
        "config.json", "cuts", "metrics.jsonl", "mlflow.json", "model", "renders", "results.json"}

    monkeypatch.setattr(dataset_options, "HOME", tmp_path / "second")
    code, out, errors = start(root, storage, "--scenes", "good", "--steps", "120", "--workers",
                              "2", "--batch", "2", *tracking)
    assert code == 0 and "good: continues from 80 of 120" in out and "2 workers of 1 CPU" in out, errors
    second = tmp_path / "second" / first.relative_to(tmp_path / "first")
    assert [r["step"] for r in read_jsonl(second / "metrics.jsonl")] == [20, 40, 60, 80, 100, 120]
    assert json.loads((second / "results.json").read_text())["steps"] == 120
    store = dataset_options.DatasetOptions(data_root=root, storage=storage).store() / "good"
    assert store.latest_step() == 120 and not store.exists(STOP)
    client = Tracking(tracking[1], f"flexgs-{root.name}")
    assert client.available()
    # one, although the machine was another
    (run,) = client.client.search_runs([client.id], "tags.kind = 'scene'")
    losses = client.client.get_metric_history(run.info.run_id, "train/loss")
    assert [loss.step for loss in losses] == [20, 40, 60, 80, 100, 120]


@pytest.mark.ray
def test_a_worker_that_dies_is_started_again(ray_here, tmp_path, monkeypatch):
    """As often as --max-failures allows, and what it was is noted."""

    def dies_once(loop: dict) -> dict:
        if not (died := loop["job"].folder / "died").exists():
            died.touch()
            os._exit(1)
        return {"steps": 1}

    monkeypatch.setattr(train_scene, "train_loop_per_worker", dies_once)
    for again in (1, 0):
        folder = tmp_path / str(again)
        folder.mkdir()
        job = train_scene.SceneJob(tmp_path, Store(folder), Config(), max_failures=again)
        if again:
            assert train_scene.train_scene(job) == {"steps": 1}
            assert "WorkerCrashedError" in read_jsonl(folder / "failures.jsonl")[0]["errors"]["0"]
        else:
            with pytest.raises(failures.SceneFailedError, match=r"WorkerCrashedError.*; no checkpoint"):
                train_scene.train_scene(job)


@pytest.mark.ray
def test_workers_that_die_before_they_have_begun_are_started_again(ray_here, tmp_path, monkeypatch):
    """Ray Train ends its run then. A scene whose machine has gone goes back to the queue."""
    def dies_once(job: train_scene.SceneJob) -> dict:
        if (job.folder / "died").exists():
            return {"steps": 1}
        (job.folder / "died").touch()
        raise ControllerError(ray_library.start_error()("its node has died"))

    monkeypatch.setattr(train_scene, "_with_ray_train", dies_once)
    job = train_scene.SceneJob(tmp_path, Store(tmp_path), Config(), workers=2, max_failures=1)
    assert train_scene.train_scene(job) == {"steps": 1}
    assert "its node has died" in read_jsonl(tmp_path / "failures.jsonl")[0]["errors"]["0"]
    (tmp_path / "died").unlink()
    with pytest.raises(failures.SceneFailedError, match="its node has died"):
        train_scene.train_scene(replace(job, max_failures=0))
    (tmp_path / "died").unlink()
    assert train_scene.train_scene(replace(job, machine="gone", max_failures=0)) is None


@pytest.mark.ray
def test_neighbours_share_a_cluster(two_scenes, capture, tmp_path, monkeypatch):
    """Two jobs and an actor of somebody else on two CPUs: both jobs end, and the one that waits says so."""

    class Other:
        def there(self) -> None:
            pass

    actor = ray.remote(num_cpus=1)(Other).remote()
    ray.get(actor.there.remote())
    theirs = subprocess.Popen(
        [sys.executable, "-c", "import sys; from ray_jobs import batch, train_all\n"
         "batch.SAY_SECONDS = batch.LEAST_SECONDS = 1\n"
         "sys.exit(train_all.main(sys.argv[1:]))", "--data-root", str(capture.parent), "--storage",
         str(tmp_path / "theirs"), *TINY, "--ray-address", ray.get_runtime_context().gcs_address],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    monkeypatch.setattr(batch, "SAY_SECONDS", 1.0)
    code, ours, errors = start(two_scenes[0], tmp_path / "ours", "--scenes", "good", "--batch", "2",
                               "--workers", "1:2")
    said = theirs.communicate(timeout=300)[0]
    ray.kill(actor)
    assert (code, theirs.returncode) == (0, 0), ours + errors + said
    assert "good: finished" in ours and "studio: finished" in said
    assert "waits for 1 CPU; " in ours + said


def compare(root: Path, storage: Path | str, *more: str) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = compare_all.main(["--data-root", str(root), "--storage", str(storage), *TINY, "--ratios",
                                 "0.1", "1", *more])
    return code, out.getvalue(), errors.getvalue()


@pytest.mark.ray
def test_methods_are_compared_over_captures(two_scenes, capture, tmp_path):
    """Each model a task; a capture that fails leaves the others alone; what is finished is not trained
    again."""
    root, storage, _ = two_scenes
    if not (root / "other").exists():
        shutil.copytree(capture, root / "other")
    code, out, errors = compare(root, storage, "--methods", "plain", "lightgs", "scratch", "--experiment",
                                "methods")
    assert code == 2 and all(line.startswith("flexgs: torn seed 0 ") for line in errors.splitlines()), errors
    assert "mean of 2 captures" in out and "(12 of 12," in out
    folder = storage / "methods"
    for name in ("good", "other"):
        methods = json.loads((folder / name / "compare.json").read_text())["methods"]
        counts = {method: {ratio: row["splats"] for ratio, row in seed["ratios"].items()}
                  for method, (seed,) in methods.items()}
        n = counts["plain"]["1"]
        assert counts["plain"]["0.1"] == n // 10 and counts["lightgs"] == {"0.1": n // 10}
        assert 0 < counts["scratch"]["0.1"] <= n // 10
    assert {"tables.md", "tables.tex", "table.csv",
            "tradeoff.png"} <= {p.name for p in (folder / "good").iterdir()}
    assert (folder / "tables.md").exists()  # the mean

    trained = {p: p.stat().st_mtime_ns for p in folder.glob("*/seed_0/*/results.json")}
    assert len(trained) == 6
    code, _, errors = compare(root, storage, "--methods", "plain", "lightgs", "--experiment", "methods",
                              "--scenes", "good", "other")
    assert code == 0, errors
    assert trained == {p: p.stat().st_mtime_ns for p in folder.glob("*/seed_0/*/results.json")}

    tracking = Tracking(f"sqlite:///{storage / 'mlflow.db'}", "methods")
    assert tracking.available()
    by_name = {(r.info.run_name, r.data.tags["scene"]): r for r in tracking.client.search_runs([tracking.id])}
    assert set(by_name) == {(name.format(scene), scene) for scene in ("good", "other")
                            for name in ("{}: comparison", "plain", "lightgs", "scratch")}
    method, whole = by_name["plain", "good"], by_name["good: comparison", "good"]
    assert method.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert whole.data.metrics["psnr/ratio_0.10"] >= method.data.metrics["psnr/ratio_0.10"]
    assert {a.path
            for a in tracking.client.list_artifacts(whole.info.run_id)} >= {"tables.md", "tradeoff.png"}


@pytest.mark.ray
def test_a_comparison_is_kept_in_an_object_store(ray_here, capture, s3, tmp_path, monkeypatch):
    """Stage 1, cells and tables pass through the bucket; another machine repeats nothing that is there."""
    root, storage = tmp_path / "data", s3.format("comparisons")
    shutil.copytree(capture, root / "good")
    more = ("--mlflow-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--experiment", "kept", "--methods",
            "plain")
    monkeypatch.setattr(dataset_options, "HOME", tmp_path / "first")
    code, out, errors = compare(root, storage, *more)
    assert code == 0 and "good seed 0 plain: done (2 of 2, " in out, errors

    kept = Store.open(storage, tmp_path / "look") / "kept"

    def bucket() -> dict[str, int]:
        return {there: info.mtime_ns for there, info in kept._kept("good").items()}

    before = bucket()
    assert {f"good/{name}" for name in (
        "seed_0/stage1/done/state.json", "seed_0/plain/results.json", "seed_0/plain/model/model.json",
        "tables.md", "compare.json", "mlflow.json", "mlflow/plain/mlflow.json")} <= set(before)

    monkeypatch.setattr(dataset_options, "HOME", tmp_path / "second")
    code, out, errors = compare(root, storage, *more, "lightgs")  # without stage 1, which is there
    assert code == 0 and "good seed 0 plain: done" not in out, errors
    trained = [there for there in before if "/seed_0/" in there]
    assert len(trained) > 8 and all(bucket()[there] == before[there] for there in trained)
    folder = tmp_path / "second" / "bucket/comparisons" / "kept" / "good"
    assert set(json.loads((folder / "compare.json").read_text())["methods"]) == {"plain", "lightgs"}
    client = Tracking(more[1], "kept")
    assert client.available()
    names = sorted(run.info.run_name for run in client.client.search_runs([client.id]))
    assert names == ["good: comparison", "lightgs", "plain"]


# ---------------------------------------------------------------------- datasets as they are released

SIZES = ("--preset", "smoke", "--steps", "40", "--base.max-splats", "600", "--evaluation.ratios", "0.05", "1",
         "--evaluation.lpips")


def released(capture: Path, folder: Path, calibrated: int = 2) -> Path:
    """A capture laid out as Mip-NeRF 360 and Zip-NeRF are released: images, here twice as large as those of
    capture, images_2, images_4, images_8, sparse/0 and poses_bounds.npy; its cameras are for images
    calibrated times as large."""
    model = pycolmap.Reconstruction(str(capture / "sparse" / "0"))
    width, height = model.cameras[1].width, model.cameras[1].height
    model.cameras[1].rescale(calibrated * width, calibrated * height)
    (folder / "sparse" / "0").mkdir(parents=True)
    model.write_binary(str(folder / "sparse" / "0"))
    for name, factor in {"images": 1, "images_2": 2, "images_4": 4, "images_8": 8}.items():
        (folder / name).mkdir()
        for path in (capture / "images").iterdir():
            with Image.open(path) as image:
                image.resize((2 * width // factor, 2 * height // factor)).save(folder / name / path.name)
    np.save(folder / "poses_bounds.npy", np.zeros((len(model.images), 17)))
    return folder


def run_job(job, storage: Path, *more: str) -> str:
    """A job that ends well: what it said."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = job.main(["--storage", str(storage), *SIZES, *more])
    assert code == 0, errors.getvalue()
    return out.getvalue()


def measured(folder: Path) -> tuple[int, int, str | None]:
    """(factor, width, how images were resized) of what the results in a folder are from; None: by whoever
    made the capture."""
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 40 and all(row["psnr"] > 5 for row in results["ratios"].values())
    return tuple(results["protocol"][key] for key in ("factor", "width", "resize"))


def test_the_factor_is_that_of_the_protocol_unless_the_user_says_one(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(Config.from_preset("smoke").to_dict()))

    def factor(name: str, *args: str) -> int:
        options = parse(train_all.TrainAll, args, "")
        return options.of(tmp_path / name, options.config).data.factor

    dataset, field = ("--dataset", "mipnerf360"), ("--protocol", "standard")
    assert [factor("bonsai", *dataset), factor("bonsai", *dataset, *field),
            factor("garden", *dataset, *field)] == [4, 2, 4]
    assert factor("bonsai", *dataset, *field, "--data.factor",
                  "8") == 8 == factor("bonsai", "--data.factor=8")
    default = Config.from_preset("smoke").data.factor
    assert factor("bonsai", *field) == default == factor("bonsai", *dataset, *field, "--config",
                                                         str(tmp_path / "c.json"))


@pytest.fixture(scope="module")
def garden_and_bonsai(capture, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mipnerf360")
    for name in ("garden", "mipnerf360/bonsai", "other"):
        released(capture, root / name)
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """One storage for all: a new MLflow database takes seconds."""
    return tmp_path_factory.mktemp("storage")


@pytest.mark.ray
@pytest.mark.slow
def test_mip_nerf_360_as_released(ray_here, garden_and_bonsai, shared):
    """Each scene at its factor of the protocol; those that are not there are named with how to get them."""
    out = run_job(train_all, shared, "--dataset", "mipnerf360", "--data-root", str(garden_and_bonsai),
                  "--protocol", "standard")
    assert ("mipnerf360: without bicycle, counter, flowers, kitchen, room, stump, treehill, not under "
            f"{garden_and_bonsai}; `flexgs data get bicycle counter ") in out
    folder = shared / "flexgs-mipnerf360"
    assert {path.parent.name for path in folder.glob("*/results.json")} == {"garden", "bonsai"}
    assert measured(folder / "garden") == (4, 32, None) and measured(folder / "bonsai") == (2, 64, None)
    tracking = Tracking(f"sqlite:///{shared / 'mlflow.db'}", "flexgs-mipnerf360")
    assert tracking.available()
    found = tracking.client.search_runs([tracking.id], "tags.kind = 'scene'")
    assert {run.info.run_name: run.data.params["data.factor"] for run in found} == {"garden": "4",
                                                                                    "bonsai": "2"}


@pytest.mark.ray
@pytest.mark.slow
def test_tanks_and_temples_as_released(ray_here, capture, shared, tmp_path):
    """Only images and sparse/0; the cameras are calibrated for images twice as large."""
    truck = released(capture, tmp_path / "truck", calibrated=4)
    for name in ("images_2", "images_4", "images_8"):
        shutil.rmtree(truck / name)
    (truck / "poses_bounds.npy").unlink()
    run_job(train_all, shared, "--dataset", "tanksandtemples", "--data-root", str(tmp_path), "--protocol",
            "field")
    assert measured(shared / "flexgs-tanksandtemples" / "truck") == (1, 128, None)


@pytest.mark.ray
def test_zip_nerf_as_released(ray_here, shared, tmp_path, monkeypatch):
    """With fisheye lenses, and under the name of the undistorted release; that is laid out as Mip-NeRF 360
    is.

    Trained in this process: how workers start and end does not depend on the capture.
    """

    def train_here(job: train_scene.SceneJob) -> dict:
        session = LocalSession(job.folder, Group(), lambda step, metrics: None)
        return run(job.config, load_capture(job.capture, job.config), job.folder, Group(), session)

    monkeypatch.setattr(batch, "train_scene", train_here)
    lens = CameraModel("OPENCV_FISHEYE", 64, 48, (40.0, 40.0, 32.0, 24.0, 0.02, -0.01, 0.0, 0.0))
    released(write_synthetic("studio", tmp_path / "small", views=12, lens=lens), tmp_path / "berlin")
    run_job(train_all, shared, "--dataset", "zipnerf", "--data-root", str(tmp_path))
    factor, width, resize = measured(shared / "flexgs-zipnerf" / "berlin")
    # as large as undistortion leaves the 32 pixels of images_4
    assert (factor, resize) == (4, None) and 16 <= width <= 64


@pytest.mark.slow
@pytest.mark.ray
def test_methods_are_compared_on_a_dataset(ray_here, garden_and_bonsai, shared):
    out = run_job(compare_all, shared / "compare", "--dataset", "mipnerf360", "--data-root",
                  str(garden_and_bonsai), "--protocol", "standard", "--scenes", "bonsai", "garden",
                  "--methods", "plain")
    assert "mean of 2 captures" in out and "without" not in out
    folders = {folder.parents[2].name: folder.parent for folder in
               (shared / "compare" / "flexgs-mipnerf360").glob("*/seed_0/plain/results.json")}
    assert {name: measured(folder) for name,
            folder in folders.items()} == {"garden": (4, 32, None), "bonsai": (2, 64, None)}
