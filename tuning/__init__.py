"""Search the settings of a scene with Optuna and Ray Tune."""
