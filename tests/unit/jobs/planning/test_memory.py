"""The formulas of memory are compared with workers that run here, each in its own process with measured memory."""

import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from networks import MINUTE, MemoryHost, cycling_histories
from networks import model_config as small_shape
from worker_memory import WatchedWorkers, growth
from worlds import write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import SplitConfig, load_split, split_dataset
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.evaluation.evaluator import Evaluator, EvaluatorFiles, evaluator_files
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.staging import write_histories
from rayrec.jobs import evaluate as job
from rayrec.jobs.build_index import build_index
from rayrec.jobs.embed import embed
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.import_data import import_data
from rayrec.jobs.planning.formulas import (
    bucket_memory,
    counting_memory,
    embedding_memory,
    encoding_memory,
    evaluated_files,
    evaluating_memory,
    examples_memory,
    indexing_memory,
    joining_memory,
    keys_store,
    merging_memory,
    ranking_memory,
    reading_memory,
    recommending_memory,
    table_bytes,
    training_memory,
)
from rayrec.jobs.rank import fit_rankers
from rayrec.jobs.recommend_all import recommend_all
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import train
from rayrec.jobs.trainer import model_config
from rayrec.model import epochs as fitting
from rayrec.model.checkpoint import save_model
from rayrec.model.epochs import Fit, FitData, Phase, Validation
from rayrec.model.network import TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.recommend import stored_retrieval
from rayrec.recommend.answer import RecommendConfig
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.stored_retrieval import MAX_DISTANCE, Retrieval, RuleCounts, pack_counts, song_ranges
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.releases import parts_of
from rayrec.storage.workspace import Workspace, histories_file

DAY_MS = 86_400_000
START = 1_700_000_000_000  # ms UTC


