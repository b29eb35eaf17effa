"""MLflow: names, runs that go on, and an MLflow that is not there."""

import json
import logging
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flexgs.config import Config
from flexgs.files import read_jsonl
from flexgs.record import BatchRecord
from flexgs.store import Store
from flexgs.tracking import Tracking, Writer, flatten, metric_name, sqlite_uri
from flexgs.tracking import writer as writer_module
from tests.conftest import ended_while_mlflow_comes_back

RESULTS = {"scene": "fox", "preset": "smoke", "steps": 200, "train_seconds": 3.5, "seconds": 4.0, "ratios": {
    "0.005": {"psnr": 15.0, "ssim": 0.4, "lpips_vgg": None, "splats": 5, "mb": 0.1, "ms": 1.0},
    "0.05": {"psnr": 20.0, "ssim": 0.6, "lpips_vgg": 0.3, "splats": 50, "mb": 1.0, "ms": 2.0},
    "1": {"psnr": 25.0, "ssim": 0.8, "lpips_vgg": 0.1, "splats": 1000, "mb": 20.0, "ms": 9.0}}}


def row(step: int) -> dict:
    return {"step": step, "stage": 1, "steps": 200, "loss": 1 / step, "eta_seconds": float("nan"),
            "psnr": 20.0}


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return sqlite_uri(tmp_path_factory.mktemp("100 % é") / "mlflow.db")


def test_ratio_names_have_two_decimals_or_more():
    assert [metric_name(r) for r in (0.005, 0.05, 0.1, 0.125, 0.5, 1.0)] == [
        "ratio_0.005", "ratio_0.05", "ratio_0.10", "ratio_0.125", "ratio_0.50", "ratio_1.00"]


def test_flatten():
    assert flatten({"a": 1, "b": {"c": {"d": (2, 3)}}}) == {"a": 1, "b.c.d": (2, 3)}


