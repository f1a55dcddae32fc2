"""Settings of the benchmarks, one class per benchmark. All run on generated data. Imports no heavy library."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveInt, model_validator

from rayrec.config import Settings
from rayrec.errors import InputError

SoakStore = Literal["sqlite", "redis-cluster"]
Config = TypeVar("Config", bound="BenchConfig")


def _check_ascending(name: str, sizes: Sequence[int], *, min_count: int) -> None:
    """Raise `ValueError` unless `sizes` are `min_count` numbers or more (1 or 2), each larger than the one before."""
    if len(sizes) < min_count or list(sizes) != sorted(set(sizes)):
        expected = "one or more" if min_count == 1 else "two or more"
        raise ValueError(f"{name} is {list(sizes)}; expected {expected} integers, smallest first")


class BenchConfig(Settings):
    """Settings that all benchmarks have."""

    QUICK: ClassVar[Mapping[str, Any]] = {}  # sizes for a smoke test of about a minute

    seed: int = Field(0, ge=0, description="Random seed of the generated data and of the initial weights")

    @classmethod
    def quick(cls: type[Config]) -> Config:
        """Return settings with the sizes of a smoke test."""
        return cls(**cls.QUICK)

    def with_quick_sizes(self: Config) -> Config:
        """Return the same settings, with the sizes of a smoke test for all fields that were not set."""
        return type(self)(**{**self.QUICK, **{name: getattr(self, name) for name in self.model_fields_set}})


class RoundsConfig(BenchConfig):
    """Settings of benchmarks that compare two ways of doing the same work."""

    rounds: int = Field(5, ge=1, description="Number of alternating rounds; ratios are medians over them")


class TrainBenchConfig(RoundsConfig):
    """Compare training on Ray Data and Ray Train with plain PyTorch.

    Both do the same work in alternating rounds of one run; the ratio is the median over the rounds.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "users": 500, "songs": 500, "plays": 20.0, "seconds": 1.0}

    users: int = Field(20_000, ge=1, description="Number of users")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    seconds: float = Field(10.0, gt=0, description="Seconds of training timed per side and round, at most one epoch")


class TasteBenchConfig(RoundsConfig):
    """Compare the stage taste with a plain loop in one process.

    Both do the same work in alternating rounds of one run; the ratio is the median over the rounds.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "users": 1_000, "songs": 500, "plays": 20.0}

    users: int = Field(200_000, ge=1, description="Number of users")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")


class EmbedBenchConfig(RoundsConfig):
    """Compare the stage embed with gensim alone.

    The time of the stage includes writing the corpus; gensim reads a finished corpus. Both train in alternating rounds
    of one run; the ratio is the median over the rounds.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "users": 500, "songs": 500, "plays": 20.0, "epochs": 2}

    users: int = Field(10_000, ge=1, description="Number of users; each of their sessions is a sentence of the corpus")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    epochs: int = Field(10, ge=1, description="Number of epochs")


class IndexBenchConfig(RoundsConfig):
    """Compare search for nearest songs in the index with faiss alone.

    Also measures recall, and the speed of exact search.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "songs": 2_000, "dim": 16, "queries": 200}

    songs: int = Field(300_000, ge=1, description="Number of songs")
    dim: int = Field(64, ge=1, description="Embedding dimension")
    queries: int = Field(10_000, ge=1, description="Queries timed per round")


class SongsBenchConfig(RoundsConfig):
    """Measure the speed of training steps as the catalog grows.

    Measures each kind of song table. The ratio is plays per second with the largest catalog over those with the
    smallest, both with a trained song table.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "songs": (500, 5_000), "steps": 2}

    songs: tuple[PositiveInt, ...] = Field(
        (10_000, 100_000, 1_000_000), description="Catalog sizes whose training steps are timed"
    )
    steps: int = Field(10, ge=1, description="Training steps timed per round")

    @model_validator(mode="after")
    def _check_sizes(self) -> "SongsBenchConfig":
        if len(self.songs) < 2:
            raise ValueError(f"songs is {list(self.songs)}; expected at least two sizes to compare")
        return self


