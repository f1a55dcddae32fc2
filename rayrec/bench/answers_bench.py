"""The cost of an answer on catalogs of several sizes: CPU time and bytes by stage, private memory, and recall.

Each catalog has generated plays, clustered song vectors, and every artifact of a release. In shapes: N songs, D
dimensions of a vector, K recommended songs.
"""

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import lightgbm
import numpy as np
import psutil
import torch

from rayrec.bench.bench_config import AnswersBenchConfig, WorldConfig
from rayrec.bench.rounds import PlainProcess, anonymous_mb, niceness
from rayrec.bench.stage_benches import EMBEDDING_DIM, bench_dataset
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.data.split import SplitConfig, split_dataset
from rayrec.display import progress
from rayrec.jobs.build_index import build_index
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.trainer import model_config
from rayrec.model.checkpoint import save_model
from rayrec.model.network import TasteModel
from rayrec.model.train_config import PLAY_COUNTS, TasteConfig, TrainConfig
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.base import QueryBatch
from rayrec.recommend.filters import without_heard
from rayrec.recommend.index import IndexConfig, SongIndex, recall_against
from rayrec.recommend.ranker import Ranker, RankingExamples, TreeModel, calibrate
from rayrec.recommend.retrievers import COUNTS, Candidates
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import (
    HORIZONS,
    KINDS,
    CandidateSource,
    RankerKind,
    Scored,
    TwoStepRecommender,
    examples_for,
)
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.releases import parts_of
from rayrec.storage.workspace import Workspace

K = 20
WARM = 20  # answers before the measured ones
TRACED = 20  # answers whose memory allocations are traced, which makes them slow
Result = TypeVar("Result")
MODEL = "answers"  # id of the model and its rankers
PLAYS_PER_SONG = 3
EXAMPLES = 400  # users whose last play is a training example of the rankers
HELD_OUT_SHARE = 0.1  # share of each user's plays, the last ones, that the retrieval does not see
TREES = 100  # per ranker: more than the rankers have on any data set of docs/evaluation.md
AGAIN = 3.0  # weight of the songs just played; set here, because the network is not trained
SPREAD = 0.7  # standard deviation of song vectors around their artist, and of artists around their center


def bench_answers(bench_workspace: Workspace, config: AnswersBenchConfig) -> dict[str, Any]:
    """Measure answers, each computed from a user's whole history, one after the other on one core of a process.

    Figures of each catalog: cpu_ms of an answer and of each stage, for users who have been answered once; first_cpu_ms
    of the first answer to each user, which maps pages of files into the memory of the process; the most bytes that a
    stage holds; private_mb of the process, without files mapped into its memory; recall@20 of the next play with the
    index and with exact search; index_recall, the share of the 20 songs nearest to a taste vector that the index finds.
    cpu_growth compares the largest catalog with the smallest.
    """
    catalogs = []
    with progress("bench answers", 2 * len(config.songs)) as bar:
        for songs in config.songs:
            with ray_cluster():
                dataset, release, build_seconds = build_answers_release(bench_workspace, config, songs)
            bar.advance(note=f"catalog of {songs:,} songs built")
            with PlainProcess(niceness()) as process:
                metrics = process.run(measure_answers, dataset, release.inputs, config.queries)
            catalogs.append({"songs": songs, "build_seconds": round(build_seconds, 1), **metrics})
            bar.advance(note=f"catalog of {songs:,} songs measured")
    smallest, largest = catalogs[0], catalogs[-1]
    return {
        "name": "answers",
        "queries": config.queries,
        "cpu_ms": largest["cpu_ms"],
        "cpu_growth": largest["cpu_ms"] / smallest["cpu_ms"],
        "private_mb": largest["private_mb"],
        "catalogs": catalogs,
        "rates": {"answers_per_second_per_cpu": 1000 / largest["cpu_ms"]},
    }


