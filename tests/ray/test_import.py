"""Imports end to end on a local cluster."""

import json
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.data.dataset import Dataset
from rayrec.data.split import SplitConfig, split_dataset
from rayrec.errors import InputError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.importing import import_run
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.staging import Staging
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.import_data import import_data
from rayrec.jobs.verify import verify_workspace
from rayrec.storage.artifacts import DatasetManifest, sha256
from rayrec.storage.workspace import Workspace

pytestmark = pytest.mark.usefixtures("cluster")

START = 1421163674


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def write_random_plays(path: Path, rows: int = 3_000) -> Path:
    """Write plays of 40 users with contexts, skips, duplicates and bad rows; return the path."""
    random = np.random.default_rng(5)
    lines = ["user,song,played_at,contexts,skipped,title"]
    for row in range(rows):
        user, song, moment = random.integers(40), int(random.zipf(1.3)) % 300, START + int(random.integers(2_000))
        context = ["", "radio", "search|album"][row % 3]
        lines.append(f"u{user},s{song},{moment},{context},{row % 2},Title {song}")
        if row % 100 == 0:
            lines.append(lines[-1])
        if row % 250 == 0:
            lines.append(f"u{user},,{moment},,,")
    return write(path, lines)


def csv_config(*paths: Path, **changes: Any) -> ImportConfig:
    return ImportConfig(format="csv", paths=tuple(map(str, paths)), **changes)


def content(workspace: Workspace) -> dict[str, list[tuple[str, int]]]:
    """Return user -> (song id, ms) of every play."""
    dataset = Dataset(workspace)
    song_ids = dataset.catalog().table.column("song_id").to_pylist()
    result = {}
    for batch in dataset.read_all():
        for row, user in enumerate(batch.user_ids):
            span = slice(batch.offsets[row], batch.offsets[row + 1])
            result[user] = [
                (song_ids[song], int(at)) for song, at in zip(batch.songs[span], batch.played_at[span], strict=True)
            ]
    return result


def rejected_lines(workspace: Workspace) -> list[tuple[int, str]]:
    tables = [workspace.read_table(path) for path in workspace.files("dataset/rejected")]
    return sorted((row["line"], row["reason"]) for row in pa.concat_tables(tables).to_pylist())


def comparable_manifest(manifest: DatasetManifest) -> DatasetManifest:
    """Return the manifest without the fields that depend on when and how it was made."""
    return replace(manifest, config={}, created_at="", id="", files={}, last_import={})


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> tuple[Path, Workspace, DatasetManifest]:
    folder = tmp_path_factory.mktemp("import")
    file = write_random_plays(folder / "plays.csv")
    workspace = Workspace(folder / "workspace")
    return file, workspace, import_data(workspace, csv_config(file))


def test_an_import_holds_what_plain_python_makes_of_the_file(
    imported: tuple[Path, Workspace, DatasetManifest],
) -> None:
    file, workspace, manifest = imported
    expected: dict[str, list[tuple[int, int, str]]] = {}
    songs: list[str] = []
    for line, text in enumerate(file.read_text().splitlines()[1:]):
        user, song, moment, *_ = text.split(",")
        if not song:
            continue
        songs += [] if song in songs else [song]
        plays = expected.setdefault(user, [])
        if (int(moment) * 1000, song) not in [(at, known_song) for at, _, known_song in plays]:
            plays.append((int(moment) * 1000, line, song))
    assert content(workspace) == {
        user: [(song, at) for at, _, song in sorted(plays)] for user, plays in expected.items()
    }
    assert Dataset(workspace).catalog().table.column("song_id").to_pylist() == songs
    assert Dataset(workspace).catalog().table.column("title").to_pylist() == [f"Title {song[1:]}" for song in songs]
    assert (manifest.users, manifest.songs) == (len(expected), len(songs))
    assert manifest.plays == sum(map(len, expected.values()))
    assert manifest.read == 3_042
    assert manifest.merged == 3_030 - manifest.plays >= 30
    assert manifest.rejected == {"no song": 12}
    assert manifest.contexts == ["album", "radio", "search"] or sorted(manifest.contexts) == [
        "album",
        "radio",
        "search",
    ]
    assert manifest.has_skipped
    assert manifest.first_play == min(at for plays in expected.values() for at, _, _ in plays)
    assert manifest.last_play == max(at for plays in expected.values() for at, _, _ in plays)


