"""Recommenders: models that return songs and scores for histories, a moment and a number of songs k."""
