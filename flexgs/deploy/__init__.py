"""Deploying a model: open it, pack it for streaming, serve it, and find the cut that a frame time allows."""

MAGIC = b"FLEXGS"
"""The first bytes of a packed model, a file of `flexgs pack`."""