class MemoryBenchConfig(BenchConfig):
    """Measure the memory of driver and workers as the data grows.

    Measures private memory: of the taste job and the data path of training with two numbers of users, and of the taste
    job with two numbers of songs.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"users": (200, 400), "songs": (500, 5_000), "plays": 10.0}

    users: tuple[PositiveInt, ...] = Field(
        (50_000, 500_000),
        description="Numbers of users of the small and the large data set, both with the first number of --songs",
    )
    songs: tuple[PositiveInt, ...] = Field(
        (10_000, 2_000_000),
        description="Numbers of songs of the small and the large catalog, both with the first number of --users",
    )
    plays: float = Field(20.0, ge=1, description="Mean plays per user")

    @model_validator(mode="after")
    def _check_sizes(self) -> "MemoryBenchConfig":
        for name, sizes in (("users", self.users), ("songs", self.songs)):
            if len(sizes) != 2 or sizes[0] >= sizes[1]:
                raise ValueError(f"{name} is {list(sizes)}; expected two integers, the smaller first")
        return self


class ScaleBenchConfig(BenchConfig):
    """Measure import, embed, train and taste as data and workers grow."""

    QUICK: ClassVar[Mapping[str, Any]] = {
        "users": (100, 400),
        "songs": 500,
        "plays": 20.0,
        "embed_epochs": 1,
        "word2vec_epochs": 2,
        "workers": (1, 2),
    }

    users: tuple[PositiveInt, ...] = Field(
        (1_000, 10_000, 100_000), description="Number of users of each data set, smallest first; all stages run on each"
    )
    workers: tuple[PositiveInt, ...] = Field(
        (1, 2, 4),
        description="Numbers of workers on the smallest and the middle data set, 1 first; "
        "numbers above the CPU count are skipped",
    )
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    embed_epochs: int = Field(2, ge=1, description="Epochs of the stage embed")
    word2vec_epochs: int = Field(
        10, ge=1, description="Epochs of word2vec alone, timed with each number of --workers as threads"
    )
    batch: int = Field(256, ge=1, description="Windows per training step, summed over all workers")

    @model_validator(mode="after")
    def _check_sizes(self) -> "ScaleBenchConfig":
        _check_ascending("users", self.users, min_count=2)
        if self.workers[:1] != (1,) or list(self.workers) != sorted(self.workers):
            raise ValueError(f"workers is {list(self.workers)}; expected ascending integers, 1 first")
        return self


class SimulateBenchConfig(BenchConfig):
    """Simulate the hours of all stages on a large cluster.

    The simulation uses the CPU time of each unit of work, measured on this machine. It also shows what limits each
    stage and how much longer the stage takes if a node is lost.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"measured_users": 200, "measured_songs": 500, "measured_plays": 20.0}

    users: int = Field(100_000_000, ge=1, description="Number of users")
    plays: int = Field(20_000_000_000, ge=1, description="Number of plays, of all users together")
    songs: int = Field(10_000_000, ge=1, description="Number of songs")
    nodes: int = Field(64, ge=1, description="Number of nodes of the cluster")
    cores: int = Field(16, ge=1, description="Number of cores per node")
    epochs: int = Field(10, ge=1, description="Epochs of the stages embed and train")
    latency: float = Field(0.03, ge=0, description="Seconds per request to object storage")
    requests_per_second: float = Field(20_000.0, gt=0, description="Requests per second that object storage answers")
    losses: float = Field(0.0, ge=0, description="Mean number of losses per node and hour, as with spot nodes")
    measured_users: int = Field(
        2_000, ge=1, description="Users of the smaller data set measured here; the larger has 4 times as many"
    )
    measured_songs: int = Field(
        10_000, ge=1, description="Songs of the smaller data set measured here; the larger has 4 times as many"
    )
    measured_plays: float = Field(60.0, ge=1, description="Mean plays per user in the data sets measured here")
    check: bool = Field(
        False, description="Also run stages on three local nodes and compare their time with the simulated time"
    )


