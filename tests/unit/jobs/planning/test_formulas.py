"""The formulas are compared with counts: jobs run here on generated plays, and their requests and bytes are counted."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from networks import model_config, network
from without_ray import CountingFileSystem
from worlds import write_dataset

from rayrec.config import Settings
from rayrec.data.dataset import Dataset, bucket_of
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange, SplitConfig
from rayrec.embeddings import word2vec
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.staging import write_histories
from rayrec.jobs import recommend_all as job
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.pipeline import Outcome, ReleaseConfig, Stages
from rayrec.jobs.planning.formulas import (
    INDEX_REQUESTS,
    ROW_BYTES,
    SMALL_PARQUET,
    ImportSize,
    corpus_bytes,
    embed_requests,
    evaluate_requests,
    histories_bytes,
    histories_requests,
    import_requests,
    index_bytes,
    input_requests,
    model_bytes,
    rank_requests,
    recommend_requests,
    recommendations_bytes,
    retrieval_bytes,
    retrieval_requests,
    songs_bytes,
    states_bytes,
    taste_requests,
    tastes_bytes,
    train_requests,
)
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.taste import compute_tastes
from rayrec.model.checkpoint import save_model
from rayrec.model.network import TasteModel
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.online.load_states import load_states
from rayrec.online.state_store import open_store
from rayrec.recommend.answer import RecommendConfig
from rayrec.recommend.base import BaseRecommender, Ranking
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import write_dataset_manifest
from rayrec.storage.releases import active_release
from rayrec.storage.workspace import Workspace, histories_file

DAY_MS = 86_400_000
START = 1_700_000_000

pytestmark = pytest.mark.usefixtures("run_without_ray")


def write_sessions(path: Path, plays: int, *, songs: int, users: int, start: int = START) -> Path:
    """Write plays as a service logs them: by time, in sessions of 10 plays, songs by Zipf's law; 34 bytes per play."""
    random = np.random.default_rng(plays)
    sessions = plays // 10
    user = np.repeat(random.integers(users, size=sessions), 10)
    session_starts = np.repeat(np.sort(random.integers(8 * 3600, size=sessions)), 10)
    moment = start + session_starts + np.tile(np.arange(10) * 200, sessions) + random.integers(120, size=plays)
    song = random.permutation(songs)[np.exp(random.random(plays) * np.log(songs)).astype(int) - 1]
    order = np.argsort(moment, kind="stable")
    lines = [f"u{user[row]:08d},track{song[row]:07d},{moment[row]}" for row in order.tolist()]
    path.write_text("\n".join(["user,song,played_at", *lines]) + "\n")
    return path


def shuffle_bytes(plays: int, songs_of_pieces: int) -> float:
    """Bytes that an import may read in addition to its input: for its plays, and 9 bytes per song of each piece.

    `songs_of_pieces` is the number of distinct songs of a piece, summed over all pieces.
    """
    return plays * ROW_BYTES + songs_of_pieces * 9.0


@pytest.mark.parametrize(("pieces", "buckets"), [(3, 16), (8, 24)])
def test_requests_of_an_import(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, buckets: int
) -> None:
    path = write_sessions(tmp_path / "plays.csv", 20_000, songs=3_000, users=2_000)
    unit = path.stat().st_size / pieces / (1 << 20) * 1.001
    counts = CountingFileSystem()
    with monkeypatch.context() as patch:
        counts.watch(patch)
        import_data(workspace, ImportConfig(format="csv", paths=(str(path),), buckets=buckets, unit_mib=unit))
    expected = import_requests(ImportSize(pieces=pieces, buckets=buckets))
    assert counts.total == pytest.approx(expected, rel=0.15)


def test_requests_for_20_billion_plays_are_under_a_million_and_bytes_at_most_1_3_times_the_input() -> None:
    plays, songs, play_bytes, unit = 20 * 10**9, 10**7, 34, 64 << 20
    size = ImportSize(pieces=512, buckets=4096)
    requests = import_requests(size) + input_requests(plays * play_bytes, unit)
    assert requests < 1_000_000
    shares = 1 / (np.arange(1, songs + 1) * np.log(songs))
    songs_per_piece = int((1 - np.exp(-shares * plays / size.pieces)).sum())
    assert shuffle_bytes(plays, size.pieces * songs_per_piece) < 0.3 * plays * play_bytes


