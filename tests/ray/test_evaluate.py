"""The evaluate stage on a local cluster."""

from typing import Any

import numpy as np
import pytest
from networks import model_config, network
from worlds import random_histories, random_vectors, write_dataset, write_song_vectors

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.errors import InputError, MismatchError, NotFoundError
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.ranks import BASELINE_CHOICES
from rayrec.evaluation.report import read_results
from rayrec.evaluation.results import statistics_of
from rayrec.jobs.evaluate import evaluate
from rayrec.model.checkpoint import save_model
from rayrec.model.network import TasteModel
from rayrec.recommend.baselines import BASELINES, PopularityRecommender, fit_baselines
from rayrec.storage.artifacts import Manifest, load_manifest, publish, verify
from rayrec.storage.workspace import Workspace

NUM_SONGS = 30
SPLIT = Split(id="cut", dataset="by-hand", validation_from=400_000, test_from=700_000, held_out_share=0.1)
# `average-1.0` is left out: after two plays the plain average is equally near to both songs, and rounding decides.
MODELS = tuple(name for name in BASELINES if name != "average-1.0")
SETTINGS = EvaluateConfig(models=MODELS, bootstrap_samples=100, offsets=10)
INPUTS = {"dataset": "by-hand", "split": "cut"}


@pytest.fixture
def histories() -> Histories:
    histories = random_histories(150, NUM_SONGS, seed=11)
    return histories.take(histories.lengths > 0)


@pytest.fixture
def dataset(workspace: Workspace, histories: Histories) -> Dataset:
    write_song_vectors(workspace, random_vectors(NUM_SONGS), INPUTS)
    return write_dataset(workspace, histories, NUM_SONGS, buckets=5)


@pytest.mark.usefixtures("cluster")
def test_the_job_over_buckets_equals_one_pass_in_one_process(dataset: Dataset, histories: Histories) -> None:
    manifest = evaluate(dataset.workspace, SETTINGS, split=SPLIT)
    stored = dataset.workspace.read_json(manifest.path("results.json"))
    settings = {row["model"]: {name: row[name] for name in row if name != "model"} for row in stored["settings"]}
    assert settings.keys() == {*BASELINE_CHOICES, "weighted-short", "weighted-long"}
    recommenders = fit_baselines(MODELS, dataset, random_vectors(NUM_SONGS), SPLIT.final, settings=settings)
    popularity = recommenders[0]
    assert isinstance(popularity, PopularityRecommender)
    evaluator = Evaluator(recommenders, split=SPLIT, song_plays=popularity.plays, config=SETTINGS)
    expected = statistics_of(evaluator(histories), evaluator, "item-knn")
    assert len(stored["results"]) == len(MODELS) * 7 * 4 * 9
    stored["comparisons"] = expected.pop("comparisons")  # the job compares with `two-step`, which is not evaluated
    (health,) = stored["song_vectors"]
    assert (health["vectors"], health["coverage"], health["dim"]) == ("songs", 1.0, 8)
    assert health["neighbors"][0]["plays"] == popularity.plays.max()
    assert stored["retrieval"] == expected.pop("retrieval") == []  # no model here proposes candidates
    assert stored["calibration"] == expected.pop("calibration") == []  # or has scores that are probabilities
    for name, entries in expected.items():
        assert len(stored[name]) == len(entries) > 0, name
        for actual, expected_entry in zip(stored[name], entries, strict=True):
            _assert_same(actual, expected_entry)


def _assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith(("low", "high")):
            continue  # the job groups users into other cells for its bootstrap
        if isinstance(value, str):
            assert actual[key] == value
        else:
            np.testing.assert_allclose(actual[key], value, atol=2e-6, err_msg=f"{key} of {expected}")


@pytest.mark.usefixtures("cluster")
def test_a_report_is_complete_found_again_and_repeated_on_purpose(dataset: Dataset) -> None:
    settings = EvaluateConfig(models=("popularity",), bootstrap_samples=10)
    first = evaluate(dataset.workspace, settings, split=SPLIT)
    verify(dataset.workspace, load_manifest(dataset.workspace, "reports", first.id))
    assert first.metrics["default"] == "two-step"  # the default recommender of a trained model
    results = read_results(dataset.workspace, first)
    assert {entry["model"] for entry in results["results"]} == {"popularity"}
    assert results["song_vectors"] == []  # popularity uses no song embeddings
    assert "results" not in first.metrics  # manifests stay small: each look at the workspace reads them
    assert first.inputs == INPUTS
    assert evaluate(dataset.workspace, settings, split=SPLIT) == first
    second = evaluate(dataset.workspace, settings, split=SPLIT, repeat=True)
    assert second.id != first.id
    assert read_results(dataset.workspace, second)["results"] == results["results"]