def test_a_server_that_never_answers_holds_up_nobody(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        tracking, writer, done = Tracking(f"http://127.0.0.1:{server.getsockname()[1]}", "test"), Writer(), []
        writer.put(done.append, 1)
        assert writer.wait(10) and writer.idle
        writer.put(tracking.run(tmp_path, "run", kind="scene").start)
        writer.put(done.append, 2)  # comes back, although the call before it does not
        asked, _ = server.accept()  # held until the end: a connection that is closed is an answer
        with asked:
            asked.recv(1)
            assert not writer.wait(0.2) and not writer.idle and done == [1]
            monkeypatch.setattr(writer_module, "MOMENT", 0.1)
            assert not writer.drain(0.1)
            assert "waits up to 0 s for it; Ctrl-C ends at once" in capsys.readouterr().out
            assert pickle.loads(pickle.dumps(writer)).idle  # as Ray Tune does with what has one
    # the connection has ended; the writer's warning is not to come in another test
    assert writer.wait(60) and done == [1, 2] and tracking.missed


def test_a_call_that_fails_is_a_warning_and_the_next_is_made(caplog):
    writer, done = Writer(), []
    writer.put(Path("/dev/null/is no folder").read_bytes)
    writer.put(done.append, 1)
    assert writer.wait(10) and done == [1] and "Not a directory" in caplog.text


def test_half_a_line_is_left_for_later(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [r["step"] for r in read_jsonl(tmp_path / "a.jsonl")] == [1, 2]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_scene_from_start_to_end_and_on(uri, tmp_path):
    """History without gaps or doubles over a restart, results under their names once, pictures and cuts."""
    folder = tmp_path / "fox"
    for name, size in (("renders/grid.png", 10), ("cuts/fox_005.00pct.ply", 10),
                       ("cuts/fox_100.00pct.ply", 60_000_000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as f:
            f.truncate(size)
    (folder / "results.json").write_text(json.dumps(RESULTS))

    def start():
        tracking = Tracking(uri, "flexgs-test", tmp_path / "artifacts")
        batch = tracking.run(tmp_path, "all scenes", kind="batch")
        run = tracking.run(folder, "fox", kind="scene", parent=batch, tags={"scene": "fox", "git_sha": None},
                           params=flatten(Config.from_preset("smoke").to_dict()))
        run.start()
        return tracking, batch, run

    tracking, batch, run = start()
    run.log_history([row(50), row(100)])
    run.log_history([row(50), row(100), row(150)])
    run.finish("FAILED", "it broke")
    client, run_id = tracking.client, run.id
    assert (client.get_run(run_id).data.tags["error"] == "it broke"
            and client.get_run(run_id).info.status == "FAILED")

    tracking, batch, run = start()  # another process, which redoes some steps
    assert run.id == run_id and client.get_run(run_id).info.status == "RUNNING"
    run.log_history([row(100), row(150), row(200)])
    for _ in range(2):
        run.log_results(RESULTS, folder)
    batch.log_summary(RESULTS["ratios"], 200)
    batch.finish()

    done = client.get_run(run_id)
    assert done.info.status == "FINISHED" and "error" not in done.data.tags
    assert done.data.tags["kind"] == "scene" and done.data.tags["mlflow.parentRunId"] == batch.id
    assert done.data.params["field.resolution"] == "(64, 64, 64, 100)" and done.data.params["steps"] == "200"
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == [50, 100, 150, 200]
    assert not {"train/eta_seconds", "train/steps"} & set(done.data.metrics)
    assert done.data.metrics["psnr/ratio_0.05"] == 20 and done.data.metrics["psnr/ratio_0.005"] == 15
    assert done.data.metrics["lpips/ratio_1.00"] == 0.1 and "lpips/ratio_0.005" not in done.data.metrics
    assert {f"{name}/ratio_1.00" for name in ("ssim", "splats", "mb", "ms")} <= set(done.data.metrics)
    curve = client.get_metric_history(run_id, "curve/psnr_by_ratio_permille")
    assert sorted((m.step, m.value) for m in curve) == [(5, 15), (50, 20), (1000, 25)]
    assert {a.path for a in client.list_artifacts(run_id)} == {"results.json", "renders", "cuts"}
    # the other is too large
    assert [a.path for a in client.list_artifacts(run_id, "cuts")] == ["cuts/fox_005.00pct.ply"]
    assert client.get_run(batch.id).data.metrics["psnr/ratio_1.00"] == 25
    experiment = client.get_experiment(tracking.id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert (f"experiments/{tracking.id}/runs" in tracking.how_to_open()
            and " server --host 127.0.0.1" in tracking.how_to_open())


def test_a_run_that_mlflow_has_lost_is_made_again(uri, tmp_path):
    (tmp_path / "mlflow.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')
    run = Tracking(uri, "flexgs-lost").run(tmp_path, "fox", kind="scene")
    run.log_history([row(50)])
    run.finish()
    assert (json.loads((tmp_path / "mlflow.json").read_text())["run_id"] == run.id
            != "0123456789abcdef0123456789abcdef")


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_is_made_once_although_the_answer_was_lost(uri, tmp_path, monkeypatch, times):
    """MLflow's client asks again by itself, and we do after a pause, perhaps in another process."""
    def process() -> tuple[Tracking, bool]:
        tracking = Tracking(uri, f"lost {times}")
        return tracking, tracking.run(tmp_path, "run", kind="scene", params={"steps": 3}).start()

    def lost(*args, **kwargs):
        for _ in range(times):
            create(*args, **kwargs)
        raise ConnectionError("the answer is lost")

    create = MlflowClient.create_run
    monkeypatch.setattr(MlflowClient, "create_run", lost)
    assert not process()[1]
    monkeypatch.undo()
    tracking, told = process()
    (run,) = tracking.client.search_runs([tracking.id])
    assert told and run.info.status == "RUNNING" and run.data.params == {"steps": "3"}
    assert tracking.run(tmp_path, "run", kind="scene").id == run.info.run_id


def test_what_mlflow_has_missed_of_a_batch_is_sent_at_its_end(tmp_path):
    """The means over the scenes too, which nothing else sends."""
    def begin(tracking: Tracking) -> tuple[Writer, Callable]:
        record = BatchRecord(Store(tmp_path / "runs"), tracking, "the same command")
        record.results = {"fox": RESULTS}
        return record.mlflow, record.finish

    tracking = ended_while_mlflow_comes_back(tmp_path, begin)
    (run,) = tracking.client.search_runs([tracking.id])
    assert run.info.status == "FINISHED" and run.data.metrics["psnr/ratio_1.00"] == 25
    assert "the same command" in run.data.tags["mlflow.note.content"]


def test_no_mlflow_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "flexgs.tracking"):
        tracking = Tracking("http://me:secret@127.0.0.1:9", "flexgs-test")
        run = tracking.run(tmp_path / "fox", "fox", kind="scene")
        run.start()
        run.log_history([row(50)])
        run.log_results(RESULTS, tmp_path)
        run.finish()
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "127.0.0.1:9" in caplog.text
    assert "secret" not in caplog.text and tracking.how_to_open() == ""
    assert not (tmp_path / "fox").exists()


def test_processes_that_start_together_share_one_database(tmp_path):
    code = (f"from flexgs.tracking import Tracking; from pathlib import Path; import sys\n"
            f"t = Tracking('sqlite:///{tmp_path}/new.db', 'flexgs-test', "
            f"Path({str(tmp_path)!r}) / 'artifacts')\nr = t.run(Path({str(tmp_path)!r}) / sys.argv[1], "
            "sys.argv[1], kind='scene'); r.start(); r.finish()")
    processes = [subprocess.Popen([sys.executable, "-c", code, name], stderr=subprocess.PIPE, text=True)
                 for name in "ab"]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert errors == ["", ""]
    tracking = Tracking(f"sqlite:///{tmp_path}/new.db", "flexgs-test")
    assert tracking.available()
    runs = tracking.client.search_runs([tracking.id])
    assert (sorted(r.info.run_name for r in runs) == ["a", "b"]
            and {r.info.status for r in runs} == {"FINISHED"})
    assert not list(Path(tmp_path).glob(".mlflow-*"))
