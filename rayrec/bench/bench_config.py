"""Settings of the benchmarks, one class per benchmark. All run on generated data. Imports no heavy library."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveInt, model_validator

from rayrec.config import Settings
from rayrec.errors import InputError

SoakStore = Literal["sqlite", "redis-cluster"]
Config = TypeVar("Config", bound="BenchConfig")


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

    rounds: int = Field(5, ge=1, description="Alternating rounds; ratios are medians over them")


class TrainBenchConfig(RoundsConfig):
    """Training on Ray Data and Ray Train against plain PyTorch.

    Both do the same work in alternating rounds of one run; the ratio is the median over the rounds.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "users": 500, "songs": 500, "plays": 20.0, "seconds": 1.0}

    users: int = Field(20_000, ge=1, description="Number of users")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    seconds: float = Field(10.0, gt=0, description="Timed seconds of each side per round, at most one epoch")


class TasteBenchConfig(RoundsConfig):
    """Taste vectors of all users against one plain process.

    Both do the same work in alternating rounds of one run; the ratio is the median over the rounds.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "users": 1_000, "songs": 500, "plays": 20.0}

    users: int = Field(200_000, ge=1, description="Number of users")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")


class EmbedBenchConfig(RoundsConfig):
    """Song embeddings against gensim alone.

    The time of the stage includes writing the corpus; gensim reads a finished corpus. Both train in alternating rounds
    of one run; the ratio is the median over the rounds.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "users": 500, "songs": 500, "plays": 20.0, "epochs": 2}

    users: int = Field(10_000, ge=1, description="Number of users; each of their sessions is a sentence")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    epochs: int = Field(10, ge=1, description="Number of epochs")


class IndexBenchConfig(RoundsConfig):
    """Search for nearest songs with the index against faiss alone.

    Also measures recall, and the speed of exact search.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"rounds": 2, "songs": 2_000, "dim": 16, "queries": 200}

    songs: int = Field(300_000, ge=1, description="Number of songs")
    dim: int = Field(64, ge=1, description="Embedding dimension")
    queries: int = Field(10_000, ge=1, description="Queries timed per round")


class SongsBenchConfig(RoundsConfig):
    """A training step as the catalog grows.

    Measured for each kind of song table. The ratio is plays per second with the largest catalog over those with the
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
    """Private memory of driver and workers as users and songs grow.

    Measures the taste job and the data path of training with two numbers of users, and the taste job with two numbers
    of songs.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"users": (200, 400), "songs": (500, 5_000), "plays": 10.0}

    users: tuple[PositiveInt, ...] = Field(
        (50_000, 500_000), description="Users of the small and the large data set; their songs are the fewer of --songs"
    )
    songs: tuple[PositiveInt, ...] = Field(
        (10_000, 2_000_000), description="Songs of the small and the large catalog, played by the fewer of --users"
    )
    plays: float = Field(20.0, ge=1, description="Mean plays per user")

    @model_validator(mode="after")
    def _check_sizes(self) -> "MemoryBenchConfig":
        for name, sizes in (("users", self.users), ("songs", self.songs)):
            if len(sizes) != 2 or sizes[0] >= sizes[1]:
                raise ValueError(f"{name} is {list(sizes)}; expected two integers, the smaller first")
        return self


class ScaleBenchConfig(BenchConfig):
    """Import, embed, train and taste as data and workers grow."""

    QUICK: ClassVar[Mapping[str, Any]] = {
        "users": (100, 400),
        "songs": 500,
        "plays": 20.0,
        "embed_epochs": 1,
        "word2vec_epochs": 2,
        "workers": (1, 2),
    }

    users: tuple[PositiveInt, ...] = Field(
        (1_000, 10_000, 100_000), description="Users of each data set, smallest first; all stages run on each"
    )
    workers: tuple[PositiveInt, ...] = Field(
        (1, 2, 4),
        description="Workers on the small and the middle data set, 1 first; counts above the CPUs are skipped",
    )
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    embed_epochs: int = Field(2, ge=1, description="Epochs of embed")
    word2vec_epochs: int = Field(10, ge=1, description="Epochs of word2vec alone, timed by number of threads")
    batch: int = Field(256, ge=1, description="Windows per training step over all workers, whatever their number")

    @model_validator(mode="after")
    def _check_sizes(self) -> "ScaleBenchConfig":
        if len(self.users) < 2 or list(self.users) != sorted(set(self.users)):
            raise ValueError(f"users is {list(self.users)}; expected two or more integers, smallest first")
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
    plays: int = Field(20_000_000_000, ge=1, description="Number of plays of all users")
    songs: int = Field(10_000_000, ge=1, description="Number of songs")
    nodes: int = Field(64, ge=1, description="Nodes of the cluster")
    cores: int = Field(16, ge=1, description="Cores per node")
    epochs: int = Field(10, ge=1, description="Epochs of embed and of train")
    latency: float = Field(0.03, ge=0, description="Seconds per request of object storage")
    requests_per_second: float = Field(20_000.0, gt=0, description="Requests per second that object storage answers")
    losses: float = Field(0.0, ge=0, description="Losses per hour of each spot node")
    measured_users: int = Field(
        2_000, ge=1, description="Users of the smaller of the data sets measured here; 4 times in the larger"
    )
    measured_songs: int = Field(
        10_000, ge=1, description="Songs of the smaller of the data sets measured here; 4 times in the larger"
    )
    measured_plays: float = Field(60.0, ge=1, description="Mean plays per user in the data sets measured here")
    check: bool = Field(False, description="Also run the stages on three local nodes and compare")


class WorldConfig(BenchConfig):
    """Settings of benchmarks that answer from a generated release: its number of plays."""

    plays: int = Field(300_000, ge=1, description="Plays of a catalog; 3 for each song where that is more")
    plays_per_user: float = Field(60.0, ge=1, description="Mean plays per user")


class AnswersBenchConfig(WorldConfig):
    """CPU time and memory of an answer by stage.

    Measured on catalogs of several sizes.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {"songs": (500, 2_000), "plays": 10_000, "plays_per_user": 20.0, "queries": 20}

    songs: tuple[PositiveInt, ...] = Field(
        (10_000, 1_000_000), description="Songs of each catalog, smallest first; 10000000 takes 15 minutes to build"
    )
    queries: int = Field(200, ge=1, description="Users who are answered, one after the other")


