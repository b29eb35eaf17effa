"""Models in MLflow: cut in another process, which version is the best, and nothing twice."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow.pyfunc import PythonModelContext

from flexgs.errors import UserError
from flexgs.model.elastic import ElasticModel
from flexgs.ply import ply_bytes, write_ply
from flexgs.report.table import psnr_auc
from flexgs.tracking import Run, Tracking, notes, pyfunc, sqlite_uri
from flexgs.tracking.pyfunc import Cutter
from flexgs.training.trainer import Trainer

LOAD_AND_CUT = """
import json, sys
import mlflow, pandas as pd
uri, folder = sys.argv[1:]
mlflow.set_tracking_uri(uri)
model = mlflow.pyfunc.load_model("models:/flexgs-it_s studio@best")
paths = [folder + "/a.ply", folder + "/b.ply"]
written = model.predict(pd.DataFrame({"budget": ["20%", "20kB"], "path": paths}))
returned = model.predict(pd.DataFrame({"budget": [0.2]}))
import flexgs
print(json.dumps({"written": written.drop(columns="ply").to_dict("list"), "flexgs": flexgs.__file__,
                  "same": returned.ply[0] == open(paths[0], "rb").read(), "ply": list(written.ply.isna())}))
"""


@pytest.fixture
def model(scene, config) -> ElasticModel:
    config.steps = 40
    trainer = Trainer(config, scene)
    trainer.fit(lambda step, metrics: None, lambda step, write: None)
    return trainer.model()


def results(psnr: float, scene: str = "it's studio", digest: str = "abc") -> dict:
    return {"scene": scene, "capture": "/captures/it's studio", "preset": "smoke", "steps": 200,
            "protocol": {"train_views": 15, "test_views": 3, "width": 64, "height": 48, "points": 100,
                         "digest": digest},
            "ratios": {ratio: {"psnr": psnr + float(ratio), "ssim": 0.5, "splats": 9, "mb": 1.0}
                       for ratio in ("0.05", "1")}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return sqlite_uri(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


def started(uri: str, root: Path, name: str = "run") -> tuple[Tracking, Run]:
    """An experiment of the test's own, and a run in it."""
    tracking = Tracking(uri, root.name, root / "artifacts")
    return tracking, tracking.run(root / name, name, kind="scene")