@pytest.mark.parametrize("plays", [152_000, 304_000])
def test_bytes_of_a_shuffle_in_blocks_as_large_as_those_of_20_billion_plays(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plays: int
) -> None:
    path = write_sessions(tmp_path / "plays.csv", plays, songs=10**7, users=390_000)
    config = ImportConfig(format="csv", paths=(str(path),), buckets=plays // 9_500)
    counts = CountingFileSystem()
    with monkeypatch.context() as patch:
        counts.watch(patch)
        manifest = import_data(workspace, config)
    block_bytes = sum(counts.path_bytes[name] for name in counts.path_bytes if name.endswith(".blocks"))
    assert block_bytes == pytest.approx(shuffle_bytes(plays, manifest.songs), rel=0.15)


def write_parts(workspace: Workspace, parts: int, *, users: int = 300, days: int = 100, buckets: int = 4) -> Dataset:
    """Write a data set of one play per user and day, in `parts` parts by time. The plays do not depend on `parts`."""
    moments = np.arange(days) * DAY_MS + START * 1_000
    files = {}
    histories = Histories.from_lists(
        [np.arange(days) % 50] * users,  # type: ignore[list-item]
        [moments + 1_000 * user for user in range(users)],  # type: ignore[misc]
        [f"u{user:08d}" for user in range(users)],
    )
    dataset = write_dataset(workspace, histories, 50, buckets=buckets)
    bucket = bucket_of(histories.user_ids, buckets)
    bounds = np.linspace(0, days, parts + 1).astype(int) * DAY_MS + START * 1_000
    times = []
    for part in range(parts):
        part_histories = histories.keep(
            (histories.played_at >= bounds[part]) & (histories.played_at < bounds[part + 1])
        )
        times.append((int(part_histories.played_at.min()), int(part_histories.played_at.max())))
        for number in range(buckets):
            path = histories_file(part, number)
            files[path.removeprefix("dataset/")] = write_histories(
                workspace, path, [part_histories.take(bucket == number)]
            )
    write_dataset_manifest(workspace, replace(dataset.manifest, parts=parts, part_times=times, files=files))
    return Dataset(workspace)


@pytest.mark.parametrize("overlap", [0, 1], ids=["a new day", "a new day and some of the last"])
def test_an_append_costs_the_same_after_1_and_after_100_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: int
) -> None:
    path = tmp_path / "new.csv"
    day = START + (100 - overlap) * 86_400
    random = np.random.default_rng(0)
    moments = day + np.sort(random.integers(86_400, size=(300, 500)))
    songs = np.exp(random.random((300, 500)) * np.log(10**6)).astype(int)
    lines = [
        f"u{user:08d},track{songs[user - 150, play]:07d},{moments[user - 150, play]}"
        for user in range(150, 450)
        for play in range(500)
    ]
    path.write_text("\n".join(["user,song,played_at", *lines]) + "\n")
    config = ImportConfig(format="csv", paths=(str(path),))
    counts_of_parts = {}
    for parts in (1, 100):
        workspace = Workspace(tmp_path / f"{parts}-parts")
        write_parts(workspace, parts)
        counts = CountingFileSystem()
        with monkeypatch.context() as patch:
            counts.watch(patch)
            result = append_plays(workspace, config)
        assert result.plays == result.dataset.plays - 30_000 > 140_000
        assert result.users == 150
        # Requests of an import, and to read each bucket's users and its histories in the part that the plays overlap.
        reads = SMALL_PARQUET * 4 * (1 + overlap)
        budget = import_requests(ImportSize(pieces=1, buckets=4)) + reads
        assert counts.total == pytest.approx(budget, rel=0.15)
        counts_of_parts[parts] = counts
    assert counts_of_parts[100].total <= 1.2 * counts_of_parts[1].total
    assert counts_of_parts[100].bytes_read <= 1.2 * counts_of_parts[1].bytes_read


