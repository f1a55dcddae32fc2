"""Evaluation of (prefix, target) pairs from a file, on a local cluster and from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from worlds import random_histories, random_vectors, write_dataset, write_song_vectors

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange, Split
from rayrec.errors import InputError, MismatchError
from rayrec.evaluation.evaluator import PrefixEvaluator, PrefixFile, read_prefixes
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import read_results
from rayrec.evaluation.results import Statistics
from rayrec.importing.readers.reader import Unit
from rayrec.jobs import evaluate as job
from rayrec.jobs.evaluate import evaluate_prefixes
from rayrec.recommend.baselines import PopularityRecommender, fit_baselines
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

NUM_SONGS = 30
MODELS = ("popularity", "sequential-rules", "item-knn")
SETTINGS = EvaluateConfig(models=MODELS, bootstrap_samples=20)


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    write_song_vectors(workspace, random_vectors(NUM_SONGS), {"dataset": "by-hand"})
    histories = random_histories(80, NUM_SONGS, seed=11)
    return write_dataset(workspace, histories.take(histories.lengths > 0), NUM_SONGS)


@pytest.fixture
def file(tmp_path: Path) -> PrefixFile:
    random = np.random.default_rng(0)
    pairs = [random.integers(0, NUM_SONGS + 2, size=random.integers(2, 9)) for _ in range(200)]
    path = tmp_path / "pairs.txt"
    texts = [[f"song-{song}" for song in pair] for pair in pairs]
    path.write_text("".join(f"{' '.join(text[:-1])}\t{text[-1]}\n" for text in texts))
    return PrefixFile(path=str(path))


@pytest.mark.usefixtures("cluster")
def test_the_job_over_shards_equals_one_pass_in_one_process(
    dataset: Dataset, file: PrefixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "PREFIXES_AT_ONCE", 1_500)
    manifest = evaluate_prefixes(dataset.workspace, SETTINGS, file)
    recommenders = fit_baselines(MODELS, dataset, random_vectors(NUM_SONGS), FitRange())
    popularity = recommenders[0]
    assert isinstance(popularity, PopularityRecommender)
    evaluator = PrefixEvaluator(recommenders, song_plays=popularity.plays, config=SETTINGS)
    song_ids = dataset.catalog().table.column(columns.SONG_ID)
    pairs = list(read_prefixes(Unit(source=file.path), file, song_ids))
    accumulator = evaluator.empty()
    for prefixes in pairs:
        accumulator.add(evaluator(prefixes))
    expected = Statistics(accumulator, recommenders, SETTINGS).results(["served", "next"])
    expected = [entry for entry in expected if entry["users"] == "all"]
    results = read_results(dataset.workspace, manifest)["results"]
    assert len(results) == len(expected) == len(MODELS) * 18
    for result, expected_result in zip(results, expected, strict=True):
        compared_fields = [name for name in result if name not in ("low", "high")]  # its bootstrap has other cells
        assert {name: result[name] for name in compared_fields} == pytest.approx(
            {name: expected_result[name] for name in compared_fields}, abs=2e-6
        )
        assert result["low"] <= result["value"] <= result["high"]
    counts = [manifest.metrics[name] for name in ("pairs", "unknown_targets", "unknown_items")]
    assert counts == np.sum([batch.counts for batch in pairs], axis=0).tolist()
    assert min(counts) > 0
    assert evaluate_prefixes(dataset.workspace, SETTINGS, file) == manifest
    page = dataset.workspace.read_bytes(manifest.path("report.html")).decode()
    assert "The target of each line" in page


@pytest.mark.usefixtures("cluster")
def test_pairs_are_evaluated_from_the_command_line(
    dataset: Dataset, file: PrefixFile, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workspace", dataset.workspace.uri, "evaluate", "--models", "popularity", "--prefixes", file.path]
    assert main([*arguments, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["pairs"], output["protocol"]) == (200, "prefixes")
    assert {entry["model"] for entry in output["results"]} == {"popularity"}
    assert main([*arguments, "--target-separator", "|"]) == 2
    assert "a line without the target separator '|'" in capsys.readouterr().err


@pytest.mark.usefixtures("cluster")
def test_a_file_without_pairs_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty.txt has no pairs"):
        evaluate_prefixes(dataset.workspace, SETTINGS, PrefixFile(path=str(tmp_path / "empty.txt")))


def test_vectors_made_for_a_split_are_refused_without_it(workspace: Workspace, file: PrefixFile) -> None:
    histories = random_histories(20, NUM_SONGS, seed=1)
    write_dataset(workspace, histories.take(histories.lengths > 0), NUM_SONGS)
    write_song_vectors(workspace, random_vectors(NUM_SONGS), {"dataset": "by-hand", "split": "cut"})
    with pytest.raises(MismatchError, match=r"before the test range of split cut.*uses no split; pass --split cut"):
        evaluate_prefixes(workspace, SETTINGS, file)
    other_split = Split(id="other", dataset="by-hand", validation_from=1, test_from=2)
    with pytest.raises(MismatchError, match=r"before the test range of split cut.*evaluation uses split other"):
        evaluate_prefixes(workspace, SETTINGS, file, split=other_split)
