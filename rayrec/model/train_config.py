"""Settings of the taste network, its training and the batch job over all users. Loads no torch."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from rayrec.config import setting
from rayrec.errors import InputError
from rayrec.storage.artifacts import Manifest

SongTable = Literal["trained", "mapped", "frozen"]
Objective = Literal["sampled-softmax", "softmax", "cosine", "l2"]
Cell = Literal["gru", "lstm"]
Source = Literal["histories", "playlists"]
REGRESSIONS = ("cosine", "l2")  # objectives that pull taste vectors towards song vectors, as the paper's do


MEMORY = "memory.safetensors"  # the file of a models artifact that holds what is mixed in beside the network
PLAY_COUNTS = "play_counts.npy"  # int64 (N,): plays of each song in the range that the model was fit on


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The target of a position n is the song at n + l, l drawn from unif{min_offset, max_offset} [paper]."""

    min_offset: int  # l_min, in plays, at least 1
    max_offset: int  # l_max, in plays

    def __post_init__(self) -> None:
        if not 1 <= self.min_offset <= self.max_offset:
            raise InputError(
                f"horizon offsets {self.min_offset}..{self.max_offset} are not in order; give 1 <= min <= max"
            )


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which context features a step of the network sees beside the song, c_j [paper]; stored with the model."""

    contexts: tuple[str, ...] = ()  # names of the bits of the multi-hot, C
    gap: bool = True  # time since the previous play, Δ
    request_gap: bool = True  # time from the last play to the request, an input of the head [ours]
    hour: bool = False  # one-hot hour of the day, UTC
    weekday: bool = False  # one-hot day of the week, UTC
    skipped: bool = False  # whether the play was skipped

    @property
    def dim(self) -> int:
        """F: floats a play."""
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
    horizons: dict[str, Horizon]
    song_table: SongTable
    cell: Cell = "gru"
    averages: tuple[float, ...] = ()  # discounts γ of the averages that the head sees
    input_table: bool = False  # whether songs as inputs have a table of their own

    @property
    def recurrent_layers(self) -> int:
        """Vectors of D_hid that the cells carry on: one a layer, two for an LSTM, outputs before cells."""
        return self.num_layers * (2 if self.cell == "lstm" else 1)

    @property
    def state_layers(self) -> int:
        """Vectors of D_hid that the network carries on: those of the cells, then the sums of the averages."""
        return self.recurrent_layers + -(-len(self.averages) * self.embedding_dim // self.hidden_dim)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "ModelConfig":
        """From the JSON form that `dataclasses.asdict` gives."""
        features = FeatureSpec(**{**raw["features"], "contexts": tuple(raw["features"]["contexts"])})
        horizons = {name: Horizon(**value) for name, value in raw["horizons"].items()}
        averages = tuple(raw.get("averages", ()))
        return cls(**{**raw, "features": features, "horizons": horizons, "averages": averages})


_PAPERS: dict[str, Any] = {
    **{"objective": "cosine", "song_table": "frozen", "averages": (), "memory": False},
    **{"dropout": 0.0, "averaged_steps": 0},
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train the taste network."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        # Trained until the validation NDCG falls; on long histories it still rises after twelve epochs.
        "best": {"epochs": 40, "patience": 3},
        # The paper's networks, on histories and on playlists, short- and long-term: frozen song vectors, cosine
        # distance, one horizon, no averages, no memory. Its offsets of the long horizon are not known to us; these
        # are the default's.
        "r_hst": {**_PAPERS, "long": ()},
        "r_hlt": {**_PAPERS, "short": ()},
        "r_pst": {**_PAPERS, "source": "playlists", "long": ()},
        "r_plt": {**_PAPERS, "source": "playlists", "short": ()},
    }

    source: Source = setting(
        "histories",
        help="sequences to learn from; playlists, without times and contexts: sessions where there are none",
    )

    cell: Cell = setting("gru", help="the recurrent cell")
    hidden_dim: int = setting(128, help="units of the recurrent network, D_hid")
    num_layers: int = setting(1, help="layers of the recurrent network")
    dropout: float = setting(0.25, help="share of its inputs and outputs dropped in training")
    averages: tuple[float, ...] = setting(
        (0.0, 0.5, 0.9, 0.99), help="discounts of the averages of the songs played that the head sees; empty: none"
    )
    song_table: SongTable = setting(
        "trained", help="song vectors that train along, go through a map that trains, or stay as they came"
    )
    input_table: bool = setting(
        True,
        help="give songs as inputs a table of their own, so that a song need not be near those that follow it; only "
        "with --song-table trained",
    )
    table_learning_rate: float = setting(0.002, help="step size of Adam on the song tables")
    averaged_steps: int = setting(
        200,
        help="keep the weights as they were on average over about so many last steps; 0: as the last step left them",
    )
    objective: Objective = setting(
        "sampled-softmax", help="what to train for; cosine and l2 are the paper's, softmax is over all songs"
    )
    negatives: int = setting(1024, help="songs drawn by popularity as negatives of a step")
    long_targets: int = setting(4, help="plays drawn as targets of each position on a horizon of several offsets")
    long_correction: float = setting(
        0.75, help="share of popularity that the long horizon's taste vectors hold: 1 is chance, 0 likeness alone"
    )
    short: tuple[int, ...] = setting((1, 1), help="offsets min,max of the short horizon, in plays; empty: none")
    long: tuple[int, ...] = setting((25, 50), help="offsets min,max of the long horizon, in plays; empty: none")
    contexts: bool = setting(True, help="use the playback contexts where the data has them")
    gaps: bool = setting(True, help="use the time since the previous play and until the request")
    hours: bool = setting(False, help="use the hour of the day and the day of the week, UTC")
    skips: bool = setting(True, help="use whether a play was skipped where the data says so")
    window: int = setting(100, help="plays the network learns from in one piece")
    batch: int = setting(64, help="windows of a step, over all workers")
    learning_rate: float = setting(0.001, help="step size of Adam, η")
    epochs: int = setting(12, help="passes over the plays; with a validation range, at most as many")
    patience: int = setting(2, help="epochs without a better validation NDCG before training stops")
    refit: bool = setting(True, help="after the best epoch is known, train again on train and validation together")
    memory: bool = setting(True, help="mix in what sessions and sequential rules remember, weighed on validation")
    validation_plays: int = setting(10_000, help="plays of the validation range that are predicted each epoch")
    workers: int = setting(1, help="training workers; 0 trains in this process")
    gpu: bool = setting(False, help="give each worker a GPU")
    checkpoint_minutes: float = setting(10.0, help="minutes between checkpoints within an epoch")
    wait_minutes: float = setting(15.0, help="minutes to wait for the workers' CPUs or GPUs to be free")
    seed: int = setting(0, help="of initial weights, order and negatives")

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "num_layers", "negatives", "window", "batch", "epochs", "patience", "long_targets"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        for name, known in (("cell", Cell), ("song_table", SongTable), ("objective", Objective), ("source", Source)):
            if getattr(self, name) not in get_args(known):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(known))}")
        for name in ("workers", "validation_plays", "averaged_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.dropout < 1 or min(self.learning_rate, self.table_learning_rate) <= 0:
            raise InputError(
                f"dropout {self.dropout} must be in [0, 1), the learning rates {self.learning_rate} and "
                f"{self.table_learning_rate} above 0"
            )
        if not (all(0 <= discount <= 1 for discount in self.averages) and 0 <= self.long_correction <= 1):
            raise InputError(
                f"averages {self.averages} and the long correction {self.long_correction} must be in [0, 1]"
            )
        if self.objective in REGRESSIONS and self.song_table != "frozen":
            raise InputError(
                f"the {self.objective} objective needs --song-table frozen: with song vectors that are trained, "
                "making all songs equal would be perfect"
            )
        if self.wait_minutes <= 0 or self.checkpoint_minutes < 0:
            raise InputError(
                f"wait minutes {self.wait_minutes:g} must be above 0, checkpoint minutes {self.checkpoint_minutes:g} "
                "not negative"
            )
        if self.memory and not self.short:
            raise InputError("a memory is mixed into the short horizon, and there is none; give --short or --no-memory")
        if self.batch < self.workers:
            raise InputError(f"a batch of {self.batch} windows cannot be shared by {self.workers} workers")
        for name in ("short", "long"):
            if len(getattr(self, name)) not in (0, 2):
                raise InputError(f"{name} is {getattr(self, name)}; give two offsets, min,max, or none")
        if not self.horizons:
            raise InputError("short and long are both empty; a network needs at least one horizon")

    @property
    def horizons(self) -> dict[str, Horizon]:
        """The horizons by name, those that are there."""
        offsets = {"short": self.short, "long": self.long}
        return {name: Horizon(min_offset=pair[0], max_offset=pair[1]) for name, pair in offsets.items() if pair}

    @property
    def has_input_table(self) -> bool:
        """True where songs as inputs have a table of their own: where tables are trained at all."""
        return self.input_table and self.song_table == "trained"

    @property
    def lookahead(self) -> int:
        """Plays behind a window's last input that targets may lie in."""
        return max(horizon.max_offset for horizon in self.horizons.values())


@dataclass(frozen=True, kw_only=True)
class TasteConfig:
    """How to compute the taste vectors of all users."""

    at: int | None = setting(None, help="moment that the vectors are for, ms UTC; default: the last play of the data")
    full: bool = setting(False, help="run over all plays, though earlier tastes of the model hold states to go on from")
    users: int = setting(2_500, help="users computed at once")
    gpu: bool = setting(False, help="give each worker a GPU")
    concurrency: int | None = setting(None, help="workers at once; default: what the cluster has CPUs for")

    def __post_init__(self) -> None:
        if self.users < 1 or (self.concurrency is not None and self.concurrency < 1):
            raise InputError(f"users {self.users} and concurrency {self.concurrency} must be at least 1")


def has_memory(model: Manifest) -> bool:
    """True for a models artifact whose recommender is a hybrid of network and memory."""
    return MEMORY in model.files
