"""Data several times as large as Ray's object store stream through it, and the spilled bytes stay bounded."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import random_vectors, write_song_vectors

from rayrec.bench.rounds import PlainProcess
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.import_data import import_data
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import train
from rayrec.model.song_tables import Share
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.model.training_windows import ShardReader, window_lengths
from rayrec.storage.artifacts import verify
from rayrec.storage.workspace import Workspace

STORE = 80 << 20  # bytes, about the minimum with which Ray starts
USERS, PLAYS, NUM_SONGS = 4_000, 1_500, 40
# A tiny network: the test is about the data that stream to it. Each window of 20 plays comes with 80 later plays.
CONFIG = TrainConfig(
    hidden_dim=2,
    negatives=4,
    long=(80, 80),
    long_targets=1,
    averages=(),
    song_table="frozen",
    window=20,
    batch=2_000,
    epochs=1,
    workers=1,
)


def write_plays(folder: Path) -> str:
    """Write files of 500 users each, with one play per minute and user; return the folder."""
    folder.mkdir()
    for number, first_user in enumerate(range(0, USERS, 500)):
        rows = np.arange(500 * PLAYS)
        users = pa.array([f"u{user}" for user in range(first_user, first_user + 500)]).take(pa.array(rows // PLAYS))
        songs = pa.array([f"s{song}" for song in range(NUM_SONGS)]).take(pa.array(rows * 7 % NUM_SONGS))
        times = pa.array(1_400_000_000_000 + rows % PLAYS * 60_000)
        pq.write_table(pa.table({"user": users, "song": songs, "played_at": times}), folder / f"{number}.parquet")
    return str(folder)


class SpillWatch(threading.Thread):
    """Records the most bytes that a folder holds at any moment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak, self._ended = folder, 0, threading.Event()

    def __enter__(self) -> "SpillWatch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, sum(_size(path) for path in self.folder.rglob("*")))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def run_stages(plays: str, folder: str, spill_folder: str) -> dict[str, Any]:
    """Run import, train and taste with a small store; return the artifacts and the peak of spilled bytes by stage."""
    workspace, results = Workspace(folder), dict[str, Any]()
    Path(spill_folder).mkdir()
    with ray_cluster(num_cpus=2, object_store_memory=STORE, object_spilling_directory=spill_folder):

        def run_watched(name: str, stage: Any) -> Any:
            with SpillWatch(Path(spill_folder)) as watch:
                artifact = stage()
            results[name] = watch.peak
            return artifact

        config = ImportConfig(format="parquet", paths=(plays,), buckets=16)
        dataset = run_watched("import", lambda: import_data(workspace, config))
        write_song_vectors(workspace, random_vectors(NUM_SONGS), {"dataset": dataset.id})
        results["model"] = run_watched("train", lambda: train(workspace, CONFIG))
        results["tastes"] = run_watched("taste", lambda: compute_tastes(workspace, TasteConfig()))
    return results


def streamed_bytes(workspace: Workspace) -> int:
    """Return the total bytes of the tables of windows that a training reads in one epoch."""
    dataset = Dataset(workspace)
    lengths = window_lengths(dataset, FitRange(), CONFIG)
    reader = ShardReader(dataset, FitRange(), CONFIG, lengths, Share())
    return sum(table.nbytes for table in reader.tables(reader.batches(0)))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_data_larger_than_the_object_store_stream_through_it(tmp_path: Path, record_property: Any) -> None:
    plays, workspace = write_plays(tmp_path / "plays"), Workspace(tmp_path / "workspace")
    with PlainProcess(0) as driver:
        results = driver.run(run_stages, plays, workspace.root, str(tmp_path / "spills"))
    size = streamed_bytes(workspace)
    record_property("streamed_mb", size / 2**20)
    record_property("spilled_mb", {stage: results[stage] / 2**20 for stage in ("import", "train", "taste")})
    assert size > 3 * STORE
    assert results["train"] < size / 4
    assert max(results["import"], results["taste"]) < STORE / 4  # these stages keep their data out of the store
    assert Dataset(workspace).manifest.plays == USERS * PLAYS
    assert results["model"].metrics["plays"] == USERS * (PLAYS - 1)  # a user's last play is no input
    assert (results["tastes"].metrics["users"], results["tastes"].metrics["plays"]) == (USERS, USERS * PLAYS)
    for artifact in (results["model"], results["tastes"]):
        verify(workspace, artifact)
