"""What a plan starts from: how large the data are, how the stages will be run, how fast a CPU is."""

import json
from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from rayrec.config import Settings
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import InputError
from rayrec.importing.import_plan import BUCKET_BYTES, MAX_BUCKETS, MIN_BUCKETS
from rayrec.model.train_config import TrainConfig
from rayrec.storage.dataset_manifest import DatasetManifest
from rayrec.storage.workspace import HISTORIES

LISTED = 5  # largest buckets and users
CSV_BYTES = 33  # of a play with user, song and unix seconds; measured as the sizes of plan.py were
ASSUMED_SKEW = 1.25  # largest bucket over the mean where no data set is there to look at
BUILT_IN_FROM = "two shared cores of an AMD EPYC without a GPU, 2026-11-24"
BUILT_IN = {
    "import_plays_per_second_per_cpu": 650_000.0,
    "embed_tokens_per_second_per_cpu": 262_000.0,
    "train_plays_per_second_per_cpu": 23_300.0,
    "retrieval_plays_per_second_per_cpu": 100_000.0,
    "taste_plays_per_second_per_cpu": 322_000.0,
    "read_plays_per_second_per_cpu": 4_500_000.0,
    "rank_queries_per_second_per_cpu": 125.0,
    "evaluate_queries_per_second_per_cpu": 90.0,
    "recommend_users_per_second_per_cpu": 190.0,
}
TRAIN_ON_GPU = "train_plays_per_second_per_gpu"  # measured by nobody yet: only a file of rates can hold it
ANSWERS = "answers_per_second_per_cpu"  # of `rayrec bench answers --save`; none is built in: catalogs differ too much
_EMBED, _TRAIN = EmbedConfig(), TrainConfig()


@dataclass(frozen=True, kw_only=True)
class Skew:
    """Of a data set. Plays of buckets are told from their files' bytes, those of users are counted."""

    largest_buckets: list[tuple[int, int]]  # bucket, about how many plays; largest first
    longest_histories: list[tuple[str, int]]  # user id, plays; of the largest bucket, longest first


def measure_skew(dataset: Dataset) -> Skew:
    """One listing of files, and the lengths of one bucket's histories: cheap, however many users there are."""
    sizes = _bucket_bytes(dataset)
    total = max(1, sum(sizes.values()))
    plays = [(bucket, round(dataset.manifest.plays * size / total)) for bucket, size in sizes.most_common(LISTED)]
    return Skew(largest_buckets=plays, longest_histories=_longest(dataset, plays[0][0]) if plays else [])


def _bucket_bytes(dataset: Dataset) -> Counter[int]:
    sizes = dataset.workspace.sizes(HISTORIES)
    buckets = range(dataset.manifest.buckets)
    return Counter(
        {bucket: sum(sizes.get(path, 0) for path in dataset.manifest.histories_files(bucket)) for bucket in buckets}
    )


def _longest(dataset: Dataset, bucket: int) -> list[tuple[str, int]]:
    lengths_by_user: Counter[str] = Counter()
    for path in dataset.manifest.histories_files(bucket):
        with dataset.workspace.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(5_000, columns=[columns.USER, columns.SONGS]):
                lengths = np.diff(batch.column(columns.SONGS).offsets.to_numpy())
                first = np.argsort(-lengths, kind="stable")[:LISTED]
                for user, plays in zip(batch.column(columns.USER).take(first).to_pylist(), lengths[first], strict=True):
                    lengths_by_user[user] += int(plays)
    return lengths_by_user.most_common(LISTED)


class PlanConfig(Settings):
    """How the stages will be run; the defaults are those of the stages."""

    dim: int = Field(_EMBED.dim, ge=1, description="Embedding dimension")
    hidden_dim: int = Field(_TRAIN.hidden_dim, ge=1, description="Hidden size of the recurrent network")
    embed_epochs: int = Field(_EMBED.epochs, ge=1, description="Epochs of word2vec")
    epochs: int = Field(_TRAIN.epochs, ge=1, description="Maximum epochs of the network")
    window: int = Field(_TRAIN.window, ge=1, description="Sequence length of truncated backpropagation, in plays")
    batch: int = Field(0, ge=0, description="Batch size in windows, over all workers; 0: 64 per worker")
    workers: int = Field(0, ge=0, description="Training workers; 0: one per GPU, or one per CPU node without GPUs")
    gpu: bool = Field(_TRAIN.gpu, description="Train on GPUs")
    validation: bool = Field(True, description="Hold back a validation range: embeddings and network are fitted twice")
    buckets: int = Field(
        0, ge=0, le=MAX_BUCKETS, description="Buckets of users; 0: one per 64 MiB of input, 16 to 4096"
    )
    queries: int = Field(100_000, ge=1, description="Queries that evaluate samples")
    k: int = Field(100, ge=1, description="Songs per user of recommend --all")
    nodes: int = Field(0, ge=0, description="Number of CPU nodes; 0: the cluster's maximum")
    serve_rate: float = Field(100.0, gt=0, description="Requests per second that the server has to answer")

    @property
    def fits(self) -> int:
        """Fits of vectors and network: for the selection and the final one."""
        return 2 if self.validation else 1


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """How large the data are. `largest_bucket` is plays, assumed where nobody has looked."""

    users: int
    plays: int
    songs: int
    buckets: int
    largest_bucket: int
    looked_at: bool  # whether the skew is that of a data set

    @classmethod
    def assumed(cls, users: int, plays: int, songs: int, buckets: int = 0) -> "DataSize":
        """From counts alone. Raises `InputError` for counts that cannot be."""
        for name, count in (("users", users), ("plays", plays), ("songs", songs)):
            if count < 1:
                raise InputError(f"{name} is {count}; expected at least 1")
        bucket_count = buckets or min(MAX_BUCKETS, max(MIN_BUCKETS, ceil(plays * CSV_BYTES / BUCKET_BYTES)))
        largest = ceil(plays / bucket_count * ASSUMED_SKEW)
        return cls(users=users, plays=plays, songs=songs, buckets=bucket_count, largest_bucket=largest, looked_at=False)

    @classmethod
    def of(cls, manifest: DatasetManifest, skew: Skew) -> "DataSize":
        """Of a data set that is there."""
        return cls(
            users=manifest.users,
            plays=manifest.plays,
            songs=manifest.songs,
            buckets=manifest.buckets,
            largest_bucket=max([plays for _, plays in skew.largest_buckets], default=manifest.plays),
            looked_at=True,
        )


def read_rates(path: str) -> dict[str, float]:
    """The rates of a file that `rayrec bench --save` wrote. Raises `InputError` for another file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))["rates"]
        rates = {str(name): float(rate) for name, rate in content.items()}
    except OSError as error:
        raise InputError(f"rates file {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has no rates; expected a file written by `rayrec bench scale --save FILE`") from error
    slow = [name for name, rate in rates.items() if not rate > 0]
    if slow:
        raise InputError(f"{path} has {slow[0]} {rates[slow[0]]}; expected a number above 0")
    return rates
