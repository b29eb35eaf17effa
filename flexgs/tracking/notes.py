"""Descriptions, in Markdown, that MLflow shows of an experiment, a batch, a scene and a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgs.config import percent
from flexgs.errors import pasted
from flexgs.report.table import mean_ratios

EXPERIMENT = """\
Elastic 3D Gaussian Splatting: a scene is trained once, then cut to any number of Gaussians without further \
training. Unfold this for what the figures mean.

- **Runs.** One for a batch, with the means over its scenes, and below it one per scene; or one for a
  comparison, and below it one per method. What a run is, and the command that repeats it, is in its
  description.
- **Quality.** `psnr/ratio_0.05` is the PSNR, in dB, on test views when 5 % of the Gaussians are kept. `ssim`,
  `lpips`, `splats` (Gaussians), `mb` (size of the file) and `ms` (time of a frame) are named likewise.
  `psnr_auc` is the mean PSNR over the logarithm of the ratio: one number to sort by.
- **Chart.** `curve/psnr_by_ratio_permille` is PSNR over the fraction kept: its step is the ratio in
  thousandths.
- **Files.** A scene's run has its cuts (`cuts/*.ply`, for any 3DGS viewer), its pictures
  (`renders/grid.png`) and how it was measured (`results.json`).
- **Models.** `models:/flexgs-<scene>@best` is a scene's best model so far; how to cut it is in its
  description.
"""


def scene(results: Mapping[str, Any], folder: Path) -> str:
    """Describe a scene: a table of its results, the commands that train and cut it again, and its folder.

    Args:
        results: the contents of results.json.
        folder: the run folder.
    """
    protocol, capture = results.get("protocol", {}), results.get("capture", "CAPTURE")
    ratios = _sorted(results["ratios"])
    rows = [[head, *(form.format(row[key]) for _, row in ratios)] for head, key, form in (
        ("PSNR", "psnr", "{:.2f}"), ("SSIM", "ssim", "{:.3f}"), ("Gaussians", "splats", "{:,.0f}"),
        ("MB", "mb", "{:.2f}"))]
    train = f"flexgs train {pasted(capture)} --config {pasted(folder / 'config.json')} --output again"
    cut = f"flexgs cut {pasted(folder)} --budget 20MB -o {pasted(results['scene'] + '.ply')}"
    views = ""
    if "digest" in protocol:
        views = (f"{protocol['train_views']} views of {protocol['width']}x{protocol['height']} "
                 f"pixels to train on, {protocol['test_views']} others to test on. ")
    return "\n".join([
        f"**{results['scene']}**: preset `{results['preset']}`, {results['steps']:,} steps. "
        f"{views}One model, cut at:", "",
        *_table(["kept", *(percent(ratio) for ratio, _ in ratios)], rows), "",
        "Train it again, and cut it to another budget:", "", "```", train, cut, "```", "",
        f"Everything about it is in `{folder}`; cuts and pictures are also among the artifacts.", ""])


def model(name: str, alias: str) -> str:
    """Describe a registered model: the Python code that cuts it."""
    return "\n".join([
        "Cut to any budget in Python:", "", "```python",
        f'model = mlflow.pyfunc.load_model("models:/{name}@{alias}")',
        'model.predict(pd.DataFrame({"budget": ["5%", "20MB"], "path": ["a.ply", "b.ply"]}))', "```", "",
        f"The alias `{alias}` is the version of the highest `psnr_auc` among those measured in the same way.",
        ""])


def batch(results: Sequence[Mapping[str, Any]], command: str) -> str:
    """Describe a batch: PSNR of every scene and their mean, from results.json of each, and its command."""
    means = mean_ratios(results)
    rows = [[str(r["scene"]), *(f"{r['ratios'][ratio]['psnr']:.2f}" for ratio, _ in _sorted(means))]
            for r in results]
    if len(results) > 1:
        rows.append(["mean", *(f"{row['psnr']:.2f}" for _, row in _sorted(means))])
    return "\n".join(["**All scenes**, PSNR in dB by the fraction of the Gaussians that is kept:", "",
                      *_table(["scene", *(percent(ratio) for ratio, _ in _sorted(means))], rows), "",
                      "The same again; what is finished is not repeated:", "", "```", command, "```", ""])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heads, ["---", *["--:"] * (len(heads) - 1)], *rows)]


def _sorted(ratios: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(ratios.items(), key=lambda item: float(item[0]))
