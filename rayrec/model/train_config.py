"""Settings of the taste network, its training and the batch job over all users. Does not import torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from rayrec.config import Settings
from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS, parse_timestamp
from rayrec.data.ragged import find_in_groups
from rayrec.data.windows import divisors

SongTable = Literal["trained", "mapped", "frozen"]
Objective = Literal["sampled-softmax", "softmax", "cosine", "l2"]
Cell = Literal["gru", "lstm"]
Source = Literal["histories", "playlists"]
REGRESSIONS = ("cosine", "l2")  # objectives that pull taste vectors towards song vectors, as those of the paper


MODEL_CONFIG = "model.json"  # file in a models artifact: the shape of its network
SONG_VECTORS = "song_vectors.npy"  # float32 (N, D) in a models artifact: what taste vectors are compared with
PLAY_COUNTS = "play_counts.npy"  # int64 (N,): plays of each song in the range that the model was fit on
MAX_PLAYS_IN_DAYS = 500  # plays after a query that a horizon in days can include; windows hold as many after inputs
USUAL_BATCH = 64  # windows per batch for which the default learning rates and negatives were chosen
DIM_WITHOUT_EMBEDDINGS = 64  # embedding dimension if `dim` is not set
LEAST_SCALE = 4.0  # lower limit of the scale of logits, for catalogs with few songs per choice; not tuned


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """A horizon in plays: the target of position n is the song n + l, l from unif{min_offset, max_offset} [paper]."""

    min_offset: int  # l_min, in plays, at least 1
    max_offset: int  # l_max, in plays

    def __str__(self) -> str:
        return f"{self.min_offset} to {self.max_offset} plays later"

    @property
    def lookahead(self) -> int:
        """The number of plays after a position that can hold targets."""
        return self.max_offset

    @property
    def choices(self) -> int:
        """The largest number of plays that can be the target of a position."""
        return self.max_offset - self.min_offset + 1

    def spans(self, histories: Histories, queries: Queries) -> tuple[np.ndarray, np.ndarray]:
        """int64 (Q,) each: the position of the first target play of each query, and the position after the last one."""
        next_positions = histories.offsets[queries.rows] + queries.plays_before
        ends = histories.offsets[queries.rows + 1]
        return np.minimum(next_positions + self.min_offset - 1, ends), np.minimum(
            next_positions + self.max_offset, ends
        )


@dataclass(frozen=True, kw_only=True)
class DaysHorizon:
    """A horizon in days: the targets of a query are the plays from `first_day` to `last_day` days after it.

    Only the next MAX_PLAYS_IN_DAYS plays can be targets. In training, a position is treated as a query at the moment of
    the next play, as in evaluation [ours].
    """

    first_day: int  # from 0, the moment of the query
    last_day: int  # exclusive: 0 and 7 are the seven days that begin with the query

    def __str__(self) -> str:
        return f"{self.first_day} to {self.last_day} days later"

    @property
    def lookahead(self) -> int:
        """As in `Horizon`."""
        return MAX_PLAYS_IN_DAYS

    @property
    def choices(self) -> int:
        """As in `Horizon`."""
        return MAX_PLAYS_IN_DAYS

    def spans(self, histories: Histories, queries: Queries) -> tuple[np.ndarray, np.ndarray]:
        """As in `Horizon`."""
        next_positions = histories.offsets[queries.rows] + queries.plays_before
        limits = np.minimum(histories.offsets[queries.rows + 1], next_positions + MAX_PLAYS_IN_DAYS)
        starts, ends = (
            find_in_groups(histories.played_at, next_positions, limits, queries.at + day * DAY_MS)
            for day in (self.first_day, self.last_day)
        )
        return starts, ends


AnyHorizon = Horizon | DaysHorizon
NEXT_PLAY = Horizon(min_offset=1, max_offset=1)


def logit_scale(num_songs: int, horizon: AnyHorizon) -> float:
    """Return the factor that turns cosines into logits, the inverse of the softmax temperature [ours].

    With it, a song with cosine 1 has the probability 1 / (choices + 1) if all other songs have cosine 0. The factor is
    not learned, since a network would increase it further and further to become more confident in the plays that it
    has seen, and would then predict unseen plays less well. The fixed scale of AdaCos (Zhang et al. 2019,
    arXiv:1905.00292) is larger by the factor √2.
    """
    return max(math.log(max(1, num_songs) / horizon.choices), LEAST_SCALE)


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """The context features c_j that a step of the network reads besides the song [paper]; stored with the model."""

    contexts: tuple[str, ...] = ()  # names of the bits of the multi-hot, C
    gap: bool = True  # time since the previous play, Δ
    request_gap: bool = True  # time from the last play to the request, an input of the head [ours]
    hour: bool = False  # one-hot hour of the day, UTC
    weekday: bool = False  # one-hot day of the week, UTC
    skipped: bool = False  # whether the play was skipped
    pause_hours: float = 0.0  # pause that discounts the averages as much as one play [ours]; 0: only plays do

    @property
    def dim(self) -> int:
        """F, the number of floats per play."""
        return len(self.contexts) + self.gap + 24 * self.hour + 7 * self.weekday + self.skipped


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a taste network; stored with it."""

    num_songs: int  # N
    embedding_dim: int  # D
    hidden_dim: int  # D_hid
    num_layers: int
    dropout: float
    features: FeatureSpec
    horizons: dict[str, AnyHorizon]
    song_table: SongTable
    logit_scales: dict[str, float]  # by horizon: the factor that turns cosines into logits
    cell: Cell
    averages: tuple[float, ...]  # discounts γ of the averages that the head reads
    input_table: bool  # True if songs as inputs have a separate table

    @property
    def recurrent_layers(self) -> int:
        """The number of state vectors of the cells: one per layer, two for an LSTM (all outputs, then all cells)."""
        return self.num_layers * (2 if self.cell == "lstm" else 1)

    @property
    def state_layers(self) -> int:
        """The number of state vectors of the network, D_hid each: those of the cells, then the sums of the averages."""
        return self.recurrent_layers + -(-len(self.averages) * self.embedding_dim // self.hidden_dim)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Create the configuration from the JSON form that `dataclasses.asdict` returns."""
        features = FeatureSpec(**{**raw["features"], "contexts": tuple(raw["features"]["contexts"])})
        horizons = {
            name: DaysHorizon(**value) if "last_day" in value else Horizon(**value)
            for name, value in raw["horizons"].items()
        }
        return cls(**{**raw, "features": features, "horizons": horizons, "averages": tuple(raw["averages"])})


_PAPER_SETTINGS: dict[str, Any] = {
    **{"objective": "cosine", "song_table": "frozen", "averages": ()},
    **{"dropout": 0.0, "averaged_part": 0.0},
}


class TrainConfig(Settings):
    """How to train the taste network."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        # Trains until the validation NDCG falls; on long histories it still rises after twelve epochs.
        "best": {"epochs": 40, "patience": 3},
        # The paper's networks, on histories and on playlists, short- and long-term: frozen song vectors, cosine
        # distance, one horizon, no averages. The paper's offsets of the long horizon are unknown; the
        # defaults are used.
        "r_hst": {**_PAPER_SETTINGS, "long": ()},
        "r_hlt": {**_PAPER_SETTINGS, "short": ()},
        "r_pst": {**_PAPER_SETTINGS, "source": "playlists", "long": ()},
        "r_plt": {**_PAPER_SETTINGS, "source": "playlists", "short": ()},
    }

    source: Source = Field(
        "histories",
        description="Training sequences; playlists have no times or contexts; if the data has no playlists, sessions "
        "take their place",
    )
    cell: Cell = Field("gru", description="Recurrent cell")
    hidden_dim: int = Field(128, ge=1, description="Hidden size")
    num_layers: int = Field(1, ge=1, description="Number of recurrent layers")
    dropout: float = Field(0.25, ge=0, lt=1, description="Dropout probability")
    averages: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.0, 0.5, 0.9, 0.99),
        description="Discount factors of the averages of played songs, an extra input of the layers after the "
        "recurrent cell; empty: no averages",
    )
    pause_hours: float = Field(
        1.0,
        ge=0,
        description="A pause of this many hours fades the averages as much as one play; 0: pauses have no effect. "
        "Needs --gaps and real times",
    )
    song_table: SongTable = Field(
        "trained", description="Song embeddings: trained, mapped by a small trained network, or frozen"
    )
    dim: int | None = Field(
        None, ge=1, description="Embedding dimension; default: that of the song embeddings, or 64 without them"
    )
    input_table: bool = Field(
        True,
        description="Train separate input embeddings (untied weights); only with a trained song table",
    )
    table_learning_rate: float = Field(0.003, gt=0, description="Adam learning rate of the song tables")
    averaged_part: float = Field(
        0.4,
        ge=0,
        le=0.5,
        description="Average the weights over about this last fraction of the steps so far; 0: use those of the last "
        "step",
    )
    objective: Objective = Field(
        "sampled-softmax",
        description="Training objective; softmax uses all songs as negatives, cosine and l2 are those of the paper",
    )
    negatives: int = Field(1024, ge=1, description="Negative samples per step, drawn by popularity")
    long_targets: int = Field(4, ge=1, description="Sampled targets per position if the horizon has several offsets")
    long_correction: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Share of popularity kept in the long horizon's taste vectors, from 0 (none) to 1 (full)",
    )
    short: tuple[int, ...] = Field((1, 1), description="Offsets min,max of the short horizon, in plays; empty: none")
    long: tuple[int, ...] = Field((25, 50), description="Offsets min,max of the long horizon, in plays; empty: none")
    long_weight: float = Field(
        0.3, gt=0, description="Weight of the long horizon's loss relative to that of the short one"
    )
    long_days: tuple[int, ...] = Field(
        (),
        description="Long horizon as days first,last after the request instead of plays: 0,7 for the next 7 days; "
        "only the next 500 plays count",
    )
    contexts: bool = Field(True, description="Use playback contexts if the data has them")
    gaps: bool = Field(True, description="Use the time since the previous play and until the request")
    hours: bool = Field(False, description="Use the hour of day and the day of week, UTC")
    skips: bool = Field(True, description="Use whether a play was skipped, if the data has this")
    window: int = Field(100, ge=1, description="Sequence length of truncated backpropagation, in plays")
    batch: int = Field(64, ge=1, description="Batch size in windows, over all workers")
    learning_rate: float = Field(0.001, gt=0, description="Adam learning rate")
    warmup_steps: int = Field(0, ge=0, description="Steps over which learning rates rise linearly to their full values")
    scale_with_batch: bool = Field(
        False, description="Multiply learning rates and negatives by the square root of batch / 64"
    )
    epochs: int = Field(12, ge=1, description="Number of epochs; with a validation range, the maximum")
    patience: int = Field(2, ge=1, description="Epochs without improved validation NDCG before training stops")
    refit: bool = Field(True, description="Train again on training and validation range with the best number of epochs")
    validation_plays: int = Field(
        10_000, ge=0, description="Plays of the validation range that are predicted per epoch"
    )
    shards: int = Field(
        64,
        ge=1,
        description="Number of data shards; must be a multiple of --workers. The number of workers does not change the "
        "batches",
    )
    workers: int = Field(1, ge=0, description="Training workers; 0 trains in this process")
    gpu: bool = Field(False, description="Give each worker a GPU")
    compiled: bool = Field(
        False,
        description="Compile the network with torch.compile; the first steps take up to minutes, later ones are faster",
    )
    checkpoint_minutes: float = Field(10.0, ge=0, description="Minutes between checkpoints within an epoch")
    wait_minutes: float = Field(15.0, gt=0, description="Minutes to wait for free CPUs or GPUs")
    seed: int = Field(0, ge=0, description="Random seed")

    @model_validator(mode="after")
    def _check_together(self) -> "TrainConfig":
        if self.objective in REGRESSIONS and self.song_table != "frozen":
            raise ValueError(
                f"--objective {self.objective} would make all song embeddings equal if they are trained; use "
                f"--song-table frozen, not {self.song_table}"
            )
        if self.batch < self.workers:
            raise ValueError(f"batch is {self.batch}; expected at least one window for each of {self.workers} workers")
        if self.workers and self.shards % self.workers:
            choices = ", ".join(map(str, divisors(self.shards)))
            raise ValueError(f"workers is {self.workers}; expected a divisor of shards ({self.shards}): {choices}")
        for name, offsets in (("short", self.short), ("long", self.long)):
            if offsets and not (len(offsets) == 2 and 1 <= offsets[0] <= offsets[1]):
                raise ValueError(
                    f"{name} is {list(offsets)}; expected two offsets min,max with 1 <= min <= max, or none"
                )
        if self.long_days and not (len(self.long_days) == 2 and 0 <= self.long_days[0] < self.long_days[1]):
            raise ValueError(
                f"long_days is {list(self.long_days)}; expected two days first,last with 0 <= first < last, or none"
            )
        if self.long_days and self.source == "playlists":
            raise ValueError(
                "--long-days needs times, which playlists do not have; use --source histories, or --long instead"
            )
        if not self.horizons:
            raise ValueError("short and long are both empty; expected at least one horizon")
        return self

    def network_shape(self, *, num_songs: int, embedding_dim: int, features: FeatureSpec) -> ModelConfig:
        """Return the shape of the network for these settings."""
        return ModelConfig(
            num_songs=num_songs,
            embedding_dim=embedding_dim,
            hidden_dim=self.hidden_dim,
            num_layers=self.num_layers,
            cell=self.cell,
            dropout=self.dropout,
            features=features,
            horizons=self.horizons,
            song_table=self.song_table,
            logit_scales={name: logit_scale(num_songs, horizon) for name, horizon in self.horizons.items()},
            averages=self.averages,
            input_table=self.has_input_table,
        )

    @property
    def horizons(self) -> dict[str, AnyHorizon]:
        """The configured horizons by name."""
        offsets = {"short": self.short, "long": () if self.long_days else self.long}
        horizons: dict[str, AnyHorizon] = {
            name: Horizon(min_offset=pair[0], max_offset=pair[1]) for name, pair in offsets.items() if pair
        }
        if self.long_days:
            horizons["long"] = DaysHorizon(first_day=self.long_days[0], last_day=self.long_days[1])
        return horizons

    @property
    def scale(self) -> float:
        """The factor of learning rates and negatives: for Adam, the square root of the growth of the batch."""
        return math.sqrt(self.batch / USUAL_BATCH) if self.scale_with_batch else 1.0

    @property
    def has_input_table(self) -> bool:
        """True if songs as inputs have a separate table, which requires a trained song table."""
        return self.input_table and self.song_table == "trained"

    @property
    def lookahead(self) -> int:
        """The number of plays after a window's last input that can hold targets."""
        return max(horizon.lookahead for horizon in self.horizons.values())


class TasteConfig(Settings):
    """How to compute the taste vectors of all users."""

    at: str | None = Field(
        None,
        description="Time for which to compute taste vectors, ISO 8601 with zone or Unix time; default: the last play",
    )
    full: bool = Field(
        False, description="Process all plays instead of continuing from the states of earlier taste vectors"
    )
    users: int = Field(2_500, ge=1, description="Inference batch size, in users")
    gpu: bool = Field(False, description="Give each worker a GPU")
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Maximum of parallel workers; default: as many as the cluster has CPUs for, after it has grown",
    )

    @field_validator("at", mode="before")
    @classmethod
    def _to_ms(cls, value: Any) -> str | None:
        """Convert the time from any accepted form to Unix ms, as text."""
        return None if value is None else str(parse_timestamp(value))
