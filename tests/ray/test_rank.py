"""Retrieval and ranker jobs: counts of buckets and song ranges merge, rankers learn from the validation range."""

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankings import retrieval_of
from trainings import CONFIG as SMALL
from trainings import NUM_SONGS
from worlds import random_vectors, write_song_vectors

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import SELECTION_FOLDER, Split
from rayrec.data.synthetic import GenerateConfig
from rayrec.errors import InputError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import read_results
from rayrec.jobs import retrieval as job
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.generate import generate
from rayrec.jobs.rank import fit_rankers
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.train import train
from rayrec.recommend import stored_retrieval
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.recommend.two_step_config import ABLATED_PARTS, RankConfig, RetrievalConfig
from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest, verify
from rayrec.storage.workspace import Workspace, histories_file

SETTINGS = RetrievalConfig(sessions_per_song=5, rules_per_song=8)
FEW_TREES = RankConfig(trees=5, leaves=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("rank") / "workspace")
    generate(workspace, GenerateConfig(users=150, songs=NUM_SONGS, artists=12, genres=4, plays=25, days=60, buckets=3))
    return workspace


@pytest.fixture(scope="module")
def model(world: Workspace, split: Split) -> Manifest:
    vectors = Manifest(kind="songs", id="by-hand").path("selection_vectors.npy")
    world.write_array(vectors, random_vectors(NUM_SONGS))
    return train(world, SMALL.replace(workers=0, epochs=1), split=split)


@pytest.fixture(scope="module")
def retrieval(world: Workspace, split: Split) -> Manifest:
    return fit_retrieval(world, SETTINGS, split=split)


def arrays(value: Any) -> dict[str, np.ndarray]:
    """Return all arrays of a retrieval by dotted field name."""
    result: dict[str, np.ndarray] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, np.ndarray):
            result[field.name] = part
        elif hasattr(part, "__dataclass_fields__"):
            result |= {f"{field.name}.{name}": array for name, array in arrays(part).items()}
    return result


def expected_retrieval(world: Workspace, split: Split) -> Retrieval:
    """Return a retrieval fitted in this process, on all plays that a final fit may use."""
    dataset = Dataset(world)
    catalog = dataset.catalog()
    return retrieval_of(
        (split.final.select(histories) for histories in dataset.read_all()),
        num_songs=dataset.num_songs,
        allowed=split.final,
        newest=SETTINGS.sessions_per_song,
        artist_of_song=catalog.codes("artist"),
    )


def test_a_fit_by_buckets_and_song_ranges_equals_a_fit_in_one_process(
    world: Workspace, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_retrieval, "PLAYS_PER_RANGE", 200)
    manifest = fit_retrieval(world, SETTINGS, split=split, repeat=True)
    verify(world, manifest)
    actual = arrays(Retrieval.load(world, manifest.folder))
    expected = expected_retrieval(world, split)
    expected = Retrieval(**{**expected.__dict__, "rules": expected.rules.strongest(SETTINGS.rules_per_song)})
    for name, array in arrays(expected).items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    assert not world.files(manifest.path("run"))


