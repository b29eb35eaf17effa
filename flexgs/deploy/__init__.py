"""Deploying a model: open it, pack it for streaming, serve it, and find the cut that a frame time allows."""