def measure_answers(dataset: Dataset, parts: dict[str, str], query_count: int) -> dict[str, Any]:
    """Return the figures of one catalog. Must be called in a process that has loaded nothing else before."""
    import torch

    torch.set_num_threads(1)
    two_step = load_recommender(dataset.workspace, dataset, parts)
    assert isinstance(two_step, TwoStepRecommender)
    histories, queries = last_play_queries(dataset, query_count + WARM)
    user_queries = [one_query(histories, queries, row) for row in range(len(queries))]
    for history, query in user_queries[:WARM]:
        answer_one(two_step, history, query)
    user_queries = user_queries[WARM:] or user_queries  # without further users, the same ones are measured
    first_cpu_ms, repeated_cpu_ms = (_cpu_ms(two_step, user_queries) for _ in range(2))
    private_mb = anonymous_mb(psutil.Process())
    stage_costs = StageCosts()
    for history, query in user_queries:
        answer_by_stage(two_step, history, query, stage_costs)
    tracemalloc.start()
    traced_costs = StageCosts(traced=True)
    for history, query in user_queries[:TRACED]:
        answer_by_stage(two_step, history, query, traced_costs)
    tracemalloc.stop()
    stages = {
        name: {"cpu_ms": 1000 * seconds / len(user_queries), "bytes": traced_costs.most_bytes[name]}
        for name, seconds in stage_costs.seconds.items()
    }
    recall_with_index = recall(two_step, histories, queries)
    exact_index = SongIndex.build(two_step.source.network.song_vectors, IndexConfig(kind="flat"))
    return {
        "cpu_ms": repeated_cpu_ms,
        "first_cpu_ms": first_cpu_ms,
        "candidates": stage_costs.candidates / len(user_queries),
        "stages": stages,
        "private_mb": private_mb,
        "recall": recall_with_index,
        "exact_recall": recall(with_index(two_step, exact_index), histories, queries),
        "index_recall": index_recall(two_step, exact_index, histories, queries),
        "index": two_step.source.index.figures.kind,
        "nprobe": two_step.source.index.figures.nprobe,
    }


def _cpu_ms(two_step: TwoStepRecommender, user_queries: list[tuple[Histories, Queries]]) -> float:
    """Return the CPU milliseconds per answer."""
    started = time.process_time()
    for history, query in user_queries:
        answer_one(two_step, history, query)
    return 1000 * (time.process_time() - started) / len(user_queries)


def one_query(histories: Histories, queries: Queries, row: int) -> tuple[Histories, Queries]:
    """Return the plays before query number `row`, as a history of one user, and the query on that history."""
    plays_before = int(queries.plays_before[row])
    history = histories.take(queries.rows[row : row + 1]).span(0, plays_before)
    return history, Queries.at_end(history, int(queries.at[row]))


def answer_one(two_step: TwoStepRecommender, history: Histories, query: Queries) -> np.ndarray:
    """Return int32 (K,): recommended songs that are new to one user, as a server answers."""
    return np.asarray(two_step.rank_queries(history, query, K, filters=without_heard(history)).songs[0])


@dataclass
class StageCosts:
    """CPU seconds by stage, and with `traced` the most bytes that an answer held in each stage."""

    traced: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    most_bytes: dict[str, int] = field(default_factory=dict)
    candidates: int = 0

    def __call__(self, name: str, work: Callable[[], Result]) -> Result:
        """Do the work of the stage `name`, add its costs, and return its result."""
        if self.traced:
            tracemalloc.reset_peak()
            bytes_before, _ = tracemalloc.get_traced_memory()
        started = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        if self.traced:
            held_bytes = tracemalloc.get_traced_memory()[1] - bytes_before
            self.most_bytes[name] = max(self.most_bytes.get(name, 0), held_bytes)
        return result