def test_a_job_that_was_killed_reads_no_bucket_again(
    world: Workspace, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.replace(sessions_per_song=6)

    def files_after_killed_fit() -> dict[str, int]:
        with monkeypatch.context() as patch:
            patch.setattr(job, "run_on_node", _raise_error)
            with pytest.raises(RuntimeError, match="the node is gone"):
                fit_retrieval(world, settings, split=split)
        folders = world.folders("retrieval")
        (unfinished_id,) = [name for name in folders if not world.exists(f"retrieval/{name}/manifest.json")]
        paths = world.files(f"retrieval/{unfinished_id}")
        return {path: Path(world.full(path)).stat().st_mtime_ns for path in paths}

    pieces = files_after_killed_fit()
    assert len(pieces) == Dataset(world).manifest.buckets + 1  # a piece per bucket, and their merged counts
    assert files_after_killed_fit() == pieces  # no file was written again
    manifest = fit_retrieval(world, settings, split=split)
    assert manifest.metrics["sessions"] > 0


def _raise_error(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the node is gone")


def test_rankers_learn_from_the_validation_range_and_answer(
    world: Workspace, model: Manifest, retrieval: Manifest
) -> None:
    rankers = fit_rankers(world, FEW_TREES, model_id=model.id, retrieval_id=retrieval.id)
    verify(world, rankers)
    assert rankers.inputs["models"] == model.id
    assert rankers.metrics["queries"] > 100
    assert rankers.metrics["next"]["form"] in ("trees", "linear")
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world, model.id))
    assert isinstance(recommender, TwoStepRecommender)
    histories = next(iter(Dataset(world).read_all()))
    songs, scores = recommender.recommend(histories, int(histories.played_at.max()), 5, exclude_heard=True)
    heard_songs = [set(plays) for plays in np.split(histories.songs, histories.offsets[1:-1])]
    assert all(not set(songs[row]) & heard_songs[row] for row in range(len(histories)))
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.fixture
def elsewhere(world: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the workspace that a test may damage."""
    shutil.copytree(world.full(""), tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def change_songs(workspace: Workspace, is_changed: Callable[[Histories], np.ndarray]) -> int:
    """Change the songs of the plays for which `is_changed`, bool (P,), is True; return the number of these plays."""
    num_changed = 0
    for bucket in range(Dataset(workspace).manifest.buckets):
        path = histories_file(0, bucket)
        histories = Histories.from_arrow(workspace.read_table(path))
        mask = is_changed(histories)
        songs = np.where(mask, (histories.songs + 1) % NUM_SONGS, histories.songs).astype(np.int32)
        workspace.write_table(path, replace(histories, songs=songs).to_arrow())
        num_changed += int(mask.sum())
    return num_changed


def refit_rankers(workspace: Workspace, model: Manifest, retrieval: Manifest) -> dict[str, str]:
    """Train the rankers again; return their files with checksums."""
    return fit_rankers(workspace, FEW_TREES, model_id=model.id, retrieval_id=retrieval.id, repeat=True).files


def test_rankers_do_not_depend_on_plays_of_the_test_range(
    elsewhere: Workspace, world: Workspace, split: Split, model: Manifest, retrieval: Manifest
) -> None:
    original = fit_rankers(world, FEW_TREES, model_id=model.id, retrieval_id=retrieval.id)
    assert change_songs(elsewhere, split.is_test) > 300
    assert refit_rankers(elsewhere, model, retrieval) == original.files
    assert change_songs(elsewhere, split.is_validation) > 100
    assert refit_rankers(elsewhere, model, retrieval) != original.files


def test_rankers_learn_without_the_final_network_and_the_final_retrieval(
    elsewhere: Workspace, world: Workspace, model: Manifest, retrieval: Manifest
) -> None:
    original = fit_rankers(world, FEW_TREES, model_id=model.id, retrieval_id=retrieval.id)
    deleted_paths = [
        path
        for manifest in (model, retrieval)
        for path in elsewhere.files(manifest.folder)
        if path != manifest.path("manifest.json") and not path.startswith(f"{manifest.path(SELECTION_FOLDER)}/")
    ]
    assert {model.path("model.safetensors"), retrieval.path("retrieval.json")} <= set(deleted_paths)
    for path in deleted_paths:
        elsewhere.delete(path)
    assert refit_rankers(elsewhere, model, retrieval) == original.files


@pytest.mark.slow  # trains rankers without each of five parts
def test_an_ablation_evaluates_rankers_trained_without_each_part(
    world: Workspace, split: Split, model: Manifest, retrieval: Manifest
) -> None:
    fit_rankers(world, FEW_TREES, model_id=model.id, retrieval_id=retrieval.id)
    config = EvaluateConfig(models=("two-step",), ablation=True, bootstrap_samples=10, offsets=0)
    report = evaluate(world, config, split=split, model_id=model.id)
    verify(world, report)
    results = read_results(world, report)["results"]
    kinds = {row["model"]: row["kind"] for row in results}
    assert kinds == {"two-step": "network"} | {f"without {part}": "ablation" for part in ABLATED_PARTS}
    mrr_by_model = {
        row["model"]: row["value"]
        for row in results
        if (row["target"], row["metric"], row["k"], row["users"]) == ("next", "mrr", 20, "all")
    }
    assert len(set(mrr_by_model.values())) > 1
    assert not world.files(report.path("run"))
    with pytest.raises(InputError, match="not among the models"):
        evaluate(world, config.replace(models=("popularity",)), split=split, model_id=model.id)


def test_fewer_queries_are_drawn_by_user_and_time(world: Workspace, model: Manifest, retrieval: Manifest) -> None:
    first = fit_rankers(world, RankConfig(trees=2, leaves=3, queries=60), model_id=model.id, retrieval_id=retrieval.id)
    second = fit_rankers(
        world, RankConfig(trees=2, leaves=3, queries=60), model_id=model.id, retrieval_id=retrieval.id, repeat=True
    )
    assert first.metrics["queries"] <= 60
    assert first.files == second.files


def test_rankers_cannot_be_trained_on_a_model_without_a_validation_range(world: Workspace, split: Split) -> None:
    write_song_vectors(world, random_vectors(NUM_SONGS), {"dataset": split.dataset})
    full_model = train(world, SMALL.replace(workers=0, epochs=1), split=None)
    for retrieval_split in (None, split):
        retrieval = fit_retrieval(world, SETTINGS, split=retrieval_split)
        with pytest.raises(InputError, match="has no validation range"):
            fit_rankers(world, RankConfig(), model_id=full_model.id, retrieval_id=retrieval.id)
