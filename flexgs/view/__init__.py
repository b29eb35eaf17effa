"""Looking at a model: camera paths, videos, an interactive viewer, and a self-contained web page."""
