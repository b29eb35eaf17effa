"""Nobody is told that flexgs is used: what its libraries would report over the network is turned off, in one
place.

MLflow 3 and Ray report how they are used unless their environment says no; Optuna, viser and aiohttp do not.
A person who wants to take part sets the variables otherwise: what is set already stays.
"""

import os

MLFLOW = {"MLFLOW_DISABLE_TELEMETRY": "true"}
"""Also read by MLflow's server, for the page that it shows."""
OFF = {**MLFLOW, "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "npm_config_update_notifier": "false"}
"""DO_NOT_TRACK is what programs of npm read; MLflow 3 reads it too, but takes no value except "true"."""


def turn_off() -> None:
    """For this process and those that it starts; before mlflow is imported, which reads it then."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
