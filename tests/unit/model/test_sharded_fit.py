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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import random_vectors

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

SONGS, PLAYED, KNOWN, DIM = 8_001, 40, 100, 8  # an odd number of songs: workers keep unequal numbers
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
WRITTEN = 250  # songs per round; of two or four workers, the last one is finished a round before the first
SMALL = {(checkpoint, "SONGS_AT_ONCE"): WRITTEN, (fitting, "ROWS_AT_ONCE"): 300, (fitting, "STEPS_BETWEEN_READS"): 2}
SMALL |= {
    (fitting, "SCORES_AT_ONCE"): 20_000,
    (fitting, "USERS_AT_ONCE"): 3,
}  # 37 users: some workers have no user in the last round
PART_WAY = 3  # checkpoint from which a fit is resumed, in the second epoch
WAYS = {1: ("fresh", "resumed from 4"), 2: ("fresh", "resumed from 1"), 4: ("fresh", "resumed from 2")}


class LargestTensor(TorchDispatchMode):  # type: ignore[misc]
    """Records the most elements of any tensor that an operation reads or writes, and the most rows of any matrix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, made)):
            if isinstance(leaf, Tensor):
                self.numbers = max(self.numbers, leaf.numel())
                self.rows = max(self.rows, len(leaf) if leaf.dim() == 2 else 0)
        return made


def fit_of(share: Share, folder: Path | None) -> tuple[Fit, Validation]:
    histories = cycling_histories(37, num_songs=PLAYED)
    plays: dict[Phase, Histories] = {"selection": histories.before(CUT), "final": histories}
    asked = Validation(histories=histories, plays=np.flatnonzero(histories.played_at >= CUT))
    host = MemoryHost(plays, CONFIG, folder, share=share)
    vectors = random_vectors(SONGS - 1, DIM)  # the last song is newer than the vectors
    vectors[KNOWN:] = 0  # these songs start from random rows, and are not recommended
    data = {phase: FitData(vectors=vectors, counts=np.bincount(histories.songs, minlength=SONGS)) for phase in plays}
    shape = replace(model_config(CONFIG), num_songs=SONGS)
    return Fit(shape, CONFIG, data, host, validation=asked, share=share), asked


def fit_all(share: Share, folder: Path, ways: Sequence[str]) -> None:
    """For each of `ways`, write the files of a fit from its start, or resumed from another number of workers."""
    torch.set_num_threads(1)
    for way in ways:
        made = Path(f"{folder}/{share.workers} {way}")
        with LargestTensor() as largest:
            fit, _ = fit_of(share, made / "checkpoints")
            if way != "fresh":
                fit.resume(Path(f"{folder}/{way.rpartition(' ')[2]} fresh/checkpoints/{PART_WAY}"))
            model = fit.run()
            save_model(Workspace(made), "models/m", model, fit.known, share)
        told = {"numbers": largest.numbers, "rows": largest.rows, "epochs": fit.progress.epochs}
        (made / f"{share.rank}.json").write_text(json.dumps(told))
    random = torch.Generator().manual_seed(1)
    vectors, (_, asked) = torch.randn(SONGS, DIM, generator=random), fit_of(share, None)
    vectors[3:900:7] = 0
    tastes = vectors[asked.histories.songs[asked.plays]] + torch.randn(len(asked.plays), DIM, generator=random)
    figures = validation_metrics(tastes, share.own(vectors), asked, share)
    (folder / f"figures {share.workers} {share.rank}.json").write_text(json.dumps(figures))


def _one_of(rank: int, workers: int, folder: str, ways: Sequence[str]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/{workers} {ways[0]}.meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    for (module, name), value in SMALL.items():
        setattr(module, name, value)
    fit_all(Share(rank=rank, workers=workers), Path(folder), ways)
    dist.barrier()
    os._exit(0)  # gloo's threads outlive the group and abort an interpreter that exits normally


def spawn(workers: int, folder: Path, ways: Sequence[str]) -> None:
    torch.multiprocessing.spawn(_one_of, args=(workers, str(folder), ways), nprocs=workers)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the files of a fit on one worker and one on four, by number of workers and way."""
    made = tmp_path_factory.mktemp("fits")
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in SMALL.items():
            patch.setattr(module, name, value)
        fit_all(Share(), made, WAYS[1][:1])
        spawn(4, made, WAYS[4][:1])
        yield made


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


def told(folder: Path, way: str, rank: int) -> dict[str, Any]:
    return dict(json.loads((folder / way / f"{rank}.json").read_text()))


ALL_WAYS = [f"{workers} {way}" for workers, ways in WAYS.items() for way in ways]
slow = pytest.mark.slow


