"""rayrec."""
