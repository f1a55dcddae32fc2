"""Settings of song embeddings."""

from typing import Literal

from pydantic import Field

from rayrec.config import Settings

Source = Literal["auto", "playlists", "histories"]


class EmbedConfig(Settings):
    """Song embeddings: word2vec, or vectors from a file.

    The defaults were chosen on the validation range of the 30Music sample (fitted on what is before
    it; 7,492 plays in it; full catalog). Recall@20 (MRR@20) of the next play among the neighbours of
    the last song is 0.372 (0.096) with them; 0.356 to 0.361 (0.09) at 10 to 30 epochs of window 5,
    5 negatives and exponent 0.75; 0.148 (0.039) at gensim's own settings, where the mean cosine of
    random pairs is 0.98. A window of 10, 30 epochs, more than 64 numbers and a learning rate of 0.05
    all lost. On #nowplaying, where nothing was chosen, they give 0.134 (0.060) against 0.130 (0.059).
    Without the direction that all songs share, 0.379 (0.099); on the longer histories of 30Music, whose
    songs had a mean cosine of 0.94, 0.326 (0.129) instead of 0.288 (0.118).
    That drawing negatives in favour of rare songs suits recommendations was found by Caselles-Dupré
    et al. 2018 (arXiv:1804.04212).
    """

    dim: int = Field(64, ge=1, description="Embedding dimension")
    epochs: int = Field(20, ge=1, description="Number of epochs")
    skip_gram: bool = Field(
        True, description="Use skip-gram; otherwise CBOW, which is faster and less accurate on plays"
    )
    window: int = Field(3, ge=1, description="Context window: songs on either side of the target")
    negatives: int = Field(10, ge=1, description="Negative samples per positive pair")
    ns_exponent: float = Field(
        -0.5,
        ge=-4,
        le=4,
        description="Exponent of play counts in negative sampling; 0 is uniform, below 0 prefers rare songs",
    )
    learning_rate: float = Field(0.025, gt=0, le=1, description="Initial learning rate; decays linearly to almost 0")
    center: bool = Field(True, description="Subtract the mean vector before normalization")
    subsample: float = Field(
        0.0, ge=0, description="gensim's threshold for subsampling frequent songs; 0 keeps all plays"
    )
    min_count: int = Field(1, ge=1, description="Minimum occurrences of a song in the corpus to get an embedding")
    session_gap_minutes: float = Field(
        30.0, gt=0, description="Pause between two plays that starts a new session, in minutes"
    )
    source: Source = Field(
        "auto",
        description="Sentences to train on: playlists, or sessions of histories; auto: playlists if any",
    )
    vectors: str | None = Field(
        None, description="Import embeddings from this .npy or .parquet file instead of training"
    )
    workers: int = Field(
        0, ge=0, description="Training threads; 0 uses all CPUs of one node; above 1 results are not reproducible"
    )
    seed: int = Field(0, ge=0, description="Random seed")
