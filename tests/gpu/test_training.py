"""Training on the GPU: it learns, goes on from a checkpoint, and two processes do what one does.

gsplat's backward adds up with atomics, in another order each time, so nothing is equal bit for bit, and after
a densification not even the number of Gaussians need be. What is compared starts from one checkpoint without
densification after it, and is the change since. How close that is was tried on the CPU: with every pixel's
gradient off by 1e-6, ten steps change the Gaussians and the transform by at most 1e-4 of their change, GsNet
by 1.2e-2; the same views in five steps of two, by 4e-2 or more. On a GPU it has to be seen.
"""

import dataclasses
import math

import pytest
import torch

from flexgs.distributed import Group
from flexgs.evaluate import evaluate
from flexgs.model.elastic import ElasticModel
from flexgs.raster.reference import relative_l2
from flexgs.run import LocalSession, run
from flexgs.scene import load_scene
from flexgs.training.checkpoint import latest_checkpoint
from flexgs.training.trainer import Trainer
from tests.test_distributed import spawn
from tests.test_train import QUIET, forget, method_of

pytestmark = pytest.mark.gpu
CLOSE, CLOSE_GSNET = 0.01, 0.05


def begun(config, scene, device, until, folder):
    """The checkpoint of a training up to the view `until`."""
    Trainer(config, scene, device=device).fit(QUIET, LocalSession(folder, Group(), QUIET).checkpoint,
                                              until=until)
    return latest_checkpoint(folder / "checkpoints")


def go_on(group, config, capture, device, checkpoint, views, out=None):
    """What changed() says after the checkpoint; the first worker saves it."""
    trainer = Trainer(config, load_scene(capture, factor=1), group, device)
    trainer.load(checkpoint)
    changes = changed(trainer, views)
    if out and group.rank == 0:
        torch.save(changes, out)
    return changes


def changed(trainer, views):
    """How much each tensor changes in the next views."""
    before = {name: t.detach().cpu().clone() for name, t in trainer.optimizer.parameters()}
    trainer.fit(QUIET, forget, until=trainer.step + views)
    return {name: t.detach().cpu() - before[name] for name, t in trainer.optimizer.parameters()}


def far(a, b):
    """The tensors in which changes are not close."""
    bounds = {name: CLOSE_GSNET if name.startswith("selector") else CLOSE for name in b}
    return {name: error for name, bound in bounds.items()
            if not (error := relative_l2(a[name], b[name])) < bound}


def test_the_loss_falls(device, scene, config):
    config.base.reset_every = 2.0  # a reset raises it
    losses = []
    trainer = Trainer(config, scene, device=device)
    trainer.fit(lambda step, metrics: losses.append(metrics["loss"]), forget)
    assert losses[2] < losses[0] and losses[5] < losses[3]  # stage 1, stage 2
    assert len(trainer.splats) != len(scene.points)  # it did densify


@pytest.mark.parametrize("until", [40, 80])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_resumed_equals_uninterrupted(device, capture, scene, config, tmp_path, preset, until):
    """In stage 1 and in stage 2."""
    method_of(preset, config)
    config.base.refine_start, config.base.reset_every = 1.0, 2.0
    trainer = Trainer(config, scene, device=device)
    trainer.fit(QUIET, LocalSession(tmp_path, Group(), QUIET).checkpoint, until=until)
    uninterrupted = changed(trainer, 10)
    resumed = go_on(Group(), config, capture, device, latest_checkpoint(tmp_path / "checkpoints"), 10)
    assert not far(resumed, uninterrupted), far(resumed, uninterrupted)


def test_close_means_something(device, capture, scene, config, tmp_path):
    checkpoint = begun(config, scene, device, 80, tmp_path)
    usual = go_on(Group(), config, capture, device, checkpoint, 10)
    assert len(far(go_on(Group(), dataclasses.replace(config, batch=2), capture, device, checkpoint, 10),
                   usual)) == len(usual)


@pytest.mark.parametrize("until", [20, 80])
def test_two_processes_on_one_gpu_equal_one_with_a_batch_of_two(device, capture, scene, config, tmp_path,
                                                                until):
    """Over gloo, which takes tensors of the GPU; every second step the replicas are compared, bit for bit."""
    config.batch, config.base.refine_start, config.base.reset_every, config.check_every = 2, 1.0, 2.0, 4
    checkpoint = begun(config, scene, device, until, tmp_path)
    one = go_on(Group(), config, capture, device, checkpoint, 20)
    spawn(2, go_on, config, capture, device, checkpoint, 20, tmp_path / "two.pt")
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert not far(two, one), far(two, one)


@pytest.mark.parametrize("preset", ["default", "paper", "lightgs"])
def test_a_run_ends_with_a_model_that_is_the_same_on_the_cpu(device, scene, config, tmp_path, preset):
    """All of a run: training, evaluation, cuts, pictures. The saved model is cut, rendered and measured
    without the GPU."""
    method_of(preset, config)
    config.evaluation = dataclasses.replace(config.evaluation, ratios=(0.05, 0.3, 1.0), lpips=())
    results = run(config, scene, tmp_path, Group(), LocalSession(tmp_path, Group(), QUIET), device)
    there, here = (ElasticModel.load(tmp_path).to(d) for d in (device, "cpu"))
    for ratio in config.evaluation.ratios:
        for (name, a), (_, b) in zip(there.cut(ratio).items(), here.cut(ratio).items(), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5, msg=f"{name} at {ratio}")
    measured = evaluate(here, scene, config.evaluation, config.background)
    for ratio, row in results["ratios"].items():
        assert math.isfinite(row["psnr"]) and row["splats"] == measured["ratios"][ratio]["splats"]
        assert abs(row["psnr"] - measured["ratios"][ratio]["psnr"]) < 0.01
        assert abs(row["ssim"] - measured["ratios"][ratio]["ssim"]) < 1e-4
