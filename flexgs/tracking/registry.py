"""Trained models in MLflow's registry: a model per scene, a version per training.

The version of the highest PSNR has the alias best: models:/flexgs-garden@best. Versions are the pyfunc models
of pyfunc.py.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from flexgs.report.table import psnr_auc
from flexgs.tracking import notes, pyfunc

BEST = "best"


def register(client: MlflowClient, run_id: str, results: Mapping[str, Any], model: Path, digest: str,
             copied: bool = True) -> str:
    """Register a trained model, and give it the alias best if it is better than the one that has it.

    Only versions that were measured in the same way are compared, by psnr_auc.

    Args:
        client: of the MLflow store.
        run_id: the run that trained the model.
        results: the contents of results.json.
        model: the folder that ElasticModel.save has written.
        digest: a name for these results; if the run has a version of this name, no other is made.
        copied: whether MLflow gets a copy of the model; else the version names its folder.

    Returns:
        The URI of the version, models:/<name>/<number>.
    """
    name = "flexgs-" + re.sub(r"[^\w -]", "_", results["scene"])  # MLflow refuses dots, quotes and others
    known = [v for v in client.search_model_versions(f"run_id='{run_id}'") if v.tags.get("results") == digest]
    version = known[0] if known else _add(client, run_id, name, model, copied, {
        "results": digest, "psnr_auc": f"{psnr_auc(results['ratios']):.4f}", "measured": _measured(results)})
    if _better(client, version):
        client.set_registered_model_alias(name, BEST, version.version)
    return f"models:/{name}/{version.version}"


def _add(client: MlflowClient, run_id: str, name: str, model: Path, copied: bool,
         tags: dict[str, str]) -> ModelVersion:
    """Make a new version by the client alone, as mlflow.pyfunc.log_model would leave an active run."""
    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, name, run_id, tags, run.data.params,
                                        "elastic 3DGS")
    with tempfile.TemporaryDirectory() as folder:
        about = Model(artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id,
                      model_id=logged.model_id)
        pyfunc.save(model, Path(folder) / "model", about, copied)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name, description=notes.model(name, BEST))
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(name, logged.artifact_location, run_id, tags, model_id=logged.model_id)


def _better(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether no version has the alias best, or one that was measured alike and has a lower psnr_auc."""
    try:
        best = client.get_model_version_by_alias(version.name, BEST)
    except MlflowException as e:
        if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return True
    same = best.tags.get("measured") == version.tags["measured"]
    return same and float(version.tags["psnr_auc"]) > float(best.tags["psnr_auc"])


def _measured(results: Mapping[str, Any]) -> str:
    """Return a digest of the images, test views, ratios and file format; if equal, PSNR may be compared."""
    protocol = results["protocol"]
    how = [sorted(results["ratios"], key=float), *(protocol.get(key) for key in (
        "digest", "resize", "test_every", "test_views", "background", "mb"))]
    return hashlib.blake2b(json.dumps(how).encode(), digest_size=6).hexdigest()
