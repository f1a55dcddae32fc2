"""A whole fit on several workers, to the model's files: the model of one worker, and no worker holds a whole table."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from networks import MemoryHost, cycling_histories, model_config
from safetensors.numpy import load_file
from torch import Tensor
from worlds import random_vectors

from rayrec.compat import observed_operations
from rayrec.data.histories import Histories
from rayrec.errors import DamagedArtifactError
from rayrec.model import checkpoint
from rayrec.model import epochs as fitting
from rayrec.model.checkpoint import export_song_vectors, load_model, save_model
from rayrec.model.epochs import RECALL_AT, Fit, FitData, Phase, Validation, start_vectors, validation_metrics
from rayrec.model.network import TABLES, TasteModel
from rayrec.model.song_tables import RowExchange, Share
from rayrec.model.train_config import TrainConfig
from rayrec.storage.workspace import Workspace

SONGS, PLAYED_SONGS, KNOWN_SONGS, DIM = 8_001, 40, 100, 8  # an odd number of songs: workers keep unequal numbers
CUT = 15 * 60_000
CONFIG = TrainConfig(
    hidden_dim=16,
    window=12,
    batch=16,
    negatives=30,
    long=(2, 5),
    epochs=3,
    patience=3,
    learning_rate=0.03,
    table_learning_rate=0.03,
    averaged_part=0.2,
    dropout=0.0,
    checkpoint_minutes=0.0,
)
SONGS_PER_WRITE = 250  # songs per round; of two or four workers, the last one is finished a round before the first
SMALL_LIMITS = {
    (checkpoint, "SONGS_AT_ONCE"): SONGS_PER_WRITE,
    (fitting, "ROWS_AT_ONCE"): 300,
    (fitting, "STEPS_BETWEEN_READS"): 2,
}
SMALL_LIMITS |= {
    (fitting, "SCORES_AT_ONCE"): 20_000,
    (fitting, "USERS_AT_ONCE"): 3,
}  # 37 users: some workers have no user in the last round
RESUMED_CHECKPOINT = 3  # checkpoint from which a fit is resumed, in the second epoch
WAYS = {1: ("fresh", "resumed from 4"), 2: ("fresh", "resumed from 1"), 4: ("fresh", "resumed from 2")}


class LargestTensor:
    """Records the most elements of any tensor that an operation reads or writes, and the most rows of any matrix."""

    def __init__(self) -> None:
        self.numbers = self.rows = 0

    def add(self, operation: str, tensors: list[Tensor]) -> None:
        """Compare the tensors of one operation, as `observed_operations` gives them, with the largest so far."""
        for tensor in tensors:
            self.numbers = max(self.numbers, tensor.numel())
            self.rows = max(self.rows, len(tensor) if tensor.dim() == 2 else 0)


def fit_of(share: Share, folder: Path | None) -> tuple[Fit, Validation]:
    histories = cycling_histories(37, num_songs=PLAYED_SONGS)
    plays: dict[Phase, Histories] = {"selection": histories.before(CUT), "final": histories}
    validation = Validation(histories=histories, plays=np.flatnonzero(histories.played_at >= CUT))
    host = MemoryHost(plays, CONFIG, folder, share=share)
    vectors = random_vectors(SONGS - 1, DIM)  # the last song is newer than the vectors
    vectors[KNOWN_SONGS:] = 0  # these songs start from random rows, and are not recommended
    data = {phase: FitData(vectors=vectors, counts=np.bincount(histories.songs, minlength=SONGS)) for phase in plays}
    shape = replace(model_config(CONFIG), num_songs=SONGS)
    return Fit(shape, CONFIG, data, host, validation=validation, share=share), validation


def fit_all(share: Share, folder: Path, ways: Sequence[str]) -> None:
    """For each of `ways`, write the files of a fit from its start, or resumed from another number of workers."""
    torch.set_num_threads(1)
    for way in ways:
        fit_folder = Path(f"{folder}/{share.workers} {way}")
        largest = LargestTensor()
        with observed_operations(largest.add):
            fit, _ = fit_of(share, fit_folder / "checkpoints")
            if way != "fresh":
                fit.resume(Path(f"{folder}/{way.rpartition(' ')[2]} fresh/checkpoints/{RESUMED_CHECKPOINT}"))
            model = fit.run()
            save_model(Workspace(fit_folder), "models/m", model, fit.known, share)
        report = {"numbers": largest.numbers, "rows": largest.rows, "epochs": fit.progress.epochs}
        (fit_folder / f"{share.rank}.json").write_text(json.dumps(report))
    random = torch.Generator().manual_seed(1)
    vectors, (_, validation) = torch.randn(SONGS, DIM, generator=random), fit_of(share, None)
    vectors[3:900:7] = 0
    tastes = vectors[validation.histories.songs[validation.plays]] + torch.randn(
        len(validation.plays), DIM, generator=random
    )
    metrics = validation_metrics(tastes, share.own(vectors), validation, share)
    (folder / f"figures {share.workers} {share.rank}.json").write_text(json.dumps(metrics))


def _run_worker(rank: int, workers: int, folder: str, ways: Sequence[str]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init_method = f"file://{folder}/{workers} {ways[0]}.meeting"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=workers)
    for (module, name), value in SMALL_LIMITS.items():
        setattr(module, name, value)
    fit_all(Share(rank=rank, workers=workers), Path(folder), ways)
    dist.barrier()
    os._exit(0)  # gloo's threads outlive the group and abort an interpreter that exits normally


def spawn(workers: int, folder: Path, ways: Sequence[str]) -> None:
    torch.multiprocessing.spawn(_run_worker, args=(workers, str(folder), ways), nprocs=workers)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the files of a fit on one worker and one on four, by number of workers and way."""
    fits_folder = tmp_path_factory.mktemp("fits")
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in SMALL_LIMITS.items():
            patch.setattr(module, name, value)
        fit_all(Share(), fits_folder, WAYS[1][:1])
        spawn(4, fits_folder, WAYS[4][:1])
        yield fits_folder


