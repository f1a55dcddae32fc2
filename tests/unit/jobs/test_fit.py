"""`rayrec fit`: settings are chosen on the newest plays, then models are fitted on all; too few plays are no error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rings import BEGIN, ring_plays, write_rows
from without_ray import without_ray

from rayrec.data.dataset import Dataset
from rayrec.data.split import SELECTION_FOLDER
from rayrec.errors import DamagedArtifactError, InputError, NotFoundError
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.importing.inspection import guess_import
from rayrec.jobs.fit import FitResult, fit, selection_parts, stage_configs, train_defaults
from rayrec.jobs.import_data import append_plays
from rayrec.jobs.job_config import FitConfig
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.storage import artifacts
from rayrec.storage.artifacts import (
    FORMAT_VERSION,
    KINDS,
    DatasetManifest,
    Manifest,
    listing,
    load_manifest,
)
from rayrec.storage.releases import active_release, is_active, verify_release
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace
from rayrec_cli.main import main

SETTINGS: dict[str, dict[str, Any]] = {
    "import": {"buckets": 2},
    "embed": {"dim": 8, "epochs": 2},
    "train": {"hidden_dim": 8, "epochs": 2, "negatives": 16},
    "rank": {"trees": 10},
}
PARTS = ("models", "retrieval", "rankers")
STAGES = ["import", "embed", "train", "songs", "retrieval", "rank", "taste", "index", "release"]


def run_fit(workspace: Workspace, path: str, **options: Any) -> FitResult:
    return fit(workspace, FitConfig(paths=(path,)), settings=SETTINGS, **options)


def use_next_format_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process the next version of rayrec: all artifacts so far have another format version."""
    next_version = FORMAT_VERSION + 1
    monkeypatch.setattr(artifacts, "FORMAT_VERSION", next_version)
    monkeypatch.setitem(Manifest.__init__.__kwdefaults__, "format_version", next_version)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str, FitResult, list[str]]:
    """A workspace after a fit of 60 users of a ring, the file of plays, the result and the notes of the fit."""
    folder, notes = tmp_path_factory.mktemp("fit"), []
    path = write_rows(folder / "plays.csv", ring_plays(range(60)))
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        result = run_fit(Workspace(folder / "workspace"), path, on_note=notes.append)
    return Workspace(folder / "workspace"), path, result, notes


def test_a_file_becomes_a_live_release_that_answers_with_rankers(
    ring: tuple[Workspace, str, FitResult, list[str]],
) -> None:
    workspace, _, result, notes = ring
    assert [outcome.stage for outcome in result.outcomes] == STAGES
    live_release = active_release(workspace)
    assert live_release is not None
    assert live_release.id == result.release
    assert "rankers" in live_release.inputs
    verify_release(workspace, live_release)
    assert result.quality is not None
    validation = live_release.metrics["validation"]
    assert validation["figures"]["served_recall@20"] == result.quality.value("two-step")
    assert validation["verdict"].startswith("two-step finds ")
    columns = "csv: user = user_id, song = track, played_at = timestamp, title = title, artist = artist"
    assert notes[0] == f"Reading as {columns}; times without a zone are read as UTC"
    assert notes[1].startswith("Validation range: the plays from ")
    assert len(result.answer.songs) == 5


def test_served_models_learn_from_all_plays_and_measured_models_not_from_those_held_back(
    ring: tuple[Workspace, str, FitResult, list[str]],
) -> None:
    workspace, _, result, _ = ring
    assert result.split is not None
    moments = [moment for batch in Dataset(workspace).read_all() for moment in batch.played_at.tolist()]
    early_plays = sum(moment < (result.split.validation_from or 0) for moment in moments)
    assert 0.1 <= 1 - early_plays / len(moments) <= 0.21
    live_release = active_release(workspace)
    assert live_release is not None
    retrieval = load_manifest(workspace, "retrieval", live_release.inputs["retrieval"])
    final_folder, selection_folder = retrieval.folder, retrieval.path(SELECTION_FOLDER)
    assert int(Retrieval.load(workspace, final_folder).plays.plays.sum()) == len(moments)
    assert int(Retrieval.load(workspace, selection_folder).plays.plays.sum()) == early_plays
    model = load_manifest(workspace, "models", live_release.inputs["models"])
    assert int(workspace.read_array(model.path("play_counts.npy")).sum()) == len(moments)


