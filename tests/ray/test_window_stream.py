"""Files and bytes that the tasks of Ray Data read for each training worker."""

from pathlib import Path

import counted_reads
import pytest
from counted_reads import CountedWorkspace
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.jobs.trainer import WindowStream
from rayrec.model.song_tables import Share
from rayrec.model.train_config import TrainConfig
from rayrec.model.training_windows import ShardReader, window_lengths
from rayrec.storage.workspace import Workspace

BUCKETS = 16
CONFIG = TrainConfig(window=5, batch=64, long=(2, 3))


@pytest.mark.usefixtures("cluster")
def test_each_worker_opens_its_part_of_the_files_once_and_reads_its_part_of_the_bytes(
    workspace: Workspace, tmp_path: Path
) -> None:
    counted_reads.ship()
    write_dataset(workspace, random_histories(600, 10, seed=9), 10, buckets=BUCKETS)
    counted_workspace = CountedWorkspace(workspace.root, tmp_path / "log")
    dataset = Dataset(counted_workspace)
    lengths = window_lengths(dataset, FitRange(), CONFIG)

    def read(rank: int, workers: int) -> tuple[list[str], int]:
        """Return the files opened and the bytes read for one epoch of the worker `rank`."""
        reader = ShardReader(dataset, FitRange(), CONFIG, lengths, Share(rank=rank, workers=workers))
        counted_workspace.reads()
        stream = WindowStream(reader, range(1))
        assert sum(len(windows) for windows in stream.epoch(0)) > 0
        stream.close()
        files, sizes = zip(*counted_workspace.reads(), strict=True)
        return list(files), sum(sizes)

    all_files, all_bytes = read(0, 1)
    assert len(all_files) == len(set(all_files)) == BUCKETS
    assert all_bytes >= sum(Path(file).stat().st_size for file in all_files)
    for workers in (2, 4):
        parts = [read(rank, workers) for rank in range(workers)]
        assert [len(files) for files, _ in parts] == [BUCKETS // workers] * workers
        assert sorted(file for files, _ in parts for file in files) == sorted(all_files)
        assert sum(size for _, size in parts) == all_bytes
        assert max(size for _, size in parts) < 1.2 * all_bytes / workers
