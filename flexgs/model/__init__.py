"""The elastic model: the order of the Gaussians, what changes in those kept, and cuts of any size."""
