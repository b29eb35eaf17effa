"""Runs in MLflow: an experiment per dataset, a parent run per folder of runs, a run per scene.

    tracking = Tracking("sqlite:////data/runs/mlflow.db", "flexgs-mipnerf360", artifacts=Path("/data/runs/mlartifacts"))
    batch = tracking.run(experiment_folder, "all scenes", kind="batch")
    run = tracking.run(experiment_folder / "garden", "garden", kind="scene", parent=batch, params=flatten(config.to_dict()))
    run.start()
    run.log_history(rows)                          # lines of metrics.jsonl; those already logged are skipped
    run.log_results(results, folder)               # psnr/ratio_0.05, ..., pictures and cuts
    batch.finish()

A run's id is kept in <folder>/mlflow.json, so the same folder goes on in the same run. Nothing here stops a
training: what MLflow does not take is warned about once, stays in metrics.jsonl and results.json, and is sent
at the next chance.

mlflow is imported when it is used: here, in registry.py (the trained models) and in pyfunc.py (what a model
is there).
"""

from flexgs.tracking.experiment import SERVER, Tracking, sqlite_uri
from flexgs.tracking.run import Run, flatten, metric_name

__all__ = ["SERVER", "Run", "Tracking", "flatten", "metric_name", "sqlite_uri"]
