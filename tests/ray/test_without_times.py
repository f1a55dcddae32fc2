"""Every stage on plays without times, of which only the order is known."""

import json

import numpy as np
import pytest

from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, list_splits, validation_histories
from rayrec.errors import InputError, LeakError
from rayrec.jobs.pipeline import Outcome, run
from rayrec.jobs.train import train
from rayrec.jobs.trainer import load_validation, model_config
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.baselines import PopularityRecommender, fit_baselines
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

USERS, SONGS = 60, 12
LAST_SONG = "encore"  # the song that every user plays last, and only then


@pytest.fixture(scope="module")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> tuple[Workspace, dict[str, Outcome]]:
    """A pipeline run on users who play the songs 0, 1, 2 ... in a circle, starting at song `user % SONGS`."""
    folder = tmp_path_factory.mktemp("sequences")
    lines = [" ".join([*(str((user + step) % SONGS) for step in range(19)), LAST_SONG]) for user in range(USERS)]
    (folder / "plays.txt").write_text("\n".join(lines))
    workspace = Workspace(folder / "workspace")
    settings = {
        "import": {"format": "sequences", "paths": [str(folder / "plays.txt")], "buckets": 2},
        "split": {"last_fraction": 0.2, "validation_fraction": 0.1},
        "embed": {"dim": 8, "epochs": 2},
        "train": {"hidden_dim": 16, "epochs": 2, "negatives": 16, "workers": 0},
        "evaluate": {"bootstrap_samples": 20, "models": ["taste", "sequential-rules", "popularity"], "ks": [1, 10]},
    }
    return workspace, {outcome.stage: outcome for outcome in run(workspace, settings)}


@pytest.fixture
def split(pipeline_run: tuple[Workspace, dict[str, Outcome]]) -> Split:
    return list_splits(pipeline_run[0])[-1]


def test_the_end_of_each_sequence_is_evaluated_and_the_report_says_so(
    pipeline_run: tuple[Workspace, dict[str, Outcome]],
) -> None:
    workspace, outcomes = pipeline_run
    assert outcomes["split"].figures["protocol"] == "last-fraction"
    metrics = outcomes["evaluate"].figures
    report_folder = f"reports/{outcomes['evaluate'].id}"
    assert (metrics["protocol"], metrics["plays"], metrics["users"]) == ("last-fraction", USERS * 4, USERS)
    recall = {
        (entry["model"], entry["k"]): entry["value"]
        for entry in json.loads(workspace.read_bytes(f"{report_folder}/results.json"))["results"]
        if (entry["users"], entry["target"], entry["metric"]) == ("all", "next", "recall")
    }
    assert recall["sequential-rules", 1] == 0.75  # 3 of 4 test plays: the last song cannot be predicted
    assert recall["popularity", 1] < 0.2
    assert 0 < recall["taste", 10] <= 0.75
    assert b"weaker than a split in time" in workspace.read_bytes(f"{report_folder}/report.html")
    assert json.loads(workspace.read_bytes(f"{report_folder}/results.json"))["about"]["protocol"] == "last-fraction"


def test_a_horizon_in_days_is_refused(pipeline_run: tuple[Workspace, dict[str, Outcome]], split: Split) -> None:
    with pytest.raises(InputError, match=r"no times, which a horizon in days needs; use --long"):
        train(pipeline_run[0], TrainConfig(long_days=(0, 7)), split=split)


def test_the_network_sees_neither_gaps_nor_hours(pipeline_run: tuple[Workspace, dict[str, Outcome]]) -> None:
    workspace, outcomes = pipeline_run
    features = workspace.read_json(f"models/{outcomes['train'].id}/model.json")["features"]
    assert not any(features[name] for name in ("gap", "request_gap", "hour", "weekday", "pause_hours"))
    assert model_config(Dataset(workspace), TrainConfig(hours=True), 8).features.dim == 0


def test_the_validation_plays_are_those_before_the_last_fifth(
    pipeline_run: tuple[Workspace, dict[str, Outcome]], split: Split
) -> None:
    validation = load_validation(
        validation_histories(Dataset(pipeline_run[0]), split, 10_000).to_arrow(), split.selection, 10_000
    )
    assert validation.histories.lengths.tolist() == [16] * USERS
    assert sorted(set(validation.histories.places[validation.plays].tolist())) == [14, 15]
    assert len(validation.plays) == 2 * USERS


def test_fits_do_not_see_the_end_of_a_sequence(
    pipeline_run: tuple[Workspace, dict[str, Outcome]], split: Split
) -> None:
    dataset = Dataset(pipeline_run[0])
    last_song = int(dataset.catalog().rows([LAST_SONG])[0])
    (popularity,) = fit_baselines(["popularity"], dataset, None, split.final)
    assert isinstance(popularity, PopularityRecommender)
    assert popularity.plays[last_song] == 0
    assert popularity.plays.sum() == USERS * 16
    batches = list(dataset.read_all())
    assert np.concatenate([batch.songs for batch in batches]).tolist().count(last_song) == USERS
    with pytest.raises(LeakError):
        PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=split.final)
    final_batches = [split.final.select(batch) for batch in batches]
    with pytest.raises(LeakError):
        PopularityRecommender.fit(final_batches, num_songs=dataset.num_songs, allowed=split.selection)


def test_the_command_line_shows_a_data_set_without_times(
    pipeline_run: tuple[Workspace, dict[str, Outcome]], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, _ = pipeline_run
    assert main(["status", "--workspace", workspace.uri]) == 0
    assert "last-fraction" in capsys.readouterr().out
    assert main(["recommend", "--songs", "3,4", "--workspace", workspace.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["songs"]
