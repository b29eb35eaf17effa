"""Built-in scenes, ray traced, that stand in for a download."""
