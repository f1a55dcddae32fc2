"""Recommenders: everything that answers (histories, at, k) with songs and scores."""
