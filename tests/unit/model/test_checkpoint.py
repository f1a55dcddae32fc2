"""Stored networks and trainings: after loading they equal those that were saved."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NUM_SONGS, MemoryHost, cycling_histories, model_config, network, part_of
from worlds import random_histories

from rayrec.data.histories import Queries
from rayrec.errors import DamagedArtifactError
from rayrec.model import checkpoint
from rayrec.model.checkpoint import export_song_vectors, load_model, load_training, save_model, save_training
from rayrec.model.inference import TasteEncoder
from rayrec.model.song_tables import Share
from rayrec.model.train_config import FeatureSpec, SongTable, TrainConfig
from rayrec.model.training import Training
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

IS_KNOWN = np.arange(NUM_SONGS) % 5 > 0
MANIFEST = Manifest(kind="models", id="m")


@pytest.mark.parametrize("input_table", [False, True])
def test_a_stored_network_gives_the_same_vectors(workspace: Workspace, input_table: bool) -> None:
    features = FeatureSpec(contexts=("a", "b"), hour=True)
    model = network(model_config(layers=2, song_table="trained", features=features, input_table=input_table))
    with torch.no_grad():
        model.songs.weight *= 3  # a trained table is not normalized
        if model.inputs is not None:
            model.inputs.weight.copy_(torch.randn(NUM_SONGS, 8, generator=torch.Generator().manual_seed(2)))
    names = save_model(workspace, MANIFEST.folder, model, np.ones(NUM_SONGS, dtype=bool))
    assert sorted(f"{MANIFEST.folder}/{name}" for name in names) == workspace.files(MANIFEST.folder)
    loaded = load_model(workspace, MANIFEST.folder)
    assert loaded.config == model.config
    assert not any(value.requires_grad for value in loaded.parameters())
    histories = random_histories(20, NUM_SONGS)
    queries = Queries.at_end(histories, 10**9)
    actual, expected = (
        TasteEncoder(taste_model).vectors(histories, queries, "long") for taste_model in (loaded, model)
    )
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_exported_song_vectors_are_normalized_and_zero_where_unknown() -> None:
    model = network()
    with torch.no_grad():
        model.songs.weight *= torch.arange(1, NUM_SONGS + 1).unsqueeze(1)
    vectors = export_song_vectors(model, IS_KNOWN).numpy()
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), IS_KNOWN, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class RecordedShare(Share):
    """A worker that is alone in the process and records the rows that it gives to each gather."""

    gathers: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def total(self, value: float) -> float:
        """Return the number of songs of all workers."""
        return NUM_SONGS

    def interleaved(self, rows: torch.Tensor, total: int) -> torch.Tensor | None:
        """Record `rows` and return None: no rows come from other workers."""
        self.gathers.append((rows, total))
        return None


@pytest.mark.parametrize(("workers", "at_once"), [(7, 4), (7, 8), (7, 3), (4, 5), (90, 4)])
def test_workers_without_rows_left_still_take_part_in_every_gather(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, workers: int, at_once: int
) -> None:
    monkeypatch.setattr(checkpoint, "SONGS_AT_ONCE", at_once)
    model = network(model_config(song_table="trained", input_table=True))
    shares = [RecordedShare(rank=rank, workers=workers) for rank in range(workers)]
    for share in shares:
        save_model(workspace, "models/m", part_of(model, share), share.own(IS_KNOWN), share)
    rounds = -(-NUM_SONGS // (workers * at_once))
    for share in shares:
        assert [total for _, total in share.gathers] == [total for _, total in shares[0].gathers]
        assert len(share.gathers) == 2 * rounds  # for each of the two tables
    gathered_rows = [rows for parts in zip(*(share.gathers for share in shares), strict=True) for rows, _ in parts]
    assert sum(map(len, gathered_rows)) == 2 * NUM_SONGS


def test_song_vectors_of_another_network_are_noticed(workspace: Workspace) -> None:
    save_model(workspace, MANIFEST.folder, network(), IS_KNOWN)
    workspace.write_array(MANIFEST.path("song_vectors.npy"), np.zeros((3, 8), np.float32))
    with pytest.raises(DamagedArtifactError, match=r"shape \(3, 8\); expected \(60, 8\); run `rayrec train --force`"):
        load_model(workspace, MANIFEST.folder)


def train(config: TrainConfig, epochs: int) -> Training:
    training = Training(network(model_config(config)), config, np.ones(NUM_SONGS), device="cpu", share=Share())
    host = MemoryHost({"final": cycling_histories(20)}, config)
    for epoch in range(epochs):
        training.epoch(host.windows("final", epoch), epoch, on_step=lambda _: None)
    return training


@pytest.mark.parametrize("table", ["trained", "frozen"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_training_is_restored_with_its_optimizers(tmp_path: Path, table: SongTable, epochs: int) -> None:
    config = TrainConfig(hidden_dim=8, window=10, batch=8, negatives=10, long=(2, 3), song_table=table)
    training = train(config, epochs)
    best = {"a": torch.arange(3.0)}
    save_training(tmp_path, training.state(), best, {"epoch": epochs}, Share())
    fresh = train(config, 0)
    loaded_best, progress = load_training(tmp_path, fresh)
    assert progress == {"epoch": epochs}
    assert loaded_best is not None
    assert torch.equal(loaded_best["a"], best["a"])
    for name, value in training.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], value)
    restored_state, saved_state = fresh.state(), training.state()
    assert any(name.startswith("inputs.weight/") for name in saved_state.rows) is (table == "trained")
    for actual, expected in ((restored_state.common, saved_state.common), (restored_state.rows, saved_state.rows)):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name


def test_a_checkpoint_without_best_weights_loads_none(tmp_path: Path) -> None:
    training = train(TrainConfig(hidden_dim=8, window=10, batch=8, negatives=10, long=(2, 3)), 0)
    save_training(tmp_path, training.state(), None, {}, Share())
    assert load_training(tmp_path, training)[0] is None


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    training = train(TrainConfig(hidden_dim=8, window=10, batch=8, negatives=10, long=(2, 3)), 1)
    save_training(tmp_path, training.state(), None, {}, Share())
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


MEASURE = """
import sys
import numpy as np
import torch
from rayrec.data.histories import Histories
from rayrec.model.checkpoint import load_model
from rayrec.model.inference import TasteEncoder
from rayrec.storage.workspace import Workspace
torch.set_num_threads(1)  # as workers do: each thread keeps freed memory of its own
encoder = TasteEncoder(load_model(Workspace(sys.argv[1]), "models/m"))
songs = np.random.default_rng(0).integers(encoder.model.config.num_songs, size=(200, 50))
encoder.run(Histories.from_lists(songs, [np.arange(50)] * 200))
fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(int(fields["Private_Dirty"].split()[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc/self/smaps_rollup: run it on Linux")
def test_private_memory_of_a_process_does_not_grow_with_the_catalog(tmp_path: Path) -> None:
    kilobytes = []
    for num_songs in (10_000, 400_000):
        workspace = Workspace(tmp_path / str(num_songs))
        config = replace(model_config(num_songs=num_songs), embedding_dim=64)
        save_model(workspace, "models/m", network(config), np.ones(num_songs, dtype=bool))
        command = [sys.executable, "-c", MEASURE, workspace.uri]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
        kilobytes.append(int(output))
    assert kilobytes[1] - kilobytes[0] < 10_000  # the larger table has 102,400 kB
