"""Workers that hold a shard of the Gaussians each, against workers that hold replicas: real processes."""

import shutil

import pytest
import torch
from torch import Tensor

from flexgs.config import Config, DistributedConfig
from flexgs.distributed import Group, Shard
from flexgs.errors import UserError
from flexgs.raster import project, rasterize
from flexgs.raster.contract import Projection
from flexgs.run import LocalSession
from flexgs.training.checkpoint import latest_checkpoint
from flexgs.training.trainer import Trainer
from tests.conftest import random_splats
from tests.test_distributed import spawn
from tests.tiny import tiny_config, tiny_scene, view

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


def _train(group: Group, config: Config, folder, until: int | None = None) -> dict[str, Tensor]:
    """Train, or go on; return the parameters and moments, the model and its figures."""
    trainer, lines = Trainer(config, tiny_scene(100), group), []
    if found := latest_checkpoint(folder / "checkpoints"):
        trainer.load(found)
    trainer.fit(lambda step, metrics: lines.append(metrics), LocalSession(folder, group).checkpoint, until)
    n, shares = lines[-1]["splats"], config.distributed.mode == "sharded"
    assert group.gather(len(trainer.splats)) == [len(range(r, n, group.world)) if shares else n
                                                 for r in range(group.world)]
    if until:
        return {}
    model = trainer.model()
    parts = {"": state(trainer), "whole.": dict(model.splats.items()), "cut.": dict(model.cut(0.1).items()),
             "figures.": {name: torch.tensor(value) for name, value in lines[-1].items() if "psnr" in name}}
    return {prefix + name: t for prefix, part in parts.items() for name, t in part.items()}


def assert_same(one: dict, two: dict, bound: float = 1e-5) -> None:
    assert one.keys() == two.keys()
    for name, t in one.items():
        assert t.shape == two[name].shape, name
        assert float((t - two[name]).norm() / t.norm().clamp(min=1e-12)) <= bound, name


def _runs(group: Group, folder) -> None:
    replicated, sharded = short("replicated"), short("sharded")
    replicas, shards = (_train(group, config, folder / config.distributed.mode)
                        for config in (replicated, sharded))
    assert len(replicas["whole.means"]) == 150  # it did densify, up to the limit
    assert_same(replicas, shards)
    for until in (20, 44):  # in the middle of a round of densification; and of the average of stage 2
        _train(group, sharded, folder / f"{until}", until)
        for config, crew in ((sharded, group), (replicated, group), (sharded, Group())):
            who = "both" if crew is group else f"{group.rank}"
            there = folder / f"{until}{config.distributed.mode}" / who
            if crew.rank == 0:
                shutil.copytree(folder / f"{until}", there)
            group.gather(None)
            uninterrupted = 0 if config is sharded and crew is group else 1e-5
            assert_same(shards, _train(crew, config, there), uninterrupted)


def test_shards_equal_replicas_and_go_on_as_any_number_of_workers(tmp_path):
    spawn(2, _runs, tmp_path)


def _methods(group: Group, folder) -> None:
    for method in ("field", "keep"):
        config = short("sharded")
        config.batch, config.antialiased = group.world, method == "keep"
        if method == "field":
            config.transform.kind, config.order.kind = "field", "sampled"
        elif method == "keep":
            config.order.kind, config.order.keep, config.transform.kind = "importance", 0.3, "none"
        shards = _train(group, config, folder / method)
        if group.rank == 0:
            assert_same(_train(Group(), config, folder / f"{method} alone"), shards)


def test_four_shards_equal_one_worker(tmp_path):
    spawn(4, _methods, tmp_path)


def test_what_cannot_be_sharded_is_refused():
    for preset, options, found in (("paper", {}, "--order.kind: found gsnet"),
                                   ("matryoshka", {}, "--order.kind: found opacity"),
                                   ("default", {"rows": "seen"}, "--distributed.rows: found seen"),
                                   ("default", {"sh_rest": "bfloat16"}, "--distributed.sh-rest: found bf")):
        config = Config.from_preset(preset, distributed=DistributedConfig("sharded", **options))
        with pytest.raises(UserError, match=f"{found}.* with --distributed.mode sharded; expected .*, or "
                                            "--distributed.mode replicated$"):
            config.check()
    config = Config.from_preset("default", distributed=DistributedConfig("sharded"))
    config.transform.kind = "someones:Transform"
    with pytest.raises(UserError, match=r"--transform\.kind: found someones:Transform"):
        config.check()


def test_what_is_received_is_rasterized_as_what_was_projected():
    splats, camera = random_splats(300), view(0, False).camera
    whole = project(splats, camera)
    seen = (whole.radii > 0).all(1)
    received = Projection(*(t[seen] for t in whole[:6]))
    assert 100 < len(received.means2d) < 300
    assert torch.equal(rasterize(received, camera).image, rasterize(whole, camera).image)


def _moved(group: Group) -> None:
    """Rows of 11 Gaussians of three workers, some of them dropped and the others in another order."""
    shard, rows = Shard(group, 11, True), torch.arange(22.0).view(11, 2)
    mine = shard.mine(rows)
    assert [len(part) for part in group.gather(mine)] == [4, 4, 3] and torch.equal(shard.whole(mine), rows)
    blocks = torch.arange(6.0)  # one row of a first block, and five of a second
    assert group.gather(shard.mine(blocks, [1, 5]).tolist()) == [[0, 1, 4], [2, 5], [3]]
    assert torch.equal(shard.whole(shard.mine(blocks, [1, 5]), [1, 5]), blocks)
    order = torch.tensor([7, 0, 10, 4, 3])
    kept, move = shard.sorter(order)
    moved = move(mine[kept])
    assert shard.n == 5 and len(moved) == shard.count(5) == [2, 2, 1][group.rank]
    assert torch.equal(shard.whole(moved), rows[order])
    shard.n = 1  # workers without any
    assert torch.equal(shard.whole(rows[:shard.count(1)]), rows[:1])


def test_rows_move_between_the_workers():
    spawn(3, _moved)