@pytest.mark.parametrize("way", [way if way == "4 fresh" else pytest.param(way, marks=slow) for way in ALL_WAYS[1:]])
def test_a_fit_makes_the_same_model_on_any_number_of_workers_and_resumed_with_another(folder: Path, way: str) -> None:
    alone, other = (load_model(Workspace(folder / each), "models/m") for each in (ALL_WAYS[0], way))
    assert alone.config == other.config
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, atol=2e-3, rtol=0, msg=name)
    first, others = told(folder, ALL_WAYS[0], 0), [told(folder, way, rank) for rank in range(int(way[0]))]
    selection = [line for line in first["epochs"] if line["phase"] == "selection"]
    assert all(0.05 < line[f"validation_recall@{RECALL_AT}"] < 1 for line in selection)
    for line, *lines in zip(first["epochs"], *(each["epochs"] for each in others), strict=True):
        for name in set(line) - {"seconds", "plays_per_second"}:
            assert all(each[name] == lines[0][name] for each in lines), name
            assert lines[0][name] == pytest.approx(line[name], abs=2e-3), name


@pytest.mark.parametrize(
    ("workers", "number"), [(4, 0), *(pytest.param(*case, marks=slow) for case in ((2, 0), (2, 1), (4, 1)))]
)
def test_no_worker_holds_a_table_whole_from_the_start_to_the_model_file(
    folder: Path, workers: int, number: int
) -> None:
    """This covers the start, steps, validation, checkpoints, resuming and export."""
    whole = told(folder, ALL_WAYS[0], 0)
    assert whole["numbers"] == 3 * SONGS * DIM  # two moments and the average of a table
    assert whole["rows"] == SONGS
    for rank in range(workers):
        part = told(folder, f"{workers} {WAYS[workers][number]}", rank)
        own = len(range(rank, SONGS, workers))
        assert part["numbers"] == 3 * own * DIM
        assert part["rows"] == max(own, WRITTEN * workers)  # WRITTEN rows of each worker are written at a time


@pytest.mark.parametrize("workers", [4, pytest.param(2, marks=slow)])
def test_the_ranks_among_all_songs_are_counted_by_all_workers(folder: Path, workers: int) -> None:
    alone = json.loads((folder / "figures 1 0.json").read_text())
    assert 0.1 < alone[f"validation_recall@{RECALL_AT}"] < 0.9
    for rank in range(workers):
        assert json.loads((folder / f"figures {workers} {rank}.json").read_text()) == alone


def test_a_checkpoint_is_of_parts_that_hold_each_row_once(folder: Path) -> None:
    parts = sorted((folder / "4 fresh" / "checkpoints" / str(PART_WAY)).glob("rows-*"))
    sizes = [load_file(part)["songs.weight/mean"].shape for part in parts]
    assert sizes == [(len(range(rank, SONGS, 4)), DIM) for rank in range(4)]
    slots = [f"{table}/{slot}" for table in TABLES for slot in ("table", "mean", "square", "average", "seen")]
    assert set(load_file(parts[0])) == {*slots, *(f"best/{table}" for table in TABLES)}


def test_a_checkpoint_that_lacks_a_part_is_refused(folder: Path, tmp_path: Path) -> None:
    made = folder / "4 fresh" / "checkpoints" / str(PART_WAY)
    for path in made.iterdir():
        if "rows-00000" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fit, _ = fit_of(Share(), None)
    with pytest.raises(DamagedArtifactError, match="is incomplete: it holds the rows of only 3 workers"):
        fit.resume(tmp_path)


def test_the_start_of_a_table_is_the_same_for_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = random_vectors(50)
    vectors[7:30:3] = 0
    whole = start_vectors(vectors, seed=1, num_songs=61)
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 4)
    for workers in (1, 2, 3, 8):
        for rank in range(workers):
            share = Share(rank=rank, workers=workers)
            own = start_vectors(vectors, seed=1, num_songs=61, share=share)
            np.testing.assert_array_equal(own, share.own(whole))


def test_a_network_of_few_songs_answers_as_the_whole_one() -> None:
    """Validation uses such a network."""
    torch.manual_seed(0)
    model = TasteModel(model_config(CONFIG, num_songs=PLAYED), torch.from_numpy(random_vectors(PLAYED)))
    songs = np.array([3, 5, 8])
    vectors = export_song_vectors(model, np.ones(PLAYED, dtype=bool))
    few = fitting.network_of_songs(model, vectors, RowExchange(Share()), songs)
    torch.testing.assert_close(few.song_vectors(torch.arange(3)), model.song_vectors(torch.from_numpy(songs)))
