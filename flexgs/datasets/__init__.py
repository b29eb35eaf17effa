"""Captures: the catalogue of known ones, their download, and the check that one is whole."""
