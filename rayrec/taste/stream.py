"""From buckets on disk to batches of windows, as plain functions that any engine can run in parallel."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.split import FitRange
from rayrec.data.windows import Windows, cut_windows, worker_batches
from rayrec.taste.config import TrainConfig
from rayrec.taste.training import Share

POOL_PLAYS = 500_000  # plays whose windows are put in batches by length together
BATCH = "batch"  # column: the number of the batch that a window belongs to


class UnitReader:
    """Reads units of buckets and cuts them into one worker's share of the batches."""

    def __init__(self, dataset: Dataset, allowed: FitRange, config: TrainConfig, share: Share, epoch: int) -> None:
        self._dataset, self._allowed, self._config, self._share, self._epoch = dataset, allowed, config, share, epoch

    def tables(self, rows: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """The batches of units given as JSON lists of buckets, as rows that `split_batches` takes apart."""
        for unit in rows["unit"]:
            for pool in self._pools(json.loads(unit)):
                yield from self._batches(pool, json.loads(unit))

    def _pools(self, buckets: list[int]) -> Iterator[Histories]:
        held: list[Histories] = []
        for bucket in buckets:
            for histories in self._dataset.read_bucket(bucket):
                held.append(self._allowed.select(histories))
                if sum(part.num_plays for part in held) >= POOL_PLAYS:
                    yield concatenate(held)
                    held = []
        yield concatenate(held)

    def _batches(self, pool: Histories, buckets: list[int]) -> Iterator[pa.Table]:
        config = self._config
        windows = cut_windows(pool, config.window, config.lookahead)
        rng = np.random.default_rng([config.seed, self._epoch, buckets[0], pool.num_plays])
        batches = list(
            worker_batches(windows, batch=config.batch, rank=self._share.rank, workers=self._share.workers, rng=rng)
        )
        if batches:
            numbers = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
            tables = pa.concat_tables([batch.to_arrow() for batch in batches])
            yield tables.append_column(BATCH, pa.array(numbers))


def split_batches(table: pa.Table) -> Iterator[Windows]:
    """The batches of a table that `UnitReader` made, in order."""
    numbers = table.column(BATCH).to_numpy()
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1, [len(numbers)]])
    for begin, end in pairwise(cuts):
        yield Windows.from_arrow(table.slice(begin, end - begin))


def plain_stream(reader: UnitReader, units: list[list[int]]) -> Iterator[Windows]:
    """The same batches in this process, for training without a cluster."""
    rows: dict[str, Any] = {"unit": np.array([json.dumps(unit) for unit in units], dtype=object)}
    for table in reader.tables(rows):
        yield from split_batches(table)
