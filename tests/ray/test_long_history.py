"""One user with ten million plays among users with fifty: import and tastes stay below a stated memory limit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from networks import model_config, network

from rayrec.bench.rounds import WORKER, MemoryWatch
from rayrec.data.dataset import Dataset
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.import_data import import_data
from rayrec.jobs.taste import compute_tastes
from rayrec.model.checkpoint import save_model
from rayrec.model.taste_table import LAST_PLAYED_AT, PLAYS, tastes_file
from rayrec.model.train_config import TasteConfig
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace

LONG_PLAYS, OTHER_USERS, SHORT_PLAYS, NUM_SONGS = 10_000_000, 200, 50, 60
ROWS_PER_GROUP = 1_000_000
START = 1_400_000_000_000
BUCKETS = 4
BYTES_PER_PLAY = 400  # memory limit of a worker, per play of the longest history


def write_plays(path: Path) -> None:
    """Write the long history with plays 10 s apart, and the short ones within the same period."""
    schema = pa.schema([("user", pa.string()), ("song", pa.string()), ("played_at", pa.int64())])
    songs = pa.array([f"s{song}" for song in range(NUM_SONGS)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, LONG_PLAYS, ROWS_PER_GROUP):
            steps = np.arange(start, min(LONG_PLAYS, start + ROWS_PER_GROUP))
            users = pa.array(np.full(len(steps), "long", dtype=object))
            writer.write_table(
                pa.table([users, songs.take(pa.array(steps * 7 % NUM_SONGS)), START + steps * 10_000], schema=schema)
            )
        rows = np.arange(OTHER_USERS * SHORT_PLAYS)
        users = pa.array([f"u{user}" for user in (rows // SHORT_PLAYS).tolist()])
        writer.write_table(
            pa.table([users, songs.take(pa.array(rows % NUM_SONGS)), START + rows * 60_000], schema=schema)
        )


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("cluster")
def test_a_user_with_ten_million_plays_is_imported_and_computed(
    tmp_path: Path, workspace: Workspace, record_property: Callable[[str, object], None]
) -> None:
    write_plays(tmp_path / "plays.parquet")
    config = ImportConfig(format="parquet", paths=(str(tmp_path / "plays.parquet"),), buckets=BUCKETS)
    with MemoryWatch() as import_watch:
        manifest = import_data(workspace, config)
    assert (manifest.users, manifest.plays) == (OTHER_USERS + 1, LONG_PLAYS + OTHER_USERS * SHORT_PLAYS)
    record_property("import_worker_mb", import_watch.peaks_mb[WORKER])
    assert import_watch.peaks_mb[WORKER] * 2**20 < BYTES_PER_PLAY * LONG_PLAYS
    names = save_model(workspace, "models/m", network(model_config()), np.ones(NUM_SONGS, dtype=bool))
    publish(workspace, Manifest(kind="models", id="m", inputs={"dataset": manifest.id}), names)
    with MemoryWatch() as taste_watch:
        tastes = compute_tastes(workspace, TasteConfig())
    record_property("taste_worker_mb", taste_watch.peaks_mb[WORKER])
    assert taste_watch.peaks_mb[WORKER] * 2**20 < BYTES_PER_PLAY * LONG_PLAYS
    rows = pa.concat_tables([workspace.read_table(tastes_file(tastes.folder, bucket)) for bucket in range(BUCKETS)])
    plays = dict(zip(rows["user_id"].to_pylist(), rows[PLAYS].to_pylist(), strict=True))
    assert plays.pop("long") == LONG_PLAYS
    assert len(plays) == OTHER_USERS
    assert set(plays.values()) == {SHORT_PLAYS}
    assert max(rows[LAST_PLAYED_AT].to_pylist()) == START + (LONG_PLAYS - 1) * 10_000
    long_history = Dataset(workspace).history("long")
    assert long_history.num_plays == LONG_PLAYS
    assert (np.diff(long_history.played_at) == 10_000).all()
