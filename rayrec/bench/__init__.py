"""Benchmarks: stages against plain loops that do the same work, the server under load, and how both scale."""
