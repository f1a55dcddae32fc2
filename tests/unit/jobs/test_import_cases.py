"""Files that real users import by the command line: the result is a correct data set, or a one-line error."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_import import in_this_process

from rayrec.data.dataset import Dataset
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.merging import BucketMerger
from rayrec.importing.staging import Staging
from rayrec.jobs.import_data import import_data
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

START = 1711929600  # 2024-04-01, unix seconds
DAY = 86_400


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)


class Outcome:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.data: dict[str, Any] = json.loads(out) if out.startswith("{") else {}


@pytest.fixture
def rayrec(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str | Path, as_json: bool = True) -> Outcome:
        flags = ["--workspace", workspace.uri, *(["--json"] if as_json else [])]
        code = main([*flags, *map(str, arguments)])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert "--debug" not in output.err
        return Outcome(code, output.out, output.err)

    return run


def plays_per_user(workspace: Workspace) -> dict[str, int]:
    """User -> number of plays."""
    batches = list(Dataset(workspace).read_all())
    return {user: int(count) for batch in batches for user, count in zip(batch.user_ids, np.diff(batch.offsets))}  # noqa: B905


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_plays_csv(path: Path, rows: int = 100, people: int = 4, bad: int = 0) -> Path:
    lines = [f"u{row % people},s{row % 7},{START + row * 7200}" for row in range(rows)] + ["u1,,5"] * bad
    return write(path, "\n".join(["user,song,played_at", *lines]) + "\n")


def mpd_slice(first: int) -> str:
    tracks = [{"pos": position, "track_uri": f"t{position}", "track_name": "n"} for position in range(5)]
    return json.dumps({"playlists": [{"pid": first + number, "tracks": tracks} for number in range(20)]})


def test_a_slice_that_is_cut_off_stops_the_import_and_is_named(
    rayrec: Any, tmp_path: Path, workspace: Workspace
) -> None:
    write(tmp_path / "mpd" / "mpd.slice.0-19.json", mpd_slice(0))
    write(tmp_path / "mpd" / "mpd.slice.20-39.json", mpd_slice(20)[:-40])
    failure = rayrec("import", "mpd", tmp_path / "mpd")
    assert (failure.code, failure.data["error"]["kind"]) == (2, "damaged_input")
    assert "mpd.slice.20-39.json cannot be read completely" in failure.data["error"]["message"]
    assert not workspace.exists("dataset/dataset.json")
    result = rayrec("import", "mpd", tmp_path / "mpd", "--skip-damaged")
    assert (result.code, result.data["playlists"], result.data["rejected"]) == (0, 20, 0)
    assert list(result.data["import"]["damaged"]) == [str(tmp_path / "mpd" / "mpd.slice.20-39.json")]
    assert result.data["import"]["warnings"] == ["1 of 2 files could not be read completely and were skipped."]


def write_two_files(folder: Path) -> str:
    """Write 30 plays of user a and 50 of user b as two Parquet files, and return their folder."""
    for name, rows in (("a", 30), ("b", 50)):
        frame = pd.DataFrame({"user": [name] * rows, "song": range(rows), "played_at": range(START, START + rows)})
        frame.to_parquet(write(folder / f"{name}.parquet", b""))
    return str(folder)


def make_second_file_fail(patch: pytest.MonkeyPatch, message: str) -> None:
    """Make the second of `two_files` fail with an error that only reading its rows can show."""
    iter_batches = pq.ParquetFile.iter_batches

    def fail_on_second_file(file: pq.ParquetFile, *arguments: Any, **options: Any) -> Any:
        if file.metadata.num_rows == 50:
            raise OSError(message)
        return iter_batches(file, *arguments, **options)

    patch.setattr(pq.ParquetFile, "iter_batches", fail_on_second_file)


def test_a_file_that_a_killed_import_could_not_read_is_in_the_next_one(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ImportConfig(format="parquet", paths=(write_two_files(tmp_path / "p"),), skip_damaged=True, buckets=2)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        make_second_file_fail(patch, "Connection reset by peer")
        patch.setattr(Staging, "publish", kill)
        with pytest.raises(KeyboardInterrupt):
            import_data(workspace, config)
    assert import_data(workspace, config).plays == 80
    assert plays_per_user(workspace) == {"a": 30, "b": 50}


def test_a_file_that_could_not_be_read_before_a_kill_in_the_first_pass_is_in_the_next_import(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ImportConfig(format="parquet", paths=(write_two_files(tmp_path / "p"),), skip_damaged=True, buckets=2)

    def fail_and_then_kill(file: pq.ParquetFile, *_: Any, **__: Any) -> Any:
        raise OSError("Connection reset by peer") if file.metadata.num_rows == 30 else KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "iter_batches", fail_and_then_kill)
        with pytest.raises(KeyboardInterrupt):
            import_data(workspace, config)
    assert import_data(workspace, config).plays == 80


def test_a_killed_import_that_leaves_a_damaged_file_out_merges_no_bucket_twice(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ImportConfig(format="parquet", paths=(write_two_files(tmp_path / "p"),), skip_damaged=True, buckets=8)
    merge, merged_buckets = BucketMerger.run, list[int]()

    def merge_until_the_fifth(self: BucketMerger, bucket: int, group: Any) -> Any:
        if len(merged_buckets) == 4 and bucket not in merged_buckets:
            merged_buckets.append(bucket)
            raise KeyboardInterrupt
        result = merge(self, bucket, group)
        merged_buckets.append(bucket)
        return result

    make_second_file_fail(monkeypatch, "Corrupt snappy compressed data")
    monkeypatch.setattr(BucketMerger, "run", merge_until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        import_data(workspace, config)
    assert import_data(workspace, config).plays == 30
    assert sorted(merged_buckets) == sorted([*range(8), merged_buckets[4]])  # the fifth bucket was begun twice


@pytest.mark.parametrize(
    ("format_name", "name", "content"),
    [
        ("csv", "p.csv.gz", gzip.compress(b"user,song,played_at\nu,s,1711929600\n" * 50, mtime=0)[:-9]),
        ("listenbrainz", "p.json", b'[{"listened_at": 1711929600, "user_name": "u"'),
        ("spotify-history", "endsong_1.json", b'[{"ts": "2024-04-01T00:00:00Z"'),
        ("parquet", "p.parquet", b"PAR1 cut"),
        *(
            (name, f"p.{ending}", b"")
            for name, ending in [("csv", "csv"), ("sequences", "txt"), ("parquet", "parquet")]
        ),
        ("mpd", "p.json", b""),
        ("lastfm-1k", "userid-timestamp.tsv", b""),
    ],
)
def test_in_every_format_an_incomplete_or_empty_file_is_named(
    rayrec: Any, tmp_path: Path, format_name: str, name: str, content: bytes
) -> None:
    file = write(tmp_path / "x" / name, content)
    failure = rayrec("import", format_name, file)
    assert (failure.code, failure.data["error"]["kind"]) == (2, "damaged_input"), failure.err
    assert str(file) in failure.data["error"]["message"]
    skip_failure = rayrec("import", format_name, file, "--skip-damaged")
    assert (skip_failure.code, skip_failure.data["error"]["message"]) == (2, f"{file}: no rows to import")


def spotify_play(song: str, day: int, **extra: str) -> dict[str, Any]:
    track = {"spotify_track_uri": f"spotify:track:{song}", "master_metadata_track_name": "t", "ms_played": 200_000}
    return {"ts": f"2024-04-{day:02}T10:00:00Z", **track, **extra}


def test_two_people_with_spotifys_folder_name_are_two_users(rayrec: Any, tmp_path: Path, workspace: Workspace) -> None:
    for user, days in (("ann", 2), ("bob", 3)):
        file = tmp_path / user / "Spotify Extended Streaming History" / "Streaming_History_Audio_2024_0.json"
        write(file, json.dumps([spotify_play(f"{user}{day}", day) for day in range(1, days + 1)]))
    result = rayrec("import", "spotify-history", tmp_path)
    assert (result.code, plays_per_user(workspace)) == (0, {"ann": 2, "bob": 3})
    assert "using the folder names as user IDs ('ann', 'bob')" in result.data["import"]["warnings"][0]


def test_two_exports_of_one_person_are_one_user_under_the_name_that_is_given(
    rayrec: Any, tmp_path: Path, workspace: Workspace
) -> None:
    old_plays = [spotify_play(str(day), day, username="31abcdefg") for day in range(1, 11)]
    write(tmp_path / "ann" / "endsong_0.json", json.dumps(old_plays))
    write(
        tmp_path / "ann" / "Streaming_History_Audio_2022_0.json",
        json.dumps([spotify_play(str(day), day) for day in range(1, 21)]),
    )
    failure = rayrec("import", "spotify-history", tmp_path)
    assert (failure.code, failure.data["error"]["hint"]) == (
        2,
        "pass --user NAME to import all of them as one user",
    )
    result = rayrec("import", "spotify-history", tmp_path, "--user", "ann")
    assert (result.code, plays_per_user(workspace), result.data["merged"]) == (0, {"ann": 20}, 10)


def test_the_user_that_is_given_is_found_under_the_id_as_queries_spell_it(
    rayrec: Any, tmp_path: Path, workspace: Workspace
) -> None:
    file = write(tmp_path / "p.csv", f"song,played_at\na,{START}\n")
    assert rayrec("import", "csv", file, "--user", " 7.0 ").code == 0
    assert [Dataset(workspace).history(user_id).num_plays for user_id in (" 7.0 ", "7")] == [1, 1]


def test_one_frame_as_csv_and_as_parquet_appends_to_the_same_users(
    rayrec: Any, tmp_path: Path, workspace: Workspace
) -> None:
    write(tmp_path / "tiny.csv", f"user,song,played_at\n1,3,{START}\n2,4,{START}\n")
    frame = pd.DataFrame({"user": [1.0, 2.0, np.nan], "song": [3, 4, 5], "played_at": [START + DAY] * 3})
    frame.to_csv(tmp_path / "night.csv", index=False)
    frame.to_parquet(tmp_path / "night.parquet")
    assert rayrec("import", "csv", tmp_path / "tiny.csv").code == 0
    csv_result = rayrec("import", "csv", tmp_path / "night.csv", "--append")
    assert (csv_result.data["appended"]["plays"], csv_result.data["appended"]["users"]) == (2, 0)
    assert csv_result.data["appended"]["reasons"] == {"no user": 1}
    parquet_result = rayrec("import", "parquet", tmp_path / "night.parquet", "--append")
    assert (parquet_result.data["appended"]["plays"], parquet_result.data["appended"]["merged"]) == (0, 2)
    assert plays_per_user(workspace) == {"1": 2, "2": 2}


def test_the_summary_shows_outliers_rejected_rows_and_warnings(rayrec: Any, tmp_path: Path) -> None:
    for number in range(5):
        write_plays_csv(
            tmp_path / "p" / f"{number}.csv", rows=3 if number == 4 else 100, people=5 + number, bad=4 * (number == 2)
        )
    write(tmp_path / "p" / "3.csv", (tmp_path / "p" / "3.csv").read_bytes().removesuffix(b"\n"))
    report = rayrec("import", "csv", tmp_path / "p").data
    summary = report["import"]
    assert (summary["files"], summary["read"], summary["rejected"]) == (5, 407, 4)
    assert summary["bytes"] == sum(file.stat().st_size for file in (tmp_path / "p").iterdir())
    assert summary["rows_per_file"] == [3, 100, 100]
    assert summary["outliers"] == {str(tmp_path / "p" / "4.csv"): 3}
    (reason,) = summary["reasons"]
    assert (reason["reason"], reason["rows"], reason["line"], reason["text"]) == ("no song", 4, 102, "u1,,5")
    assert reason["source"] == str(tmp_path / "p" / "2.csv")
    assert reason["share"] == pytest.approx(4 / 407)
    assert summary["warnings"] == [
        f"The last line of {tmp_path / 'p' / '3.csv'} has no line end: the file may be incomplete."
    ]


def test_more_contexts_than_a_data_set_holds_give_a_warning(rayrec: Any, tmp_path: Path, workspace: Workspace) -> None:
    def write_contexts(name: str, first: int, last: int) -> Path:
        names = [f"c{number:02d}" for number in range(first, last) for _ in range(50 - number)]  # c00 is most frequent
        lines = [f"u,s,{START + first * 3600 + row},{context}" for row, context in enumerate(names)]
        return write(tmp_path / name, "\n".join(["user,song,played_at,contexts", *lines]) + "\n")

    summary = rayrec("import", "csv", write_contexts("first.csv", 9, 40)).data["import"]
    assert summary["warnings"] == []
    assert Dataset(workspace).manifest.contexts == [f"c{number:02d}" for number in range(9, 40)]
    summary = rayrec("import", "csv", write_contexts("all.csv", 0, 40), "--force").data["import"]
    assert summary["warnings"] == ["40 context names; only 31 are kept: the most frequent."]
    assert Dataset(workspace).manifest.contexts == [f"c{number:02d}" for number in range(31)]
    later = rayrec("import", "csv", write_contexts("later.csv", 41, 45), "--append").data["import"]
    assert later["warnings"] == ["35 context names; only 31 are kept: those of earlier imports and the most frequent."]


@pytest.mark.parametrize(
    ("bad", "allowed", "code", "warned"), [(1, "0.5", 0, 0), (2, "0.5", 0, 1), (120, "0.5", 2, 1), (120, "0.6", 0, 1)]
)
def test_many_rejected_rows_warn_and_more_than_are_allowed_import_nothing(
    rayrec: Any, tmp_path: Path, workspace: Workspace, bad: int, allowed: str, code: int, warned: int
) -> None:
    file = write_plays_csv(tmp_path / "p.csv", rows=100, bad=bad)
    result = rayrec("import", "csv", file, "--max-rejected", allowed)
    assert (result.code, len(result.data["import"]["warnings"])) == (code, warned)
    assert workspace.exists("dataset/dataset.json") == (code == 0)
    if code:
        assert result.data["error"]["kind"] == "too_many_rejected"
        assert result.err.startswith(
            "rayrec: 120 of 220 rows (55%) were rejected, more than 50%, so nothing was imported"
        )
        text_result = rayrec("import", "csv", file, as_json=False)
        assert (
            text_result.code,
            "no song" in text_result.out,
            "line 102: u1,,5" in " ".join(text_result.out.split()),
        ) == (2, True, True)


def test_missing_columns_are_named_at_once_with_the_nearest_ones(rayrec: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "p.csv", f"user,sng,tme\nann,s1,{START}\n")
    missing_columns = "'song' for song or 'played_at' for played_at; it has user, sng, tme"
    hint = "map them, for example with --columns song=sng,played_at=tme"
    failure = rayrec("import", "csv", file)
    assert (failure.code, failure.data["error"]["hint"]) == (2, hint)
    assert failure.data["error"]["message"] == f"{file} has no column {missing_columns}"
    mapped_failure = rayrec("import", "csv", file, "--columns", "user=listener,song=sng")
    assert mapped_failure.data["error"]["hint"] == "map them, for example with --columns user=user,played_at=tme"
    assert rayrec("import", "csv", file, "--columns", "song=sng,played_at=tme").data["plays"] == 1


def test_where_all_rows_are_rejected_the_summary_shows_an_example_too(rayrec: Any, tmp_path: Path) -> None:
    file = write_plays_csv(tmp_path / "p.csv", rows=0, bad=3)
    result = rayrec("import", "csv", file, "--max-rejected", "1")
    assert (result.code, result.data["error"]["kind"]) == (2, "too_many_rejected")
    assert result.data["error"]["message"] == f"{file}: all 3 rows are rejected: 3 × no song"
    (reason,) = result.data["import"]["reasons"]
    assert (reason["line"], reason["text"]) == (2, "u1,,5")


def test_entries_that_are_not_plays_do_not_stop_an_import(rayrec: Any, tmp_path: Path) -> None:
    """Most entries of a watch history are no music."""
    entry = {"titleUrl": "https://www.youtube.com/watch?v=a", "title": "Watched A"}
    music = [{**entry, "header": "YouTube Music", "time": f"2022-04-25T18:09:{row:02}Z"} for row in range(4)]
    history = [*music, {**music[0], "time": None}, *[{**entry, "header": "YouTube"}] * 95]
    file = write(tmp_path / "ann" / "watch-history.json", json.dumps(history))
    result = rayrec("import", "youtube-takeout", file)
    assert (result.code, result.data["plays"], result.data["rejected"]) == (0, 4, 96)
    assert result.data["import"]["not_plays"] == 95
    assert "1 of 5 rows (20.0%) were rejected." in result.data["import"]["warnings"]
    assert rayrec("import", "youtube-takeout", file, "--force", "--max-rejected", "0.1").code == 2


def test_spotifys_account_data_beside_the_extended_history_changes_nothing(
    rayrec: Any, tmp_path: Path, workspace: Workspace
) -> None:
    account_play = {"endTime": "2024-01-05 14:23", "artistName": "A", "trackName": "T", "msPlayed": 184000}
    file = write(tmp_path / "ann" / "StreamingHistory_music_0.json", json.dumps([account_play]))
    failure = rayrec("import", "spotify-history", file)
    assert failure.code == 2
    assert "ask Spotify for the extended streaming history" in json.dumps(failure.data)
    plays = [spotify_play(str(day), day, username="ann") for day in range(1, 11)]
    write(tmp_path / "ann" / "Streaming_History_Audio_2023_0.json", json.dumps(plays))
    result = rayrec("import", "spotify-history", tmp_path)
    assert (result.code, plays_per_user(workspace), result.data["import"]["not_plays"]) == (0, {"ann": 10}, 1)


def test_json_that_is_no_watch_history_stops_the_import(rayrec: Any, tmp_path: Path) -> None:
    failure = rayrec("import", "youtube-takeout", write(tmp_path / "ann" / "abos.json", "[{}]"))
    assert failure.code == 2
    assert failure.data["error"]["message"].endswith("abos.json is not a JSON watch history")


def test_files_left_out_are_named_with_the_whole_reason(rayrec: Any, tmp_path: Path) -> None:
    write_plays_csv(tmp_path / "p" / "1.csv", rows=10)
    write(tmp_path / "p" / ("a rather long name that a table would cut " * 3 + ".csv"), "")
    result = rayrec("import", "csv", tmp_path / "p", "--skip-damaged", as_json=False)
    assert result.code == 0
    assert "a table would cut .csv is empty; fetch it again" in " ".join(result.out.split())


def test_a_play_of_1970_is_pointed_out(rayrec: Any, tmp_path: Path) -> None:
    file = write_plays_csv(tmp_path / "p.csv")
    write(file, file.read_text() + "u1,s1,0\n")
    result = rayrec("import", "csv", file, as_json=False)
    assert result.code == 0
    assert "the first play is of 1970-01-01" in " ".join(result.out.split())


def test_parquet_with_nan_users_has_no_user_called_nan(rayrec: Any, tmp_path: Path, workspace: Workspace) -> None:
    table = pa.table(
        {"user": pa.array([16.0, np.nan, np.inf], from_pandas=False), "song": [1, 2, 3], "played_at": [START] * 3}
    )
    pq.write_table(table, tmp_path / "p.parquet")
    result = rayrec("import", "parquet", tmp_path / "p.parquet", "--max-rejected", "1")
    assert (plays_per_user(workspace), result.data["reasons"]) == ({"16": 1}, {"no user": 2})


def test_a_train_range_of_one_play_of_1970_is_refused(rayrec: Any, tmp_path: Path) -> None:
    file = write_plays_csv(tmp_path / "p.csv", rows=300)
    write(file, file.read_text() + "u1,s1,0\n")
    assert rayrec("import", "csv", file).code == 0
    failure = rayrec("split")
    assert (failure.code, failure.data["error"]["kind"]) == (2, "input")
    assert (
        "holds 1 of 301 plays: the first play is from 1970-01-01, the others are from 2024-04-01 or later"
        in failure.err
    )
    assert rayrec("split", "--test-days", "7", "--validation-days", "2").code == 0