def taste_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, users: int, buckets: int = 4, parts: int = 1
) -> CountingFileSystem:
    """Count the requests and bytes of the job that computes the taste vectors of all users."""
    workspace = Workspace(folder)
    dataset = write_parts(workspace, parts, users=users, days=10, buckets=buckets)
    names = save_model(workspace, "models/m", network(model_config(num_songs=50)), np.ones(50, dtype=np.bool_))
    inputs = {"dataset": dataset.manifest.id, "songs": "s"}
    artifacts.publish(workspace, artifacts.Manifest(kind="models", id="m", inputs=inputs), names)
    counts = CountingFileSystem()
    with monkeypatch.context() as patch:
        counts.watch(patch)
        tastes = compute_tastes(workspace, TasteConfig())
    artifacts.verify(workspace, tastes)
    return counts


def test_the_driver_of_taste_reads_manifests_alone_whatever_the_number_of_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (taste_counts(tmp_path / str(users), monkeypatch, users=users) for users in (50, 500))
    assert many.bytes_read > 3 * few.bytes_read
    assert many.driver_bytes_read <= 1.02 * few.driver_bytes_read < 20_000


@pytest.mark.parametrize(("buckets", "parts"), [(4, 1), (24, 1), (6, 3)])
def test_requests_of_taste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: int, parts: int) -> None:
    counts = taste_counts(tmp_path / "w", monkeypatch, users=200, buckets=buckets, parts=parts)
    expected = taste_requests(buckets, histories_requests(parts, 1, 3))
    assert counts.total == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("plays", [60_000, 120_000])
