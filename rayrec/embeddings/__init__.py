"""Song vectors: trained by word2vec on playlists or sessions, or brought in from outside; judged, saved, loaded."""
