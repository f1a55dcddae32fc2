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
    made = random_histories(60, NUM_SONGS, seed=13)
    return made.take(made.lengths > 0)


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
        alone = dataset.history(row["user_id"])
        songs, scores = recommender.recommend_one(alone, AT, 5, horizon="long")
        found = recommender.score_vectors(np.array([row["taste_long"]], dtype=np.float32))[0]
        np.testing.assert_allclose(found[songs], scores, atol=1e-5)
        assert row["heard"] == sorted(set(alone.songs.tolist()))
        assert (row["plays"], row["last_played_at"]) == (alone.num_plays, alone.played_at[-1])


@pytest.mark.usefixtures("cluster")
def test_only_the_buckets_that_are_missing_are_computed(dataset: Dataset) -> None:
    workspace = dataset.workspace
    whole = compute_tastes(workspace, CONFIG)
    assert whole.metrics["buckets_computed"] == BUCKETS
    wanted = rows_of(workspace, whole)
    workspace.delete(whole.path("manifest.json"))  # as if the job had been killed
    workspace.delete(tastes_file(whole.folder, 2))
    kept = {bucket: workspace.read_bytes(tastes_file(whole.folder, bucket)) for bucket in (0, 1, 3)}
    again = compute_tastes(workspace, CONFIG)
    assert again.id == whole.id
    assert again.metrics["buckets_computed"] == 1
    assert again.metrics["users"] == whole.metrics["users"]
    assert {bucket: workspace.read_bytes(tastes_file(again.folder, bucket)) for bucket in kept} == kept
    assert rows_of(workspace, again).equals(wanted)


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
