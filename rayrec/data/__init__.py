"""Plays and playlists: outside formats in, canonical Parquet out, histories as flat arrays."""
