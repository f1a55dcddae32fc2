"""Sizes of the benchmarks. Loads nothing heavy."""

from dataclasses import dataclass
from typing import Literal, get_args

from rayrec.config import setting
from rayrec.errors import InputError

BenchName = Literal["train", "taste", "index", "embed", "memory", "songs", "scale", "serve"]
NAMES: tuple[str, ...] = get_args(BenchName)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much work a benchmark does. Data are generated."""

    rounds: int = setting(5, help="alternating rounds; ratios are medians over them")
    songs: int = setting(10_000, help="songs of the generated data of train, taste and memory")
    plays: float = setting(60.0, help="mean plays of a user in train, taste and embed")
    train_users: int = setting(20_000, help="train: users")
    train_seconds: float = setting(
        10.0, help="train: steady seconds that a round of each side is timed for, at most an epoch"
    )
    taste_users: int = setting(200_000, help="taste: users")
    embed_users: int = setting(10_000, help="embed: users, each session of whom is a sentence")
    embed_epochs: int = setting(10, help="embed: passes over the corpus")
    index_songs: int = setting(300_000, help="index: songs")
    index_dim: int = setting(64, help="index: numbers per vector")
    index_queries: int = setting(10_000, help="index: queries timed in a round")
    memory_users: tuple[int, ...] = setting((50_000, 500_000), help="memory: users of the small and the large data")
    serve_songs: tuple[int, ...] = setting((10_000, 1_000_000), help="serve: songs of each catalog")
    serve_clients: tuple[int, ...] = setting((1, 16, 64), help="serve: clients at once; 1 and 16 among them")
    serve_seconds: float = setting(5.0, help="serve: length of each load a round, in slices of 1")
    serve_many_plays: int = setting(10_000, help="serve: plays of users that are compared with those of 10")
    soak_minutes: float = setting(10.0, help="serve --soak: length of the load")
    soak_kill_seconds: float = setting(60.0, help="serve --soak: time between two kills of a replica")
    memory_plays: float = setting(20.0, help="memory: mean plays of a user")
    table_songs: tuple[int, ...] = setting(
        (10_000, 100_000, 1_000_000), help="songs: catalogs whose training steps are timed"
    )
    table_steps: int = setting(10, help="songs: training steps timed in a round")
    scale_users: tuple[int, ...] = setting(
        (1_000, 10_000, 100_000), help="scale: users of the data, smallest first; all stages run on each"
    )
    scale_embed_epochs: int = setting(2, help="scale: passes over the corpus; word2vec alone makes embed-epochs")
    scale_workers: tuple[int, ...] = setting(
        (1, 2, 4),
        help="scale: workers on the small and middle data, 1 first; those above the machine's CPUs are left out",
    )
    seed: int = setting(0, help="of the generated data and of initial weights")

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"rounds is {self.rounds}; give at least 1")
        if len(self.table_songs) < 2 or min(self.table_songs) < 1:
            raise InputError(f"table songs are {self.table_songs}; give at least two sizes to compare")
        if len(self.memory_users) != 2 or self.memory_users[0] >= self.memory_users[1]:
            raise InputError(f"memory users are {self.memory_users}; give two numbers, the smaller first")

        if len(self.scale_users) < 2 or list(self.scale_users) != sorted(set(self.scale_users)):
            raise InputError(f"scale users are {self.scale_users}; give two numbers or more, smallest first")
        if (
            not self.scale_workers
            or self.scale_workers[0] != 1
            or list(self.scale_workers) != sorted(self.scale_workers)
        ):
            raise InputError(f"scale workers are {self.scale_workers}; give numbers, 1 first")
        if not {1, 16} <= set(self.serve_clients):
            raise InputError(f"serve clients are {self.serve_clients}; the ratios are those of 1 and of 16 clients")

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
            memory_plays=10.0,
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
        )


def check_name(name: str) -> None:
    """Raises `InputError` for a benchmark that there is not."""
    if name not in NAMES:
        raise InputError(f"there is no benchmark {name!r}; there are: {', '.join(NAMES)}")
