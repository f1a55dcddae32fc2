"""Settings of song vectors."""

from dataclasses import dataclass
from typing import Literal

from rayrec.config import setting
from rayrec.errors import InputError

Source = Literal["auto", "playlists", "histories"]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How song vectors are made: by word2vec, or from a file.

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

    dim: int = setting(64, help="numbers per vector, D")
    epochs: int = setting(20, help="passes over the corpus")
    skip_gram: bool = setting(True, help="skip-gram; else continuous bag of words, faster and weaker on plays")
    window: int = setting(3, help="songs on either side that count as neighbours")
    negatives: int = setting(10, help="songs drawn against each true neighbour")
    ns_exponent: float = setting(-0.5, help="negatives are drawn by play count to this power; 0 draws all songs alike")
    learning_rate: float = setting(0.025, help="step size at the start; falls linearly to nearly 0")
    center: bool = setting(True, help="take off the direction that all songs share, which hides what tells them apart")
    subsample: float = setting(0.0, help="gensim's threshold for leaving out plays of frequent songs; 0 keeps all")
    min_count: int = setting(1, help="songs seen fewer times in the corpus get no vector")
    session_gap_minutes: float = setting(30.0, help="a longer pause between two plays starts a new session, in minutes")
    source: Source = setting(
        "auto", help="what a sentence is: playlists, or sessions of histories; auto: what is there"
    )
    vectors: str | None = setting(None, help="take vectors from this .npy or .parquet file instead of training")
    workers: int = setting(0, help="training threads; 0: the CPUs of one node; more than 1 is not reproducible")
    seed: int = setting(0, help="of the first vectors and of the negatives")

    def __post_init__(self) -> None:
        for name in ("dim", "epochs", "window", "negatives", "min_count"):
            if getattr(self, name) < 1:
                raise InputError(f"embed {name} is {getattr(self, name)}; give a whole number of at least 1")
        for name in ("workers", "subsample", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"embed {name} is {getattr(self, name)}; it must not be negative")
        for name in ("learning_rate", "session_gap_minutes"):
            if getattr(self, name) <= 0:
                raise InputError(f"embed {name} is {getattr(self, name)}; it must be positive")
        if self.source not in ("auto", "playlists", "histories"):
            raise InputError(f"embed source is {self.source!r}; expected auto, playlists or histories")
