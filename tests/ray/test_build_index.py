import sys

import numpy as np
import pytest
from networks import NUM_SONGS, model_config, network
from worlds import random_histories, write_dataset

from rayrec.data.histories import Queries
from rayrec.data.top_k import top_k
from rayrec.embeddings.vectors import SongVectors
from rayrec.errors import MissingDependencyError, NotFoundError
from rayrec.jobs import build_index as index_job
from rayrec.jobs.build_index import build_index, taste_queries
from rayrec.model.checkpoint import save_model
from rayrec.model.train_config import SONG_VECTORS
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

pytestmark = pytest.mark.usefixtures("cluster")


def add_model(workspace: Workspace, model_id: str, seed: int) -> np.ndarray:
    vectors = SongVectors.normalized(np.random.default_rng(seed).normal(size=(600, 8)))
    manifest = Manifest(kind="models", id=model_id)
    vectors.save(workspace, manifest.path(SONG_VECTORS))
    artifacts.publish(workspace, manifest, [SONG_VECTORS])
    return vectors.vectors


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_the_index_of_the_newest_model_finds_its_songs(kind: str, workspace: Workspace) -> None:
    add_model(workspace, "old", seed=0)
    vectors = add_model(workspace, "new", seed=1)
    manifest = build_index(workspace, IndexConfig(kind=kind, target_recall=1.0, queries=50))
    assert manifest.inputs == {"models": "new"}
    assert (manifest.metrics["kind"], manifest.metrics["songs"], manifest.metrics["recall"]) == (kind, 600, 1.0)
    artifacts.verify(workspace, manifest)
    stored = artifacts.load_manifest(workspace, "indexes", manifest.id)
    songs = SongIndex.load(workspace, stored, vectors).rank(vectors[:5], 10).songs
    np.testing.assert_array_equal(songs, top_k(vectors[:5] @ vectors.T, 10)[0])


def test_lists_are_chosen_on_taste_vectors_of_both_horizons(workspace: Workspace) -> None:
    histories = random_histories(40, NUM_SONGS)
    histories = histories.take(histories.lengths > 0)
    write_dataset(workspace, histories, NUM_SONGS)
    names = save_model(workspace, "models/m", network(model_config()), np.ones(NUM_SONGS, dtype=bool))
    model = artifacts.publish(workspace, Manifest(kind="models", id="m", inputs={"dataset": "by-hand"}), names)
    queries = taste_queries(workspace, model, 12)
    assert queries is not None
    recommender = TasteRecommender.load(workspace, "m")
    end_queries = Queries.at_end(histories, histories.played_at[histories.offsets[1:] - 1])
    tastes = [recommender.vectors(histories, end_queries, horizon) for horizon in ("short", "long")]
    near_masks = [np.abs(queries[:, None] - vectors[None]).max(axis=2).min(axis=1) < 1e-5 for vectors in tastes]
    assert queries.shape == (12, recommender.song_vectors.shape[1])
    assert [is_near.sum() for is_near in near_masks] == [6, 6]
    assert taste_queries(workspace, Manifest(kind="models", id="m", inputs={"dataset": "gone"}), 12) is None


def test_the_same_index_is_not_built_again_unless_repeated(workspace: Workspace) -> None:
    add_model(workspace, "a", seed=0)
    first = build_index(workspace, IndexConfig(), model_id="a")
    assert build_index(workspace, IndexConfig(), model_id="a") == first
    assert build_index(workspace, IndexConfig(), model_id="a", repeat=True).id == f"{first.id}.2"
    assert build_index(workspace, IndexConfig().replace(seed=1), model_id="a").id != first.id


def test_a_missing_model_is_named_with_the_command_to_run(workspace: Workspace) -> None:
    with pytest.raises(NotFoundError, match="rayrec train"):
        build_index(workspace, IndexConfig())
    with pytest.raises(NotFoundError, match="'b'"):
        build_index(workspace, IndexConfig(), model_id="b")


def test_without_faiss_nothing_is_started(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    add_model(workspace, "a", seed=0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(index_job, "run_on_node", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        build_index(workspace, IndexConfig())