def answer_by_stage(two_step: TwoStepRecommender, history: Histories, query: Queries, stage_costs: StageCosts) -> None:
    """Do the work of `answer_one` one stage after the other, and measure each with `stage_costs`."""
    source, filters = two_step.source, without_heard(history)
    vectors = stage_costs("taste vectors", lambda: source.network.vectors_of(history, query, HORIZONS))
    short_vectors, long_vectors = (vectors[horizon] for horizon in HORIZONS)
    batch = stage_costs(
        "plays",
        lambda: QueryBatch.of(
            history,
            query,
            source.num_songs,
            short_vectors=short_vectors,
            long_vectors=long_vectors,
            real_times=source.sources.real_times,
        ),
    )
    proposals = {
        retriever.name: stage_costs(retriever.name, partial(retriever.propose, batch, COUNTS[retriever.name]))
        for retriever in source.retrievers
    }
    candidates = stage_costs("union", lambda: Candidates.union(batch, proposals))
    features = stage_costs("features", lambda: source.sources.features(batch, candidates))
    scored_candidates = Scored(batch=batch, candidates=candidates, features=features)
    stage_costs("ranker", lambda: two_step.rank_scored(scored_candidates, K, filters))
    stage_costs.candidates += len(candidates.rows)


def recall(two_step: TwoStepRecommender, histories: Histories, queries: Queries) -> float:
    """Return recall@K of the last play of each user."""
    songs = two_step.rank_queries(histories, queries, K).songs
    return float((songs == histories.songs[histories.offsets[1:] - 1][:, None]).any(axis=1).mean())


def index_recall(two_step: TwoStepRecommender, exact_index: SongIndex, histories: Histories, queries: Queries) -> float:
    """Return the share of the K songs nearest to each taste vector of the queries that the recommender's index finds.

    `exact_index` finds them all. In contrast to `recall`, no other retriever can make up for a song that is missed.
    """
    vectors = np.concatenate(list(two_step.source.network.vectors_of(histories, queries, HORIZONS).values()))
    exact_songs = exact_index.rank(vectors, min(K, exact_index.songs)).songs
    songs = two_step.source.index.rank(vectors, K).songs
    return float(recall_against(exact_songs, songs).mean())


def with_index(two_step: TwoStepRecommender, index: SongIndex) -> TwoStepRecommender:
    """Return the same recommender with another index."""
    network = two_step.source.network.with_index(index)
    source = CandidateSource(network, two_step.source.base_retrieval, real_times=two_step.source.sources.real_times)
    return TwoStepRecommender(source, two_step.rankers)


def build_answers_release(
    bench_workspace: Workspace, config: WorldConfig, songs: int
) -> tuple[Dataset, Manifest, float]:
    """Return a data set with `songs` songs, its live release, and the seconds to build them, 0 if they existed.

    The release has all parts of the default recommender. Its retrieval has not seen the last plays of users, and its
    rankers learn from other users than those of bucket 0, whose answers are measured. Needs a running Ray cluster.
    """
    started = time.perf_counter()
    users = round(max(config.plays, PLAYS_PER_SONG * songs) / config.plays_per_user)
    dataset = bench_dataset(bench_workspace, users=users, songs=songs, plays=config.plays_per_user, seed=config.seed)
    workspace = dataset.workspace
    release = releases.active_release(workspace)
    if release is not None:
        return dataset, release, 0.0
    model = _write_model(dataset, config.seed)
    build_index(workspace, IndexConfig(), model_id=model.id)
    split = split_dataset(workspace, SplitConfig(last_fraction=HELD_OUT_SHARE, validation_fraction=0))
    retrieval = fit_retrieval(workspace, RetrievalConfig(), split=split)
    _write_rankers(dataset, model, retrieval)
    compute_tastes(workspace, TasteConfig(), model_id=model.id)
    release = releases.create_release(workspace, model_id=model.id)
    return dataset, release, time.perf_counter() - started


