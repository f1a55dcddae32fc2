"""Song embeddings: train them with word2vec or read them from a file, check, save and load them."""
