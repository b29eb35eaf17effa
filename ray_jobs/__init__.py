"""Jobs on a Ray cluster, or on this machine: train or compare all scenes of a dataset."""
