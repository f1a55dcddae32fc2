"""`rayrec train --from` on appended plays, with the commands that docs/training.md describes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rings import ring_plays, write_rows

from rayrec.data.dataset import Dataset
from rayrec.data.split import hold_back_validation
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

RING: dict[str, Any] = {"songs": 60, "follow": 0.95}
COLUMNS = ["--columns", "user=user_id,song=track,played_at=timestamp"]
SPLIT = ["split", "--test-days", "4", "--validation-days", "4"]
TRAIN = ["train", "--workers", "0", "--hidden-dim", "16", "--epochs", "4", "--negatives", "32", "--batch", "16"]

pytestmark = pytest.mark.usefixtures("run_without_ray")


def run(workspace: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 0) -> dict[str, Any]:
    """Run a command and return the JSON that it prints."""
    assert main(["--workspace", str(workspace), "--json", *arguments]) == code
    return dict(json.loads(capsys.readouterr().out))


def import_plays(workspace: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Import plays of 150 users; return the path of a file with their plays of six more days."""
    plays_path = write_rows(folder / "plays.csv", ring_plays(range(150), **RING))
    run(workspace, ["import", "csv", plays_path, *COLUMNS, "--buckets", "2"], capsys)
    return write_rows(folder / "days.csv", ring_plays(range(150), plays=20, begin=20, days=6, **RING))


def test_a_model_is_continued_on_appended_plays_and_ranked_on_those_that_it_has_not_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    days_path = import_plays(workspace, tmp_path, capsys)
    run(workspace, SPLIT, capsys)
    run(workspace, ["embed", "--dim", "8", "--epochs", "2", "--workers", "1"], capsys)
    first = run(workspace, TRAIN, capsys)
    run(workspace, ["import", "csv", days_path, *COLUMNS, "--append"], capsys)
    old_split_workspace = shutil.copytree(workspace, tmp_path / "seen")  # a copy that gets no new split

    split = run(workspace, SPLIT, capsys)
    second = run(workspace, [*TRAIN, "--from", first["id"]], capsys)
    assert second["inputs"]["songs"] == first["inputs"]["songs"]
    assert second["inputs"]["split"] == split["id"] != first["inputs"]["split"]
    assert second["validation_recall@20"] > 0.5  # the successor is in the first 20 of 60 songs; by chance a third
    run(workspace, ["retrieval"], capsys)
    assert run(workspace, ["rank", "--trees", "5"], capsys)["inputs"]["models"] == second["id"]

    third = run(old_split_workspace, [*TRAIN, "--from", first["id"]], capsys)
    assert third["epochs"] == 1
    assert third["validation_recall@20"] is None
    run(old_split_workspace, ["retrieval"], capsys)
    error = run(old_split_workspace, ["rank", "--trees", "5"], capsys, code=2)["error"]
    message = f"{error['message']}; {error['hint']}"
    assert f"model {third['id']} continues model {first['id']} and has no network trained without the plays" in message
    assert f"whose validation range has only plays that model {first['id']} was not trained on" in message
    assert (Workspace(old_split_workspace).folders("rankers")) == []


def read_vectors(workspace: Path, network_folder: str) -> np.ndarray:
    """Return the song vectors of a network; zeros for a song that it does not know."""
    return np.asarray(Workspace(workspace).read_array(f"{network_folder}/song_vectors.npy"))


