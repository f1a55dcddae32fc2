"""What `rayrec bench answers` answers from: generated plays, clustered vectors, and every artifact of a release.

N songs, D numbers per vector, C candidates, F features.
"""

import time
from typing import Any

import lightgbm
import numpy as np
import torch

from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.bench_data import EMBEDDING_DIM, bench_dataset
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.jobs.build_index import build_index
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.train_plan import model_config
from rayrec.model.checkpoint import save_model
from rayrec.model.network import TasteModel
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.ranker import Ranker, RankingExamples, TreeModel, calibrate
from rayrec.recommend.retrieval.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import KINDS, CandidateSource, RankerKind, examples_for
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.releases import parts_of
from rayrec.storage.workspace import Workspace

MODEL = "answers"  # id of the model and its rankers
PLAYS_PER_SONG = 3
EXAMPLES = 400  # users whose last play teaches the rankers
TREES = 100  # of each ranker: more than any data set of docs/evaluation.md grew
AGAIN = 3.0  # weight of the songs just played, which a network that is not trained has to be given
SPREAD = 0.7  # of song vectors around that of their artist, and of these around each other


def answers_world(place: Workspace, config: BenchConfig, songs: int) -> tuple[Dataset, dict[str, str], float]:
    """A catalog's data set, the ids of its parts, and the seconds that building took; 0 where it was there.

    Needs a running cluster.
    """
    began = time.perf_counter()
    users = round(max(config.answers_plays, PLAYS_PER_SONG * songs) / config.plays)
    dataset = bench_dataset(place, config, users=users, songs=songs)
    workspace = dataset.workspace
    if workspace.exists(f"rankers/{MODEL}/manifest.json"):
        return dataset, parts_of(workspace, artifacts.load(workspace, "models", MODEL)), 0.0
    model = _write_model(dataset, config.seed)
    build_index(workspace, IndexConfig(), model_id=model.id)
    retrieval = fit_retrieval(workspace, RetrievalConfig())
    _write_rankers(dataset, model, retrieval)
    return dataset, parts_of(workspace, model), time.perf_counter() - began


def _write_model(dataset: Dataset, seed: int) -> Manifest:
    """A network of the default shape that is not trained: its taste vectors lie near the songs just played."""
    workspace, vectors = dataset.workspace, _song_vectors(dataset, seed)
    made_of = {"dataset": dataset.manifest.id}
    embedding = Manifest(kind="songs", id=MODEL, inputs=made_of)
    workspace.write_array(embedding.path("vectors.npy"), vectors)
    artifacts.publish(workspace, embedding, ["vectors.npy"])
    torch.manual_seed(seed)
    model = TasteModel(model_config(dataset, TrainConfig(), EMBEDDING_DIM), torch.from_numpy(vectors))
    for weights in model.again.values():
        weights.data.fill_(AGAIN)
    manifest = Manifest(kind="models", id=MODEL, inputs={**made_of, "songs": embedding.id}, seed=seed)
    names = save_model(workspace, manifest.folder, model.eval(), np.ones(len(vectors), dtype=np.bool_))
    return artifacts.publish(workspace, manifest, names)


def _song_vectors(dataset: Dataset, seed: int) -> np.ndarray:
    """float32 (N, D), normalized: songs around their artist, artists around one of as many points as their root."""
    random = np.random.default_rng(seed)
    artist = dataset.catalog().codes(columns.ARTIST)
    artists = int(artist.max()) + 1

    def around(centers: np.ndarray) -> np.ndarray:
        return np.asarray(centers + SPREAD * random.normal(size=centers.shape).astype(np.float32))

    points = random.normal(size=(max(1, int(artists**0.5)), EMBEDDING_DIM)).astype(np.float32)
    vectors = around(around(points[random.integers(len(points), size=artists)])[artist])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _write_rankers(dataset: Dataset, model: Manifest, retrieval: Manifest) -> None:
    workspace = dataset.workspace
    network = TasteRecommender.load(workspace, model.id, parts_of(workspace, model)["indexes"])
    source = CandidateSource(network, Retrieval.load(workspace, retrieval.folder))
    histories, queries = last_play_queries(dataset, EXAMPLES)
    rows, songs = np.arange(len(queries)), histories.songs[histories.offsets[1:] - 1]
    kinds: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {kind: (rows, songs) for kind in KINDS if kind != "served"}
    examples = examples_for(source, histories, queries, kinds, held_out=np.zeros(len(rows), dtype=np.bool_))
    inputs = {"dataset": dataset.manifest.id, "models": model.id, "retrieval": retrieval.id}
    manifest = Manifest(kind="rankers", id=MODEL, inputs=inputs)
    names = []
    for kind, part in examples.items():
        names += _grown(part, source.sources.names).save(workspace, manifest.folder, kind)
    artifacts.publish(workspace, manifest, names)


def _grown(examples: RankingExamples, names: list[str]) -> Ranker:
    """A ranker of exactly TREES trees, whether they all help or not."""
    settings: dict[str, Any] = {"objective": "lambdarank", "num_leaves": 31, "num_threads": 1, "verbosity": -1}
    data = lightgbm.Dataset(examples.features, examples.right, group=examples.counts, feature_name=names)
    model = TreeModel(lightgbm.train(settings, data, num_boost_round=TREES))
    return Ranker(model, names, calibrate(examples.rows, model.scores(examples.features), examples.right))


def last_play_queries(dataset: Dataset, users: int) -> tuple[Histories, Questions]:
    """Some users with the queries that the last play of each answers."""
    histories = next(dataset.read_bucket(0, users))
    histories = histories.take(histories.lengths > 1)
    return histories, Questions.before_plays(histories, histories.offsets[1:] - 1)
