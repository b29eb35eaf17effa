"""Runs in MLflow: an experiment per dataset, a parent run per folder of runs, a run per scene.

    tracking = Tracking("sqlite:////runs/mlflow.db", "flexgs-mipnerf360", artifacts=Path("/runs/mlartifacts"))
    batch = tracking.run(folder, "all scenes", kind="batch")
    run = tracking.run(folder / "garden", "garden", kind="scene", parent=batch)
    run.start()
    run.log_history(rows)                          # lines of metrics.jsonl; those already logged are skipped
    run.log_results(results, folder / "garden")    # psnr/ratio_0.05, ..., pictures and cuts
    batch.finish()

The id of a run is kept in <folder>/mlflow.json, so the same folder continues the same run. No failure of
MLflow stops a training: it is warned about once, and what MLflow did not take stays in metrics.jsonl and
results.json and is sent at the next chance. mlflow is imported when it is first used, since that takes long.
"""

from flexgs.tracking.experiment import SERVER, Tracking, sqlite_uri
from flexgs.tracking.run import Run, flatten, metric_name
from flexgs.tracking.writer import SLOW, Writer

__all__ = ["SERVER", "SLOW", "Run", "Tracking", "Writer", "flatten", "metric_name", "sqlite_uri"]
