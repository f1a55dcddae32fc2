"""How unevenly plays are spread over buckets and users: what one task and one batch must hold at worst."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.storage.workspace import HISTORIES, histories_file

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
    workspace = dataset.workspace
    selector = pafs.FileSelector(workspace.full(HISTORIES), allow_not_found=True, recursive=True)
    sizes: Counter[int] = Counter()
    for info in workspace.filesystem.get_file_info(selector):
        if info.type == pafs.FileType.File and "/bucket=" in info.path:
            sizes[int(info.path.split("/bucket=")[1].split("/")[0])] += info.size
    return sizes


def _longest(dataset: Dataset, bucket: int) -> list[tuple[str, int]]:
    found: Counter[str] = Counter()
    for part in range(dataset.manifest.parts):
        path = histories_file(part, bucket)
        if not dataset.workspace.exists(path):
            continue
        with dataset.workspace.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(5_000, columns=[columns.USER, columns.SONGS]):
                lengths = np.diff(batch.column(columns.SONGS).offsets.to_numpy())
                first = np.argsort(-lengths, kind="stable")[:LISTED]
                for user, plays in zip(batch.column(columns.USER).take(first).to_pylist(), lengths[first], strict=True):
                    found[user] += int(plays)
    return found.most_common(LISTED)
