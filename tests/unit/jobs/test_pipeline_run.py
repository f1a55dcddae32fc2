"""`rayrec run` without a test range: settings and rankers use the newest plays, the model is fitted on all plays."""

import os
from pathlib import Path
from typing import Any

import pytest
from rings import ring_plays, write_rows
from without_ray import without_ray

from rayrec.data.dataset import Dataset
from rayrec.data.split import list_splits, load_split
from rayrec.errors import InputError
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.pipeline import Outcome, Stages, run
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.storage.artifacts import load_manifest
from rayrec.storage.releases import active_release
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

COLUMNS = {"user": "user_id", "song": "track", "played_at": "timestamp"}
STAGES = ["import", "embed", "train", "retrieval", "rank", "taste", "index", "release"]


def _sections(path: str) -> dict[str, dict[str, Any]]:
    return {
        "import": {"format": "csv", "paths": [path], "columns": COLUMNS, "buckets": 2},
        "embed": {"dim": 8, "epochs": 1},
        "train": {"hidden_dim": 8, "epochs": 1, "negatives": 16, "workers": 0},
        "rank": {"trees": 2},
    }


def test_without_a_split_the_newest_plays_teach_rankers_and_the_model_learns_from_all(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    sections, notes = _sections(write_rows(tmp_path / "plays.csv", ring_plays(range(60)))), []
    outcomes = run(workspace, sections, on_note=notes.append)
    assert [outcome.stage for outcome in outcomes] == STAGES
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert notes[0].startswith("Validation range: the plays from ")
    (split,) = list_splits(workspace)
    live_release = active_release(workspace)
    assert live_release is not None
    rankers, model = (load_manifest(workspace, kind, live_release.inputs[kind]) for kind in ("rankers", "models"))
    assert load_split(workspace, rankers.inputs["split"]) == split
    assert not split.has_test
    dataset = Dataset(workspace)
    assert int(workspace.read_array(model.path("play_counts.npy")).sum()) == dataset.manifest.plays
    assert isinstance(load_recommender(workspace, dataset, live_release.inputs), TwoStepRecommender)
    second_outcomes = run(workspace, sections)
    assert {outcome.status for outcome in second_outcomes} == {"skipped"}


def test_with_too_few_plays_for_a_validation_range_the_release_has_no_rankers(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    notes: list[str] = []
    outcomes: list[Outcome] = []
    path = write_rows(tmp_path / "plays.csv", ring_plays(range(4), plays=10))
    run(workspace, _sections(path), on_stage=outcomes.append, on_note=notes.append)
    assert notes[0].startswith("40 plays are too few for a validation range")
    left_out = {outcome.stage: outcome.reason for outcome in outcomes if outcome.status == "left out"}
    assert left_out == dict.fromkeys(("retrieval", "rank"), "rankers need a validation range")
    live_release = active_release(workspace)
    assert live_release is not None
    assert "rankers" not in live_release.inputs


def test_plays_of_one_moment_are_named_as_the_reason_why_there_is_no_validation_range(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of dates of birth or of the export, for example, and not too few plays."""
    without_ray(monkeypatch)
    times = ["1767225600"] * 380 + ["1767312000"] * 20
    path = tmp_path / "plays.csv"
    path.write_text("user,song,played_at\n" + "".join(f"u{row},s{row},{time}\n" for row, time in enumerate(times)))
    import_data(workspace, ImportConfig(format="csv", paths=(str(path),), buckets=2))
    notes: list[str] = []
    Stages(workspace, on_note=notes.append).hold_back()
    (note,) = notes
    assert note.startswith(
        "no validation range can be cut off, because nearly all of the 400 plays have the same time, "
        "2026-01-01T00:00:00.000Z (check that this is the time of the plays): training runs the maximum"
    )


def test_a_changed_first_file_replaces_no_appended_plays_unless_forced(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    first_path = write_rows(tmp_path / "plays.csv", ring_plays(range(4), plays=10))
    day_path = write_rows(tmp_path / "day.csv", ring_plays(range(4), plays=3, begin=20, days=1))
    config = ImportConfig(format="csv", paths=(first_path,), columns=COLUMNS, buckets=2)
    Stages(workspace).run("import", config)
    os.utime(first_path, (0, 0))
    Stages(workspace).run("import", config)  # imported again: no other plays can be lost
    append_plays(workspace, config.replace(paths=(day_path,)))
    os.utime(first_path, (1, 1))
    with pytest.raises(InputError, match=r"already contains 52 plays from csv, some of them appended later; .*--force"):
        Stages(workspace).run("import", config)
    assert Dataset(workspace).manifest.plays == 52
    Stages(workspace, force=True).run("import", config)
    assert Dataset(workspace).manifest.plays == 40


def test_an_import_says_that_song_metadata_is_not_used_if_it_replaced_the_described_data_set(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    path = write_rows(tmp_path / "plays.csv", ring_plays(range(4), plays=10))
    songs_path = str(tmp_path / "songs.csv")
    Path(songs_path).write_text("song,artist\ns52,Ann\n")
    config = ImportConfig(format="csv", paths=(path,), columns=COLUMNS, buckets=2)
    notes: list[str] = []
    Stages(workspace, on_note=notes.append).run("import", config)
    describe(workspace, DescribeConfig(), songs_path)
    os.utime(path, (0, 0))
    Stages(workspace, on_note=notes.append).run("import", config)  # the same plays: the metadata is still used
    assert notes == []
    write_rows(tmp_path / "plays.csv", ring_plays(range(5), plays=10))
    Stages(workspace, on_note=notes.append).run("import", config)
    (message,) = notes
    assert (
        "song metadata belongs to the data set that was replaced and is not used; run `rayrec describe` again"
        in message
    )
    assert message.endswith("and then run this command again")
    columns = ",".join(f"{role}={name}" for role, name in COLUMNS.items())
    arguments = ["--workspace", workspace.uri, "import", "csv", path, "--columns", columns, "--force"]
    assert main(arguments) == 0
    assert message.removesuffix("run this command again") + "fit the models" in " ".join(
        capsys.readouterr().err.split()
    )
    describe(workspace, DescribeConfig(), songs_path)
    assert main(arguments) == 0
    assert "metadata" not in capsys.readouterr().err