@pytest.fixture(scope="module")
def all_fits(fresh: Path) -> Path:
    """The folder of `fresh`, to which the fits on two workers and all resumed fits are added."""
    spawn(2, fresh, WAYS[2])
    spawn(4, fresh, WAYS[4][1:])
    fit_all(Share(), fresh, WAYS[1][1:])
    return fresh


@pytest.fixture
def folder(request: pytest.FixtureRequest, fresh: Path) -> Path:
    """The folder of `all_fits` for a test marked as slow, of `fresh` for others."""
    return request.getfixturevalue("all_fits") if request.node.get_closest_marker("slow") else fresh


def read_report(folder: Path, way: str, rank: int) -> dict[str, Any]:
    return dict(json.loads((folder / way / f"{rank}.json").read_text()))


ALL_WAYS = [f"{workers} {way}" for workers, ways in WAYS.items() for way in ways]
slow = pytest.mark.slow


@pytest.mark.parametrize("way", [way if way == "4 fresh" else pytest.param(way, marks=slow) for way in ALL_WAYS[1:]])
def test_a_fit_makes_the_same_model_on_any_number_of_workers_and_resumed_with_another(folder: Path, way: str) -> None:
    single_model, model = (load_model(Workspace(folder / item), "models/m") for item in (ALL_WAYS[0], way))
    assert single_model.config == model.config
    for name, value in single_model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=2e-3, rtol=0, msg=name)
    single_report = read_report(folder, ALL_WAYS[0], 0)
    reports = [read_report(folder, way, rank) for rank in range(int(way[0]))]
    selection = [line for line in single_report["epochs"] if line["phase"] == "selection"]
    assert all(0.05 < line[f"validation_recall@{RECALL_AT}"] < 1 for line in selection)
    for line, *lines in zip(single_report["epochs"], *(item["epochs"] for item in reports), strict=True):
        for name in set(line) - {"seconds", "plays_per_second"}:
            assert all(item[name] == lines[0][name] for item in lines), name
            assert lines[0][name] == pytest.approx(line[name], abs=2e-3), name


