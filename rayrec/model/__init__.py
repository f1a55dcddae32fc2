"""Taste vectors: the recurrent network that turns a history into them, its training and its inference."""
