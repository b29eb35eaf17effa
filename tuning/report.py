"""The results of a search: best.json, report.md and its figures, and the best trial's gain over trial 0."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import optuna
from scipy.stats import spearmanr

from flexgs.config import Config
from flexgs.files import atomic_file, write_json
from flexgs.model.elastic import ElasticModel
from flexgs.report.pictures import pyplot, save, write_curve
from flexgs.report.sheet import Sheet, TableCell
from flexgs.scene import Scene
from tuning.space import Params, applied, flags
from tuning.study import PARETO, directions, front, frozen, quality
from tuning.trial import Record, Search, figures, flat


@dataclass(frozen=True)
class Gain:
    """The gain of a trial over trial 0 in the objective (dB for PSNR), a value per seed."""

    seen: tuple[float, ...]
    """The gain on the test views that trials are chosen by."""
    unseen: tuple[float, ...]
    """The gain on the other test views."""

    def __str__(self) -> str:
        return (f"{_spread(self.unseen)} on the views that the search has not seen, {_spread(self.seen)} "
                "on those it chose by")


def gain(searches: Sequence[Search], best: Params, zero: Params, scene: Scene, objective: str) -> Gain:
    """Measure the gain of the parameters `best` over `zero`, from the models that each search has of them.

    Args:
        searches: a search for each seed.
        best: the parameters of one trial.
        zero: the parameters of trial 0.
        scene: the capture.
        objective: the objective of the search.
    """
    by_views: dict[str, list[float]] = {}
    for views in ("even", "odd"):
        for search in searches:
            config = replace(search.start, evaluation=replace(search.start.evaluation, views=views))
            of_best, of_zero = (flat(figures(_model(search, params), scene, config))
                                for params in (best, zero))
            key = quality(objective)
            by_views.setdefault(views, []).append(of_best[key] - of_zero[key])
    return Gain(tuple(by_views["even"]), tuple(by_views["odd"]))


def write(search: Search, objective: str, winner: Record, verdict: str, command: str) -> Sheet:
    """Write best.json, report.md and figures into the search's folder, and return the table of trials.

    Args:
        search: the search, of which at least one trial is finished.
        objective: the objective of the search.
        winner: the best trial.
        verdict: a sentence on how the best trial compares with trial 0.
        command: the command line that repeats the search.
    """
    records = search.records()
    write_json(search.folder / "best.json", _whole(applied(winner.params, search.start)).to_dict())
    for record in front(records) if objective == PARETO else []:
        write_json(search.folder / "front" / f"trial_{record.number}.json",
                   _whole(applied(record.params, search.start)).to_dict())
    tables = {f"trial {record.number}": record.last["ratios"] for record in (records[0], winner)
              if record.rungs}
    write_curve(tables, search.folder / "curve.png")
    pictures = ["curve.png", *_figures(search, objective, records)]
    sheet = table(records, objective)
    name = quality(objective)
    lines = [
        f"# Search for {search.capture.name}", f"    {command}",
        f"Of {len(records)} trials {_count(records)}. The best is **trial {winner.number}**: {name} "
        f"{winner.figures[name]:.3f}; {verdict}. Trial 0, where the search started, has "
        f"{records[0].figures.get(name, math.nan):.3f}.",
        "The settings of the best, behind `flexgs train CAPTURE`, or as `--config best.json`:",
        f"    --preset {search.start.preset} {' '.join(flags(winner.params))}",
        sheet.markdown(), _importances(search, objective, records), agreement(records, objective),
        *(f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures)]
    with atomic_file(search.folder / "report.md") as out:
        out.write_text("\n\n".join(line for line in lines if line) + "\n")
    return sheet


def table(records: Sequence[Record], objective: str) -> Sheet:
    """Return a table of the trials, the best first: figures, time, and settings that differ from trial 0."""
    names = ("psnr_auc", "mb") if objective == PARETO else (objective,)
    on_front = {record.number for record in front(list(records))} if objective == PARETO else set()
    shown = sorted(records, key=lambda r: (r.status != "finished", -r.figures.get(names[0], -math.inf),
                                           r.number))
    best = next((r.number for r in shown if r.status == "finished"), None)

    def changes(record: Record) -> str:
        zero = records[0].params
        return " ".join(flags({k: v for k, v in record.params.items() if not _part_of_several(k)
                               and zero.get(k) != v}))

    return Sheet.of("trials", [
        (("", "trial"), [TableCell(str(r.number)) for r in shown]),
        (("", "how it ended"),
         [TableCell(f"failed: {r.error}" if r.error else r.status + " (front)" * (r.number in on_front))
          for r in shown]),
        *((("", name), [TableCell(f"{r.figures[name]:.3f}" if r.rungs else "", r.number == best)
                        for r in shown])
          for name in names),
        (("", "seconds"), [TableCell(f"{r.seconds:.0f}") for r in shown]),
        (("", "differs from trial 0 in"), [TableCell(changes(r)) for r in shown])])


def agreement(records: Sequence[Record], objective: str) -> str:
    """Say how the order of trials in mid-training agrees with the final one, on which early stopping relies.

    Empty with fewer than 4 finished trials.
    """
    whole = [record for record in records if record.status == "finished"]
    if len(whole) < 4:
        return ""
    name = quality(objective)
    found = []
    for rung, part in ((1, "a quarter"), (2, "half")):
        rho = spearmanr([flat(r.rungs[str(rung)])[name] for r in whole],
                        [r.figures[name] for r in whole]).statistic
        found.append(f"{rho:.2f} after {part}")
    return (f"Spearman's correlation of {name} with its value at the end of stage 2, over the "
            f"{len(whole)} finished trials: {', '.join(found)} of it.")


def _figures(search: Search, objective: str, records: Sequence[Record]) -> list[str]:
    """Draw the objective over each setting that half of the trials have, and the front; return file names."""
    plt = pyplot()
    measured, name = [record for record in records if record.rungs], quality(objective)
    names = dict.fromkeys(key for record in measured for key in record.params)
    shown = [key for key in names if 2 * sum(key in record.params for record in measured) >= len(measured)]
    columns = min(4, len(shown))
    figure, axes = plt.subplots(-(-len(shown) // columns), columns,
                                figsize=(3 * columns, 2.4 * -(-len(shown) // columns)),
                                sharey=True, squeeze=False, layout="constrained")
    for ax in axes.flat[len(shown):]:
        ax.set_visible(False)
    for ax, key in zip(axes.flat, shown, strict=False):
        for status, face in {"finished": "tab:blue", "stopped": "none"}.items():
            points = [(record.params[key], record.figures[name]) for record in measured
                      if record.status == status and key in record.params]
            ax.scatter([str(x) if isinstance(x, str) else x for x, _ in points], [y for _, y in points],
                       facecolors=face, edgecolors="tab:blue", label=status)
        ax.set_title(key, fontsize=9)
        ax.tick_params(labelsize=7)
        if any(isinstance(record.params.get(key), str) for record in measured):
            ax.tick_params(axis="x", labelrotation=30)
    axes[0, 0].legend(fontsize=7)
    figure.supylabel(name)
    drawn = {"settings.png": figure}
    if objective == PARETO:
        figure, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
        for chosen, label in ((measured, "trials"), (front(list(records)), "front")):
            ax.plot([r.figures["mb"] for r in chosen], [r.figures["psnr_auc"] for r in chosen],
                    "o" if label == "trials" else "-", label=label)
        ax.set(xlabel="MB of the elastic model", ylabel="psnr_auc (dB)")
        ax.legend()
        drawn["front.png"] = figure
    for file, figure in drawn.items():
        save(figure, search.folder / file)
    return list(drawn)


def _importances(search: Search, objective: str, records: Sequence[Record]) -> str:
    """Say how much each setting matters; stopped trials count with their last figures."""
    study = _study(search, objective, records)
    if len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) < 4:
        return ""
    target = (lambda trial: trial.values[0]) if objective == PARETO else None
    # The evaluator is named here because Optuna's default differs between versions.
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
    return ("Share of the variance that each setting explains, by Optuna's fANOVA (with few trials a hint): "
            + ", ".join(f"{name} {share:.2f}" for name, share in found.items() if share >= 0.01) + ".")


def _study(search: Search, objective: str, records: Sequence[Record]) -> optuna.Study:
    study = optuna.create_study(directions=directions(objective))
    study.add_trials([frozen(record, search, objective) for record in records if record.rungs])
    return study


def _model(search: Search, params: Params) -> ElasticModel:
    trial = search.trial(params)
    trial.pull("model")
    return ElasticModel.load(trial.folder / "model")


def _whole(config: Config) -> Config:
    """Return the settings as a user trains with them: measured on all test views."""
    return replace(config, evaluation=replace(config.evaluation, views="all"))


def _part_of_several(name: str) -> bool:
    return name.startswith("field.resolution.")


def _count(records: Sequence[Record]) -> str:
    kinds = [record.status for record in records]
    order = ("finished", "stopped", "failed", "interrupted")
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in order if kind in kinds)


def _spread(values: Sequence[float]) -> str:
    noise = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    seeds = f" ({len(values)} seeds)" if len(values) > 1 else " (one seed)"
    return f"{fmean(values):+.2f}{noise}{seeds}"


