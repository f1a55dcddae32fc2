"""The retrieval stage gives the result of a single process for any groups of buckets and ranges of songs."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from without_ray import CountingFileSystem
from worlds import random_histories, with_opinions, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import SELECTION_FOLDER, Split, save_split
from rayrec.importing import import_plan
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs import retrieval as job
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.planning.formulas import retrieval_requests
from rayrec.jobs.retrieval import fit_retrieval, merge_counts
from rayrec.recommend import stored_retrieval
from rayrec.recommend.stored_retrieval import DIRECT_WEIGHT, Retrieval, RetrievalCounts
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

SONGS, BUCKETS = 50, 6
START, DAY = 1_700_000_000, 86_400  # seconds
SETTINGS = RetrievalConfig(sessions_per_song=3, rules_per_song=4)

pytestmark = pytest.mark.usefixtures("run_without_ray")


def arrays(retrieval: Retrieval) -> dict[str, np.ndarray]:
    named_arrays: dict[str, Any] = {}
    for part in ("sessions", "rules", "plays"):
        value = getattr(retrieval, part)
        named_arrays |= {f"{part}.{field.name}": getattr(value, field.name) for field in fields(value)}
    return {**named_arrays, "recent": retrieval.recent_plays, "popular": retrieval.popular}


def set_ranges_and_groups(monkeypatch: pytest.MonkeyPatch, *, ranges: int, groups: int, plays: int) -> None:
    """Make the stage use `ranges` ranges of songs and `groups` groups of buckets, as for very large data."""
    monkeypatch.setattr(stored_retrieval, "PLAYS_PER_RANGE", -(-plays // ranges))
    monkeypatch.setattr(import_plan, "MAX_READS", ranges * groups)


@pytest.mark.parametrize(
    ("ranges", "groups", "opinions"), [(1, 6, False), (5, 6, True), (5, 3, False), (5, 3, True), (50, 1, True)]
)
def test_any_groups_and_ranges_give_the_same(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, ranges: int, groups: int, opinions: bool
) -> None:
    histories = random_histories(60, SONGS, seed=2)
    histories = with_opinions(histories, SONGS) if opinions else histories
    dataset = write_dataset(workspace, histories, SONGS, buckets=BUCKETS)
    set_ranges_and_groups(monkeypatch, ranges=ranges, groups=groups, plays=dataset.manifest.plays)
    manifest = fit_retrieval(workspace, SETTINGS)
    counts = RetrievalCounts.fit(histories, num_songs=SONGS, newest=SETTINGS.sessions_per_song)
    expected = arrays(Retrieval.build(counts.strongest(SETTINGS.rules_per_song)))
    retrieval = Retrieval.load(workspace, manifest.folder)
    actual = arrays(retrieval)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    assert (retrieval.has_likes, retrieval.skip_share > 0) == (opinions, opinions)


def test_a_killed_job_counts_no_group_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(workspace, random_histories(60, SONGS, seed=2), SONGS, buckets=BUCKETS)
    set_ranges_and_groups(monkeypatch, ranges=5, groups=3, plays=dataset.manifest.plays)
    expected = fit_retrieval(workspace, SETTINGS)
    read_buckets = []
    read_bucket = Dataset.read_bucket

    def record_and_read(dataset: Dataset, bucket: int, *arguments: Any, **options: Any) -> Any:
        read_buckets.append(bucket)
        return read_bucket(dataset, bucket, *arguments, **options)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "merge_counts", kill)
        with pytest.raises(KeyboardInterrupt):
            fit_retrieval(workspace, SETTINGS, repeat=True)
    monkeypatch.setattr(Dataset, "read_bucket", record_and_read)
    resumed = fit_retrieval(workspace, SETTINGS, repeat=True)
    assert read_buckets == []
    assert resumed.files == expected.files  # name -> checksum


def test_a_job_killed_before_it_deletes_its_intermediate_files_leaves_none_in_the_artifact(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = random_histories(60, SONGS, seed=2)
    dataset = write_dataset(workspace, histories, SONGS, buckets=BUCKETS)
    validation_from, end = int(np.median(histories.played_at)), int(histories.played_at.max()) + 1
    split = Split(id="s", dataset=dataset.manifest.id, validation_from=validation_from, test_from=end, has_test=False)
    save_split(workspace, split)
    expected = fit_retrieval(workspace, SETTINGS, split=split)
    delete = Workspace.delete

    def delete_or_kill(workspace: Workspace, path: str) -> None:
        if path.endswith("/run"):
            raise KeyboardInterrupt
        delete(workspace, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Workspace, "delete", delete_or_kill)
        fit_retrieval(workspace, SETTINGS, split=split, repeat=True)
    resumed = fit_retrieval(workspace, SETTINGS, split=split, repeat=True)
    assert resumed.files == expected.files
    assert workspace.files(f"{resumed.path(SELECTION_FOLDER)}/run") == []


def test_each_part_is_copied_few_times_while_parts_are_merged() -> None:
    """Each part is copied about log2(number of parts) times, and not once for each part that follows it."""
    histories = random_histories(64, SONGS, seed=3)
    parts = [RetrievalCounts.fit(histories.take(np.arange(64) == user), num_songs=SONGS) for user in range(64)]
    copied_rules = 0
    merge = RetrievalCounts.merge.__func__  # type: ignore[attr-defined]

    def count_and_merge(cls: type, parts: Any) -> RetrievalCounts:
        nonlocal copied_rules
        copied_rules += sum(len(part.rules.followers) for part in parts)
        result: RetrievalCounts = merge(cls, parts)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetrievalCounts, "merge", classmethod(count_and_merge))
        merged = merge_counts(iter(parts))
    assert copied_rules <= 8 * sum(len(part.rules.followers) for part in parts)
    expected = RetrievalCounts.fit(histories, num_songs=SONGS)
    np.testing.assert_array_equal(merged.rules.followers, expected.rules.followers)
    np.testing.assert_array_equal(merged.sessions.songs, expected.sessions.songs)


@pytest.mark.parametrize(("ranges", "groups"), [(1, 6), (10, 3), (25, 6)])
def test_requests_are_as_many_as_the_formula_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: int, groups: int
) -> None:
    workspace = Workspace(tmp_path / "w")
    dataset = write_dataset(workspace, random_histories(60, SONGS, seed=2), SONGS, buckets=BUCKETS)
    set_ranges_and_groups(monkeypatch, ranges=ranges, groups=groups, plays=dataset.manifest.plays)
    counts = CountingFileSystem()
    with monkeypatch.context() as patch:
        counts.watch(patch)
        fit_retrieval(workspace, SETTINGS)
    expected = retrieval_requests(BUCKETS, 1, groups=groups, ranges=ranges, row_groups=1, columns=3, fits=1)
    assert counts.total == pytest.approx(expected, rel=0.15)


def test_requests_for_20_billion_plays_are_under_two_million() -> None:
    plays, songs, buckets = 20 * 10**9, 10**7, 4_096
    ranges = stored_retrieval.song_ranges(songs, plays)
    groups = import_plan.bucket_groups(len(ranges), buckets)
    requests = retrieval_requests(buckets, 1, groups=len(groups), ranges=len(ranges), row_groups=5, columns=3, fits=2)
    assert len(ranges) == 1_000
    assert requests < 2_000_000


@pytest.mark.parametrize(("ranges", "groups"), [(1, 1), (2, 6), (7, 2), (50, 3)])
def test_the_files_are_the_same_whatever_the_groups_and_ranges_after_an_append_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: int, groups: int
) -> None:
    rows = [
        [f"u{play // 15 % 12}", f"s{play * play % (41 if play < 600 else 61)}", START + 60 * play]
        for play in range(900)
    ]

    def fit_in_two_parts(folder: Path, ranges: int, groups: int) -> list[dict[str, str]]:
        workspace, checksums = Workspace(folder), []
        for part in range(2):
            add_plays(workspace, folder.with_suffix(f".{part}.csv"), rows[600 * part : 600 * (part + 1)])
            set_ranges_and_groups(monkeypatch, ranges=ranges, groups=groups, plays=Dataset(workspace).manifest.plays)
            manifest = fit_retrieval(workspace, SETTINGS)
            assert bool(manifest.metrics["base"]) == bool(part)
            checksums.append(manifest.files)
        return checksums

    assert fit_in_two_parts(tmp_path / "cut", ranges, groups) == fit_in_two_parts(tmp_path / "whole", 1, BUCKETS)


def add_plays(workspace: Workspace, path: Path, rows: list[list[Any]]) -> None:
    """Import plays, or append them if the workspace has plays already."""
    path.write_text("\n".join(["user,song,played_at", *(",".join(map(str, row)) for row in rows)]) + "\n")
    config = ImportConfig(format="csv", paths=(str(path),), buckets=BUCKETS)
    if workspace.exists("dataset"):
        append_plays(workspace, config)
    else:
        import_data(workspace, config)


def followers(workspace: Workspace, retrieval: Manifest, song: str) -> dict[str, float]:
    """Follower -> weight in the stored rules of `song`: 1 per play straight after it, 0.5 per play at distance 2."""
    catalog, rules = Dataset(workspace).catalog(), Retrieval.load(workspace, retrieval.folder).rules
    ids, (row,) = catalog.table.column("song_id").to_pylist(), catalog.rows([song])
    entries = slice(int(rules.offsets[row]), int(rules.offsets[row + 1]))
    weights = (rules.weights[entries] / DIRECT_WEIGHT).tolist()
    return dict(zip([ids[follower] for follower in rules.followers[entries]], weights, strict=True))


def sessions(workspace: Workspace, retrieval: Manifest) -> set[str]:
    """The song ids of each session, joined to one text."""
    ids = Dataset(workspace).catalog().table.column("song_id").to_pylist()
    stored_sessions = Retrieval.load(workspace, retrieval.folder).sessions
    return {
        "".join(ids[song] for song in songs) for songs in np.split(stored_sessions.songs, stored_sessions.offsets[1:-1])
    }


def pairs(user: str, first: str, second: str, count: int, *, start: int) -> list[list[Any]]:
    """Plays of `first` and, a minute later, `second` by each of `count` users."""
    users = [f"{user}{number}" for number in range(count)]
    return [[user, song, start + 60 * position] for user in users for position, song in enumerate((first, second))]


def test_a_follower_that_was_cut_starts_at_0_in_an_appended_part(workspace: Workspace, tmp_path: Path) -> None:
    """In three parts, b follows a 3, 0 and 0 times, and c follows a 2, 2 and 4 times; one rule per song is kept."""
    settings = RetrievalConfig(rules_per_song=1)
    add_plays(workspace, tmp_path / "0.csv", [
        *pairs("u", "a", "b", 3, start=START), *pairs("v", "a", "c", 2, start=START),
    ])  # fmt: skip
    first = fit_retrieval(workspace, settings)
    assert followers(workspace, first, "a") == {"b": 3.0}
    add_plays(workspace, tmp_path / "1.csv", pairs("w", "a", "c", 2, start=START + DAY))
    second = fit_retrieval(workspace, settings)
    assert followers(workspace, second, "a") == {"b": 3.0}  # though c has come four times
    add_plays(workspace, tmp_path / "2.csv", pairs("x", "a", "c", 4, start=START + 2 * DAY))
    third = fit_retrieval(workspace, settings)
    full = fit_retrieval(workspace, settings.replace(full=True))
    assert [second.metrics["base"], third.metrics["base"], full.metrics["base"]] == [first.id, second.id, ""]
    assert followers(workspace, third, "a") == {"c": 4.0}  # counted in the last part only
    assert followers(workspace, full, "a") == {"c": 8.0}


def test_a_session_that_goes_on_in_an_appended_part_is_two_and_its_rules_end_between_them(
    workspace: Workspace, tmp_path: Path
) -> None:
    """One user plays d, e in the first part and, a minute later, f, g in the second; another plays h, i likewise."""
    add_plays(workspace, tmp_path / "0.csv", [
        ["on", "d", START], ["on", "e", START + 60], ["once", "h", START],
    ])  # fmt: skip
    first = fit_retrieval(workspace, RetrievalConfig())
    add_plays(workspace, tmp_path / "1.csv", [
        ["on", "f", START + 120], ["on", "g", START + 180], ["once", "i", START + 60],
    ])  # fmt: skip
    incremental = fit_retrieval(workspace, RetrievalConfig())
    full = fit_retrieval(workspace, RetrievalConfig(full=True))
    assert (incremental.metrics["base"], full.metrics["base"]) == (first.id, "")
    assert sessions(workspace, full) == {"defg", "hi"}
    assert sessions(workspace, incremental) == {"de", "fg"}
    assert followers(workspace, full, "e") == {"f": 1.0, "g": 0.5}
    assert followers(workspace, incremental, "e") == {}
    assert followers(workspace, incremental, "d") == {"e": 1.0}
    assert followers(workspace, incremental, "f") == {"g": 1.0}
    plays = [Retrieval.load(workspace, manifest.folder).plays.plays.tolist() for manifest in (incremental, full)]
    assert plays[0] == plays[1] == [1] * 6


def test_without_times_popular_songs_are_those_of_all_users_not_of_the_longest_history(workspace: Workspace) -> None:
    lists = [[0, 1, 2]] * 40 + [[*[0, 1, 2] * 3, *[4, 5] * 10_000]]
    times = [(180_000 * np.arange(len(songs))).tolist() for songs in lists]
    histories = Histories.from_lists(lists, times)
    write_dataset(workspace, histories.take(np.arange(40)), SONGS, times="positions")
    first = Retrieval.load(workspace, fit_retrieval(workspace, SETTINGS).folder)
    np.testing.assert_array_equal(first.recent_plays[:3], [40, 40, 40])
    write_dataset(workspace, histories, SONGS, times="positions")
    second = Retrieval.load(workspace, fit_retrieval(workspace, SETTINGS, repeat=True).folder)
    np.testing.assert_array_equal(second.recent_plays, second.plays.plays)
    assert second.recent_plays[0] == 43
