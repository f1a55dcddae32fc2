"""Sizes of the benchmarks. Loads nothing heavy."""

from typing import Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from rayrec.config import Settings
from rayrec.errors import InputError

BenchName = Literal[
    "train", "taste", "index", "embed", "memory", "songs", "scale", "simulate", "answers", "states", "serve"
]
SoakStore = Literal["sqlite", "redis-cluster"]
NAMES: tuple[str, ...] = get_args(BenchName)


class BenchConfig(Settings):
    """How much work a benchmark does. Data are generated."""

    rounds: int = Field(5, ge=1, description="Alternating rounds; ratios are medians over them")
    songs: int = Field(10_000, ge=1, description="Songs of the generated data of train, taste and memory")
    plays: float = Field(60.0, ge=1, description="Mean plays per user in train, taste and embed")
    train_users: int = Field(20_000, ge=1, description="train: number of users")
    train_seconds: float = Field(
        10.0, gt=0, description="train: timed seconds of each side per round, at most one epoch"
    )
    taste_users: int = Field(200_000, ge=1, description="taste: number of users")
    embed_users: int = Field(10_000, ge=1, description="embed: number of users; each of their sessions is a sentence")
    embed_epochs: int = Field(10, ge=1, description="embed: number of epochs")
    index_songs: int = Field(300_000, ge=1, description="index: number of songs")
    index_dim: int = Field(64, ge=1, description="index: embedding dimension")
    index_queries: int = Field(10_000, ge=1, description="index: queries timed per round")
    memory_users: tuple[PositiveInt, ...] = Field(
        (50_000, 500_000), description="memory: users of the small and the large data set"
    )
    answers_songs: tuple[PositiveInt, ...] = Field(
        (10_000, 1_000_000), description="answers: songs of each catalog, smallest first; 10000000 takes hours to build"
    )
    answers_plays: int = Field(
        300_000, ge=1, description="answers: plays of a catalog; 3 for each song where that is more"
    )
    answers_queries: int = Field(200, ge=1, description="answers: users who are answered, one after the other")
    states_users: int = Field(1_000_000, ge=1, description="states: users who are loaded into each kind of store")
    serve_songs: tuple[PositiveInt, ...] = Field((10_000, 1_000_000), description="serve: songs of each catalog")
    serve_clients: tuple[PositiveInt, ...] = Field(
        (1, 16, 64), description="serve: concurrent clients; must include 1 and 16"
    )
    serve_seconds: float = Field(5.0, gt=0, description="serve: seconds of each load per round, in slices of 1 second")
    serve_many_plays: int = Field(10_000, ge=1, description="serve: plays of the users compared with users of 10 plays")
    soak_minutes: float = Field(10.0, gt=0, description="serve --soak: minutes of load")
    soak_kill_seconds: float = Field(60.0, gt=0, description="serve --soak: seconds between two killed replicas")
    soak_store: SoakStore = Field(
        "sqlite",
        description="serve --soak: store of users; redis-cluster starts one, whose primaries are killed too",
    )
    memory_songs: tuple[PositiveInt, ...] = Field(
        (10_000, 2_000_000), description="memory: songs of the small and the large catalog"
    )
    memory_plays: float = Field(20.0, ge=1, description="memory: mean plays per user")
    table_songs: tuple[PositiveInt, ...] = Field(
        (10_000, 100_000, 1_000_000), description="songs: catalog sizes whose training steps are timed"
    )
    table_steps: int = Field(10, ge=1, description="songs: training steps timed per round")
    scale_users: tuple[PositiveInt, ...] = Field(
        (1_000, 10_000, 100_000), description="scale: users of each data set, smallest first; all stages run on each"
    )
    scale_embed_epochs: int = Field(2, ge=1, description="scale: epochs of embed; word2vec alone uses --embed-epochs")
    scale_batch: int = Field(
        256, ge=1, description="scale: windows per training step over all workers, whatever their number"
    )
    scale_workers: tuple[PositiveInt, ...] = Field(
        (1, 2, 4),
        description="scale: workers on the small and the middle data set, 1 first; counts above the CPUs are skipped",
    )
    simulate_users: int = Field(100_000_000, ge=1, description="simulate: users of the large data")
    simulate_plays: int = Field(20_000_000_000, ge=1, description="simulate: plays of the large data")
    simulate_songs: int = Field(10_000_000, ge=1, description="simulate: songs of the large data")
    simulate_nodes: int = Field(64, ge=1, description="simulate: nodes of the cluster")
    simulate_cores: int = Field(16, ge=1, description="simulate: cores per node")
    simulate_epochs: int = Field(10, ge=1, description="simulate: epochs of embed and of train")
    simulate_latency: float = Field(0.03, ge=0, description="simulate: seconds per request of object storage")
    simulate_requests: float = Field(20_000.0, gt=0, description="simulate: requests per second that it answers")
    simulate_losses: float = Field(0.0, ge=0, description="simulate: losses per hour of each spot node")
    simulate_measured_users: int = Field(
        2_000,
        ge=1,
        description="simulate: users of the smaller of the data measured here; 4 times in the larger",
    )
    simulate_check: bool = Field(False, description="simulate: also run the stages on three local nodes and compare")
    seed: int = Field(0, ge=0, description="Random seed of the generated data and of the initial weights")

    @model_validator(mode="after")
    def _check_sizes(self) -> "BenchConfig":
        if len(self.table_songs) < 2:
            raise ValueError(f"table_songs is {list(self.table_songs)}; expected at least two sizes to compare")
        if len(self.memory_users) != 2 or self.memory_users[0] >= self.memory_users[1]:
            raise ValueError(f"memory_users is {list(self.memory_users)}; expected two integers, the smaller first")
        if len(self.memory_songs) != 2 or self.memory_songs[0] >= self.memory_songs[1]:
            raise ValueError(f"memory_songs is {list(self.memory_songs)}; expected two integers, the smaller first")
        if len(self.scale_users) < 2 or list(self.scale_users) != sorted(set(self.scale_users)):
            raise ValueError(f"scale_users is {list(self.scale_users)}; expected two or more integers, smallest first")
        if self.scale_workers[:1] != (1,) or list(self.scale_workers) != sorted(self.scale_workers):
            raise ValueError(f"scale_workers is {list(self.scale_workers)}; expected ascending integers, 1 first")
        if not {1, 16} <= set(self.serve_clients):
            raise ValueError(f"serve_clients is {list(self.serve_clients)}; expected 1 and 16 among them")
        return self

    @classmethod
    def quick(cls) -> "BenchConfig":
        """Small enough to see in a minute that it works; its figures say little."""
        return cls(
            rounds=2,
            songs=500,
            plays=20.0,
            train_users=500,
            train_seconds=1.0,
            taste_users=1_000,
            embed_users=500,
            embed_epochs=2,
            index_songs=2_000,
            index_dim=16,
            index_queries=200,
            memory_users=(200, 400),
            memory_songs=(500, 5_000),
            memory_plays=10.0,
            answers_songs=(500, 2_000),
            answers_plays=10_000,
            answers_queries=20,
            states_users=5_000,
            serve_songs=(500,),
            serve_clients=(1, 16),
            serve_seconds=1.0,
            serve_many_plays=200,
            soak_minutes=0.5,
            soak_kill_seconds=10.0,
            table_songs=(500, 5_000),
            table_steps=2,
            scale_users=(100, 400),
            scale_embed_epochs=1,
            scale_workers=(1, 2),
            simulate_measured_users=200,
        )


def check_name(name: str) -> None:
    """Raises `InputError` for a benchmark that there is not."""
    if name not in NAMES:
        raise InputError(f"Unknown benchmark {name!r}; expected one of {', '.join(NAMES)}")
