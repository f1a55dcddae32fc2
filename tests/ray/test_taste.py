"""The taste stage on a local cluster: one row per user, resumed bucket by bucket."""

import numpy as np
import pyarrow as pa
import pytest
from networks import MINUTE, NUM_SONGS, model_config, network
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.errors import MismatchError, NotFoundError
from rayrec.jobs.taste import compute_tastes
from rayrec.model.checkpoint import save_model
from rayrec.model.taste_table import tastes_file
from rayrec.model.train_config import TasteConfig
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage.artifacts import Manifest, load_manifest, publish, verify
from rayrec.storage.workspace import Workspace

BUCKETS = 4
AT = 200 * MINUTE
CONFIG = TasteConfig(at="1970-01-01T03:20:00Z", users=7)  # the moment AT


@pytest.fixture(scope="module")
def histories() -> Histories:
    histories = random_histories(60, NUM_SONGS, seed=13)
    return histories.take(histories.lengths > 0)


@pytest.fixture
def dataset(workspace: Workspace, histories: Histories) -> Dataset:
    """A data set and an untrained model of it."""
    names = save_model(workspace, "models/m", network(model_config(layers=2)), np.ones(NUM_SONGS, dtype=bool))
    publish(workspace, Manifest(kind="models", id="m", inputs={"dataset": "by-hand", "songs": "s"}), names)
    return write_dataset(workspace, histories, NUM_SONGS, buckets=BUCKETS)


def rows_of(workspace: Workspace, manifest: Manifest) -> pa.Table:
    return pa.concat_tables([workspace.read_table(tastes_file(manifest.folder, bucket)) for bucket in range(BUCKETS)])


@pytest.mark.usefixtures("cluster")
def test_every_user_has_one_row_with_the_vector_of_a_single_request(dataset: Dataset, histories: Histories) -> None:
    manifest = compute_tastes(dataset.workspace, CONFIG)
    verify(dataset.workspace, load_manifest(dataset.workspace, "tastes", manifest.id))
    table = rows_of(dataset.workspace, manifest)
    assert sorted(table.column("user_id").to_pylist()) == sorted(histories.user_ids)
    assert manifest.inputs == {"dataset": "by-hand", "models": "m"}
    assert (manifest.metrics["users"], manifest.metrics["plays"]) == (len(histories), histories.num_plays)
    recommender = TasteRecommender.load(dataset.workspace, "m")
    for row in table.slice(0, 12).to_pylist():
        history = dataset.history(row["user_id"])
        songs, scores = recommender.recommend_one(history, AT, 5, horizon="long")
        all_scores = recommender.score_vectors(np.array([row["taste_long"]], dtype=np.float32))[0]
        np.testing.assert_allclose(all_scores[songs], scores, atol=1e-5)
        assert row["heard"] == sorted(set(history.songs.tolist()))
        assert (row["plays"], row["last_played_at"]) == (history.num_plays, history.played_at[-1])


@pytest.mark.usefixtures("cluster")
def test_only_the_buckets_that_are_missing_are_computed(dataset: Dataset) -> None:
    workspace = dataset.workspace
    first = compute_tastes(workspace, CONFIG)
    assert first.metrics["buckets_computed"] == BUCKETS
    expected = rows_of(workspace, first)
    workspace.delete(first.path("manifest.json"))  # as if the job had been killed
    workspace.delete(tastes_file(first.folder, 2))
    kept_files = {bucket: workspace.read_bytes(tastes_file(first.folder, bucket)) for bucket in (0, 1, 3)}
    second = compute_tastes(workspace, CONFIG)
    assert second.id == first.id
    assert second.metrics["buckets_computed"] == 1
    assert second.metrics["users"] == first.metrics["users"]
    assert {bucket: workspace.read_bytes(tastes_file(second.folder, bucket)) for bucket in kept_files} == kept_files
    assert rows_of(workspace, second).equals(expected)


@pytest.mark.usefixtures("cluster")
def test_tastes_are_found_again_and_repeated_on_purpose(dataset: Dataset) -> None:
    first = compute_tastes(dataset.workspace, CONFIG)
    assert compute_tastes(dataset.workspace, CONFIG.replace(users=3), model_id="m") == first
    assert compute_tastes(dataset.workspace, CONFIG, repeat=True).id == f"{first.id}.2"
    later = compute_tastes(dataset.workspace, TasteConfig())
    assert later.config["at"] == dataset.manifest.last_play


def test_a_model_of_another_data_set_is_refused(dataset: Dataset) -> None:
    publish(dataset.workspace, Manifest(kind="models", id="other", inputs={"dataset": "gone"}), [])
    with pytest.raises(
        MismatchError, match=r"model other was trained on data set gone, .* run `rayrec embed` and `rayrec train` first"
    ):
        compute_tastes(dataset.workspace, CONFIG)


def test_without_a_model_the_command_to_run_is_named(workspace: Workspace, histories: Histories) -> None:
    write_dataset(workspace, histories, NUM_SONGS, buckets=BUCKETS)
    with pytest.raises(NotFoundError, match="rayrec train"):
        compute_tastes(workspace, CONFIG)