def test_bytes_of_a_data_set(workspace: Workspace, tmp_path: Path, plays: int) -> None:
    path = write_sessions(tmp_path / "plays.csv", plays, songs=10**7, users=plays // 10)
    manifest = import_data(workspace, ImportConfig(format="csv", paths=(str(path),), buckets=4))
    assert workspace.size("dataset/histories") == pytest.approx(histories_bytes(manifest.plays), rel=0.15)
    assert workspace.size("dataset/songs.parquet") == pytest.approx(songs_bytes(manifest.songs, 0), rel=0.15)


@pytest.mark.parametrize("songs", [10_000, 40_000])
def test_bytes_of_songs_with_titles_and_artists(workspace: Workspace, tmp_path: Path, songs: int) -> None:
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), size=6)) for _ in range(2_000)]
    names = np.array([" ".join(random.choice(words, size=2)) for _ in range(songs // 8 + songs)])
    lines = [
        f"u{row % 500},track{row:07d},{START + row},{names[row].title()},{names[songs + row // 8].title()}"
        for row in random.permutation(songs).tolist()
    ]
    path = tmp_path / "plays.csv"
    path.write_text("\n".join(["user,song,played_at,title,artist", *lines]) + "\n")
    import_data(workspace, ImportConfig(format="csv", paths=(str(path),), buckets=1))
    texts = ("".join(f"{name:20}" for name in part) for part in (names[:songs], names[songs:].repeat(8)))
    text_bytes = sum(len(pa.compress(column.title().encode(), "zstd", asbytes=True)) for column in texts)
    assert workspace.size("dataset/songs.parquet") == pytest.approx(songs_bytes(songs, text_bytes), rel=0.15)


def write_listeners(path: Path, *, users: int, plays: int, songs: int) -> Path:
    """Write `plays` plays per user over 60 days, songs by Zipf's law."""
    random = np.random.default_rng(users)
    lines = []
    for user in range(users):
        moments = START + np.sort(random.integers(60 * 86_400, size=plays))
        user_songs = np.exp(random.random(plays) * np.log(songs)).astype(int)
        lines += [f"u{user:08d},track{song:07d},{at}" for song, at in zip(user_songs, moments, strict=True)]
    path.write_text("\n".join(["user,song,played_at", *lines]) + "\n")
    return path


def test_the_documented_requests_of_the_stages_are_those_of_the_formulas() -> None:
    text = (Path(__file__).parents[4] / "docs" / "scale.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| requests of embed, .*, 16 buckets.* \| (.*) \|$", text, re.MULTILINE)
    buckets, read_requests = 16, histories_requests(1, 1, 3)
    expected = [
        embed_requests(buckets, read_requests, fits=2),
        train_requests(buckets, read_requests, fits=2, epochs=3),
        retrieval_requests(buckets, 1, groups=buckets, ranges=1, row_groups=1, columns=3, fits=2),
        rank_requests(buckets, read_requests),
        taste_requests(buckets, read_requests),
        evaluate_requests(buckets, read_requests, counted=buckets),
        recommend_requests(buckets, read_requests),
    ]
    assert [int(count) for count in row.split(", ")] == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("buckets", "epochs", "queries"), [(4, 1, 0), (16, 3, 100)])
def test_requests_of_the_stages_of_a_run(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: int, epochs: int, queries: int
) -> None:
    path = write_listeners(tmp_path / "plays.csv", users=60, plays=60, songs=200)
    counts, stage_requests = CountingFileSystem(), {}

    def record_requests(outcome: Outcome) -> None:
        assert outcome.status == "done"
        stage_requests[outcome.stage] = counts.total
        counts.requests.clear()

    configs: dict[str, Settings] = {
        "import": ImportConfig(format="csv", paths=(str(path),), buckets=buckets),
        "split": SplitConfig(test_days=5, validation_days=10),
        "embed": EmbedConfig(dim=8, epochs=1),
        "train": TrainConfig(hidden_dim=8, epochs=epochs, negatives=16, workers=0),
        "retrieval": RetrievalConfig(),
        "rank": RankConfig(trees=5),
        "taste": TasteConfig(),
        "index": IndexConfig(),
        "evaluate": EvaluateConfig(queries=queries, models=("two-step", "taste")),
        "release": ReleaseConfig(),
    }
    with monkeypatch.context() as patch:
        counts.watch(patch)
        stages = Stages(workspace, on_stage=record_requests)
        for name, config in configs.items():
            stages.run(name, config)
        release = active_release(workspace)
        assert release is not None
        counts.requests.clear()
        job.recommend_all(workspace, RecommendConfig(k=20), release.inputs)
    read_requests = histories_requests(1, 1, 3)
    expected = {
        "embed": embed_requests(buckets, read_requests, fits=2),
        "train": train_requests(buckets, read_requests, fits=2, epochs=epochs),
        "retrieval": retrieval_requests(buckets, 1, groups=buckets, ranges=1, row_groups=1, columns=3, fits=2),
        "rank": rank_requests(buckets, read_requests),
        "index": INDEX_REQUESTS,
        "taste": taste_requests(buckets, read_requests),
        "evaluate": evaluate_requests(buckets, read_requests, counted=buckets if queries else 0),
    }
    assert {name: stage_requests[name] for name in expected} == pytest.approx(expected, rel=0.15)
    assert counts.total == pytest.approx(recommend_requests(buckets, read_requests), rel=0.15)


@pytest.mark.parametrize(("songs", "dim", "kind"), [(4_000, 16, "flat"), (8_000, 64, "flat"), (200_000, 8, "ivf")])
def test_bytes_of_a_model_and_of_an_index(workspace: Workspace, songs: int, dim: int, kind: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(songs, dim)).astype(np.float32)
    config = replace(model_config(TrainConfig(hidden_dim=8), num_songs=songs), embedding_dim=dim)
    names = save_model(workspace, "models/m", TasteModel(config, torch.from_numpy(vectors)), np.ones(songs, np.bool_))
    assert sum(workspace.size(f"models/m/{name}") for name in names) == pytest.approx(model_bytes(songs, dim), rel=0.15)
    index = SongIndex.build(vectors, IndexConfig(nlist=100, queries=10, target_recall=0.1))
    assert index.figures.kind == kind
    index.save(workspace, "index.faiss")
    assert workspace.size("index.faiss") == pytest.approx(index_bytes(songs, dim), rel=0.15)


@pytest.mark.parametrize(("plays", "songs"), [(20_000, 500), (40_000, 20_000)])
def test_bytes_of_a_retrieval(workspace: Workspace, tmp_path: Path, plays: int, songs: int) -> None:
    path = write_sessions(tmp_path / "plays.csv", plays, songs=songs, users=plays // 50)
    import_data(workspace, ImportConfig(format="csv", paths=(str(path),), buckets=4))
    manifest = fit_retrieval(workspace, RetrievalConfig())
    retrieval = Retrieval.load(workspace, manifest.folder)
    expected = retrieval_bytes(
        retrieval.num_songs,
        rules=len(retrieval.rules.followers),
        session_songs=len(retrieval.sessions.songs),
        sessions=len(retrieval.sessions),
        day_songs=len(retrieval.plays.days),
    )
    assert workspace.size(manifest.folder) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("plays", "songs"), [(20_000, 1_000), (40_000, 100_000)])
def test_bytes_of_a_corpus(tmp_path: Path, plays: int, songs: int) -> None:
    random = np.random.default_rng(0)
    histories = Histories.from_lists(
        list(random.integers(songs, size=(plays // 100, 100))),
        [START * 1_000 + np.arange(100) * 60_000] * (plays // 100),
    )
    sentences = word2vec.from_histories([histories], FitRange(), EmbedConfig().session_gap_minutes)
    corpus = word2vec.write_corpus(sentences, tmp_path / "corpus", songs)
    assert corpus.path.stat().st_size == pytest.approx(corpus_bytes(plays, songs), rel=0.15)


class RandomRecommender(BaseRecommender):
    """Recommends random songs."""

    name = "anything"

    def __init__(self, num_songs: int) -> None:
        self.num_songs, self._random = num_songs, np.random.default_rng(0)

    def rank(self, histories: Histories, _at: Any, k: int, **_: Any) -> Ranking:  # type: ignore[override]
        scores = -np.sort(-self._random.random((len(histories), k)), axis=1).astype(np.float32)
        songs = self._random.integers(self.num_songs, size=scores.shape, dtype=np.int32)
        filled = np.zeros(len(songs), dtype=np.int64)
        return Ranking(songs=songs, scores=scores, paths=("exact",) * len(songs), filled=filled)

    def score(self, *_: Any) -> np.ndarray:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize(("users", "k"), [(300, 100), (1_200, 20)])
def test_bytes_of_recommendations(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, users: int, k: int) -> None:
    songs = 10**6
    histories = Histories.from_lists(
        [[1]] * users, [[START * 1_000]] * users, [f"u{user:08d}" for user in range(users)]
    )
    write_dataset(workspace, histories, songs, buckets=1)
    monkeypatch.setattr(job, "require_fitting_parts", lambda *_: None)
    monkeypatch.setattr(job, "load_recommender", lambda *_: RandomRecommender(songs))
    manifest = job.recommend_all(workspace, RecommendConfig(k=k), {})
    size = workspace.size(job.recommendations_file(manifest.folder, 0))
    assert size == pytest.approx(recommendations_bytes(users, k), rel=0.15)


@pytest.mark.parametrize(("hidden", "plays"), [(64, 20), (128, 60), (256, 100)])
def test_bytes_of_the_states_of_users(workspace: Workspace, tmp_path: Path, hidden: int, plays: int) -> None:
    users, songs, random = 2_000, 20_000, np.random.default_rng(0)
    moments = np.cumsum(random.integers(60_000, 3_600_000, size=(users, plays)), axis=1) + START * 1_000
    histories = Histories.from_lists(
        list(random.integers(songs, size=(users, plays))), list(moments), [f"u{user:08d}" for user in range(users)]
    )
    dataset = write_dataset(workspace, histories, songs)
    model = network(model_config(TrainConfig(hidden_dim=hidden), num_songs=songs))
    names = save_model(workspace, "models/m", model, np.ones(songs, dtype=np.bool_))
    inputs = {"dataset": dataset.manifest.id, "songs": "s"}
    artifacts.publish(workspace, artifacts.Manifest(kind="models", id="m", inputs=inputs), names)
    tastes = compute_tastes(workspace, TasteConfig())
    parquet_bytes = sum(workspace.size(path) for path in workspace.files(tastes.folder) if path.endswith(".parquet"))
    average_floats = len(model.config.averages) * model.config.embedding_dim
    distinct_songs = sum(len(np.unique(songs)) for songs in np.split(histories.songs, histories.offsets[1:-1]))
    floats = len(model.config.horizons) * model.config.embedding_dim + hidden + average_floats
    assert parquet_bytes == pytest.approx(tastes_bytes(users, distinct_songs, floats=floats), rel=0.15)
    release = artifacts.Manifest(kind="releases", id="r", inputs={**inputs, "models": "m", "tastes": tastes.id})
    store = open_store(f"sqlite:///{tmp_path}/states.sqlite", dataset.lineage)
    load_states(dataset, store, release)
    store.close()
    size = sum(path.stat().st_size for path in tmp_path.glob("states.sqlite*"))
    expected = states_bytes(users, users * plays, hidden_dim=hidden, average_floats=average_floats)
    assert size == pytest.approx(expected, rel=0.15)
