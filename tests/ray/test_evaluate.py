"""The evaluate stage on a local cluster."""

import numpy as np
import pytest
from worlds import random_histories, random_vectors, write_dataset, write_song_vectors

from rayrec.artifacts import Manifest, load, publish, verify
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.errors import InputError, MismatchError, NotFoundError
from rayrec.evaluation.protocol import EvaluateConfig, Evaluator
from rayrec.evaluation.results import curves_of_tally, results_of
from rayrec.jobs.evaluate import evaluate
from rayrec.recommend.baselines import BASELINES, fit_baselines
from rayrec.recommend.popularity import PopularityRecommender
from rayrec.workspace import Workspace

NUM_SONGS = 30
SPLIT = Split(id="cut", dataset="by-hand", validation_from=400_000, test_from=700_000, held_out_share=0.1)
SETTINGS = EvaluateConfig(models=BASELINES, bootstrap_samples=100, offsets=10)
MADE_OF = {"dataset": "by-hand", "split": "cut"}


@pytest.fixture
def histories() -> Histories:
    made = random_histories(150, NUM_SONGS, seed=11)
    return made.take(made.lengths > 0)


@pytest.fixture
def dataset(workspace: Workspace, histories: Histories) -> Dataset:
    write_song_vectors(workspace, random_vectors(NUM_SONGS), MADE_OF)
    return write_dataset(workspace, histories, NUM_SONGS, buckets=5)


@pytest.mark.usefixtures("cluster")
def test_the_job_over_buckets_equals_one_pass_in_one_process(dataset: Dataset, histories: Histories) -> None:
    manifest = evaluate(dataset.workspace, SETTINGS, split=SPLIT)
    fitted = fit_baselines(BASELINES, dataset, random_vectors(NUM_SONGS), SPLIT.final)
    popularity = fitted[0]
    assert isinstance(popularity, PopularityRecommender)
    evaluator = Evaluator(fitted, split=SPLIT, known_songs=popularity.plays > 0, config=SETTINGS)
    tally = evaluator(histories)
    stored = dataset.workspace.read_json(manifest.path("results.json"))
    expected = results_of(tally, fitted, SETTINGS)
    assert len(stored["results"]) == len(expected) == len(BASELINES) * 4 * 6
    for found, wanted in zip(stored["results"], expected, strict=True):
        assert found == pytest.approx(wanted, abs=2e-6)
    for found, wanted in zip(
        stored["cosine_by_offset"], curves_of_tally(tally, evaluator.curves, SETTINGS), strict=True
    ):
        np.testing.assert_allclose(found["value"], wanted["value"], atol=2e-6)
        assert found["plays"] == wanted["plays"]


@pytest.mark.usefixtures("cluster")
def test_a_report_is_complete_found_again_and_repeated_on_purpose(dataset: Dataset) -> None:
    settings = EvaluateConfig(models=("popularity",), bootstrap_samples=10)
    first = evaluate(dataset.workspace, settings, split=SPLIT)
    verify(dataset.workspace, load(dataset.workspace, "reports", first.id))
    assert first.metrics["default"] == "taste"
    assert {entry["model"] for entry in first.metrics["results"]} == {"popularity"}
    assert first.inputs == MADE_OF
    assert evaluate(dataset.workspace, settings, split=SPLIT) == first
    again = evaluate(dataset.workspace, settings, split=SPLIT, repeat=True)
    assert again.id != first.id
    assert again.metrics["results"] == first.metrics["results"]


def test_vectors_that_saw_the_test_range_are_refused(workspace: Workspace, histories: Histories) -> None:
    write_dataset(workspace, histories, NUM_SONGS)
    write_song_vectors(workspace, random_vectors(NUM_SONGS), {"dataset": "by-hand"})
    with pytest.raises(MismatchError, match=r"made from all plays.*rayrec embed"):
        evaluate(workspace, EvaluateConfig(models=("neighbours",)), split=SPLIT)


def test_a_network_of_another_split_is_refused(dataset: Dataset) -> None:
    made_of = {"dataset": "by-hand", "split": "another", "songs": "by-hand"}
    publish(dataset.workspace, Manifest(kind="models", id="m", inputs=made_of), [])
    with pytest.raises(MismatchError, match=r"models m was made for split another.*rayrec train"):
        evaluate(dataset.workspace, EvaluateConfig(), split=SPLIT)


def test_a_split_of_another_data_set_is_refused(dataset: Dataset) -> None:
    other = Split(id="cut", dataset="other", validation_from=1, test_from=2)
    with pytest.raises(MismatchError, match="cuts data set other"):
        evaluate(dataset.workspace, EvaluateConfig(models=("popularity",)), split=other)


def test_without_a_network_the_command_to_run_is_named(dataset: Dataset) -> None:
    with pytest.raises(NotFoundError, match="rayrec train"):
        evaluate(dataset.workspace, EvaluateConfig(), split=SPLIT)


def test_an_unknown_model_is_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="no model 'gru'; there are: taste, popularity"):
        evaluate(dataset.workspace, EvaluateConfig(models=("gru",)), split=SPLIT)


@pytest.mark.usefixtures("cluster")
def test_a_test_range_without_questions_is_refused(dataset: Dataset) -> None:
    late = Split(id="cut", dataset="by-hand", validation_from=10**12, test_from=10**12)
    with pytest.raises(InputError, match="nothing to predict; make a split with more test days"):
        evaluate(dataset.workspace, EvaluateConfig(models=("popularity",)), split=late)
