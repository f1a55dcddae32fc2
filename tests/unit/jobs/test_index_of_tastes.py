"""nprobe of each IVF index over a network is chosen on taste vectors of users; a stored index is not built again."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rings import ring_plays, write_rows
from without_ray import without_ray

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Queries
from rayrec.data.split import SELECTION_FOLDER, SplitConfig, load_split
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs import evaluate, rank
from rayrec.jobs.build_index import build_index
from rayrec.jobs.fit import selection_parts
from rayrec.jobs.pipeline import Stages
from rayrec.jobs.rank import fit_rankers
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.index import IndexConfig, IndexMetrics, SongIndex
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import HORIZONS, TwoStepRecommender
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.storage.artifacts import newest
from rayrec.storage.workspace import Workspace

COLUMNS = {"user": "user_id", "song": "track", "played_at": "timestamp"}
LISTS = IndexConfig(kind="ivf", nlist=8, queries=20, target_recall=0.7)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A ring of 60 songs with network, retrieval and rankers of a split, and no index."""
    folder = tmp_path_factory.mktemp("indexes")
    path = write_rows(folder / "plays.csv", ring_plays(range(60)))
    workspace = Workspace(folder / "workspace")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        stages = Stages(workspace)
        stages.run("import", ImportConfig(format="csv", paths=(path,), columns=COLUMNS, buckets=2))
        stages.run("split", SplitConfig(test_days=4, validation_days=4))
        stages.run("embed", EmbedConfig(dim=8, epochs=1))
        stages.run("train", TrainConfig(hidden_dim=8, epochs=1, negatives=16, workers=0))
        stages.run("retrieval", RetrievalConfig())
        stages.run("rank", RankConfig(trees=2))
    return workspace


@pytest.fixture
def chosen_on(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray | None]:
    """The queries on which nprobe is chosen, for each IVF index that is built in a test."""
    without_ray(monkeypatch)
    recorded_queries: list[np.ndarray | None] = []
    build = SongIndex.build

    def record_and_build(
        vectors: np.ndarray, config: IndexConfig, *, queries: np.ndarray | None = None, threads: int = 1
    ) -> SongIndex:
        if config.kind == "ivf":
            recorded_queries.append(queries)
        return build(vectors, config, queries=queries, threads=threads)

    monkeypatch.setattr(SongIndex, "build", record_and_build)
    return recorded_queries


def _require_tastes(queries: np.ndarray | None, workspace: Workspace, network_folder: str) -> None:
    """Require that `queries` are taste vectors of users at the end of their histories."""
    assert queries is not None
    assert queries.shape == (LISTS.queries, 8)
    network = TasteRecommender.from_folder(workspace, network_folder)
    tastes = []
    for histories in Dataset(workspace).read_all():
        ends = Queries.at_end(histories, histories.played_at[histories.offsets[1:] - 1])
        tastes += list(network.vectors_of(histories, ends, HORIZONS).values())
    assert np.abs(queries[:, None] - np.concatenate(tastes)[None]).max(axis=2).min(axis=1).max() < 1e-5


def _two_step(workspace: Workspace) -> TwoStepRecommender:
    """The two-step recommender that `evaluate` makes."""
    dataset, model = Dataset(workspace), newest(workspace, "models")
    split = load_split(workspace, model.inputs["split"])
    models = evaluate.choose_models(workspace, dataset, EvaluateConfig(models=("two-step",)), split, None)
    (recommender,), _ = evaluate.make_recommenders(workspace, dataset, models, split)
    assert isinstance(recommender, TwoStepRecommender)
    return recommender


def test_rankers_learn_with_an_index_that_was_chosen_on_tastes_of_the_selection_network(
    workspace: Workspace, chosen_on: list[np.ndarray | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "IndexConfig", lambda: LISTS)
    fit_rankers(workspace, RankConfig(trees=2), repeat=True)
    (queries,) = chosen_on
    _require_tastes(queries, workspace, newest(workspace, "models").path(SELECTION_FOLDER))


def test_quality_is_measured_with_an_index_that_was_chosen_on_tastes(
    workspace: Workspace, chosen_on: list[np.ndarray | None]
) -> None:
    dataset = Dataset(workspace)
    model, retrieval, rankers = (newest(workspace, kind) for kind in ("models", "retrieval", "rankers"))
    recommender = selection_parts(dataset, model, retrieval, rankers, "two-step").load(dataset, LISTS)
    assert isinstance(recommender, TwoStepRecommender)
    assert recommender.source.index.figures.kind == "ivf"
    (queries,) = chosen_on
    _require_tastes(queries, workspace, model.path(SELECTION_FOLDER))


def test_without_a_stored_index_an_evaluation_chooses_its_own_on_tastes(
    workspace: Workspace, chosen_on: list[np.ndarray | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "IndexConfig", lambda: LISTS)
    assert _two_step(workspace).source.index.figures.kind == "ivf"
    (queries,) = chosen_on
    _require_tastes(queries, workspace, newest(workspace, "models").folder)


def test_an_evaluation_searches_the_index_that_is_stored(
    workspace: Workspace, chosen_on: list[np.ndarray | None], tmp_path: Path
) -> None:
    workspace = Workspace(shutil.copytree(workspace.uri, tmp_path / "copy"))
    index = build_index(workspace, LISTS)
    assert len(chosen_on) == 1
    metrics = _two_step(workspace).source.index.figures
    assert len(chosen_on) == 1  # no other index was built
    assert metrics == IndexMetrics(**{name: index.metrics[name] for name in asdict(metrics)})
    config = EvaluateConfig(models=("two-step",), bootstrap_samples=0, offsets=0, max_curve_users=5)
    split = load_split(workspace, newest(workspace, "models").inputs["split"])
    report = evaluate.evaluate(workspace, config, split=split)
    assert report.inputs["indexes"] == index.id
    assert len(chosen_on) == 1
