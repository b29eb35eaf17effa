"""One scene trained by 1, 2 and 3 workers, and by another number after a resume at half: the same steps, the
same seeds.

    python -m tests.cluster.worlds CAPTURE --seeds 0 1 2 --steps 1200 --splats 6000

Prints the table of docs/distributed.md: PSNR of the test views at each ratio. Workers are processes of one
thread.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from flexgs.config import Config
from flexgs.distributed import Group
from flexgs.evaluate import evaluate
from flexgs.files import write_json
from flexgs.run import LocalSession, resume
from flexgs.scene import load_scene
from flexgs.training.trainer import Trainer
from tests.test_distributed import spawn

BATCH = 6
PLANS = [(1,), (2,), (3,), (1, 3), (3, 2)]
"""Workers, and workers after half of the steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--splats", type=int, default=6000)
    options = parser.parse_args()
    means: dict[tuple[int, ...], list[float]] = {}
    ratios = Config().evaluation.ratios
    print("| workers | seed | " + " | ".join(f"{100 * r:g} %" for r in ratios) + " | Gaussians |\n"
          + "|---" * (len(ratios) + 3)
          + "|", flush=True)
    for seed in options.seeds:
        for plan in PLANS:
            config = Config(seed=seed, steps=options.steps, batch=BATCH, checkpoint_every=options.steps // 2)
            config.base.max_splats = options.splats
            with tempfile.TemporaryDirectory() as folder:
                for i, workers in enumerate(plan):
                    until = config.steps if i == len(plan) - 1 else config.steps // 2
                    spawn(workers, train, options.capture, config, Path(folder), until)
                rows = list(json.loads((Path(folder) / "measured.json").read_text()).values())
            psnr = [row["psnr"] for row in rows]
            means.setdefault(plan, []).append(fmean(psnr))
            print(f"| {' then '.join(map(str, plan))} | {seed} | " + " | ".join(f"{p:.2f}" for p in psnr)
                  + f" | {rows[-1]['splats']:,} |", flush=True)
    print("\nmean over ratios, mean ± standard deviation over seeds")
    for plan, values in means.items():
        print(f"{' then '.join(map(str, plan))}: {fmean(values):.3f} ± {stdev(values):.3f} dB")


def train(group: Group, capture: Path, config: Config, folder: Path, until: int) -> None:
    """To the view `until`; what the test views show at the end goes to measured.json."""
    scene = load_scene(capture, factor=config.data.factor, test_every=config.data.test_every)
    trainer, session = Trainer(config, scene, group), LocalSession(folder, group, lambda step, metrics: None)
    resume(trainer, session)
    trainer.fit(lambda step, metrics: None, session.checkpoint, until=until)
    if until == config.steps:
        measured = evaluate(trainer.model(), scene, config.evaluation, config.background, group)
        if group.rank == 0:
            write_json(folder / "measured.json", measured["ratios"])


if __name__ == "__main__":
    main()