def test_quality_is_that_of_rankers_that_have_not_learned_from_the_users_it_is_measured_on(
    ring: tuple[Workspace, str, FitResult, list[str]], tmp_path: Path
) -> None:
    workspace = Workspace(shutil.copytree(ring[0].uri, tmp_path / "copy"))
    live_release = active_release(workspace)
    assert live_release is not None
    model, retrieval, rankers = (load_manifest(workspace, kind, live_release.inputs[kind]) for kind in PARTS)
    for path in workspace.files(rankers.folder):
        if SELECTION_FOLDER not in path and path.endswith(".json"):
            workspace.delete(path)  # the rankers that answer requests: they were trained on all users
    parts = selection_parts(Dataset(workspace), model, retrieval, rankers, "two-step")
    recommender = parts.load(Dataset(workspace), IndexConfig())
    assert isinstance(recommender, TwoStepRecommender)
    assert "next" in recommender.rankers


def test_the_ring_is_found_where_popularity_finds_nothing(ring: tuple[Workspace, str, FitResult, list[str]]) -> None:
    quality = ring[2].quality
    assert quality is not None
    two_step, popularity = quality.value("two-step", "next", "mrr"), quality.value("popularity", "next", "mrr")
    assert two_step is not None
    assert popularity is not None
    assert two_step > 0.5 > 4 * popularity
    assert {row[0] for row in quality.table()} == {"two-step", "taste", "popularity"}


