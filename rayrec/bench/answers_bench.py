"""What an answer costs on catalogs of several sizes: CPU time and bytes by stage, private memory, recall."""

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import psutil

from rayrec.bench.answers_world import answers_world, last_play_queries
from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.rounds import PlainProcess, niceness
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.jobs.runtime import ray_cluster
from rayrec.progress import progress
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.filters import without_heard
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.query_batch import QueryBatch
from rayrec.recommend.retrievers import COUNTS, Candidates
from rayrec.recommend.two_step import HORIZONS, CandidateSource, Scored, TwoStepRecommender
from rayrec.storage.workspace import Workspace

K = 20
MIB = 1 << 20
WARM = 20  # answers before those that count
TRACED = 20  # answers whose allocations are followed, which makes them slow
Result = TypeVar("Result")


def bench_answers(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """One answer after the other, each of a user's whole history, by one core of a process that does nothing else.

    For each catalog: cpu_ms of an answer and of each stage, bytes that a stage holds at most, private_mb of the process
    beside what it maps into memory, recall@20 of the next play with the index and with exact search. cpu_growth
    compares the largest catalog with the smallest.
    """
    catalogs = []
    with progress("bench answers", 2 * len(config.answers_songs)) as bar:
        for songs in config.answers_songs:
            with ray_cluster():
                dataset, parts, seconds = answers_world(place, config, songs)
            bar.advance(note=f"{songs:,} songs are built")
            with PlainProcess(niceness()) as plain:
                figures = plain.run(measure_answers, dataset, parts, config.answers_queries)
            catalogs.append({"songs": songs, "build_seconds": round(seconds, 1), **figures})
            bar.advance(note=f"{songs:,} songs are measured")
    smallest, largest = catalogs[0], catalogs[-1]
    return {
        "name": "answers",
        "queries": config.answers_queries,
        "cpu_ms": largest["cpu_ms"],
        "cpu_growth": largest["cpu_ms"] / smallest["cpu_ms"],
        "private_mb": largest["private_mb"],
        "catalogs": catalogs,
    }


def measure_answers(dataset: Dataset, parts: dict[str, str], queries: int) -> dict[str, Any]:
    """The figures of one catalog, in a process that has loaded nothing yet."""
    import torch

    torch.set_num_threads(1)
    two_step = load_recommender(dataset.workspace, dataset, parts)
    assert isinstance(two_step, TwoStepRecommender)
    histories, questions = last_play_queries(dataset, queries + WARM)
    users = [one_query(histories, questions, row) for row in range(len(questions))]
    for history, question in users[:WARM]:
        answer_one(two_step, history, question)
    users = users[WARM:] or users  # a world of few users has none to spare
    began = time.process_time()
    for history, question in users:
        answer_one(two_step, history, question)
    whole = 1000 * (time.process_time() - began) / len(users)
    private = sum(area.private_dirty for area in psutil.Process().memory_maps()) / MIB
    clock = StageCosts()
    for history, question in users:
        answer_by_stage(two_step, history, question, clock)
    tracemalloc.start()
    traced = StageCosts(traced=True)
    for history, question in users[:TRACED]:
        answer_by_stage(two_step, history, question, traced)
    tracemalloc.stop()
    stages = {
        name: {"cpu_ms": 1000 * seconds / len(users), "bytes": traced.most_bytes[name]}
        for name, seconds in clock.seconds.items()
    }
    recall_with_index = recall(two_step, histories, questions)
    exact = SongIndex.build(two_step.source.network.song_vectors, IndexConfig(kind="flat"))
    return {
        "cpu_ms": whole,
        "candidates": clock.candidates / len(users),
        "stages": stages,
        "private_mb": private,
        "recall": recall_with_index,
        "exact_recall": recall(with_index(two_step, exact), histories, questions),
        "index": two_step.source.index.figures.kind,
        "nprobe": two_step.source.index.figures.nprobe,
    }


def one_query(histories: Histories, questions: Questions, row: int) -> tuple[Histories, Questions]:
    """One user's plays before a question, and the question."""
    seen = int(questions.seen[row])
    history = histories.take(questions.rows[row : row + 1]).span(0, seen)
    return history, Questions.at_end(history, int(questions.at[row]))


def answer_one(two_step: TwoStepRecommender, history: Histories, question: Questions) -> np.ndarray:
    """int32 (K,): new songs for one user, as a server answers."""
    return np.asarray(two_step.rank_queries(history, question, K, limits=without_heard(history)).songs[0])


@dataclass
class StageCosts:
    """CPU seconds by stage, or with `traced` the most bytes that any answer held in it."""

    traced: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    most_bytes: dict[str, int] = field(default_factory=dict)
    candidates: int = 0

    def __call__(self, name: str, work: Callable[[], Result]) -> Result:
        """The result of a stage's work."""
        if self.traced:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
        began = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
        if self.traced:
            held = tracemalloc.get_traced_memory()[1] - before
            self.most_bytes[name] = max(self.most_bytes.get(name, 0), held)
        return result


def answer_by_stage(two_step: TwoStepRecommender, history: Histories, question: Questions, stage: StageCosts) -> None:
    """The work of `answer_one`, one stage after the other."""
    source, limits = two_step.source, without_heard(history)
    vectors = stage("taste vectors", lambda: source.network.vectors_of(history, question, HORIZONS))
    short, long = (vectors[horizon] for horizon in HORIZONS)
    batch = stage(
        "plays",
        lambda: QueryBatch.of(history, question, source.num_songs, short_vectors=short, long_vectors=long),
    )
    proposals = {
        retriever.name: stage(retriever.name, partial(retriever.propose, batch, COUNTS[retriever.name]))
        for retriever in source.retrievers
    }
    candidates = stage("union", lambda: Candidates.union(batch, proposals))
    features = stage("features", lambda: source.sources.features(batch, candidates))
    scored = Scored(batch=batch, candidates=candidates, features=features)
    stage("ranker", lambda: two_step.rank_scored(scored, K, limits))
    stage.candidates += len(candidates.rows)


def recall(two_step: TwoStepRecommender, histories: Histories, questions: Questions) -> float:
    """recall@K of the last play of each user."""
    songs = two_step.rank_queries(histories, questions, K).songs
    return float((songs == histories.songs[histories.offsets[1:] - 1][:, None]).any(axis=1).mean())


def with_index(two_step: TwoStepRecommender, index: SongIndex) -> TwoStepRecommender:
    """The same with another index."""
    network = two_step.source.network.with_index(index)
    source = CandidateSource(network, two_step.source.retrieval, real_times=two_step.source.sources.real_times)
    return TwoStepRecommender(source, two_step.rankers)
