"""Song embeddings: trained by word2vec on playlists or sessions, or given; measured, saved, loaded."""