def test_a_second_fit_skips_everything_and_other_files_are_refused(
    ring: tuple[Workspace, str, FitResult, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, path, result, _ = ring
    without_ray(monkeypatch)
    second = run_fit(workspace, path)
    assert {outcome.status for outcome in second.outcomes} == {"skipped"}
    assert second.release == result.release
    assert second.quality == result.quality
    other_path = write_rows(tmp_path / "other.csv", ring_plays(range(5)))
    with pytest.raises(InputError, match="rayrec update"):
        run_fit(workspace, other_path)


def test_after_a_new_format_version_one_fit_makes_all_again_and_clean_deletes_what_was_made_before(
    ring: tuple[Workspace, str, FitResult, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace, path = Workspace(shutil.copytree(ring[0].uri, tmp_path / "copy")), ring[1]
    day = write_rows(tmp_path / "day.csv", ring_plays(range(60), plays=10, begin=21, days=1))
    without_ray(monkeypatch)
    append_plays(workspace, guess_import((day,)))
    (tmp_path / "songs.csv").write_text("song,title\ns1,First\n")
    describe(workspace, DescribeConfig(), str(tmp_path / "songs.csv"))
    old_folders = {f"{kind}/{name}" for kind in KINDS for name in workspace.folders(kind)}
    dataset_id, old_release = Dataset(workspace).manifest.id, active_release(workspace)
    use_next_format_version(monkeypatch)
    assert main(["--json", "--workspace", workspace.uri, "status"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert old_release is not None
    assert (state["active"], state["releases"]) == (old_release.id, [])
    assert state["other_versions"] == len(old_folders)
    assert main(["--workspace", workspace.uri, "status"]) == 0
    assert f"The live release {old_release.id} is missing or was made by another" in capsys.readouterr().out
    with pytest.raises(
        NotFoundError, match=r"the live release cannot be used \(.* format version .*; run `rayrec fit`"
    ):
        active_release(workspace)
    notes: list[str] = []
    result = run_fit(workspace, path, on_note=notes.append)
    assert any("run `rayrec describe` with its file" in note for note in notes)
    assert {outcome.stage: outcome.status for outcome in result.outcomes} == {
        stage: "skipped" if stage == "import" else "done" for stage in STAGES
    }
    assert Dataset(workspace).manifest.id == dataset_id  # with the appended plays
    live_release = active_release(workspace)
    assert live_release is not None
    assert live_release.id == result.release
    assert main(["--workspace", workspace.uri, "clean", "--hours", "0", "--yes"]) == 0
    assert {f"{kind}/{name}" for kind in KINDS for name in workspace.folders(kind)}.isdisjoint(old_folders)
    verify_release(workspace, live_release)


def test_described_songs_without_plays_repeat_no_training(
    ring: tuple[Workspace, str, FitResult, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, path = Workspace(shutil.copytree(ring[0].uri, tmp_path / "copy")), ring[1]
    without_ray(monkeypatch)
    (tmp_path / "songs.csv").write_text("song,title,artist\ns1,One,Artist 1\nnew,New,Artist 1\n")
    describe(workspace, DescribeConfig(), str(tmp_path / "songs.csv"))
    for expected in ("done", "skipped"):  # the first fit adds the song, to the retrieval too; the second has no work
        result = run_fit(workspace, path)
        statuses = {outcome.stage: outcome.status for outcome in result.outcomes}
        assert (statuses["embed"], statuses["train"]) == ("skipped", "skipped")
        assert {statuses[stage] for stage in ("songs", "retrieval", "release")} == {expected}
    live_release = active_release(workspace)
    assert live_release is not None
    added_songs = AddedSongs.load(workspace, f"added_songs/{live_release.inputs['added_songs']}")
    assert added_songs.rows.tolist() == Dataset(workspace).catalog().rows(["new"]).tolist()


def test_a_data_set_of_an_earlier_version_is_refused_and_without_it_fit_makes_all_again(
    ring: tuple[Workspace, str, FitResult, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, path = Workspace(shutil.copytree(ring[0].uri, tmp_path / "copy")), ring[1]
    without_ray(monkeypatch)
    use_next_format_version(monkeypatch)
    manifest = workspace.read_json(DATASET_MANIFEST)
    workspace.write_json(DATASET_MANIFEST, {**manifest, "schema_version": 3})  # with ends of Spotify's plays as times
    with pytest.raises(DamagedArtifactError, match="delete the folder dataset of the workspace and run `rayrec fit`"):
        run_fit(workspace, path)
    workspace.delete("dataset")
    result = run_fit(workspace, path)
    assert {outcome.stage: outcome.status for outcome in result.outcomes} == dict.fromkeys(STAGES, "done")
    assert is_active(workspace, result.release)


@pytest.mark.parametrize(
    ("rows", "left_out"),
    [
        (ring_plays(range(4), plays=10), ["retrieval", "rank"]),  # too few plays to hold back
        (ring_plays(range(1), plays=400, songs=300), ["rank"]),  # no second user to check rankers on
    ],
)
def test_with_too_few_plays_rankers_are_left_out_with_a_reason_and_the_fit_goes_on(
    rows: list[str], left_out: list[str], workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    result = run_fit(workspace, write_rows(tmp_path / "plays.csv", rows))
    assert [outcome.stage for outcome in result.outcomes if outcome.status == "left out"] == left_out
    assert all(outcome.reason for outcome in result.outcomes if outcome.status == "left out")
    live_release = active_release(workspace)
    assert live_release is not None
    assert "rankers" not in live_release.inputs
    assert (len(result.answer.songs) == 5) == (len({row.split(",")[0] for row in rows}) > 1)  # one user has heard all
    assert (result.quality is None) == ("retrieval" in left_out)


def test_missing_columns_and_wrong_settings_are_refused_with_what_to_do(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    path = tmp_path / "plays.csv"
    path.write_text(f"listener,when\nann,{BEGIN}\n")
    with pytest.raises(
        InputError, match=r"no column that looks like song; it has listener, when; map it with --columns song=NAME"
    ):
        run_fit(workspace, str(path))
    path.write_text(f"user,sng,tme\nann,s1,{BEGIN}\n")
    with pytest.raises(
        InputError, match=r"looks like song.*user, sng, tme; map it, for example with --columns song=sng"
    ):
        run_fit(workspace, str(path))
    with pytest.raises(InputError, match="unknown section 'tain'"):
        fit(workspace, FitConfig(paths=(str(path),)), settings={"tain": {}})
    for value in (3, [{}]):  # as TOML reads `train = 3` and `[[train]]`
        with pytest.raises(InputError, match=r"settings: train = .*; expected a section \[train\]"):
            fit(workspace, FitConfig(paths=(str(path),)), settings={"train": value})


def test_options_of_fit_override_the_import_settings_of_a_file_and_the_rest_is_guessed(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    path = write_rows(tmp_path / "plays.csv", ring_plays(range(2), plays=10))
    columns = {"song": "artist", "artist": "track"}
    stored: dict[str, Any] = {"format": "parquet", "columns": columns, "timezone": "America/New_York", "buckets": 2}
    config = FitConfig(paths=(path,), format="csv", columns={"song": "title"}, timezone="Europe/Berlin")
    result = fit(workspace, config, settings={**SETTINGS, "import": stored})
    columns_read = "csv: user = user_id, played_at = timestamp, artist = track, song = title"
    assert result.read_as == f"{columns_read}; times without a zone are read as Europe/Berlin"
    assert Dataset(workspace).manifest.buckets == 2
    with pytest.raises(InputError, match=r"settings.*columns is 3; expected"):
        fit(workspace, config, settings={"import": {"columns": 3}})


def test_import_settings_of_a_file_override_guesses(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    path = write_rows(tmp_path / "plays.txt", ring_plays(range(2), plays=10))
    stored = {"format": "csv", "columns": {"song": "title"}, "timezone": "America/New_York", "buckets": 2}
    result = fit(workspace, FitConfig(paths=(path,)), settings={**SETTINGS, "import": stored})
    columns_read = "csv: user = user_id, song = title, played_at = timestamp, artist = artist"
    assert result.read_as == f"{columns_read}; times without a zone are read as America/New_York"


@pytest.mark.parametrize(("bad", "code", "warned"), [(0, 0, 0), (2, 0, 1), (60, 2, 1)])
def test_rejected_rows_are_warned_of_and_too_many_end_the_fit_with_the_summary(
    bad: int,
    code: int,
    warned: int,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_ray(monkeypatch)
    rows = [*ring_plays(range(4), plays=10), *[f"u1,,{BEGIN},,One\n"] * bad]
    path, settings = write_rows(tmp_path / "plays.csv", rows), tmp_path / "settings.toml"
    settings.write_text("[import]\nbuckets = 2\n[embed]\ndim = 4\nepochs = 1\n[train]\nepochs = 1\nhidden_dim = 4\n")
    arguments = ["--json", "--workspace", workspace.uri, "fit", path, "--settings", str(settings)]
    assert main(arguments) == code
    output = capsys.readouterr()
    report, messages = json.loads(output.out), "".join(output.err.split())  # a line of stderr may break within a path
    assert len(report["import"]["warnings"]) == warned
    share = f"{bad} of {40 + bad} rows ({bad / (40 + bad):.1%}) were rejected."
    warning = f"Warning: {share} no song: {path}, line 42: u1,,{BEGIN},,One"
    assert ("".join(warning.split()) in messages) == (warned == 1 and code == 0)
    assert workspace.exists("dataset/dataset.json") == (code == 0)
    if code:
        assert (report["error"]["kind"], report["import"]["reasons"][0]["rows"]) == ("too_many_rejected", bad)
        assert main([*arguments, "--max-rejected", "0.7"]) == 0
        assert f"Warning: {share}" in " ".join(capsys.readouterr().err.split())


def test_too_many_rejected_rows_end_a_run_with_the_summary(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    rows = [*ring_plays(range(1), plays=10), *[f"u1,,{BEGIN},,One\n"] * 20]
    path, pipeline = write_rows(tmp_path / "plays.csv", rows), tmp_path / "pipeline.toml"
    columns = 'columns = {user = "user_id", song = "track", played_at = "timestamp"}'
    pipeline.write_text(f'[import]\nformat = "csv"\npaths = ["{path}"]\n{columns}\n')
    assert main(["--json", "--workspace", workspace.uri, "run", str(pipeline)]) == 2
    assert json.loads(capsys.readouterr().out)["import"]["rejected"] == 20


@pytest.mark.parametrize(("pause", "is_one_session"), [(10 * 60, False), (3600, True)])
def test_plays_too_far_apart_for_sessions_are_embedded_history_by_history(
    pause: int, is_one_session: bool, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    rows = [f"u{user},s{play % 5},{BEGIN + play * pause}\n" for user in range(4) for play in range(10)]
    path = tmp_path / "plays.csv"
    path.write_text("user_id,track,timestamp\n" + "".join(rows))
    run_fit(workspace, str(path))
    (songs,) = listing(workspace, "songs")
    assert songs.metrics["sentences"] == 4
    assert (songs.config["session_gap_minutes"] > 30) == is_one_session


def test_a_preset_of_training_settings_keeps_the_batch_and_workers_that_fit_chooses(
    ring: tuple[Workspace, str, FitResult, list[str]],
) -> None:
    dataset = Dataset(ring[0])
    by_preset, spelled_out = (
        stage_configs(dataset, {"train": settings})["train"]
        for settings in ({"preset": "best"}, {"epochs": 40, "patience": 3})
    )
    assert by_preset == spelled_out
    assert isinstance(by_preset, TrainConfig)
    assert (by_preset.workers, by_preset.batch) == (0, 4)
    given = stage_configs(dataset, {"train": {"preset": "best", "batch": 7}})["train"]
    assert given == by_preset.replace(batch=7)


def test_small_data_are_read_in_smaller_batches_and_large_ones_by_workers() -> None:
    def defaults(users: int, plays: int) -> dict[str, Any]:
        return train_defaults(
            DatasetManifest(id="d", source="csv", buckets=1, parts=1, users=users, plays=plays, songs=9)
        )

    assert defaults(60, 3_000) == {"workers": 0, "batch": 4}
    assert defaults(14_000, 343_000) == {"workers": 0}
    assert defaults(1_000_000, 10**8) == {}
    assert TrainConfig(**defaults(60, 3_000)).batch == 4
