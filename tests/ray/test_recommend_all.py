"""Recommendations for all users on a local cluster: equal to single requests, resumed bucket by bucket."""

import numpy as np
import pyarrow as pa
import pytest
from served import AT

from rayrec.data.dataset import Dataset
from rayrec.errors import InputError, RayrecError
from rayrec.jobs import recommend_all as job
from rayrec.jobs.recommend_all import recommend_all, recommendations_file
from rayrec.jobs.verify import verify_workspace
from rayrec.recommend.answer import RecommendConfig, answer, load_recommender
from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

CONFIG = RecommendConfig(k=7)


def rows_of(workspace: Workspace, manifest: Manifest) -> pa.Table:
    buckets = range(Dataset(workspace).manifest.buckets)
    tables = [workspace.read_table(recommendations_file(manifest.folder, bucket)) for bucket in buckets]
    return pa.concat_tables(tables)


@pytest.mark.usefixtures("cluster")
def test_every_user_gets_the_songs_of_a_single_request_and_only_missing_buckets_are_computed(world: Workspace) -> None:
    dataset, parts = Dataset(world), releases.default_parts(world)
    manifest = recommend_all(world, CONFIG, parts, at=AT)
    rows = rows_of(world, manifest)
    assert sorted(rows.column("user_id").to_pylist()) == sorted(
        user for histories in dataset.read_all() for user in histories.user_ids
    )
    recommender = load_recommender(world, dataset, parts)
    for row in rows.slice(0, 10).to_pylist():
        single = answer(dataset, recommender, CONFIG, parts=parts, at=AT, user=row["user_id"])
        assert row["song_ids"] == single.song_ids
        np.testing.assert_allclose(row["scores"], single.scores, atol=1e-5)
    assert (manifest.metrics["users"], manifest.metrics["songs"]) == (rows.num_rows, 7 * rows.num_rows)
    assert manifest.metrics["filled_songs"] == 0
    problems = [finding for finding in verify_workspace(world).problems if finding.path.startswith(manifest.folder)]
    assert problems == []

    path = recommendations_file(manifest.folder, 0)
    world.delete(manifest.path("manifest.json"))  # as if the job had been killed
    world.delete(path)
    resumed = recommend_all(world, CONFIG, parts, at=AT)
    assert (resumed.id, resumed.metrics["buckets_computed"], resumed.files) == (manifest.id, 1, manifest.files)
    assert recommend_all(world, CONFIG, parts, at=AT) == resumed

    table = world.read_table(path)
    world.write_table(path, table.set_column(2, "scores", [[list(reversed(row)) for row in table[2].to_pylist()]]))
    texts = [finding.text for finding in verify_workspace(world).problems if finding.path == path]
    assert texts == ["does not match its checksum"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("explore", [0.0, 0.2])
def test_songs_that_no_retriever_proposed_are_counted(world: Workspace, explore: float) -> None:
    config, parts = CONFIG.replace(k=150, explore=explore), releases.default_parts(world)
    first = recommend_all(world, config, parts, at=AT)
    scores = np.concatenate(rows_of(world, first).column("scores").to_pylist())
    assert 0 < first.metrics["filled_songs"] == (scores == 0).sum() < len(scores)
    world.delete(first.path("manifest.json"))  # as if the job had been killed
    second = recommend_all(world, config, parts, at=AT)
    assert (second.metrics["filled_songs"], second.metrics["buckets_computed"]) == (first.metrics["filled_songs"], 0)


def test_reasons_for_all_users_are_refused(world: Workspace) -> None:
    with pytest.raises(InputError, match="--explain"):
        recommend_all(world, CONFIG.replace(explain=True), releases.default_parts(world))


def test_a_mix_of_horizons_for_all_users_is_refused(world: Workspace) -> None:
    with pytest.raises(InputError, match=r"horizon is 0\.3; for all users expected short or long; a mix"):
        recommend_all(world, CONFIG.replace(horizon=0.3), releases.default_parts(world))


def test_parts_that_do_not_fit_are_refused_before_any_bucket(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "ray_cluster", pytest.fail)
    with pytest.raises(RayrecError, match="gone"):
        recommend_all(world, CONFIG, {"models": "gone"})
