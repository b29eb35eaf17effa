"""Training a scene: the loop, densification, the optimizer and checkpoints."""
