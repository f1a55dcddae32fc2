"""Imports files in outside formats into the canonical data set. Does not use Ray."""