def _write_model(dataset: Dataset, seed: int) -> Manifest:
    """Write an untrained network of the default shape, whose taste vectors lie near the songs just played."""
    workspace, vectors = dataset.workspace, _song_vectors(dataset, seed)
    inputs = {"dataset": dataset.manifest.id}
    embeddings = Manifest(kind="songs", id=MODEL, inputs=inputs)
    workspace.write_array(embeddings.path("vectors.npy"), vectors)
    artifacts.publish(workspace, embeddings, ["vectors.npy"])
    torch.manual_seed(seed)
    model = TasteModel(model_config(dataset, TrainConfig(), EMBEDDING_DIM), torch.from_numpy(vectors))
    for weights in model.average_weights.values():
        weights.data.fill_(AGAIN)
    manifest = Manifest(kind="models", id=MODEL, inputs={**inputs, "songs": embeddings.id}, seed=seed)
    file_names = save_model(workspace, manifest.folder, model.eval(), np.ones(len(vectors), dtype=np.bool_))
    plays = np.zeros(len(vectors), dtype=np.int64)
    for histories in dataset.read_all():
        plays += np.bincount(histories.songs, minlength=len(vectors))
    workspace.write_array(manifest.path(PLAY_COUNTS), plays)
    return artifacts.publish(workspace, manifest, [*file_names, PLAY_COUNTS])


def _song_vectors(dataset: Dataset, seed: int) -> np.ndarray:
    """Return float32 (N, D), normalized: songs lie around their artist, and artists around a few random centers.

    There are as many centers as the square root of the number of artists.
    """
    rng = np.random.default_rng(seed)
    song_artists = dataset.catalog().codes(columns.ARTIST)
    artist_count = int(song_artists.max()) + 1

    def scatter(centers: np.ndarray) -> np.ndarray:
        return np.asarray(centers + SPREAD * rng.normal(size=centers.shape).astype(np.float32))

    random_centers = rng.normal(size=(max(1, int(artist_count**0.5)), EMBEDDING_DIM)).astype(np.float32)
    vectors = scatter(scatter(random_centers[rng.integers(len(random_centers), size=artist_count)])[song_artists])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _write_rankers(dataset: Dataset, model: Manifest, retrieval: Manifest) -> None:
    workspace = dataset.workspace
    network = TasteRecommender.load(workspace, model.id, parts_of(workspace, model)["indexes"])
    source = CandidateSource(network, Retrieval.load(workspace, retrieval.folder))
    histories, queries = last_play_queries(dataset, EXAMPLES, bucket=dataset.manifest.buckets - 1)
    rows, last_songs = np.arange(len(queries)), histories.songs[histories.offsets[1:] - 1]
    targets_by_kind: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {
        kind: (rows, last_songs) for kind in KINDS if kind != "served"
    }
    examples = examples_for(source, histories, queries, targets_by_kind, held_out=np.zeros(len(rows), dtype=np.bool_))
    inputs = {"dataset": dataset.manifest.id, "models": model.id, "retrieval": retrieval.id}
    manifest = Manifest(kind="rankers", id=MODEL, inputs=inputs)
    file_names = []
    for kind, kind_examples in examples.items():
        file_names += _train_ranker(kind_examples, source.sources.names).save(workspace, manifest.folder, kind)
    artifacts.publish(workspace, manifest, file_names)


def _train_ranker(examples: RankingExamples, names: list[str]) -> Ranker:
    """Return a ranker of exactly TREES trees, without early stopping."""
    settings: dict[str, Any] = {"objective": "lambdarank", "num_leaves": 31, "num_threads": 1, "verbosity": -1}
    training_data = lightgbm.Dataset(examples.features, examples.right, group=examples.counts, feature_name=names)
    model = TreeModel(lightgbm.train(settings, training_data, num_boost_round=TREES))
    return Ranker(model, names, calibrate(examples.rows, model.scores(examples.features), examples.right))


def last_play_queries(dataset: Dataset, users: int, *, bucket: int = 0) -> tuple[Histories, Queries]:
    """Return at most `users` users of a bucket whose last play is held out, and the query before this play of each."""
    histories = next(dataset.read_bucket(bucket, users))
    # A split holds back HELD_OUT_SHARE of a user's plays, rounded: none of five plays, one of six.
    histories = histories.take(histories.lengths > 0.5 / HELD_OUT_SHARE)
    return histories, Queries.before_plays(histories, histories.offsets[1:] - 1)
