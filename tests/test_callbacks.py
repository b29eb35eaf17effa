"""What is told how a training goes: loggers, and the viewer's model while it grows."""

import json
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import begun, tiny_config, tiny_scene, tiny_splats

from flexgs.callbacks import Callback, Callbacks
from flexgs.errors import UserError
from flexgs.training.trainer import Trainer
from flexgs.view.live import Growing
from tests.test_cli import SMALL, flexgs, line_of


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in TensorBoard's event files: records of a length, its checksum, the event, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.*")):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            length, = struct.unpack_from("<Q", raw, at)
            event = Event.FromString(raw[at + 12:at + 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += length + 16
    return found


def test_figures_go_to_tensorboard_and_mlflow(capture, tmp_path, capsys, monkeypatch):
    """Those of the way and of the end; a continued run goes on with the same curves."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "my runs"
    train = ["train", capture, "--output", out, *SMALL, "--evaluation.lpips",
             "--eval-every", "15", "--log", "tensorboard", "mlflow"]
    assert flexgs(*train) == 0 == flexgs(*train, "--steps", "60")
    said = capsys.readouterr().out
    assert f"tensorboard --logdir '{out}/studio/tensorboard'" in said and "#/experiments/" in said
    ratios = json.loads((out / "studio/results.json").read_text())["ratios"]
    curves = scalars(out / "studio/tensorboard")
    assert [step for step, _ in curves["train/test_psnr_1"]] == [15, 20, 30, 40, 45, 60]
    assert [step for step, _ in curves["psnr/ratio_0.05"]] == [30, 40, 45, 60]  # stage 2 has an order
    assert [step for step, _ in curves["psnr/ratio_1"]] == [15, 30, 40, 45, 60]
    assert "train/loss_elastic" in curves
    rows = [json.loads(line) for line in (out / "studio/metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: sorted(row["ratios"]) for row in rows if "ratios" in row}[15] == ["1"]
    assert curves["psnr/ratio_0.05"][-1] == (60, pytest.approx(ratios["0.05"]["psnr"]))
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("flexgs")
    run, = client.search_runs([experiment.experiment_id], "tags.kind = 'scene'")
    assert run.info.status == "FINISHED" and run.data.params["steps"] == "40"
    history = client.get_metric_history(run.info.run_id, "train/test_psnr_1")
    assert [metric.step for metric in history] == [15, 20, 30, 40, 45, 60]
    for name in ("psnr/ratio_0.05", "ssim/ratio_0.05", "psnr_auc"):  # the table's columns, on the way
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted({metric.step for metric in history}) == [30, 40, 45, 60]
    assert run.data.metrics["psnr/ratio_0.05"] == pytest.approx(ratios["0.05"]["psnr"])


def test_figures_go_to_weights_and_biases(capture, tmp_path, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert flexgs("train", capture, "--output", tmp_path, *SMALL, "--evaluation.lpips", "--log", "wandb") == 0
    assert f"wandb sync {tmp_path}/studio/wandb/offline-run-" in capsys.readouterr().out
    wandb.teardown()  # its own process writes the rest
    kept, = (tmp_path / "studio/wandb").glob("offline-run-*/run-*.wandb")
    known = json.loads((tmp_path / "studio/wandb.json").read_text())["run_id"]
    assert kept.name == f"run-{known}.wandb"
    assert all(name in kept.read_bytes() for name in (b"train/test_psnr_1", b"psnr/ratio_0.05"))


def test_a_missing_service_is_named_before_training(capture, tmp_path, capsys, monkeypatch):
    for service, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        assert flexgs("train", capture, "--output", tmp_path, *SMALL, "--log", service) == 2
        assert (f"--log {service} needs the package {package}, which is not installed: "
                f"pip install 'flexgs[{service}]'") in line_of(capsys)
    assert not list(tmp_path.glob("studio/checkpoints/*"))
    assert flexgs("train", capture, "--output", tmp_path, *SMALL, "--log", "wandbb") == 2
    assert "did you mean wandb?" in line_of(capsys)


def test_a_model_is_cut_between_two_steps_of_its_training():
    """By other threads; what they get does not change as the training goes on."""
    trainer = begun(Trainer(tiny_config(steps=8), tiny_scene()), tiny_splats())
    model, cuts = Growing(trainer), []
    assert len(model.cut(1.0)) == 40 == len(model)  # in the thread that trains, at once

    def ask(budget):
        thread = threading.Thread(target=lambda: cuts.append(model.cut(budget)), daemon=True)
        thread.start()
        return thread

    asking = ask("10%")
    asking.join(0.1)
    assert asking.is_alive()  # until a step is over
    trainer.fit(lambda step, metrics: None, lambda step, write: None, until=2)
    model.answer()
    asking.join(10)
    first = cuts[0].means.clone()
    trainer.fit(lambda step, metrics: None, lambda step, write: None)
    assert len(cuts[0]) == 4 and torch.equal(cuts[0].means, first)
    model.end(trained := trainer.model())
    ask(0.1).join(10)
    assert torch.equal(cuts[1].means, trained.cut(0.1).means)
    model = Growing(trainer)
    model.end(None)
    with pytest.raises(UserError, match="ended before its last view"):
        model.cut(0.5)


def test_all_callbacks_end_even_if_one_fails_to():
    ended = []

    class Ends(Callback):
        def __init__(self, name, fails=False):
            self.name, self.fails = name, fails

        def end(self):
            ended.append(self.name)
            if self.fails:
                raise OSError("the service is gone")

    with pytest.raises(OSError, match="gone"), Callbacks([Ends("a", fails=True), Ends("b")]).told(None):
        pass
    assert ended == ["a", "b"]
