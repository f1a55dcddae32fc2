"""The generate stage: writes the plays of a generated world as a data set, bucket by bucket on Ray."""

from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import bucket_of
from rayrec.data.synthetic import CONTEXTS, GenerateConfig, World
from rayrec.display import progress
from rayrec.errors import InputError
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.storage.artifacts import DatasetManifest, fingerprint, sha256, write_dataset_manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import (
    DATASET,
    DATASET_MANIFEST,
    GENERATING,
    PLAYLISTS,
    SONGS_TABLE,
    Workspace,
    histories_file,
    users_file,
)

USERS_PER_RANGE = 100_000
PLAYLISTS_PER_FILE = 100_000


@writes("generate")
def generate(workspace: Workspace, config: GenerateConfig, *, repeat: bool = False) -> DatasetManifest:
    """Make the data set of a generated world; after a crash, continue with the missing buckets.

    Raises `InputError` if the workspace already has a data set, unless `repeat` replaces it.
    """
    _clear(workspace, config, repeat=repeat)
    world = World(config)
    files = {SONGS_TABLE: workspace.write_table(SONGS_TABLE, world.songs_table())}
    playlist_files, entries = _write_playlists(workspace, world)
    bucket_results = []
    with ray_cluster(), progress("generate", config.buckets) as bar:
        arguments = {"workspace": workspace, "config": config, "buckets": _user_buckets(world)}
        for result in run_buckets(BucketGenerator, range(config.buckets), arguments=arguments):
            bucket_results.append(result)
            bar.advance()
    manifest = _manifest(config, bucket_results, files | playlist_files, entries)
    write_dataset_manifest(workspace, manifest)
    workspace.delete(GENERATING)
    return manifest


class BucketGenerator:
    """A bucket worker: writes the users of one bucket; a bucket whose files exist is only read."""

    def __init__(self, workspace: Workspace, config: GenerateConfig, buckets: np.ndarray) -> None:
        self.workspace, self.world, self.buckets = workspace, World(config), buckets

    def __call__(self, unit: int) -> dict[str, Any]:
        """Return the counts, the time range (ms UTC) and the checksums of the files of bucket `unit`."""
        path, users_path = histories_file(0, int(unit)), users_file(0, int(unit))
        if self.workspace.exists(path):
            files = {name: sha256(self.workspace, name) for name in (path, users_path)}
        else:
            files = self._write(path, users_path, np.flatnonzero(self.buckets == unit))
        return {"files": files, **_summary(self.workspace, path)}

    def _write(self, path: str, users_path: str, users: np.ndarray) -> dict[str, str]:
        user_ids = self.world.user_ids(users)
        users = users[np.argsort(user_ids)]
        user_table = pa.table({columns.USER: pa.array(np.sort(user_ids), pa.string())})
        files = {users_path: self.workspace.write_table(users_path, user_table)}
        omitted_names = () if self.world.config.opinions else (columns.LIKED, columns.LIKED_AT)
        schema = pa.schema([field for field in columns.HISTORIES if field.name not in omitted_names])
        with (
            self.workspace.open_output(path) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for histories in self.world.blocks(users):
                writer.write_table(histories.to_arrow())
        return {**files, path: stream.sha256}


def _clear(workspace: Workspace, config: GenerateConfig, *, repeat: bool) -> None:
    """Delete an earlier data set; keep the finished buckets of an unfinished run with the same config."""
    if workspace.exists(DATASET_MANIFEST):
        if not repeat:
            raise InputError(
                f"workspace {workspace.uri} already has a data set; use another --workspace, or replace it with --force"
            )
        # The manifest goes first, so that a reader does not take half of the old files for a data set.
        workspace.delete(DATASET_MANIFEST)
        workspace.delete(DATASET)
    settings = to_mapping(config)
    if not (workspace.exists(GENERATING) and workspace.read_json(GENERATING) == settings):
        workspace.delete(DATASET)
        workspace.write_json(GENERATING, settings)


def _manifest(
    config: GenerateConfig, bucket_results: list[dict[str, Any]], files: dict[str, str], entries: int
) -> DatasetManifest:
    plays, likes = (sum(result[name] for result in bucket_results) for name in ("plays", "likes"))
    for result in bucket_results:
        files = files | result["files"]
    play_times = [(result["first_play"], result["last_play"]) for result in bucket_results if result["plays"]]
    first_play, last_play = min(first for first, _ in play_times), max(last for _, last in play_times)
    return DatasetManifest(
        id=fingerprint("generate", to_mapping(config), {}),
        source="generated",
        buckets=config.buckets,
        parts=1,
        users=sum(result["users"] for result in bucket_results),
        plays=plays,
        songs=config.songs,
        playlists=config.playlists,
        playlist_entries=entries,
        first_play=first_play,
        last_play=last_play,
        part_times=[(first_play, last_play)],
        contexts=list(CONTEXTS),
        has_skipped=True,
        has_likes=config.opinions > 0,
        read=plays + likes,
        likes=likes,
        config=to_mapping(config),
        files={name.removeprefix(f"{DATASET}/"): digest for name, digest in sorted(files.items())},
        created_at=datetime.now(timezone.utc).isoformat(),
    )


def _user_buckets(world: World) -> np.ndarray:
    """Return uint32 (users,): the bucket of each user by index. Users are hashed `USERS_PER_RANGE` at a time."""
    users = np.arange(world.config.users)
    ranges = (users[start : start + USERS_PER_RANGE] for start in range(0, len(users), USERS_PER_RANGE))
    return np.concatenate(
        [bucket_of(world.user_ids(user_range), world.config.buckets).astype(np.uint32) for user_range in ranges]
    )


def _write_playlists(workspace: Workspace, world: World) -> tuple[dict[str, str], int]:
    """Write the playlists; return path -> sha256 of their files, and the number of entries in them."""
    files, entries = {}, 0
    for file_number, start in enumerate(range(0, world.config.playlists, PLAYLISTS_PER_FILE)):
        indices = np.arange(start, min(start + PLAYLISTS_PER_FILE, world.config.playlists))
        songs, offsets = world.playlists(indices)
        arrays = {
            columns.PLAYLIST: pa.array([f"playlist-{index:06d}" for index in indices.tolist()]),
            columns.SONGS: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(songs)),
        }
        path = f"{PLAYLISTS}/playlists-{file_number:05d}.parquet"
        files[path] = workspace.write_table(path, pa.table(arrays, schema=columns.PLAYLISTS))
        entries += len(songs)
    return files, entries


def _summary(workspace: Workspace, path: str) -> dict[str, int]:
    """Return users, plays, likes and time range (ms UTC) of a histories file, which is read batch by batch."""
    users = plays = likes = last_play = 0
    first_play: int | None = None
    with workspace.open_input(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(columns=[columns.PLAYED_AT, columns.LIKED]):
            likes += len(batch.column(1).flatten()) if batch.num_columns > 1 else 0
            play_times = batch.column(0).flatten().to_numpy()
            users, plays = users + batch.num_rows, plays + len(play_times)
            if len(play_times):
                first_play = int(play_times.min()) if first_play is None else min(first_play, int(play_times.min()))
                last_play = max(last_play, int(play_times.max()))
    return {"users": users, "plays": plays, "likes": likes, "first_play": first_play or 0, "last_play": last_play}
