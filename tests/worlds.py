"""Small data sets written by hand, and song embeddings for them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.dataset import Dataset, bucket_of
from rayrec.data.histories import Histories
from rayrec.storage.artifacts import DatasetManifest, Manifest, publish, write_dataset_manifest
from rayrec.storage.workspace import SONGS_TABLE, Workspace, histories_file, users_file


def write_dataset(
    workspace: Workspace,
    histories: Histories,
    num_songs: int,
    buckets: int = 4,
    times: Literal["real", "positions"] = "real",
) -> Dataset:
    """Write the histories as the data set of a workspace."""
    histories = histories.take(np.argsort(histories.user_ids))
    bucket = bucket_of(histories.user_ids, buckets)
    for number in range(buckets):
        bucket_histories = histories.take(bucket == number)
        workspace.write_table(histories_file(0, number), bucket_histories.to_arrow())
        workspace.write_table(
            users_file(0, number), pa.table({columns.USER: pa.array(bucket_histories.user_ids, pa.string())})
        )
    songs = {
        columns.SONG: pa.array(range(num_songs), pa.int32()),
        columns.SONG_ID: [f"song-{song}" for song in range(num_songs)],
        columns.TITLE: [f"Title {song}" for song in range(num_songs)],
        columns.ARTIST: [f"Artist {song % 7}" for song in range(num_songs)],
    }
    workspace.write_table(SONGS_TABLE, pa.table(songs, schema=columns.SONGS_TABLE))
    manifest = DatasetManifest(
        id="by-hand",
        source="by hand",
        buckets=buckets,
        parts=1,
        users=len(histories),
        plays=histories.num_plays,
        songs=num_songs,
        first_play=int(histories.played_at.min()),
        last_play=int(histories.played_at.max()),
        part_times=[(int(histories.played_at.min()), int(histories.played_at.max()))],
        has_skipped=histories.skipped is not None,
        has_likes=histories.likes is not None,
        times=times,
    )
    write_dataset_manifest(workspace, manifest)
    return Dataset(workspace)


def rename_songs(workspace: Workspace, song_ids: Mapping[int, str]) -> None:
    """Change ids of songs in a data set; `song_ids` maps rows of the catalog to new ids."""
    songs = workspace.read_table(SONGS_TABLE)
    new_ids = [song_ids.get(row, song_id) for row, song_id in enumerate(songs.column(columns.SONG_ID).to_pylist())]
    column = songs.column_names.index(columns.SONG_ID)
    workspace.write_table(
        SONGS_TABLE, songs.set_column(column, columns.SONGS_TABLE.field(columns.SONG_ID), pa.array(new_ids))
    )


def write_song_vectors(workspace: Workspace, vectors: np.ndarray, inputs: dict[str, str]) -> Manifest:
    """Publish vectors, float32 (N, D), as a `songs` artifact whose inputs are `inputs`."""
    manifest = Manifest(kind="songs", id="by-hand", inputs=inputs)
    workspace.write_array(manifest.path("vectors.npy"), vectors)
    return publish(workspace, manifest, ["vectors.npy"])


def random_histories(users: int, num_songs: int, *, longest: int = 30, seed: int = 0) -> Histories:
    """Users with 0 to `longest` plays each, one per minute on average, who start within the first `longest` minutes."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest + 1, size=users)
    starts = random.integers(0, longest * 60_000, size=users)
    return Histories.from_lists(
        songs=[random.integers(0, num_songs, size=length) for length in lengths],  # type: ignore[misc]
        played_at=[  # type: ignore[misc]
            start + np.cumsum(random.integers(1, 120_000, size=length))
            for start, length in zip(starts, lengths, strict=True)
        ],
        user_ids=[f"user-{row}" for row in range(users)],
    )


def with_opinions(histories: Histories, num_songs: int, *, seed: int = 0) -> Histories:
    """Return the histories with a random third of the plays skipped, and up to five likes of random songs per user."""
    random = np.random.default_rng(seed)
    first, last = int(histories.played_at.min()), int(histories.played_at.max())
    likes = [
        [
            (int(random.integers(num_songs)), int(moment))
            for moment in sorted(random.integers(first, last, random.integers(6)))
        ]
        for _ in range(len(histories))
    ]
    no_plays: list[list[int]] = [[] for _ in likes]
    packed_likes = Histories.from_lists(no_plays, no_plays, histories.user_ids.tolist(), likes=likes).likes
    return replace(histories, skipped=random.random(histories.num_plays) < 1 / 3, likes=packed_likes)


def random_vectors(num_songs: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Return random vectors, float32 (N, D), normalized."""
    vectors = np.random.default_rng(seed).normal(size=(num_songs, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