def test_the_manifest_lists_every_file_with_its_checksum_and_nothing_else_stays(
    imported: tuple[Path, Workspace, DatasetManifest],
) -> None:
    _, workspace, manifest = imported
    stored_paths = {path.removeprefix("dataset/") for path in workspace.files("dataset")}
    assert stored_paths == {*manifest.files, "dataset.json"}
    assert not workspace.exists("dataset/.staging")
    for path, digest in manifest.files.items():
        assert sha256(workspace, f"dataset/{path}") == digest


def test_rejected_rows_name_their_lines(imported: tuple[Path, Workspace, DatasetManifest]) -> None:
    file, workspace, _ = imported
    lines = file.read_text().splitlines()
    rejected_rows = rejected_lines(workspace)
    assert len(rejected_rows) == 12
    assert all(lines[line - 1].split(",")[1] == "" for line, _ in rejected_rows)


def test_many_byte_ranges_and_files_give_the_same_data_set(
    imported: tuple[Path, Workspace, DatasetManifest], tmp_path: Path
) -> None:
    file, workspace, manifest = imported
    other_workspace = Workspace(tmp_path / "cut")
    other_manifest = import_data(other_workspace, csv_config(file, unit_mib=0.011))
    assert comparable_manifest(other_manifest) == comparable_manifest(manifest)
    assert {name: digest for name, digest in other_manifest.files.items() if "rejected" not in name} == {
        name: digest for name, digest in manifest.files.items() if "rejected" not in name
    }
    assert rejected_lines(other_workspace) == rejected_lines(workspace)


def test_the_same_import_again_does_nothing_and_another_one_is_refused(
    imported: tuple[Path, Workspace, DatasetManifest], tmp_path: Path
) -> None:
    file, workspace, manifest = imported
    assert import_data(workspace, csv_config(file)) == manifest
    with pytest.raises(InputError, match=r"already contains \d+ plays from csv; .* --force"):
        import_data(workspace, csv_config(file, min_user_plays=2))
    assert Dataset(workspace).manifest == manifest


def test_repeat_replaces_the_data_set(tmp_path: Path, workspace: Workspace) -> None:
    import_data(workspace, csv_config(write(tmp_path / "a.csv", ["user,song,played_at", f"a,old,{START}", "b,x,"])))
    other_file = write(tmp_path / "b.csv", ["user,song,played_at", f"c,new,{START}"])
    manifest = import_data(workspace, csv_config(other_file), repeat=True)
    assert content(workspace) == {"c": [("new", START * 1000)]}
    assert (manifest.songs, manifest.rejected) == (1, {})
    assert {path.removeprefix("dataset/") for path in workspace.files("dataset")} == {*manifest.files, "dataset.json"}