class ServeBenchConfig(RoundsConfig, WorldConfig):
    """The server behind Ray Serve against uvicorn alone.

    The same application on both, at several numbers of clients, with the default recommender.
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

    songs: tuple[PositiveInt, ...] = Field((10_000, 1_000_000), description="Songs of each catalog")
    clients: tuple[PositiveInt, ...] = Field((1, 16, 64), description="Concurrent clients; must include 1 and 16")
    seconds: float = Field(5.0, gt=0, description="Seconds of each load per round, in slices of 1 second")
    many_plays: int = Field(10_000, ge=1, description="Plays of the users compared with users of 10 plays")

    @model_validator(mode="after")
    def _check_clients(self) -> "ServeBenchConfig":
        if not {1, 16} <= set(self.clients):
            raise ValueError(f"clients is {list(self.clients)}; expected 1 and 16 among them")
        return self


class StatesBenchConfig(BenchConfig):
    """Loading the states of many users into SQLite and into Redis."""

    QUICK: ClassVar[Mapping[str, Any]] = {"users": 5_000}

    users: int = Field(1_000_000, ge=1, description="Users who are loaded into each kind of store")
    songs: int = Field(10_000, ge=1, description="Number of songs")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")


class SoakBenchConfig(WorldConfig):
    """The server under mixed load while replicas are killed.

    Counts failures and lost plays, and measures the growth of memory.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {
        "songs": 500,
        "minutes": 0.5,
        "kill_seconds": 10.0,
        "plays": 10_000,
        "plays_per_user": 20.0,
    }

    songs: int = Field(10_000, ge=1, description="Songs of the catalog")
    minutes: float = Field(10.0, gt=0, description="Minutes of load")
    kill_seconds: float = Field(60.0, gt=0, description="Seconds between two killed replicas")
    store: SoakStore = Field(
        "sqlite", description="Store of users; redis-cluster starts one, whose primaries are killed too"
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
