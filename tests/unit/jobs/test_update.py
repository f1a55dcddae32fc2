"""`rayrec update`: a release with new plays goes live, unless it makes recommendations worse."""

import json
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rings import BEGIN, DAY, ring_plays, write_rows
from without_ray import without_ray

from rayrec.config import from_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.moments import parse_timestamp
from rayrec.data.split import SELECTION_FOLDER, fit_range_of, load_split
from rayrec.errors import InputError, MismatchError
from rayrec.importing import import_run
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.fit import Quality, fit
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.job_config import FitConfig, UpdateConfig
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.update import UpdateResult, decide, update
from rayrec.model.added_songs import AddedSongs
from rayrec.online.state_store import open_store, store_uri
from rayrec.recommend.answer import RecommendConfig, answer, load_recommender
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.two_step import checks_rankers
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage.artifacts import Manifest, load_manifest
from rayrec.storage.releases import activate_release, active_release, create_release, rollback
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

SETTINGS: dict[str, dict[str, Any]] = {
    "import": {"buckets": 2},
    "embed": {"dim": 8, "epochs": 2},
    "train": {"hidden_dim": 8, "epochs": 2, "negatives": 16},
    "rank": {"trees": 10},
}
RING = {"songs": 200, "follow": 0.95}
COLUMNS = {"user": "user_id", "song": "track", "played_at": "timestamp", "title": "title", "artist": "artist"}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a workspace after a fit of 150 users of a ring, with plays of 20 days."""
    folder = tmp_path_factory.mktemp("update")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        config = FitConfig(paths=(write_rows(folder / "plays.csv", ring_plays(range(150), **RING)),))
        fit(Workspace(folder / "workspace"), config, settings=SETTINGS)
    return folder / "workspace"


@pytest.fixture
def fitted(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of the workspace in `first`."""
    without_ray(monkeypatch)
    shutil.copytree(first, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def live_release(workspace: Workspace) -> Manifest:
    release = active_release(workspace)
    assert release is not None
    return release


def run_update(workspace: Workspace, path: str, **settings: Any) -> UpdateResult:
    return update(workspace, UpdateConfig(paths=(path,), **settings))


def test_a_day_of_plays_goes_live_with_its_new_users_and_songs(fitted: Workspace, tmp_path: Path) -> None:
    before = live_release(fitted)
    rows = ring_plays(range(140, 170), plays=8, begin=20, days=1, **RING)
    for user in range(20):
        rows += [f"u{user},{song},{BEGIN + 20 * DAY + at},{song},Anna\n" for song, at in (("s6", 100), ("new", 300))]
    result = run_update(fitted, write_rows(tmp_path / "day.csv", rows))
    appended = result.appended
    assert (appended.users, appended.songs, appended.plays, result.trained) == (20, 1, len(rows), False)
    assert result.live, result.reason
    assert result.quality is not None
    release, dataset = live_release(fitted), Dataset(fitted)
    assert release.id == result.release != before.id
    assert release.inputs["models"] == before.inputs["models"]
    assert release.inputs["dataset"] == dataset.manifest.id
    added_songs = AddedSongs.load(fitted, load_manifest(fitted, "added_songs", release.inputs["added_songs"]).folder)
    assert added_songs.rows.tolist() == dataset.catalog().rows(["new"]).tolist()
    recommender, at = load_recommender(fitted, dataset, release.inputs), dataset.manifest.last_play + 60_000
    assert len(answer(dataset, recommender, RecommendConfig(k=5), parts=release.inputs, at=at, user="u169").songs) == 5
    response = answer(dataset, recommender, RecommendConfig(k=20), parts=release.inputs, at=at, songs=["s5", "s6"])
    assert "new" in [song.song_id for song in response.songs]


def test_plays_are_not_appended_to_another_data_set_than_that_of_the_live_release(
    fitted: Workspace, tmp_path: Path
) -> None:
    other_path = write_rows(tmp_path / "other.csv", ring_plays(range(9), plays=10, songs=9))
    config = ImportConfig(format="csv", columns=COLUMNS, paths=(other_path,))
    replaced_id, other = Dataset(fitted).manifest.id, import_data(fitted, config, repeat=True)
    day_path = write_rows(tmp_path / "day.csv", ring_plays(range(9), plays=8, begin=20, days=1))
    message = f"was made from data set {replaced_id}, which data set {other.id} has replaced; .* `rayrec fit`"
    with pytest.raises(MismatchError, match=message):
        run_update(fitted, day_path)
    assert Dataset(fitted).manifest == other


def test_the_new_retrieval_continues_the_old_one_and_the_checked_one_lacks_the_newest_plays(
    fitted: Workspace, tmp_path: Path
) -> None:
    before = live_release(fitted)
    rows = ring_plays(range(50), plays=8, begin=20, days=1, **RING)
    run_update(fitted, write_rows(tmp_path / "day.csv", rows))
    retrieval = load_manifest(fitted, "retrieval", live_release(fitted).inputs["retrieval"])
    assert retrieval.metrics["base"] == before.inputs["retrieval"]
    moments = np.concatenate([batch.played_at for batch in Dataset(fitted).read_all()])
    validation_from = load_split(fitted, retrieval.inputs["split"]).validation_from
    assert validation_from is not None
    assert 0 < (moments >= validation_from).sum() < len(rows)
    for folder, plays in (
        (retrieval.folder, len(moments)),
        (retrieval.path(SELECTION_FOLDER), (moments < validation_from).sum()),
    ):
        assert int(Retrieval.load(fitted, folder).plays.plays.sum()) == plays


def test_models_are_compared_on_plays_that_a_retrieval_fitted_by_hand_since_the_split_has_not_seen(
    fitted: Workspace, tmp_path: Path
) -> None:
    first_retrieval = load_manifest(fitted, "retrieval", live_release(fitted).inputs["retrieval"])
    split = load_split(fitted, first_retrieval.inputs["split"])
    assert not split.has_test
    many_path = write_rows(tmp_path / "many.csv", ring_plays(range(150), plays=8, begin=20, days=2, **RING))
    append_plays(fitted, ImportConfig(format="csv", paths=(many_path,), columns=COLUMNS))
    last_seen = Dataset(fitted).manifest.last_play
    second_retrieval = fit_retrieval(
        fitted, from_mapping(RetrievalConfig, first_retrieval.config, "retrieval"), split=split
    )
    assert create_release(fitted, retrieval_id=second_retrieval.id).inputs["retrieval"] == second_retrieval.id
    few_path = write_rows(tmp_path / "few.csv", ring_plays(range(100), plays=8, begin=23, days=1, **RING))
    result = run_update(fitted, few_path, train_share=1.0)
    assert result.quality is not None
    third_retrieval = load_manifest(fitted, "retrieval", live_release(fitted).inputs["retrieval"])
    validation_from = load_split(fitted, third_retrieval.inputs["split"]).validation_from
    assert validation_from is not None
    assert validation_from > last_seen


def test_the_same_plays_again_change_nothing(fitted: Workspace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "day.csv", ring_plays(range(50), plays=6, begin=20, days=1, **RING))
    first = run_update(fitted, path)
    second = run_update(fitted, path)
    assert (second.appended.plays, second.release, second.live, second.outcomes) == (0, first.release, True, [])


def test_plays_that_a_killed_run_had_appended_count_as_new(fitted: Workspace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "plays.csv", ring_plays(range(149, 152), plays=3, begin=20, days=1, **RING))
    append_plays(fitted, ImportConfig(format="csv", paths=(path,), columns=COLUMNS))  # the killed run did no more
    result = run_update(fitted, path)
    assert (result.appended.plays, result.new_plays, result.new_users, result.new_songs) == (0, 9, 2, 0)
    assert result.live


def test_an_update_without_new_plays_does_not_undo_a_rollback(fitted: Workspace, tmp_path: Path) -> None:
    before = live_release(fitted)
    path = write_rows(tmp_path / "plays.csv", ring_plays(range(3), plays=3, begin=20, days=1, **RING))
    first = run_update(fitted, path)
    assert first.live
    assert rollback(fitted) == before
    again = run_update(fitted, path)
    assert {outcome.status for outcome in again.outcomes} == {"skipped"}
    assert (again.release, again.live, again.reason) == (first.release, False, "it was rolled back")
    assert live_release(fitted) == before
    (tmp_path / "titles.csv").write_text("song,title\ns1,Another title\n")
    describe(fitted, DescribeConfig(), str(tmp_path / "titles.csv"))  # a release with this title has another id
    again = run_update(fitted, path)
    assert again.release != first.release
    assert (again.live, again.reason) == (False, "it was rolled back")
    activate_release(fitted, first.release)
    assert run_update(fitted, path).live


def test_of_clocks_that_are_ahead_only_their_own_users_are_left_out_of_the_comparison(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the users have a seen play ahead of the new plays; only the others' new plays are unseen for certain."""
    without_ray(monkeypatch)

    class ImportClock:
        """The plays are imported in the night after day 20."""

        @staticmethod
        def now(zone: timezone) -> datetime:
            return datetime.fromtimestamp(BEGIN + 20.1 * DAY, zone)

    ahead = int(BEGIN + 20.9 * DAY)
    rows = ring_plays(range(100), **RING) + [f"u{user},s1,{ahead},One,Anna\n" for user in range(50)]
    with monkeypatch.context() as patch:
        patch.setattr(import_run, "datetime", ImportClock)
        fit(workspace, FitConfig(paths=(write_rows(tmp_path / "plays.csv", rows),)), settings=SETTINGS)
    model = load_manifest(workspace, "models", live_release(workspace).inputs["models"])
    day_path = write_rows(tmp_path / "day.csv", ring_plays(range(100), plays=9, begin=20.2, days=0.6, **RING))
    result = run_update(workspace, day_path, train_share=1.0)
    assert result.quality is not None
    retrieval = load_manifest(workspace, "retrieval", live_release(workspace).inputs["retrieval"])
    start = load_split(workspace, retrieval.inputs["split"]).validation_from
    assert start is not None
    assert start < ahead * 1000
    model_end = fit_range_of(Dataset(workspace), model).before
    assert model_end is not None
    assert model_end <= start  # the training could continue
    histories = Dataset(workspace).histories([f"u{user}" for user in range(50, 100)])
    assert 30 <= result.quality.queries <= (histories.played_at >= start).sum()


def planted_quality(new: float, live: float, difference: tuple[float, float, float], queries: int) -> Quality:
    """Return the quality of a new and a live release: recall@20 of each, and the difference with its interval."""
    labels = {"target": "served", "metric": "recall"}
    values = {"new": new, "live": live}
    value, low, high = difference
    return Quality(
        results=[{"model": model, **labels, "value": values[model], "plays": queries} for model in values],
        comparisons=[{"model": "new", "other": "live", **labels, "difference": value, "low": low, "high": high}],
    )


@pytest.mark.parametrize(
    ("quality", "same_model", "trained"),
    [
        (planted_quality(22 / 29, 23 / 29, (-1 / 29, -0.103, 0.0), 29), True, False),  # one query, within chance
        (planted_quality(0.300, 0.304, (-0.004, -0.006, -0.002), 10_000), True, True),  # certain, within the tolerance
        (planted_quality(0.300, 0.310, (-0.010, -0.021, 0.001), 1_000), True, False),
        (planted_quality(0.300, 0.310, (-0.010, -0.014, -0.006), 10_000), False, False),
    ],
)
def test_a_release_is_refused_if_it_is_worse_by_more_than_the_tolerance_and_with_the_same_model_by_more_than_chance(
    quality: Quality, same_model: bool, trained: bool
) -> None:
    assert decide(quality, 0, is_trained=False)[0] == same_model
    assert decide(quality, 0, is_trained=True)[0] == trained


def test_a_new_model_that_finds_less_is_kept_out(fitted: Workspace, tmp_path: Path) -> None:
    """No user held out to check rankers has new plays: the new release has no rankers, and its network finds less."""
    before = live_release(fitted)
    user_ids = np.array([f"u{user}" for user in range(150)], dtype=object)
    users = np.flatnonzero(~checks_rankers(user_ids)).tolist()
    path = write_rows(tmp_path / "days.csv", ring_plays(users, begin=20, days=5, **RING))
    result = run_update(fitted, path, train=True)
    assert "rank" in [outcome.stage for outcome in result.outcomes if outcome.status == "left out"]
    assert result.quality is not None
    new_quality, live_quality = result.quality.value("new"), result.quality.value("live")
    assert new_quality is not None
    assert live_quality is not None
    assert new_quality < live_quality - 0.005
    assert not result.live
    assert f"{live_quality:.3f}" in result.reason
    assert live_release(fitted) == before
    assert load_manifest(fitted, "releases", result.release)  # kept, so that users can activate it


@pytest.mark.slow  # trains twice
def test_where_many_plays_are_new_the_training_is_continued(fitted: Workspace, tmp_path: Path) -> None:
    before = live_release(fitted)
    result = run_update(fitted, write_rows(tmp_path / "days.csv", ring_plays(range(150), begin=20, days=10, **RING)))
    assert result.trained
    assert result.live, result.reason
    model = load_manifest(fitted, "models", live_release(fitted).inputs["models"])
    assert model.inputs["from"] == before.inputs["models"]
    assert int(fitted.read_array(model.path("play_counts.npy")).sum()) == Dataset(fitted).manifest.plays


def test_few_new_plays_go_live_unchecked_and_states_follow_where_there_is_a_store(
    fitted: Workspace, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "plays.csv", ring_plays(range(2), plays=3, begin=20, days=1, **RING))
    uri = store_uri(fitted, None)
    store = open_store(uri, Dataset(fitted).lineage)
    store.close()
    result = run_update(fitted, path)
    assert (result.live, result.quality) == (True, None)
    assert "too few for a comparison" in result.reason
    assert result.states is not None
    assert result.states.users == 150


@pytest.mark.parametrize(("bad", "code"), [(2, 0), (20, 2)])
def test_rejected_rows_are_warned_of_and_too_many_end_the_update_with_the_summary(
    bad: int, code: int, fitted: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Dataset(fitted).manifest
    rows = [*ring_plays(range(2), plays=3, begin=20, days=1, **RING), *[f"u1,,{BEGIN},,One\n"] * bad]
    path = write_rows(tmp_path / "plays.csv", rows)
    arguments = ["--json", "--workspace", fitted.uri, "update", path]
    assert main(arguments) == code
    output = capsys.readouterr()
    report, messages = json.loads(output.out), output.err
    share = f"{bad} of {6 + bad} rows ({bad / (6 + bad):.1%}) were rejected."
    assert share in report["import"]["warnings"]
    assert report["import"]["reasons"][0]["text"] == f"u1,,{BEGIN},,One"
    assert (Dataset(fitted).manifest == before) == (code == 2)
    if code:
        assert report["error"]["kind"] == "too_many_rejected"
        assert main([*arguments, "--max-rejected", "0.9"]) == 0
        messages = capsys.readouterr().err
    warning = f"Warning: {share} no song: {path}, line 8: u1,,{BEGIN}"
    assert "".join(warning.split()) in "".join(messages.split())  # a line of stderr may break within a path


def test_times_without_a_zone_and_skips_are_read_as_in_the_fit_unless_another_zone_is_named(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    rows = [f"u{user},s{play},2026-01-{play:02} 10:00:00,1\n" for user in range(3) for play in range(1, 12)]
    days = {"day1": ["u0,s1,2026-01-13,0.3\n"], "day2": ["u0,s1,2026-01-14 01:00,0.1\n"]}
    for name, content in {"plays": rows, **days}.items():
        (tmp_path / f"{name}.csv").write_text("user_id,track,timestamp,share_listened\n" + "".join(content))
    config = FitConfig(paths=(str(tmp_path / "plays.csv"),), timezone="Asia/Tokyo")
    settings = {"import": {"buckets": 2, "skip_below": 0.2}, "embed": SETTINGS["embed"], "train": SETTINGS["train"]}
    fit(workspace, config, settings=settings)
    assert Dataset(workspace).manifest.last_play == parse_timestamp("2026-01-11T01:00Z")
    run_update(workspace, str(tmp_path / "day1.csv"))
    assert Dataset(workspace).manifest.last_play == parse_timestamp("2026-01-12T15:00Z")
    run_update(workspace, str(tmp_path / "day2.csv"), timezone="UTC")
    assert Dataset(workspace).manifest.last_play == parse_timestamp("2026-01-14T01:00Z")
    is_skipped = Dataset(workspace).history("u0").skipped
    assert is_skipped is not None
    assert is_skipped.tolist() == [False] * 12 + [True]


def test_without_a_live_release_it_says_what_to_run_first(workspace: Workspace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "plays.csv", ring_plays(range(2), plays=3))
    with pytest.raises(InputError, match="no live release; run `rayrec fit` first"):
        run_update(workspace, path)


def test_without_rankers_the_networks_alone_are_compared(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    few_path = write_rows(tmp_path / "plays.csv", ring_plays(range(25), plays=10, **RING))
    assert fit(workspace, FitConfig(paths=(few_path,)), settings=SETTINGS).quality is None
    assert "rankers" not in live_release(workspace).inputs
    many_path = write_rows(tmp_path / "days.csv", ring_plays(range(100), plays=30, begin=20, days=5, **RING))
    result = run_update(workspace, many_path, train_share=1.0)
    assert not result.trained
    assert result.quality is not None
    assert result.quality.queries > 100
    assert result.reason.startswith(f"recall@20 as served on {result.quality.queries:,} new queries is ")
    assert result.live
    verdict = live_release(workspace).metrics["validation"]["verdict"]
    assert verdict.startswith("taste finds ")


def test_a_model_of_too_few_plays_for_a_split_is_trained_further_on_plays_that_it_has_not_seen(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    few_path = write_rows(tmp_path / "plays.csv", ring_plays(range(25), plays=10, **RING))
    fit(workspace, FitConfig(paths=(few_path,)), settings=SETTINGS)
    before = live_release(workspace)
    assert "split" not in load_manifest(workspace, "models", before.inputs["models"]).inputs
    many_path = write_rows(tmp_path / "days.csv", ring_plays(range(100), plays=15, begin=20, days=5, **RING))
    result = run_update(workspace, many_path)
    assert result.trained
    assert result.quality is not None
    release = load_manifest(workspace, "releases", result.release)
    model = load_manifest(workspace, "models", release.inputs["models"])
    assert model.inputs["from"] == before.inputs["models"]
    assert model.metrics["validation_recall@20"] is not None  # epochs were chosen on new plays


def test_columns_are_those_of_the_fit_where_the_files_have_them(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    header = "user_id,song,track_id,ts\n"
    rows = [f"u{user},Title {play},s{play},{BEGIN + play * 1000}\n" for user in range(3) for play in range(12)]
    days = {"day1": (header, "s1"), "day2": (header.replace("track_id", "other"), "s1"), "day3": (header, "s2")}
    (tmp_path / "plays.csv").write_text(header + "".join(rows))
    for number, (name, (header_line, song)) in enumerate(days.items()):
        (tmp_path / f"{name}.csv").write_text(f"{header_line}u0,Title {song},{song},{BEGIN + DAY * (number + 1)}\n")
    fit(workspace, FitConfig(paths=(str(tmp_path / "plays.csv"),), columns={"song": "track_id"}), settings=SETTINGS)
    assert run_update(workspace, str(tmp_path / "day1.csv")).appended.songs == 0
    assert run_update(workspace, str(tmp_path / "day2.csv")).appended.songs == 1  # no column track_id: guessed
    assert run_update(workspace, str(tmp_path / "day3.csv"), columns={"song": "song"}).appended.songs == 1
    songs, rows_of = Dataset(workspace).history("u0").songs.tolist(), Dataset(workspace).catalog().rows
    assert songs[12:] == rows_of(["s1", "Title s1", "Title s2"]).tolist()


def test_files_with_a_column_of_users_that_the_fit_ignored_are_updated_with_its_user(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    rows = [f"phone,s{play},{BEGIN + play * 1000}\n" for play in range(12)]
    (tmp_path / "plays.csv").write_text("user,song,played_at\n" + "".join(rows))
    (tmp_path / "day.csv").write_text(f"user,song,played_at\ncar,s1,{BEGIN + DAY}\n")
    config = FitConfig(paths=(str(tmp_path / "plays.csv"),), columns={"user": ""}, user="ann")
    fit(workspace, config, settings=SETTINGS)
    run_update(workspace, str(tmp_path / "day.csv"))
    assert len(Dataset(workspace).history("ann").songs) == 13


@pytest.mark.parametrize(("others", "user"), [([], "ann"), (["ann"], "ann"), (["bob"], "export")])
def test_the_user_is_the_one_that_all_imports_of_the_format_were_given(
    others: list[str], user: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)

    def write_history(name: str, day: int) -> str:
        plays = [
            {"ts": f"2024-04-{day:02}T10:{play:02}:00Z", "spotify_track_uri": f"t{play}", "ms_played": 40_000}
            for play in range(12)
        ]
        path = tmp_path / name / "endsong_0.json"
        path.parent.mkdir()
        path.write_text(json.dumps(plays))
        return str(path)

    settings = {**SETTINGS, "import": {"buckets": 2}}
    fit(workspace, FitConfig(paths=(write_history("first", 1),), user="ann"), settings=settings)
    for number, other in enumerate(others, start=2):
        config = ImportConfig(format="spotify-history", paths=(write_history(other, number),), user=other)
        append_plays(workspace, config)
    notes: list[str] = []
    update(workspace, UpdateConfig(paths=(write_history("export", 9),)), on_note=notes.append)
    assert len(Dataset(workspace).history(user).songs) == (24 if user == "ann" else 12) + 12 * others.count("ann")
    assert ("all plays belong to user 'ann'" in notes[0]) == (user == "ann")
    update(workspace, UpdateConfig(paths=(write_history("third", 10),), user="cyd"))
    assert len(Dataset(workspace).history("cyd").songs) == 12
    update(workspace, UpdateConfig(paths=(write_history("dan", 11),), user=""))  # the folder names the user
    assert len(Dataset(workspace).history("dan").songs) == 12
