"""The train stage on a local cluster: one result for any number of workers, resumed or not."""

import json
import os
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
from ray.cloudpickle import register_pickle_by_value
from trainings import CONFIG as SMALL
from trainings import NUM_SONGS, weights
from witness import ship, wait_for_checkpoint
from worlds import random_vectors, write_dataset, write_song_vectors

from rayrec.config import changed_settings, to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.moments import DAY_MS
from rayrec.data.split import SELECTION_FOLDER, FitRange, Split, SplitConfig, split_dataset, validation_histories
from rayrec.data.synthetic import GenerateConfig
from rayrec.errors import DivergedError, LeakError, MismatchError, RayrecError
from rayrec.jobs import train as job
from rayrec.jobs import trainer
from rayrec.jobs.generate import generate
from rayrec.jobs.job_config import to_toml
from rayrec.jobs.pipeline import run
from rayrec.jobs.train import train
from rayrec.jobs.trainer import WindowStream, load_validation, model_config
from rayrec.model.checkpoint import load_model
from rayrec.model.epochs import Phase
from rayrec.model.song_tables import Share
from rayrec.model.train_config import DaysHorizon, TrainConfig
from rayrec.model.training import StepReport
from rayrec.model.training_windows import ShardReader, stream_batches, window_lengths
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage.artifacts import Manifest, listing, load_manifest, publish, verify
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