@pytest.mark.parametrize(
    ("workers", "number"), [(4, 0), *(pytest.param(*case, marks=slow) for case in ((2, 0), (2, 1), (4, 1)))]
)
def test_no_worker_holds_a_table_whole_from_the_start_to_the_model_file(
    folder: Path, workers: int, number: int
) -> None:
    """This covers the start, steps, validation, checkpoints, resuming and export."""
    single_report = read_report(folder, ALL_WAYS[0], 0)
    assert single_report["numbers"] == 3 * SONGS * DIM  # two moments and the average of a table
    assert single_report["rows"] == SONGS
    for rank in range(workers):
        report = read_report(folder, f"{workers} {WAYS[workers][number]}", rank)
        worker_rows = len(range(rank, SONGS, workers))
        assert report["numbers"] == 3 * worker_rows * DIM
        assert report["rows"] == max(worker_rows, SONGS_PER_WRITE * workers)  # each worker writes that many at once


@pytest.mark.parametrize("workers", [4, pytest.param(2, marks=slow)])
def test_the_ranks_among_all_songs_are_counted_by_all_workers(folder: Path, workers: int) -> None:
    expected = json.loads((folder / "figures 1 0.json").read_text())
    assert 0.1 < expected[f"validation_recall@{RECALL_AT}"] < 0.9
    for rank in range(workers):
        assert json.loads((folder / f"figures {workers} {rank}.json").read_text()) == expected


def test_the_parts_of_a_checkpoint_hold_each_row_once(folder: Path) -> None:
    parts = sorted((folder / "4 fresh" / "checkpoints" / str(RESUMED_CHECKPOINT)).glob("rows-*"))
    sizes = [load_file(part)["songs.weight/mean"].shape for part in parts]
    assert sizes == [(len(range(rank, SONGS, 4)), DIM) for rank in range(4)]
    slots = [f"{table}/{slot}" for table in TABLES for slot in ("table", "mean", "square", "average", "seen")]
    assert set(load_file(parts[0])) == {*slots, *(f"best/{table}" for table in TABLES)}


def test_a_checkpoint_that_lacks_a_part_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint_folder = folder / "4 fresh" / "checkpoints" / str(RESUMED_CHECKPOINT)
    for path in checkpoint_folder.iterdir():
        if "rows-00000" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fit, _ = fit_of(Share(), None)
    with pytest.raises(DamagedArtifactError, match="is incomplete: it holds the rows of only 3 workers"):
        fit.resume(tmp_path)


def test_the_start_of_a_table_is_the_same_for_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = random_vectors(50)
    vectors[7:30:3] = 0
    full = start_vectors(vectors, seed=1, num_songs=61)
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 4)
    for workers in (1, 2, 3, 8):
        for rank in range(workers):
            share = Share(rank=rank, workers=workers)
            part = start_vectors(vectors, seed=1, num_songs=61, share=share)
            np.testing.assert_array_equal(part, share.own(full))


def test_a_network_of_few_songs_answers_as_the_whole_one() -> None:
    """Validation uses such a network."""
    torch.manual_seed(0)
    model = TasteModel(model_config(CONFIG, num_songs=PLAYED_SONGS), torch.from_numpy(random_vectors(PLAYED_SONGS)))
    songs = np.array([3, 5, 8])
    vectors = export_song_vectors(model, np.ones(PLAYED_SONGS, dtype=bool))
    small_model = fitting.network_of_songs(model, vectors, RowExchange(Share()), songs)
    torch.testing.assert_close(small_model.song_vectors(torch.arange(3)), model.song_vectors(torch.from_numpy(songs)))