def test_a_logged_model_is_cut_in_a_fresh_process(model, uri, tmp_path):
    """By its alias, without this checkout on the path; the files are those that write_ply makes, byte for
    byte."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    model.save(tmp_path / "run" / "model")
    tracking, run = started(uri, tmp_path)
    run.log_results(results(20.0), tmp_path / "run")
    # before Python compiles it where it is loaded
    kept = {f.name for f in (tmp_path / "artifacts").rglob("*") if f.is_file()}
    assert {"model.safetensors", "model.json", "pyfunc.py", "MLmodel"} <= kept
    assert not {Path(name).suffix for name in kept} & {".pkl", ".pickle", ".pt", ".pyc"}

    done = subprocess.run([sys.executable, "-c", LOAD_AND_CUT, tracking.uri, str(tmp_path)], cwd=tmp_path,
                          text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for name, budget in (("a", "20%"), ("b", "20kB")):
        write_ply(model.cut(budget), tmp_path / "expected.ply")
        assert (tmp_path / f"{name}.ply").read_bytes() == (tmp_path / "expected.ply").read_bytes()
    counts = [len(model.cut("20%")), len(model.cut("20kB"))]
    assert said["written"]["gaussians"] == counts
    assert said["written"]["ratio"] == [n / len(model.splats) for n in counts]
    assert said["written"]["bytes"] == [ply_bytes(n, model.splats.sh_degree) for n in counts]
    assert said["same"] and said["ply"] == [True, True] and "code" in said["flexgs"]


def test_leftovers_are_not_logged(model, tmp_path, monkeypatch):
    """What lies about in the folders of the sources and of the model does not change what is logged: not by a
    file."""
    package = Path(pyfunc.__file__).parents[1]
    clean = shutil.copytree(package, tmp_path / "flexgs", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(pyfunc, "__file__", str(clean / "tracking" / "pyfunc.py"))
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    for left in ("splats.pyc", "model/__pycache__/field.cpython-311.pyc",
                 "raster/cpu/__pycache__/kernels.nbi", "splats.py~",
                 "._splats.py", ".splats.py.swp", "#splats.py#", "splats.py.orig", "model/.DS_Store", "TAGS",
                 ".ipynb_checkpoints/splats.py", "view/web/node_modules/x.py", "../model/.DS_Store",
                 "../model/model.json~"):
        (clean / left).parent.mkdir(parents=True, exist_ok=True)
        (clean / left).write_bytes(b"left")
    (clean / ".#splats.py").symlink_to("user@host.1:2")  # a lock of Emacs, which leads nowhere
    pyfunc.save(tmp_path / "model", tmp_path / "logged")
    logged = {str(f.relative_to(tmp_path / "logged")) for f in (tmp_path / "logged").rglob("*")
              if f.is_file()}
    modules = {f"code/flexgs/{module.relative_to(package)}" for module in package.rglob("[!.]*.py")}
    assert {name for name in logged if name.startswith("code/")} == modules
    assert {name for name in logged
            if name.startswith("artifacts/")} == {f"artifacts/{name}" for name in pyfunc.MODEL}


def test_only_a_better_version_takes_the_alias(model, uri, tmp_path):
    """Not a worse one, not one measured on other images; and results that were logged make no second
    version."""
    versions = {}
    for name, (psnr, digest) in {"first": (20.0, "abc"), "worse": (19.0, "abc"), "other": (30.0, "def"),
                                 "better": (21.0, "abc")}.items():
        (tmp_path / name / "model").mkdir(parents=True)
        model.save(tmp_path / name / "model")
        for _ in range(2):
            tracking, run = started(uri, tmp_path, name)
            run.log_results(results(psnr, "fox", digest), tmp_path / name)
        best = tracking.client.get_model_version_by_alias("flexgs-fox", "best")
        versions[name] = best.version
        data = tracking.client.get_run(run.id).data
        assert (data.metrics["psnr_auc"] == pytest.approx(psnr + 0.525)
                and data.tags["model"].startswith("models:/"))
    assert versions == {"first": 1, "worse": 1, "other": 1, "better": 4}
    client, fox = tracking.client, "name='flexgs-fox'"
    assert len(client.search_model_versions(fox)) == len(client.search_logged_models([tracking.id])) == 4
    run.log_results(results(20.5, "fox"), tmp_path / "better")  # it went on
    assert len(client.search_model_versions(fox)) == 5
    assert client.get_model_version_by_alias("flexgs-fox", "best").version == 4

    (dataset,) = client.get_run(run.id).inputs.dataset_inputs
    assert dataset.dataset.name == "fox" and json.loads(dataset.dataset.profile)["train_views"] == 15
    assert "| PSNR | 20.55 | 21.50 |" in client.get_run(run.id).data.tags["mlflow.note.content"]


def test_a_large_model_is_registered_where_it_is(model, uri, tmp_path, monkeypatch):
    monkeypatch.setattr("flexgs.tracking.run.MODEL_BYTES", 10)
    (tmp_path / "run" / "model").mkdir(parents=True)
    model.save(tmp_path / "run" / "model")
    tracking, run = started(uri, tmp_path)
    run.log_results(results(20.0, "large"), tmp_path / "run")
    assert tracking.client.get_run(run.id).data.tags["model"] == "models:/flexgs-large/1"
    assert not [*(tmp_path / "artifacts").rglob("model.safetensors")]
    (where,) = (tmp_path / "artifacts").rglob("folder.json")
    cutter, context = Cutter(), PythonModelContext({"folder.json": str(where)}, None)
    cutter.load_context(context)
    assert len(cutter.model) == len(model)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="run/model: not a flexgs model"):
        cutter.load_context(context)


def test_a_model_that_cannot_be_registered_is_a_warning(uri, tmp_path, caplog):
    """What was measured is logged, and the scenes after it too."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    tracking, run = started(uri, tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "models").write_text("in the way")
    run.log_results(results(20.0), tmp_path / "run")
    assert [r.levelname for r in caplog.records if r.name == "flexgs.tracking"] == ["WARNING"]
    done = tracking.client.get_run(run.id)
    assert (done.info.status == "FINISHED" and done.data.metrics["psnr/ratio_0.05"] == 20.05
            and tracking.available())


def test_the_machine_is_watched_until_the_run_ends(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracking, run = started(uri, tmp_path)
    run.start()
    run.watch_machine()
    monitor, until = run._monitor._process, time.monotonic() + 60
    while "system/cpu_utilization_percentage" not in tracking.client.get_run(run.id).data.metrics:
        assert monitor.is_alive() and time.monotonic() < until
        time.sleep(0.1)
    run.finish()
    assert not monitor.is_alive()


def test_psnr_auc_weighs_ratios_by_their_logarithm():
    flat = {ratio: {"psnr": 20.0} for ratio in ("0.01", "0.05", "1")}
    assert psnr_auc(flat) == pytest.approx(20) and psnr_auc({"1": {"psnr": 25.0}}) == 25
    assert psnr_auc({"1": {"psnr": 30.0}, "0.01": {"psnr": 10.0}, "0.1": {"psnr": 20.0}}) == pytest.approx(20)


def test_a_path_must_be_a_ply(model):
    cutter = Cutter()
    cutter.model = model
    for path in ("/etc/passwd", "/tmp/x.compressed.ply", "/tmp/x.spz"):
        with pytest.raises(UserError, match=rf"path {path}: expected a name that ends in \.ply"):
            cutter.predict(None, pd.DataFrame({"budget": ["5%"], "path": [path]}))
    with pytest.raises(UserError, match="budget '5 apples'"):
        cutter.predict(None, pd.DataFrame({"budget": ["5 apples"]}))


def test_notes():
    text = notes.batch([results(20.0), results(22.0)], "python ray_jobs/train_all.py")
    assert "| scene | 5 % | 100 % |" in text and "| mean | 21.05 | 22.00 |" in text
    text = notes.scene(results(20.0), Path("/runs/it's"))
    assert "15 views of 64x48 pixels" in text and "--config '/runs/it'\"'\"'s/config.json'" in text
