"""Captures on disk: cameras, images and points."""

from flexgs.datasets.catalog import find_scenes
from flexgs.demo.synthetic import SYNTHETIC, ensure_synthetic, write_synthetic
from flexgs.scene.capture import Points
from flexgs.scene.init import initial_splats
from flexgs.scene.load import Scene, load_scene
from flexgs.scene.views import View, ViewSampler

__all__ = ["SYNTHETIC", "Points", "Scene", "View", "ViewSampler", "ensure_synthetic", "find_scenes", "initial_splats",
           "load_scene", "write_synthetic"]