class WorldConfig(BenchConfig):
    """Settings of benchmarks that answer from a generated release: its number of plays."""

    plays: int = Field(300_000, ge=1, description="Plays per catalog; raised to 3 per song if that is more")
    plays_per_user: float = Field(60.0, ge=1, description="Mean plays per user")


class AnswersBenchConfig(WorldConfig):
    """Measure CPU time and memory of an answer by stage.

    Uses catalogs of several sizes.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"songs": (500, 2_000), "plays": 10_000, "plays_per_user": 20.0, "queries": 20}

    songs: tuple[PositiveInt, ...] = Field(
        (10_000, 1_000_000),
        description="Number of songs of each catalog, smallest first; 10000000 songs take 15 minutes to build",
    )
    queries: int = Field(200, ge=1, description="Number of users to recommend songs to, one after the other")

    @model_validator(mode="after")
    def _check_sizes(self) -> "AnswersBenchConfig":
        _check_ascending("songs", self.songs, min_count=1)
        return self


class ServeBenchConfig(RoundsConfig, WorldConfig):
    """Compare the server on Ray Serve with uvicorn alone.

    Both run the same application with the default recommender, and are measured at several numbers of clients.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {
        "rounds": 2,
        "songs": (500,),
        "clients": (1, 16),
        "seconds": 1.0,
        "many_plays": 200,
        "plays": 10_000,
        "plays_per_user": 20.0,
    }

    songs: tuple[PositiveInt, ...] = Field(
        (10_000, 1_000_000), description="Number of songs of each catalog, smallest first"
    )
    clients: tuple[PositiveInt, ...] = Field(
        (1, 16, 64), description="Numbers of concurrent clients; must include 1 and 16"
    )
    seconds: float = Field(5.0, gt=0, description="Seconds of each load per round, in slices of 1 second")
    many_plays: int = Field(
        10_000, ge=1, description="Plays per user in the group that is compared with users of 10 plays"
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> "ServeBenchConfig":
        _check_ascending("songs", self.songs, min_count=1)
        if not {1, 16} <= set(self.clients):
            raise ValueError(f"clients is {list(self.clients)}; expected integers that include 1 and 16")
        return self


class StatesBenchConfig(BenchConfig):
    """Measure the loading of many user states into SQLite and Redis."""

    QUICK: ClassVar[Mapping[str, Any]] = {"users": 5_000}

    users: int = Field(1_000_000, ge=1, description="Number of users to load into each kind of store")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")


class SoakBenchConfig(WorldConfig):
    """Test the server under mixed load while replicas are killed.

    Counts failures and lost plays, and measures the growth of memory.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {
        "songs": 500,
        "minutes": 0.5,
        "kill_seconds": 10.0,
        "plays": 10_000,
        "plays_per_user": 20.0,
    }

    songs: int = Field(10_000, ge=1, description="Number of songs")
    minutes: float = Field(10.0, gt=0, description="Minutes of load")
    kill_seconds: float = Field(60.0, gt=0, description="Seconds between kills of a replica")
    store: SoakStore = Field(
        "sqlite", description="Store of user states; redis-cluster starts a Redis Cluster and also kills its primaries"
    )


CONFIGS: dict[str, type[BenchConfig]] = {
    "train": TrainBenchConfig,
    "taste": TasteBenchConfig,
    "embed": EmbedBenchConfig,
    "index": IndexBenchConfig,
    "songs": SongsBenchConfig,
    "memory": MemoryBenchConfig,
    "scale": ScaleBenchConfig,
    "simulate": SimulateBenchConfig,
    "answers": AnswersBenchConfig,
    "states": StatesBenchConfig,
    "serve": ServeBenchConfig,
    "soak": SoakBenchConfig,
}
WITH_RATES = ("train", "taste", "embed", "scale", "answers")  # benchmarks whose rates `rayrec plan` reads


def check_name(name: str) -> None:
    """Raise `InputError` if there is no benchmark called `name`."""
    if name not in CONFIGS:
        raise InputError(f"Unknown benchmark {name!r}; expected one of {', '.join(CONFIGS)}")
