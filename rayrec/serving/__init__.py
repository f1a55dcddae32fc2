"""Recommendations over HTTP, on Ray Serve."""