def test_vectors_that_saw_the_test_range_are_refused(workspace: Workspace, histories: Histories) -> None:
    write_dataset(workspace, histories, NUM_SONGS)
    write_song_vectors(workspace, random_vectors(NUM_SONGS), {"dataset": "by-hand"})
    with pytest.raises(MismatchError, match=r"was trained on all plays.*rayrec embed"):
        evaluate(workspace, EvaluateConfig(models=("item-knn",)), split=SPLIT)


def test_a_network_of_another_split_is_refused(dataset: Dataset) -> None:
    inputs = {"dataset": "by-hand", "split": "another", "songs": "by-hand"}
    publish(dataset.workspace, Manifest(kind="models", id="m", inputs=inputs), [])
    with pytest.raises(
        MismatchError, match=r"model m was trained on the plays before the test range of split another.*rayrec train"
    ):
        evaluate(dataset.workspace, EvaluateConfig(), split=SPLIT)


def test_a_split_of_another_data_set_is_refused(dataset: Dataset) -> None:
    other_split = Split(id="cut", dataset="other", validation_from=1, test_from=2)
    with pytest.raises(MismatchError, match="belongs to data set other"):
        evaluate(dataset.workspace, EvaluateConfig(models=("popularity",)), split=other_split)


def test_without_a_network_the_command_to_run_is_named(dataset: Dataset) -> None:
    with pytest.raises(NotFoundError, match="rayrec train"):
        evaluate(dataset.workspace, EvaluateConfig(), split=SPLIT)


def test_an_unknown_model_is_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="Unknown model 'gru'; expected two-step, taste, taste-short, pop"):
        evaluate(dataset.workspace, EvaluateConfig(models=("gru",)), split=SPLIT)


def _publish_network(workspace: Workspace, model_id: str, seed: int) -> TasteModel:
    model = network(model_config(num_songs=NUM_SONGS), seed)
    names = save_model(workspace, f"models/{model_id}", model, np.ones(NUM_SONGS, dtype=bool))
    publish(workspace, Manifest(kind="models", id=model_id, inputs={**INPUTS, "songs": "by-hand"}), names)
    return model


@pytest.mark.usefixtures("cluster")
def test_networks_of_several_models_stand_on_one_table_under_their_names(dataset: Dataset) -> None:
    for model_id, seed in (("first", 0), ("second", 1)):
        _publish_network(dataset.workspace, model_id, seed)
    settings = EvaluateConfig(models=("taste", "taste-short", "again=first", "r_hst=second"), bootstrap_samples=10)
    report = evaluate(dataset.workspace, settings, split=SPLIT, model_id="first")
    assert report.inputs["models r_hst"] == "second"
    results = read_results(dataset.workspace, report)
    recall = {
        (entry["model"], entry["target"]): entry["value"]
        for entry in results["results"]
        if (entry["users"], entry["metric"], entry["k"]) == ("all", "recall", 20)
    }
    for target in ("next", "offsets25_50"):
        assert recall["again", target] == recall["taste", target] != recall["r_hst", target]
    assert recall["taste-short", "next"] == recall["taste", "next"]
    assert recall["taste-short", "offsets25_50"] != recall["taste", "offsets25_50"]  # differs for the long horizon
    cosine_keys = {(entry["model"], entry["horizon"]) for entry in results["pairwise"]}
    assert ("taste-short", "long") not in cosine_keys
    assert report.metrics["recall@20"] == recall["taste", "next"]
    (health,) = results["song_vectors"]  # no model here uses the vectors that `embed` wrote
    assert (health["vectors"], health["id"], health["songs_with_vector"]) == ("models", "first", NUM_SONGS)


def test_an_added_model_needs_a_name_that_is_not_used(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="popularity=first: the name 'popularity' is empty or already used"):
        evaluate(dataset.workspace, EvaluateConfig(models=("popularity=first",)), split=SPLIT)
    with pytest.raises(NotFoundError, match="nowhere"):
        evaluate(dataset.workspace, EvaluateConfig(models=("mine=nowhere",)), split=SPLIT)


@pytest.mark.usefixtures("cluster")
def test_a_test_range_without_queries_is_refused(dataset: Dataset) -> None:
    late_split = Split(id="cut", dataset="by-hand", validation_from=10**12, test_from=10**12)
    with pytest.raises(InputError, match="nothing to predict; run `rayrec split` with more --test-days"):
        evaluate(dataset.workspace, EvaluateConfig(models=("popularity",)), split=late_split)
