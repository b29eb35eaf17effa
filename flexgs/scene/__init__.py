"""Captures on disk: cameras, images and points."""

from flexgs.scene.capture import Points
from flexgs.scene.init import initial_splats
from flexgs.scene.load import Scene, load_scene
from flexgs.scene.views import View, ViewSampler

__all__ = ["Points", "Scene", "View", "ViewSampler", "initial_splats", "load_scene"]
