"""Writes the best songs of every user as Parquet, bucket by bucket; a killed job continues with the missing buckets."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.ragged import offsets_of
from rayrec.display import progress
from rayrec.errors import InputError
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.recommend.answer import RecommendConfig, load_recommender, require_fitting_parts
from rayrec.recommend.base import NO_SONG, BaseRecommender, Ranking
from rayrec.recommend.filters import without_heard
from rayrec.recommend.reranking import POOL, Explored, with_explored
from rayrec.storage import artifacts
from rayrec.storage.artifacts import BUCKET_COUNTS, RECOMMENDATIONS, Manifest
from rayrec.storage.locking import writes
from rayrec.storage.releases import ANSWERING_KINDS
from rayrec.storage.workspace import Workspace

KIND = RECOMMENDATIONS
USERS_AT_ONCE = 1_000
SCHEMA = pa.schema(
    [
        pa.field(columns.USER, pa.string(), nullable=False),
        pa.field(columns.SONG_IDS, pa.list_(pa.string()), nullable=False),  # best first
        pa.field(columns.SCORES, pa.list_(pa.float32()), nullable=False),  # one score per song
    ]
)


def schema_of(config: RecommendConfig) -> pa.Schema:
    """Return the columns of the files; with explore also the probability of each explored song, null for the others."""
    return (
        SCHEMA.append(pa.field(columns.PROBABILITIES, pa.list_(pa.float64()), nullable=False))
        if config.explore
        else SCHEMA
    )


def recommendations_file(folder: str, bucket: int) -> str:
    """Return the path of the Parquet file of one bucket of users in a recommendations artifact."""
    return f"{folder}/bucket={bucket:05d}/recommendations.parquet"


@writes("recommend")
def recommend_all(
    workspace: Workspace,
    config: RecommendConfig,
    parts: Mapping[str, str],
    *,
    at: int | None = None,
    repeat: bool = False,
) -> Manifest:
    """Write the k best songs of every user who has a play before `at`; return the recommendations artifact.

    `parts`, role -> id, are the parts of the recommender; see `load_recommender`. `at` is ms UTC, by default just after
    the last play. There is one Parquet file per bucket, with one row per user: user_id, song_ids list<string> and
    scores list<float32>, with fewer than k songs if fewer qualify; with explore also probabilities list<float64>, null
    for songs not explored. Metrics: seconds, users, songs (in all rows), filled_songs (songs that no retriever proposed
    and that were found near the taste vectors instead) and buckets_computed.

    Raises `InputError` if reasons or a mix of horizons are requested, `MismatchError` for parts of another data set.
    """
    if config.explain:
        raise InputError("--explain works for one user at a time; omit it, or give --user ID instead of --all")
    if config.long_weight not in (0, 1):
        raise InputError(
            f"horizon is {config.horizon}; for all users expected short or long; a mix of both needs --user ID instead "
            "of --all"
        )
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    timestamp = dataset.manifest.last_play + 1 if at is None else at
    inputs = {"dataset": dataset.manifest.plays_id, **{role: parts[role] for role in ANSWERING_KINDS if role in parts}}
    settings = {**to_mapping(config.replace(explain=False)), "at": timestamp}
    artifact_id, complete = artifacts.new_id(
        workspace, KIND, artifacts.fingerprint(KIND, settings, inputs), repeat=repeat
    )
    if complete:
        return artifacts.reuse(workspace, KIND, artifact_id)
    require_fitting_parts(workspace, dataset, parts)  # for model and rankers it raises here, not in every worker
    manifest = Manifest(kind=KIND, id=artifact_id, config=settings, inputs=inputs)
    started = time.monotonic()
    task = _Task(dataset, config, dict(parts), timestamp, manifest.folder)
    buckets = range(dataset.manifest.buckets)
    checksums: dict[str, str] = {}
    counts: Counter[str] = Counter()
    with ray_cluster(), progress("Recommendations", len(buckets)) as bar:
        for result in run_buckets(BucketRecommendations, buckets, arguments={"task": task}):
            path = recommendations_file(manifest.folder, result.bucket)
            checksums[path.removeprefix(f"{manifest.folder}/")] = result.sha256
            counts.update(result.counts)
            bar.advance()
    metrics = {"seconds": round(time.monotonic() - started, 1), **counts}
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), checksums, checksums)


@dataclass(frozen=True)
class _Task:
    """The data that all workers of one job share."""

    dataset: Dataset
    config: RecommendConfig
    parts: dict[str, str]
    at: int  # ms UTC
    folder: str


@dataclass(frozen=True, kw_only=True)
class BucketRows:
    """The result of a bucket; the driver receives nothing else of it."""

    bucket: int
    sha256: str  # sha256 of its file
    counts: dict[str, int]  # users, songs, filled_songs, buckets_computed


class BucketRecommendations:
    """A bucket worker: reads a bucket's histories and writes the songs recommended to its users."""

    def __init__(self, task: _Task) -> None:
        import torch

        torch.set_num_threads(1)
        self._task = task
        self._recommender: BaseRecommender | None = None  # loaded when a bucket has to be computed
        self._song_ids = pa.array([], pa.string())

    def __call__(self, bucket: int) -> BucketRows:
        """Write the bucket's file, unless an earlier run has written it."""
        task, workspace = self._task, self._task.dataset.workspace
        path = recommendations_file(task.folder, bucket)
        if workspace.exists(path):
            with workspace.open_input(path) as stream:
                counts = json.loads(pq.ParquetFile(stream).metadata.metadata[BUCKET_COUNTS])
            digest = artifacts.sha256(workspace, path)
            return BucketRows(bucket=bucket, sha256=digest, counts={**counts, "buckets_computed": 0})
        counts = {"users": 0, "songs": 0, "filled_songs": 0}
        with (
            workspace.open_output(path) as stream,
            pq.ParquetWriter(stream, schema_of(task.config), compression="zstd") as writer,
        ):
            for table, filled_count in self._tables(bucket):
                writer.write_table(table)
                counts["users"] += table.num_rows
                counts["filled_songs"] += filled_count
                counts["songs"] += len(table.column(columns.SCORES).combine_chunks().flatten())
            writer.add_key_value_metadata({BUCKET_COUNTS.decode(): json.dumps(counts)})
        return BucketRows(bucket=bucket, sha256=stream.sha256, counts={**counts, "buckets_computed": 1})

    def _tables(self, bucket: int) -> Iterator[tuple[pa.Table, int]]:
        """Yield the rows of a bucket in tables, each with the number of its songs that no retriever proposed."""
        task, dataset = self._task, self._task.dataset
        if self._recommender is None:
            self._recommender = load_recommender(dataset.workspace, dataset, task.parts)
            self._song_ids = columns.one_array(dataset.catalog().table.column(columns.SONG_ID))
        for histories in dataset.read_bucket(bucket, USERS_AT_ONCE):
            earlier_histories = histories.before(task.at)
            if len(earlier_histories):
                yield self._table(self._recommender, earlier_histories)

    def _table(self, recommender: BaseRecommender, histories: Histories) -> tuple[pa.Table, int]:
        config = self._task.config
        ranking = recommender.rank(
            histories,
            self._task.at,
            config.k + (POOL if config.explore else 0),
            horizon="long" if config.long_weight else "short",
            filters=without_heard(histories) if config.exclude_heard else None,
        )
        is_song = ranking.songs != NO_SONG
        songs, scores = ranking.songs[is_song], ranking.scores[is_song]
        counts, explored, filled_count = is_song.sum(axis=1), [], int(ranking.filled.sum())
        if config.explore:
            explored = [
                self._explore(recommender, histories.take(np.array([row])), ranking, row) for row in range(len(counts))
            ]
            songs, scores = (
                np.concatenate([getattr(result, name) for result in explored]) for name in ("songs", "scores")
            )
            proposed_counts = counts - ranking.filled
            filled_count = sum(
                int(np.isin(result.songs, ranking.songs[row, proposed_counts[row] :]).sum())
                for row, result in enumerate(explored)
            )
            counts = np.array([len(result.songs) for result in explored])
        offsets = pa.array(offsets_of(counts).astype(np.int32))
        song_ids = self._song_ids.take(pa.array(songs))
        arrays = [
            pa.array(histories.user_ids, pa.string()),
            pa.ListArray.from_arrays(offsets, song_ids),
            pa.ListArray.from_arrays(offsets, pa.array(scores, pa.float32())),
        ]
        if config.explore:
            probabilities = pa.array(np.concatenate([result.probabilities for result in explored]), from_pandas=True)
            arrays.append(pa.ListArray.from_arrays(offsets, probabilities))
        return pa.table(arrays, schema=schema_of(config)), filled_count

    def _explore(self, recommender: BaseRecommender, history: Histories, ranking: Ranking, row: int) -> Explored:
        config, is_song = self._task.config, ranking.songs[row] != NO_SONG
        ranked = ranking.songs[row][is_song], ranking.scores[row][is_song]
        positions = np.arange(min(config.k, int(is_song.sum())))
        return with_explored(recommender, history, self._task.at, ranked, positions, config.explore)
