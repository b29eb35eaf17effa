"""Workers that hold a shard of the Gaussians each, against workers that hold replicas: real processes."""

import pytest
import torch
from torch import Tensor

from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.run import LocalSession
from flexgs.training.checkpoint import latest_checkpoint
from flexgs.training.trainer import Trainer
from tests.test_distributed import spawn
from tests.tiny import tiny_config, tiny_scene

STEPS = 64


def short(mode: str, preset: str = "default") -> Config:
    """32 views of stage 1 in steps of 2 with three densifications and an opacity reset, and 32 of stage 2."""
    config = tiny_config(preset, STEPS)
    config.batch, config.distributed.mode, config.average = 2, mode, 0.3
    config.base.refine_every, config.base.refine_start, config.base.grow_grad2d = 8, 0.1, 1e-4
    config.base.max_splats, config.base.grow_scale3d, config.base.prune_scale3d = 150, 0.3, 1.0
    return config.check()


def state(trainer: Trainer) -> dict[str, Tensor]:
    """What a checkpoint has, on all workers."""
    named = {**trainer._tensors(), **{f"adam.{name}": t for name, t in trainer.optimizer.moments().items()}}
    return {name: trainer.shard.whole(t.detach(), trainer._counts(name)).clone() for name, t in named.items()}


def _train(group: Group, config: Config, folder, until: int | None = None, out: str = "") -> None:
    trainer = Trainer(config, tiny_scene(100), group)
    session = LocalSession(folder, group)
    if found := latest_checkpoint(folder / "checkpoints"):
        trainer.load(found)
    counts = []
    trainer.fit(lambda step, metrics: counts.append(metrics["splats"]), session.checkpoint, until)
    held = group.gather(len(trainer.splats))
    if config.distributed.mode == "sharded":
        assert held == [len(range(r, counts[-1], group.world)) for r in range(group.world)]
    model, states = trainer.model(), state(trainer)
    if group.rank == 0:
        torch.save({"whole": dict(model.splats.items()), "cut": dict(model.cut(0.1).items()),
                    "state": states}, folder / f"{out}.pt")


def results(folder, out: str) -> dict:
    found = torch.load(folder / f"{out}.pt", weights_only=True)
    return {f"{part}.{name}": t for part, tensors in found.items() for name, t in tensors.items()}


def assert_same(one: dict, two: dict, bound: float) -> None:
    assert one.keys() == two.keys()
    for name, t in one.items():
        assert t.shape == two[name].shape, name
        assert float((t - two[name]).norm() / t.norm().clamp(min=1e-12)) <= bound, name


@pytest.mark.parametrize("until", [32, 64])
def test_shards_equal_replicas(tmp_path, until):
    for mode in ("replicated", "sharded"):
        spawn(2, _train, short(mode), tmp_path, until, mode)
        for checkpoint in (tmp_path / "checkpoints").glob("*"):
            checkpoint.rename(tmp_path / mode)
    replicas, shards = (results(tmp_path, mode) for mode in ("replicated", "sharded"))
    assert len(replicas["whole.means"]) > 100  # it did densify
    assert_same(replicas, shards, 1e-5)
