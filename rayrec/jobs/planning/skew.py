"""How unevenly plays are spread over buckets and users: what one task and one batch must hold at worst."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.storage.workspace import HISTORIES

LISTED = 5  # largest buckets and users


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
    found: Counter[str] = Counter()
    for path in dataset.manifest.histories_files(bucket):
        with dataset.workspace.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(5_000, columns=[columns.USER, columns.SONGS]):
                lengths = np.diff(batch.column(columns.SONGS).offsets.to_numpy())
                first = np.argsort(-lengths, kind="stable")[:LISTED]
                for user, plays in zip(batch.column(columns.USER).take(first).to_pylist(), lengths[first], strict=True):
                    found[user] += int(plays)
    return found.most_common(LISTED)
