"""The plain loops do all the work of their stage, and time only the work that they count."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import random_histories, write_dataset

from rayrec.bench import stage_benches
from rayrec.bench.stage_benches import TrainTask
from rayrec.data import columns
from rayrec.data.histories import concatenate
from rayrec.data.split import FitRange
from rayrec.data.windows import Windows
from rayrec.embeddings.word2vec import EmbedConfig, from_histories, write_corpus
from rayrec.errors import InputError
from rayrec.model.checkpoint import save_model
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import taste_table
from rayrec.model.train_config import FeatureSpec, ModelConfig, TrainConfig
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace

SONGS = 50


@pytest.fixture
def task(workspace: Workspace) -> TrainTask:
    write_dataset(workspace, random_histories(300, SONGS), SONGS)
    config = TrainConfig(hidden_dim=8, batch=16, negatives=8, window=10)
    model = ModelConfig(
        num_songs=SONGS,
        embedding_dim=4,
        hidden_dim=8,
        num_layers=1,
        dropout=0.0,
        features=FeatureSpec(),
        horizons=config.horizons,
        song_table="trained",
        logit_scales={"short": 9.0, "long": 6.0},
        cell="gru",
        averages=(),
        input_table=False,
    )
    return TrainTask(workspace=workspace, config=config, model=model, counts=np.ones(SONGS, dtype=np.int64))


class Clock:
    """A clock that advances by one second at each look, and by what a test adds to `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    return clock


class TestTrainLoop:
    def test_an_epoch_holds_every_play_but_each_users_last_as_an_input_once(self, task: TrainTask) -> None:
        batches = list(stage_benches.plain_windows(task, epoch=0))
        histories = concatenate(list(stage_benches.Dataset(task.workspace).read_all()))
        assert sum(int(windows.inputs.sum()) for windows in batches) == np.maximum(histories.lengths - 1, 0).sum()
        assert max(len(windows) for windows in batches) < 2 * task.config.batch

    def test_warm_steps_are_trained_on_but_not_timed(self, task: TrainTask, clock: Clock) -> None:
        delay = 1_000.0

        def delayed_batches() -> Iterator[Windows]:
            for number, windows in enumerate(stage_benches.plain_windows(task, epoch=0)):
                clock.now += delay if number <= stage_benches.WARM_STEPS - 1 else 0.0
                yield windows

        all_batches = list(stage_benches.plain_windows(task, epoch=0))
        measured = stage_benches.timed_steps(task.training(), delayed_batches(), 0, seconds=1e9)
        assert measured.seconds < delay
        assert measured.work == sum(int(windows.inputs.sum()) for windows in all_batches[stage_benches.WARM_STEPS :])

    def test_a_round_ends_when_its_seconds_are_over(self, task: TrainTask, clock: Clock) -> None:
        all_batches = list(stage_benches.plain_windows(task, epoch=0))
        measured = stage_benches.timed_steps(task.training(), iter(all_batches), 0, seconds=3)
        timed_batches = all_batches[stage_benches.WARM_STEPS : stage_benches.WARM_STEPS + 3]
        assert measured.work == sum(int(windows.inputs.sum()) for windows in timed_batches)

    def test_too_few_batches_are_refused(self, task: TrainTask) -> None:
        batches = list(stage_benches.plain_windows(task, epoch=0))[: stage_benches.WARM_STEPS]
        with pytest.raises(InputError, match="increase --users"):
            stage_benches.timed_steps(task.training(), iter(batches), 0, seconds=1)

    def test_it_trains_the_network(self, task: TrainTask) -> None:
        training = task.training()
        weights_before = training.model.dense.weight.detach().clone()
        assert stage_benches.timed_steps(training, stage_benches.plain_windows(task, 0), 0, seconds=0.01).work > 0
        assert not torch.equal(weights_before, training.model.dense.weight)
        assert stage_benches.measure_plain_training(task, 0, 0.01).per_second > 0

    def test_the_data_path_counts_from_the_second_batch_on(self, task: TrainTask) -> None:
        all_batches = list(stage_benches.plain_windows(task, epoch=0))
        measured = stage_benches.timed_windows(iter(all_batches), seconds=1e9)
        assert measured.work == sum(int(windows.inputs.sum()) for windows in all_batches[1:])


class TestTasteLoop:
    def test_it_writes_the_tastes_of_all_users(self, task: TrainTask) -> None:
        workspace, model = task.workspace, task.training().model
        manifest = Manifest(kind="models", id="m", inputs={"dataset": "by-hand"})
        names = save_model(workspace, manifest.folder, model, np.ones(SONGS, dtype=np.bool_))
        manifest = publish(workspace, manifest, names)
        at = 10_000_000
        measured = stage_benches.measure_plain_tastes(workspace, manifest, "out", at, users=20)
        histories = concatenate(list(stage_benches.Dataset(workspace).read_all()))
        assert measured.work == histories.num_plays
        expected = taste_table(TasteEncoder(stage_benches.load_model(workspace, manifest.folder)), histories, at)
        rows = [row for path in workspace.files("out") for row in workspace.read_table(path).to_pylist()]
        assert [row[columns.USER] for row in rows] == expected.column(columns.USER).to_pylist()
        np.testing.assert_allclose(
            [row["taste_long"] for row in rows], expected.column("taste_long").to_pylist(), atol=1e-5
        )


def test_the_embed_loop_counts_the_tokens_of_all_epochs(task: TrainTask, tmp_path: Path) -> None:
    sentences = from_histories(stage_benches.Dataset(task.workspace).read_all(), FitRange())
    corpus = write_corpus(sentences, tmp_path / "corpus", SONGS)
    measured = stage_benches.measure_plain_embedding(corpus.path, EmbedConfig(dim=4, epochs=3), 1, corpus.tokens)
    assert measured.work == 3 * corpus.tokens
    assert measured.seconds > 0