def write_world(workspace: Workspace, *, users: int, plays: int, songs: int, dim: int, hidden_dim: int) -> Manifest:
    """Write one bucket of users with equally many plays, songs by Zipf's law, and an untrained model; return it."""
    random = np.random.default_rng(users)
    plays_per_user = plays // users
    histories = Histories(
        user_ids=np.array([f"u{user:08d}" for user in range(users)], dtype=object),
        offsets=np.arange(users + 1, dtype=np.int64) * plays_per_user,
        songs=np.exp(random.random(users * plays_per_user) * np.log(songs)).astype(np.int32) - 1,
        played_at=START + np.sort(random.integers(60 * DAY_MS, size=(users, plays_per_user)), axis=1).ravel(),
    )
    dataset = write_dataset(workspace, histories, songs, buckets=1)
    write_histories(workspace, histories_file(0, 0), [histories])
    split = split_dataset(workspace, SplitConfig(test_days=5, validation_days=5))
    vectors = random.normal(size=(songs, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    inputs = {"dataset": dataset.manifest.id, "split": split.id}
    embeddings = Manifest(kind="songs", id="e", inputs=inputs)
    names = ["vectors.npy", "selection_vectors.npy"]
    for name in names:
        workspace.write_array(embeddings.path(name), vectors)
    publish(workspace, embeddings, names)
    torch.manual_seed(0)
    shape = model_config(dataset, TrainConfig(hidden_dim=hidden_dim), dim)
    network, is_known = TasteModel(shape, torch.from_numpy(vectors)).eval(), np.ones(songs, dtype=np.bool_)
    model = Manifest(kind="models", id="m", inputs={**inputs, "songs": "e"}, config={"refit": True})
    names = save_model(workspace, model.folder, network, is_known)
    names += [f"selection/{name}" for name in save_model(workspace, model.path("selection"), network, is_known)]
    return publish(workspace, model, names)


def watch_evaluator_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the bytes of the files of each evaluator, without the network's outputs and the retrieval."""
    sizes: list[int] = []

    @contextmanager
    def watched_files(workspace: Workspace, folder: str, evaluator: Evaluator) -> Iterator[EvaluatorFiles[Evaluator]]:
        with evaluator_files(workspace, folder, evaluator) as files:
            sizes.append(workspace.size(folder))
            yield files

    monkeypatch.setattr(job, "evaluator_files", watched_files)
    return sizes


def range_sizes(dataset: Dataset, manifest: Manifest) -> tuple[int, int]:
    """Bytes of the largest merged range of songs of a retrieval, and the number of sessions, summed over all ranges."""
    counts = Retrieval.load(dataset.workspace, manifest.folder).counts
    parts = [counts.of_songs(*bounds) for bounds in song_ranges(dataset.num_songs, dataset.manifest.plays)]
    return max(len(pack_counts(part)) for part in parts), sum(len(part.sessions) for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize(("users", "songs"), [(1_000, 20_000), (1_000, 80_000)])
def test_memory_of_the_workers_of_all_stages(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, users: int, songs: int
) -> None:
    plays, queries, dim, hidden_dim = 100 * users, 200, 64, 128
    workers = WatchedWorkers()
    workers.watch(monkeypatch)
    model = write_world(workspace, users=users, plays=plays, songs=songs, dim=dim, hidden_dim=hidden_dim)
    dataset = Dataset(workspace)
    split = load_split(workspace, model.inputs["split"])
    compute_tastes(workspace, TasteConfig())
    retrieval = fit_retrieval(workspace, RetrievalConfig(), split=split)
    build_index(workspace, IndexConfig())
    fit_rankers(workspace, RankConfig(queries=queries, trees=5))
    recommend_all(workspace, RecommendConfig(k=100), parts_of(workspace, model))
    evaluator_bytes = watch_evaluator_files(monkeypatch)
    evaluate(workspace, EvaluateConfig(queries=queries, models=("two-step", "taste"), bootstrap_samples=0), split=split)
    embed(workspace, EmbedConfig(dim=dim, epochs=1, workers=1), split=split, repeat=True)
    train(workspace, TrainConfig(hidden_dim=hidden_dim, epochs=1, workers=0), songs_id="e", split=split)
    (histories,) = dataset.read_bucket(0, users)
    pairs = sum(int(np.maximum(histories.lengths - step, 0).sum()) for step in range(1, MAX_DISTANCE + 1))
    rules = len(RuleCounts.fit(split.final.select(histories), num_songs=songs).followers)
    final_bytes = sum(
        workspace.size(retrieval.path(name)) for name in retrieval.files if not name.startswith("selection/")
    )
    expected = {
        "BucketTastes": encoding_memory(hidden_dim, dim),
        "GroupCounter": counting_memory(songs, pairs),
        "RangeMerger": merging_memory(songs, rules),
        "build_retrieval": joining_memory(songs, *range_sizes(dataset, retrieval)),
        "build_and_save": indexing_memory(songs, dim),
        "ExampleCollector": examples_memory(songs, dim, queries),
        "RankerTrainer": ranking_memory(songs, dim, queries),
        "BucketRecommendations": recommending_memory(songs, users),
        "BucketEvaluator": evaluating_memory(queries),
        "fit_vectors": embedding_memory(songs, dim),
        "train_worker": training_memory(songs, dim, hidden_dim, workers=1),
    }
    measured = {name: workers.idle + workers.private[name] for name in expected}
    assert {name: workers.idle + size for name, size in expected.items()} == pytest.approx(measured, rel=0.15)
    assert evaluated_files(songs, dim, final_bytes) == pytest.approx(
        evaluator_bytes[0] + table_bytes(songs, dim) + final_bytes, rel=0.15
    )
    assert max(workers.stored.values()) < 1 << 20  # a node's object store holds a few paths and counts


@pytest.mark.slow
def test_joining_many_ranges_of_songs_takes_the_memory_of_one(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, plays, songs = 1_000, 300_000, 20_000
    random = np.random.default_rng(0)
    session_starts = np.sort(random.integers(60 * DAY_MS, size=(users, plays // users // 10, 1)), axis=1)
    histories = Histories(
        user_ids=np.array([f"u{user:08d}" for user in range(users)], dtype=object),
        offsets=np.arange(users + 1, dtype=np.int64) * (plays // users),
        songs=np.exp(random.random(plays) * np.log(songs)).astype(np.int32) - 1,
        played_at=np.sort((START + session_starts + np.arange(10) * 180_000).reshape(users, -1), axis=1).ravel(),
    )
    dataset, joining_bytes, merging_bytes = write_dataset(workspace, histories, songs, buckets=1), {}, {}
    for ranges in (1, 4, 16):
        monkeypatch.setattr(stored_retrieval, "PLAYS_PER_RANGE", -(-plays // ranges))
        workers = WatchedWorkers()
        workers.watch(monkeypatch)
        retrieval = fit_retrieval(workspace, RetrievalConfig(), repeat=True)
        largest_range, sessions = range_sizes(dataset, retrieval)
        joining_bytes[ranges] = workers.private["build_retrieval"]
        merging_bytes[ranges] = workers.private["RangeMerger"]
        assert joining_memory(songs, largest_range, sessions) == pytest.approx(joining_bytes[ranges], rel=0.25)
    assert joining_bytes[16] < joining_bytes[4] < joining_bytes[1]
    assert joining_bytes[16] < joining_bytes[1] / 2
    assert merging_bytes[16] < merging_bytes[4] < merging_bytes[1]


@pytest.mark.slow
def test_memory_of_taste_and_train_with_narrow_tables_and_a_wide_state(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs, dim, hidden_dim = 20_000, 32, 256
    workers = WatchedWorkers()
    workers.watch(monkeypatch)
    model = write_world(workspace, users=1_000, plays=100_000, songs=songs, dim=dim, hidden_dim=hidden_dim)
    split = load_split(workspace, model.inputs["split"])
    compute_tastes(workspace, TasteConfig())
    train(workspace, TrainConfig(hidden_dim=hidden_dim, epochs=1, workers=0), songs_id="e", split=split)
    expected = {
        "BucketTastes": encoding_memory(hidden_dim, dim),
        "train_worker": training_memory(songs, dim, hidden_dim, workers=1),
    }
    measured = {name: workers.idle + workers.private[name] for name in expected}
    assert {name: workers.idle + size for name, size in expected.items()} == pytest.approx(measured, rel=0.15)


def fit_many_songs(rank: int, workers: int, songs: int, dim: int, folder: str) -> int:
    """Do what a training worker does: two epochs with validation, then the last fit. Few of the songs are played.

    Return the peak memory of the process in bytes. Sampling from outside would miss short peaks.
    """
    if workers > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        init_method = f"file://{folder}/{workers} workers, {songs} songs"
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=workers)
    fitting.SCORES_AT_ONCE = 1 << 18  # else scores, whose memory does not grow with the songs, hide other peaks
    share = Share(rank=rank, workers=workers)
    config = TrainConfig(hidden_dim=8, window=12, batch=16, negatives=30, long=(2, 5), epochs=2, patience=2)
    histories = cycling_histories(37)
    phase_histories: dict[Phase, Histories] = {"selection": histories.before(15 * MINUTE), "final": histories}
    validation = Validation(histories=histories, plays=np.flatnonzero(histories.played_at >= 15 * MINUTE))
    counts = np.bincount(histories.songs, minlength=songs)
    data = {phase: FitData(vectors=np.zeros((0, dim), dtype=np.float32), counts=counts) for phase in phase_histories}
    shape = replace(small_shape(config), num_songs=songs, embedding_dim=dim)
    Fit(shape, config, data, MemoryHost(phase_histories, config, share=share), validation=validation, share=share).run()
    if workers > 1:
        dist.destroy_process_group()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_memory_of_a_training_worker_grows_with_its_share_of_the_songs(tmp_path: Path, workers: int) -> None:
    dim, sizes = 64, (workers * 100_000, workers * 300_000)
    peaks = []
    for songs in sizes:
        with ThreadPoolExecutor(workers) as executor:
            measurements = executor.map(
                lambda rank, songs=songs: growth(fit_many_songs, rank, workers, songs, dim, str(tmp_path)),
                range(workers),
            )
            peaks.append(np.array([peak for _, _, peak in measurements]))
    few, many = (training_memory(songs, dim, 8, workers) for songs in sizes)
    assert (peaks[1] - peaks[0]).tolist() == pytest.approx([many - few] * workers, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "songs"), [(50_000, 10**6), (100_000, 10**7)])
def test_memory_of_the_workers_of_an_import(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, songs: int
) -> None:
    random = np.random.default_rng(rows)
    users, songs_of_rows = random.integers(1_000, size=rows).tolist(), random.integers(songs, size=rows).tolist()
    lines = [f"u{user:08d},track{song:07d},{START // 1_000 + row}" for row, (user, song) in
             enumerate(zip(users, songs_of_rows, strict=True))]  # fmt: skip
    path = tmp_path / "plays.csv"
    path.write_text("\n".join(["user,song,played_at", *lines]) + "\n")
    workers = WatchedWorkers()
    workers.watch(monkeypatch)
    manifest = import_data(workspace, ImportConfig(format="csv", paths=(str(path),), buckets=1))
    expected = {"PieceImporter": reading_memory(rows), "BucketMerger": bucket_memory(rows)}
    measured = {name: workers.idle + workers.private[name] for name in expected}
    assert {name: workers.idle + size for name, size in expected.items()} == pytest.approx(measured, rel=0.15)
    assert keys_store(manifest.songs) == pytest.approx(workers.stored["BucketMerger"], rel=0.15)
