"""Timings of the rasterizer, of a training step, and of several workers."""