@pytest.mark.parametrize("step", ["songs_file", "bucket_results", "publish"])
def test_a_killed_import_leaves_no_data_set_and_goes_on_where_it_was(
    imported: tuple[Path, Workspace, DatasetManifest],
    tmp_path: Path,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    _, _, manifest = imported
    file = write_random_plays(tmp_path / "plays.csv")
    config = csv_config(file, unit_mib=0.011)

    def raise_interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, step, raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_data(workspace, config)
    assert not workspace.exists("dataset/dataset.json")
    # Spoil the file, but keep its size and time: a finished unit that is read again would have only bad rows.
    state, header_length = file.stat(), len(file.read_text().splitlines()[0]) + 1
    file.write_text(file.read_text()[:header_length] + "x" * (state.st_size - header_length))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert comparable_manifest(import_data(workspace, config)) == comparable_manifest(manifest)
    assert not workspace.exists("dataset/.staging")


def test_changed_input_starts_a_killed_import_afresh(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.csv", ["user,song,played_at", f"a,s1,{START}"])
    with monkeypatch.context() as patch:
        patch.setattr(import_run, "choose_contexts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_data(workspace, csv_config(file))
    write(file, ["user,song,played_at", f"b,s2,{START}", f"b,s3,{START + 1}"])
    assert import_data(workspace, csv_config(file)).plays == 2
    assert list(content(workspace)) == ["b"]


def test_users_and_songs_below_the_minimum_counts_are_rejected(tmp_path: Path, workspace: Workspace) -> None:
    plays = [("a", "s1"), ("a", "s2"), ("a", "s1"), ("b", "s1"), ("b", "s1"), ("b", "s2"), ("c", "s3"), ("d", "s4")]
    plays += [("d", "s4"), ("d", "s1"), ("d", "s1"), ("d", "s1"), ("a", "s1"), ("c", "s3"), ("c", "s3")]
    lines = [f"{user},{song},{START + row}" for row, (user, song) in enumerate(plays)]
    lines += [lines[6]] * 5  # duplicates count once: s3 has three plays, all of user c
    file = write(tmp_path / "a.csv", ["user,song,played_at", *lines])
    manifest = import_data(workspace, csv_config(file, min_user_plays=3, min_song_plays=3))
    stored_plays = content(workspace)
    assert {user: [song for song, _ in rows] for user, rows in stored_plays.items()} == {
        "a": ["s1", "s1", "s1"],
        "c": ["s3", "s3", "s3"],
        "d": ["s1", "s1", "s1"],
    }
    assert Dataset(workspace).catalog().table.column("song_id").to_pylist() == ["s1", "s3"]
    assert manifest.merged == 5
    assert manifest.rejected == {"song with fewer than 3 plays": 4, "user with fewer than 3 plays": 2}
    assert manifest.read == manifest.plays + manifest.merged + sum(manifest.rejected.values())
    assert (3, "song with fewer than 3 plays") in rejected_lines(workspace)


def test_songs_of_users_who_are_left_out_are_not_in_the_catalog(tmp_path: Path, workspace: Workspace) -> None:
    lines = [f"a,s1,{START}", f"b,only-b,{START}", f"a,s2,{START + 1}"]
    manifest = import_data(
        workspace, csv_config(write(tmp_path / "a.csv", ["user,song,played_at", *lines]), min_user_plays=2)
    )
    assert Dataset(workspace).catalog().table.column("song_id").to_pylist() == ["s1", "s2"]
    assert manifest.rejected == {"user with fewer than 2 plays": 1}


@pytest.mark.parametrize("plays_first", [True, False])
def test_plays_and_playlists_share_one_vocabulary_in_either_order(
    tmp_path: Path, workspace: Workspace, plays_first: bool
) -> None:
    plays = csv_config(write(tmp_path / "a.csv", ["user,song,played_at", f"a,s2,{START}", f"a,s1,{START + 9}"]))
    rows = ["playlist,position,song,title", "p,1,s1,One", "p,0,s9,Nine", "q,0,s2,Two"]
    playlists = csv_config(write(tmp_path / "lists.csv", rows), kind="playlists")
    configs = [plays, playlists] if plays_first else [playlists, plays]
    first = import_data(workspace, configs[0])
    songs = Dataset(workspace).catalog().table.column("song_id").to_pylist()
    second = import_data(workspace, configs[1])
    dataset = Dataset(workspace)
    song_ids = dataset.catalog().table.column("song_id").to_pylist()
    assert song_ids[: len(songs)] == songs
    assert content(workspace) == {"a": [("s2", START * 1000), ("s1", (START + 9) * 1000)]}
    playlist_songs = [
        [song_ids[song] for song in flat[start:stop]]
        for flat, offsets in dataset.read_playlists()
        for start, stop in pairwise(offsets)
    ]
    assert sorted(playlist_songs) == [["s2"], ["s9", "s1"]]
    assert first.id != second.id
    assert (second.plays, second.users, second.playlists, second.playlist_entries) == (2, 1, 2, 3)
    assert (second.songs, second.buckets) == (3, first.buckets)
    for path, digest in second.files.items():
        assert sha256(workspace, f"dataset/{path}") == digest
    with pytest.raises(InputError, match="already"):
        import_data(workspace, configs[1].replace(min_song_plays=2))
    assert import_data(workspace, configs[0]) == second


def test_a_folder_of_mpd_slices_is_imported(tmp_path: Path, workspace: Workspace) -> None:
    for number in range(2):
        tracks = [{"pos": position, "track_uri": f"t{number}{position}", "track_name": "n"} for position in range(3)]
        (tmp_path / f"mpd.slice.{number}-{number}.json").write_text(
            json.dumps({"playlists": [{"pid": number, "tracks": tracks}]})
        )
    manifest = import_data(workspace, ImportConfig(format="mpd", paths=(str(tmp_path),)))
    assert (manifest.playlists, manifest.playlist_entries, manifest.songs, manifest.plays) == (2, 6, 6, 0)
    assert Dataset(workspace).catalog().table.column("song_id").to_pylist()[:4] == ["t00", "t01", "t02", "t10"]


def test_lines_of_songs_are_imported_in_order_and_split_by_position(tmp_path: Path, workspace: Workspace) -> None:
    lines = [f"u{user}=" + ":".join(f"s{(user * position) % 7}" for position in range(10)) for user in range(12)]
    lines += ["", "nobody", "u3=s1::s2"]
    file = write(tmp_path / "histories.lst", lines)
    config = ImportConfig(
        format="sequences", paths=(str(file),), user_separator="=", song_separator=":", unit_mib=0.0002
    )
    manifest = import_data(workspace, config)
    assert (manifest.times, manifest.plays, manifest.users, manifest.merged) == ("positions", 122, 12, 0)
    assert manifest.rejected == {"empty line": 1, "no '=' between user and songs": 1, "no song": 1}
    assert [line for line, _ in rejected_lines(workspace)] == [13, 14, 15]
    plays = content(workspace)
    assert [song for song, _ in plays["u3"]] == [*(f"s{(3 * position) % 7}" for position in range(10)), "s1", "s2"]
    assert [at for _, at in plays["u5"]] == [position * 180_000 for position in range(10)]
    with pytest.raises(InputError, match="has no times"):
        split_dataset(workspace, SplitConfig())
    split = split_dataset(workspace, SplitConfig(last_fraction=0.2))
    batches = list(Dataset(workspace).read_all())
    assert sum(split.is_test(batch).sum() for batch in batches) == 11 * 2 + 2
    assert sum(split.final.select(batch).num_plays for batch in batches) == 11 * 8 + 10
    report = evaluate(workspace, EvaluateConfig(models=("popularity",), bootstrap_samples=10, offsets=0), split=split)
    assert (report.metrics["plays"], report.metrics["protocol"]) == (24, "last-fraction")
    assert b"weaker than a split in time" in workspace.read_bytes(report.path("report.html"))


def test_input_without_a_usable_row_is_refused_and_leaves_nothing(tmp_path: Path, workspace: Workspace) -> None:
    file = write(tmp_path / "a.csv", ["user,song,played_at", "a,s,yesterday", "a,,1"])
    with pytest.raises(InputError, match=r"all 2 rows are rejected: 1 × .*, 1 × .*; check"):
        import_data(workspace, csv_config(file))
    with pytest.raises(InputError, match="no rows to import"):
        import_data(workspace, csv_config(write(file, ["user,song,played_at"])))
    with pytest.raises(InputError, match="all 1 rows are rejected: 1 × user with fewer than 2 plays"):
        import_data(workspace, csv_config(write(file, ["user,song,played_at", f"a,s,{START}"]), min_user_plays=2))
    assert workspace.files("dataset") == []


@pytest.mark.slow  # writes and reads a thousand files
def test_a_damaged_parquet_file_among_a_thousand_is_named_and_the_others_are_not_read_again(
    tmp_path: Path, workspace: Workspace
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(1_000):
        rows = {"user": [f"u{row}" for row in range(5)], "song": ["s"] * 5, "played_at": [START + number] * 5}
        pq.write_table(pa.table(rows), folder / f"{number:04d}.parquet", write_page_checksum=True)
    damaged_file = folder / "0417.parquet"
    original_bytes = damaged_file.read_bytes()
    damage(damaged_file)
    config = ImportConfig(format="parquet", paths=(str(folder),), buckets=2)
    with pytest.raises(
        InputError, match=r"0417.parquet is damaged: .*restore it, or skip it with --skip-damaged; .* is kept"
    ):
        import_data(workspace, config)
    assert not workspace.exists("dataset/dataset.json")
    audit = verify_workspace(workspace)
    assert (audit.problems, [note.path for note in audit.notes]) == ([], ["dataset/dataset.json", "dataset/.staging"])
    for path in folder.iterdir():  # damage all files: reading one of the others again would fail
        state = path.stat()
        damage(path)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    damaged_file.write_bytes(original_bytes)
    manifest = import_data(workspace, config)
    assert (manifest.plays, manifest.users, manifest.read) == (5_000, 5, 5_000)
    assert not workspace.exists("dataset/.staging")


def damage(path: Path) -> None:
    """Change a byte within a page of a Parquet file; its footer stays valid."""
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)


def test_leaving_out_a_damaged_file_changes_neither_the_buckets_nor_the_units_of_the_other_files(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100 GB, one file less would give one bucket less, and then all files would be read again."""
    sizes = iter([20, 19, 19])
    monkeypatch.setattr(import_run, "choose_buckets", lambda size: next(sizes))
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        rows = {"user": ["a", "b"], "song": ["s", "t"], "played_at": [START + number] * 2}
        pq.write_table(pa.table(rows), folder / f"{number}.parquet", write_page_checksum=True)
    damage(folder / "1.parquet")
    config = ImportConfig(format="parquet", paths=(str(folder),))
    with pytest.raises(InputError, match=r"1.parquet is damaged"):
        import_data(workspace, config)
    (folder / "1.parquet").unlink()
    damage(folder / "2.parquet")
    with pytest.raises(InputError, match=r"2.parquet is damaged"):  # the damage changed it, so it is read again
        import_data(workspace, config)
    (folder / "2.parquet").unlink()
    assert import_data(workspace, config).buckets == 20
    assert content(workspace) == {"a": [("s", START * 1000)], "b": [("t", START * 1000)]}


def test_times_after_tomorrow_are_rejected_and_times_in_1970_are_kept(tmp_path: Path, workspace: Workspace) -> None:
    moments = [START, 0, 5, int(time.time()) + 3 * 86_400, 4_000_000_000, -7, 5_000_000_000]
    lines = [f"u{row},s,{moment}" for row, moment in enumerate(moments)]
    file = write(tmp_path / "a.csv", ["user,song,played_at", *lines])
    manifest = import_data(workspace, csv_config(file, max_rejected=1.0))
    assert manifest.rejected == {
        "time is more than a day in the future": 2,
        "time is not between 1970 and 2100": 2,
    }
    assert sorted(content(workspace)) == ["u0", "u1", "u2"]
    assert (manifest.first_play, manifest.last_play) == (0, START * 1000)


def test_the_real_sample_has_its_known_figures(real_data: Path, workspace: Workspace) -> None:
    config = csv_config(
        real_data / "30music-sample10" / "sessions_sample_10.csv",
        columns={"user": "user_id", "song": "song_id", "played_at": "ts"},
    )
    manifest = import_data(workspace, config)
    assert (manifest.plays, manifest.users, manifest.songs) == (343_183, 14_262, 9_999)
    assert (manifest.merged, manifest.rejected) == (0, {})


def test_the_real_histories_without_times_have_their_known_figures(real_data: Path, workspace: Workspace) -> None:
    path = str(real_data / "30music-long" / "histories.lst")
    config = ImportConfig(format="sequences", paths=(path,), user_separator=",", song_separator=":")
    manifest = import_data(workspace, config)
    assert (manifest.plays, manifest.users, manifest.songs) == (630_906, 2_965, 82_219)
    assert (manifest.merged, manifest.rejected) == (0, {})


def test_the_real_sessions_without_users_have_their_known_figures(real_data: Path, workspace: Workspace) -> None:
    path = str(real_data / "nowplaying" / "all_train_seq.plain.txt")
    manifest = import_data(workspace, ImportConfig(format="sequences", paths=(path,)))
    assert (manifest.plays, manifest.users, manifest.songs) == (953_381, 128_077, 60_416)
    assert (manifest.merged, manifest.rejected) == (0, {})
