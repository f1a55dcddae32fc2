"""Benchmarks: each stage against a plain loop that does the same work, as a ratio within one run."""