@pytest.mark.parametrize("refit", ["--refit", "--no-refit"])
def test_a_continued_network_reads_the_frozen_embeddings_that_it_was_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refit: str
) -> None:
    """Also the network of its selection phase, and also if it is continued a second time."""
    workspace = tmp_path / "workspace"
    days_path = import_plays(workspace, tmp_path, capsys)
    run(workspace, SPLIT, capsys)
    run(workspace, ["embed", "--dim", "8", "--epochs", "2", "--workers", "1"], capsys)
    frozen_train = [*TRAIN, "--song-table", "frozen"]
    first = run(workspace, [*frozen_train, refit], capsys)
    run(workspace, ["import", "csv", days_path, *COLUMNS, "--append"], capsys)
    run(workspace, SPLIT, capsys)
    second = run(workspace, [*frozen_train, "--from", first["id"]], capsys)
    third = run(workspace, [*frozen_train, "--from", second["id"]], capsys)
    expected = read_vectors(workspace, f"models/{first['id']}")
    for network_folder in (f"{second['id']}/selection", second["id"], third["id"]):
        vectors = read_vectors(workspace, f"models/{network_folder}")
        is_known = expected.any(axis=1) & vectors[: len(expected)].any(axis=1)
        assert is_known.sum() > 50
        np.testing.assert_allclose(vectors[: len(expected)][is_known], expected[is_known], atol=1e-6)


def test_nothing_is_chosen_on_plays_that_the_model_to_start_from_learned_though_it_was_not_refit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    plays_path = write_rows(tmp_path / "plays.csv", ring_plays(range(150), **RING))
    run(workspace, ["import", "csv", plays_path, *COLUMNS, "--buckets", "2"], capsys)
    run(workspace, SPLIT, capsys)
    first = run(workspace, [*TRAIN, "--no-refit", "--validation-plays", "0"], capsys)
    assert first["validation_recall@20"] is None
    assert "all plays except the plays from 2023-11-30 on" in first["trained_on"]  # the test range
    second = run(workspace, [*TRAIN, "--from", first["id"]], capsys)
    assert second["validation_recall@20"] is None
    files = Workspace(workspace).files(f"models/{second['id']}")
    assert not [name for name in files if "/selection/" in name]

    train_range_model = run(workspace, [*TRAIN, "--no-refit"], capsys)  # trained on the train range only
    third = run(workspace, [*TRAIN, "--from", train_range_model["id"]], capsys)
    assert third["validation_recall@20"] > 0.5


def test_a_model_without_a_split_has_seen_the_plays_of_its_own_data_set_and_no_later_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    days_path = import_plays(workspace, tmp_path, capsys)
    first = run(workspace, TRAIN, capsys)
    assert "split" not in first["inputs"]
    run(workspace, ["import", "csv", days_path, *COLUMNS, "--append"], capsys)
    run(workspace, ["split", "--test-days", "2", "--validation-days", "3"], capsys)
    assert run(workspace, [*TRAIN, "--from", first["id"]], capsys)["validation_recall@20"] > 0.5
    run(workspace, ["split", "--test-days", "2", "--validation-days", "6"], capsys)  # two of the 6 before the append
    assert run(workspace, [*TRAIN, "--from", first["id"]], capsys)["validation_recall@20"] is None
    run(workspace, ["split", "--test-days", "8", "--validation-days", "3"], capsys)
    error = run(workspace, [*TRAIN, "--from", first["id"]], capsys, code=1)["error"]
    assert f"model {first['id']} was fit on plays of the test range" in error["message"]


def test_without_times_nothing_is_chosen_on_plays_of_a_model_that_had_no_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    (tmp_path / "lists.txt").write_text(
        "".join(f"{user} {' '.join(str(1 + (user + n) % 20) for n in range(20))}\n" for user in range(1, 60))
    )
    run(workspace, ["import", "sequences", str(tmp_path / "lists.txt"), "--buckets", "2"], capsys)
    first = run(workspace, TRAIN, capsys)
    hold_back_validation(Dataset(Workspace(workspace)))  # as `fit` does: all plays are trained on in the end
    assert run(workspace, [*TRAIN, "--from", first["id"]], capsys)["validation_recall@20"] is None
    run(workspace, ["split", "--last-fraction", "0.2"], capsys)
    error = run(workspace, [*TRAIN, "--from", first["id"]], capsys, code=1)["error"]
    assert f"model {first['id']} was fit on plays of the test range" in error["message"]
