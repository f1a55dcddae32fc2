"""Evaluators in files: the same sums from memory-mapped arrays, and nothing else that grows with the catalog."""

from dataclasses import fields

import numpy as np
import pytest
from networks import model_config, network
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.evaluation.accumulator import MetricAccumulator
from rayrec.evaluation.evaluator import Evaluator, evaluator_files
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.model.checkpoint import save_model
from rayrec.recommend.baselines import ItemKnnRecommender, PopularityRecommender
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.ranker import LinearModel, Ranker, calibrate
from rayrec.recommend.session_knn import VstanRecommender
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import CandidateSource, TwoStepRecommender
from rayrec.storage.workspace import Workspace

SPLIT = Split(id="cut", dataset="by-hand", validation_from=400_000, test_from=700_000)
SETTINGS = EvaluateConfig(offsets=5)
FOLDER = "reports/r/run"


def _evaluator(workspace: Workspace, histories: Histories, num_songs: int, *, index: str = "flat") -> Evaluator:
    """Of two-step, network and baselines, whose arrays lie in files as those of artifacts do."""
    known = [SPLIT.final.select(histories)]
    Retrieval.fit(known, num_songs=num_songs).save(workspace, "retrieval")
    model = network(model_config(num_songs=num_songs, input_table=True))
    save_model(workspace, "model", model, np.ones(num_songs, dtype=np.bool_))
    taste = TasteRecommender.from_folder(workspace, "model")
    taste.index = SongIndex.build(taste.song_vectors, IndexConfig(kind=index, nlist=4))  # type: ignore[arg-type]
    source = CandidateSource(taste, Retrieval.load(workspace, "retrieval"))
    weights = np.random.default_rng(0).random((5, len(source.sources.names)))
    calibration = calibrate(np.array([0, 0]), np.array([1.0, 0.0]), np.array([True, False]))
    two_step = TwoStepRecommender(source, {"next": Ranker(LinearModel(weights), source.sources.names, calibration)})
    workspace.write_array("songs.npy", random_vectors(num_songs, seed=1))
    item_knn = ItemKnnRecommender(workspace.read_array("songs.npy"))
    vstan = VstanRecommender.fit(known, num_songs=num_songs, allowed=SPLIT.final)
    popularity = PopularityRecommender.fit(known, num_songs=num_songs, allowed=SPLIT.final)
    models = [two_step, taste, taste.short_only(), item_knn, vstan, popularity]
    return Evaluator(models, split=SPLIT, song_plays=popularity.plays, config=SETTINGS)


def _sums(accumulator: MetricAccumulator) -> dict[str, np.ndarray]:
    return {field.name: getattr(accumulator, field.name) for field in fields(accumulator)}


@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_an_evaluator_from_files_adds_up_the_same_sums(workspace: Workspace, index: str) -> None:
    histories = random_histories(60, 40, seed=3)
    evaluator = _evaluator(workspace, histories, 40, index=index)
    with evaluator_files(workspace, FOLDER, evaluator) as files:
        loaded: Evaluator = files.load()
        expected, found = _sums(evaluator(histories)), _sums(loaded(histories))
    assert expected["queries"].sum() > 0
    for name, sums in expected.items():
        np.testing.assert_array_equal(found[name], sums, err_msg=name)
    assert not workspace.exists(FOLDER)


def test_what_is_sent_to_workers_does_not_grow_with_the_catalog(workspace: Workspace) -> None:
    sizes = []
    for num_songs in (2_000, 20_000):
        evaluator = _evaluator(workspace, random_histories(60, num_songs, seed=3), num_songs)
        with evaluator_files(workspace, FOLDER, evaluator) as files:
            sizes.append(len(files.pickled))
    assert max(sizes) - min(sizes) < 500
    assert max(sizes) < 100_000


def test_arrays_of_artifacts_are_not_written_again(workspace: Workspace) -> None:
    num_songs, dim = 20_000, 64
    workspace.write_array("songs.npy", random_vectors(num_songs, dim))
    recommender = ItemKnnRecommender(np.asarray(workspace.read_array("songs.npy")))
    evaluator = Evaluator([recommender], split=SPLIT, song_plays=np.ones(num_songs), config=SETTINGS)
    with evaluator_files(workspace, FOLDER, evaluator) as files:
        assert workspace.size(FOLDER) < num_songs * 50 < 4 * num_songs * dim
        loaded: Evaluator = files.load()
        vectors = loaded.recommenders[0].song_vectors  # type: ignore[attr-defined]
        np.testing.assert_array_equal(vectors, recommender.song_vectors)
        assert vectors.flags.writeable is False
