"""Usage reports of the libraries, all turned off in one place.

MLflow 3 and Ray report how they are used unless the environment says no; Optuna, viser and aiohttp do not. A
variable that is already set is left alone, so a person may take part.
"""

import os

MLFLOW = {"MLFLOW_DISABLE_TELEMETRY": "true"}
"""The variables for MLflow alone; its server needs them too, for the page that it shows."""
OFF = {**MLFLOW, "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "npm_config_update_notifier": "false"}
"""All variables. Programs of npm read DO_NOT_TRACK; MLflow 3 does too, but only takes the value "true"."""


def turn_off() -> None:
    """Turn reports off for this process and its children; call it before mlflow is imported."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