CONFIG = SMALL.replace(workers=0, checkpoint_minutes=10.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Workspace:
    """A workspace with a small generated data set."""
    workspace = Workspace(tmp_path_factory.mktemp("train") / "workspace")
    generate(workspace, GenerateConfig(users=150, songs=NUM_SONGS, artists=12, genres=4, plays=25, days=60, buckets=3))
    return workspace


@pytest.fixture(scope="module")
def in_process(world: Workspace, split: Split) -> Manifest:
    """A model trained in this process, without Ray workers."""
    return train(world, CONFIG, split=split)


def test_epochs_are_chosen_by_plays_that_have_one_in_the_horizon() -> None:
    days = [0, 1, 2, 3, 9, 10]
    histories = Histories.from_lists([range(6)], [[day * DAY_MS for day in days]])  # type: ignore[list-item]
    fit_range = FitRange(before=DAY_MS)
    validation = load_validation(histories.to_arrow(), fit_range, 10, DaysHorizon(first_day=1, last_day=2))
    assert validation.plays.tolist() == [1, 2, 4]  # days 3 and 10 have no plays one day later
    assert validation.answers.tolist() == [2, 3, 5]
    assert load_validation(histories.to_arrow(), fit_range, 10).answers.tolist() == [1, 2, 3, 4, 5]


def test_a_horizon_in_days_is_trained_and_kept(world: Workspace, split: Split) -> None:
    model = train(world, CONFIG.replace(long_days=(0, 7), short=(), epochs=1), split=split)
    recommender = TasteRecommender.load(world, model.id)
    assert recommender.long_days == DaysHorizon(first_day=0, last_day=7)
    assert 0 < model.metrics["validation_recall@20"] <= 1


def test_a_model_is_complete_and_answers(world: Workspace, split: Split, in_process: Manifest) -> None:
    verify(world, load_manifest(world, "models", in_process.id))
    network = {"model.safetensors", "model.json", "song_vectors.npy", "input_vectors.npy"}
    selection = {f"{SELECTION_FOLDER}/{name}" for name in network}
    assert set(in_process.files) == network | selection | {"figures.json", "epochs.jsonl", "play_counts.npy"}
    assert in_process.inputs == {"dataset": split.dataset, "songs": "by-hand", "split": split.id}
    assert in_process.metrics.keys() >= {"seconds", "epochs", "loss", "plays_per_second", "validation_recall@20"}
    assert 0 < in_process.metrics["validation_recall@20"] <= 1
    recommender = TasteRecommender.load(world, in_process.id)
    histories = next(Dataset(world).read_bucket(0))
    songs, scores = recommender.recommend(histories, split.test_from, 5)
    assert (songs >= 0).all()
    assert (np.abs(scores) <= 1.0001).all()


@pytest.mark.slow  # compiles C++
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: install Debian's package g++")
def test_a_compiled_training_learns_the_same(
    world: Workspace, split: Split, in_process: Manifest, tmp_path: Path
) -> None:
    workspace = Workspace(shutil.copytree(world.root, tmp_path / "copied"))  # other tests must not find this model
    model = train(workspace, CONFIG.replace(compiled=True), split=split, repeat=True)
    assert model.metrics["loss"] == pytest.approx(in_process.metrics["loss"], rel=1e-3)
    assert model.metrics["validation_recall@20"] == pytest.approx(in_process.metrics["validation_recall@20"], abs=0.02)


def test_the_lines_of_the_epochs_tell_both_phases(world: Workspace, split: Split, in_process: Manifest) -> None:
    lines = [json.loads(line) for line in world.read_bytes(in_process.path("epochs.jsonl")).splitlines()]
    assert [line["phase"] for line in lines[:2]] == ["selection", "selection"]
    assert lines[-1]["phase"] == "final"
    dataset = Dataset(world)
    for phase, allowed in (("selection", split.selection), ("final", split.final)):
        inputs = sum(int((allowed.select(plays).lengths - 1).sum()) for plays in dataset.read_all())
        assert {line["plays"] for line in lines if line["phase"] == phase} == {inputs}


def test_the_same_training_is_found_again(world: Workspace, split: Split, in_process: Manifest) -> None:
    assert train(world, CONFIG, split=split) == in_process
    other_config = CONFIG.replace(workers=1, checkpoint_minutes=1.0)
    assert train(world, other_config, split=split) == in_process


def test_a_network_of_playlists_sees_songs_alone_and_says_that_no_split_cut_them(
    world: Workspace, split: Split
) -> None:
    config = TrainConfig(**TrainConfig.PRESETS["r_pst"]).replace(hidden_dim=8, window=20, epochs=1, workers=0)
    model = train(world, config, split=split)
    assert model.metrics["source"] == "playlists"
    assert "a split cannot cut them" in model.metrics["warning"]
    entries = Dataset(world).manifest.playlist_entries
    assert model.metrics["plays"] == entries - Dataset(world).manifest.playlists  # all but each playlist's last
    recommender = TasteRecommender.load(world, model.id)
    assert load_model(world, model.folder).config.features.dim == 0
    histories = next(Dataset(world).read_bucket(0))
    songs, _ = recommender.recommend(histories, split.test_from, 5)
    assert (songs >= 0).all()


def test_playlists_shorter_than_the_horizon_cannot_be_trained_on(world: Workspace, split: Split) -> None:
    config = TrainConfig(**TrainConfig.PRESETS["r_plt"]).replace(hidden_dim=8, long=(60, 70), epochs=1, workers=0)
    message = r"no training sequence \(source: playlists\) is long enough for a horizon of 60 to 70 plays later"
    with pytest.raises(RayrecError, match=message):
        train(world, config, split=split)


def _train_and_die_in_second_epoch(arguments: dict[str, Any]) -> None:
    """Train, but exit in the second epoch, once the checkpoint of the first one is stored."""
    from rayrec.jobs import trainer as trainer_module

    original_stepped = trainer_module.WorkerHost.stepped

    def die_in_second_epoch(host: Any, phase: Phase, report: StepReport, loss: float) -> None:
        if report.epoch == 1 and report.step == 1:
            wait_for_checkpoint()  # of the first epoch
            os._exit(1)
        original_stepped(host, phase, report, loss)

    trainer_module.WorkerHost.stepped = die_in_second_epoch  # type: ignore[method-assign]
    trainer_module.train_worker(arguments)


def _train_and_note_first_step(arguments: dict[str, Any]) -> None:
    """Train, and write the number of workers and the phase, epoch and step of the first step to a file."""
    from rayrec.jobs import trainer as trainer_module

    original_stepped = trainer_module.WorkerHost.stepped

    def note_first_step(host: Any, phase: Phase, report: StepReport, loss: float) -> None:
        workspace, context = arguments["plan"].workspace, ray.train.get_context()
        path = f"steps/{context.get_world_rank()}.json"
        if not workspace.exists(path):
            workspace.write_json(path, [context.get_world_size(), phase, report.epoch, report.step])
        original_stepped(host, phase, report, loss)

    trainer_module.WorkerHost.stepped = note_first_step  # type: ignore[method-assign]
    trainer_module.train_worker(arguments)


@pytest.mark.slow
def test_a_killed_training_resumes_with_other_workers_to_the_same_result(
    world: Workspace, split: Split, in_process: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    ship()
    monkeypatch.setattr(trainer, "WORKER_FAILURES", 0)
    monkeypatch.setattr(job, "train_worker", _train_and_die_in_second_epoch)
    models_before = listing(world, "models")
    with pytest.raises(RayrecError, match=r"training failed: .*rayrec train --resume"):
        train(world, CONFIG.replace(workers=1), split=split, repeat=True)
    assert listing(world, "models") == models_before
    monkeypatch.setattr(job, "train_worker", _train_and_note_first_step)
    resumed = train(world, CONFIG.replace(workers=2), split=split, unfinished="resume", repeat=True)
    for rank in range(2):
        assert world.read_json(f"steps/{rank}.json") == [2, "selection", 1, 0]
    expected, actual = weights(world, in_process), weights(world, resumed)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-4, rtol=0, err_msg=name)
    assert resumed.metrics["loss"] == pytest.approx(in_process.metrics["loss"], rel=1e-4)
    assert resumed.metrics["validation_recall@20"] == in_process.metrics["validation_recall@20"]


def test_ray_data_streams_the_batches_of_the_plain_loop_and_none_of_the_validation_range(
    world: Workspace, split: Split
) -> None:
    dataset = Dataset(world)
    lengths = window_lengths(dataset, split.selection, CONFIG)
    for rank in range(2):
        reader = ShardReader(dataset, split.selection, CONFIG, lengths, Share(rank=rank, workers=2))
        stream = WindowStream(reader, range(3, 9))
        for epoch in (3, 4, 6):
            if epoch == 4:  # stop after two batches
                assert len(list(islice(stream.epoch(epoch), 2))) == 2
                continue
            streamed, plain = list(stream.epoch(epoch)), list(stream_batches(reader, epoch))
            assert len(streamed) == len(plain) > 3
            for actual, expected in zip(streamed, plain, strict=True):
                np.testing.assert_array_equal(actual.plays.songs, expected.plays.songs)
                np.testing.assert_array_equal(actual.previous_at, expected.previous_at)
                np.testing.assert_array_equal(actual.places, expected.places)
            assert max(windows.plays.played_at.max() for windows in streamed if len(windows)) < split.validation_from
        stream.close()
    assert dataset.manifest.last_play >= split.test_from


def _train_and_note_streams(arguments: dict[str, Any]) -> None:
    """Train, and write the epochs of each stream that is opened to a file."""
    from rayrec.jobs import trainer as trainer_module

    original_stream = trainer_module.WindowStream

    def note_stream(reader: Any, epochs: range) -> Any:
        with Path(f"{arguments['plan'].workspace.root}/streams").open("a", encoding="utf-8") as file:
            file.write(f"{epochs.start} {epochs.stop}\n")
        return original_stream(reader, epochs)

    trainer_module.WindowStream = note_stream  # type: ignore[misc, assignment]
    trainer_module.train_worker(arguments)


def test_all_epochs_of_a_phase_come_from_one_stream(
    world: Workspace, split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One stream per epoch would be slow: each stream starts processes whose imports take 3 CPU seconds."""
    register_pickle_by_value(sys.modules[__name__])
    shutil.copytree(world.root, tmp_path / "workspace")
    monkeypatch.setattr(job, "train_worker", _train_and_note_streams)
    config = CONFIG.replace(workers=1, epochs=3, patience=3)
    model = train(Workspace(tmp_path / "workspace"), config, split=split, repeat=True)
    assert model.metrics["epochs"] >= 1
    assert (tmp_path / "workspace" / "streams").read_text() == "0 3\n0 3\n"  # selection, then the final fit


def test_the_plays_to_predict_lie_in_the_validation_range_alone(world: Workspace, split: Split) -> None:
    validation = load_validation(validation_histories(Dataset(world), split, 10_000).to_arrow(), split.selection, 50)
    played_at = validation.histories.played_at
    assert played_at.max() < split.test_from
    assert (played_at[validation.plays] >= split.validation_from).all()
    assert 0 < len(validation.plays) <= 50
    assert not set(validation.plays.tolist()) & set(validation.histories.offsets.tolist())  # no user's first play


def test_song_vectors_of_another_split_or_data_set_are_refused(world: Workspace, split: Split) -> None:
    with pytest.raises(MismatchError, match=r"made from split .*, not from None; run `rayrec embed --no-split` first"):
        train(world, CONFIG)
    other_songs = Manifest(kind="songs", id="other", inputs={"dataset": "gone", "split": split.id})
    publish(world, other_songs, [])
    with pytest.raises(MismatchError, match=r"other were made from dataset gone"):
        train(world, CONFIG, songs_id="other", split=split)
    world.delete("songs/other")


@pytest.mark.usefixtures("cluster")
def test_a_split_that_leaves_no_plays_is_refused(workspace: Workspace) -> None:
    write_dataset(workspace, Histories.from_lists([[0, 1]], [[10, 20]]), 2)
    write_song_vectors(workspace, random_vectors(2), {"dataset": "by-hand", "split": "early"})
    early_split = Split(id="early", dataset="by-hand", validation_from=5, test_from=5)
    with pytest.raises(RayrecError, match=r"leaves no plays to train on; run `rayrec split` with fewer"):
        train(workspace, CONFIG, split=early_split)


def test_features_follow_the_data_and_the_settings(world: Workspace) -> None:
    dataset = Dataset(world)
    full_features = model_config(dataset, CONFIG, 8).features
    assert full_features.contexts == tuple(dataset.manifest.contexts) != ()
    assert full_features.skipped
    assert full_features.pause_hours == CONFIG.pause_hours > 0
    bare_config = CONFIG.replace(contexts=False, gaps=False, skips=False, hours=True)
    features = model_config(dataset, bare_config, 8).features
    assert (features.contexts, features.gap, features.request_gap, features.skipped) == ((), False, False, False)
    assert features.pause_hours == 0
    assert features.dim == 24 + 7


def test_a_training_from_a_model_takes_a_quarter_of_its_epochs_where_it_saw_the_validation_range(
    world: Workspace, split: Split, in_process: Manifest
) -> None:
    model = train(world, CONFIG, split=split, from_id=in_process.id)
    assert model.inputs == {**in_process.inputs, "from": in_process.id}
    assert model.metrics["epochs"] == 1
    assert model.metrics["validation_recall@20"] is None
    assert model.metrics["loss"] < in_process.metrics["loss"] * 1.05
    blind_model = train(world, CONFIG.replace(refit=False), split=split)
    validated_model = train(world, CONFIG, split=split, from_id=blind_model.id)
    assert validated_model.metrics["validation_recall@20"] > 0
    early_split = split_dataset(world, SplitConfig(test_days=30, validation_days=10))
    with pytest.raises(LeakError, match="was fit on plays of the test range"):
        train(world, CONFIG, split=early_split, from_id=in_process.id)
    with pytest.raises(MismatchError, match="hidden_dim 8, but this training has 12"):
        train(world, CONFIG.replace(hidden_dim=12), split=split, from_id=in_process.id)


def test_a_training_that_diverges_publishes_nothing(world: Workspace, split: Split) -> None:
    models_before = listing(world, "models")
    with pytest.raises(DivergedError, match="lower the learning rate"):
        train(world, CONFIG.replace(learning_rate=1e20), split=split)
    assert listing(world, "models") == models_before


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make trainings exit in the second epoch; they leave a checkpoint of the first one."""
    register_pickle_by_value(sys.modules[__name__])
    ship()
    monkeypatch.setattr(trainer, "WORKER_FAILURES", 0)
    monkeypatch.setattr(job, "train_worker", _train_and_die_in_second_epoch)


@pytest.mark.slow  # trains four times, three of them under Ray Train
@pytest.mark.usefixtures("stops")
def test_an_unfinished_training_asks_for_the_flags_that_resume_or_restart_it(
    world: Workspace, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Workspace(shutil.copytree(world.root, tmp_path / "workspace"))
    copy.delete("steps")  # written by another test
    values = changed_settings(TrainConfig, to_mapping(CONFIG.replace(workers=1, seed=5)))
    (tmp_path / "train.toml").write_text(to_toml({"train": values}))
    arguments = ["--workspace", copy.uri, "train", "--config", str(tmp_path / "train.toml"), "--split", split.id]

    def run_command(*flags: str, code: int) -> str:
        assert main([*arguments, *flags]) == code
        return " ".join("".join(capsys.readouterr()).split())

    assert "--resume and --restart exclude each other" in run_command("--resume", "--restart", code=2)
    assert "training failed" in run_command(code=1)
    assert "continue it with --resume, or delete it and start over with --restart" in run_command(code=2)
    assert "--workers 0 cannot resume a checkpoint" in run_command("--workers", "0", "--resume", code=2)
    stopped_copy = Workspace(shutil.copytree(copy.root, tmp_path / "stopped"))
    monkeypatch.setattr(job, "train_worker", _train_and_note_first_step)
    run_command("--resume", code=0)
    assert copy.read_json("steps/0.json") == [1, "selection", 1, 0]
    arguments[1] = stopped_copy.uri
    run_command("--restart", code=0)
    assert stopped_copy.read_json("steps/0.json") == [1, "selection", 0, 0]
    resumed, restarted = (listing(workspace, "models")[-1].metrics for workspace in (copy, stopped_copy))
    assert resumed["loss"] == pytest.approx(restarted["loss"], rel=1e-4)


@pytest.mark.slow  # trains twice under Ray Train
@pytest.mark.usefixtures("stops")
def test_a_run_resumes_a_training_that_was_stopped(
    cluster: None, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "generate": {
            "users": 150,
            "songs": NUM_SONGS,
            "artists": 12,
            "genres": 4,
            "plays": 25,
            "days": 60,
            "buckets": 3,
        },
        "embed": {"dim": 8, "epochs": 1},
        "train": changed_settings(TrainConfig, to_mapping(CONFIG.replace(workers=1))) | {"workers": 1},
    }
    with pytest.raises(RayrecError, match="training failed"):
        run(workspace, settings)
    monkeypatch.setattr(job, "train_worker", _train_and_note_first_step)
    statuses = {outcome.stage: outcome.status for outcome in run(workspace, settings)}
    assert workspace.read_json("steps/0.json") == [1, "selection", 1, 0]  # `run` holds back a range for the selection
    assert (statuses["embed"], statuses["train"], statuses["release"]) == ("skipped", "done", "done")
