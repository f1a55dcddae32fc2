"""Import settings, the plan of units, fragments and the workers, without a cluster."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayrec.config import from_mapping
from rayrec.data.dataset import bucket_of
from rayrec.data.histories import Histories
from rayrec.errors import InputError
from rayrec.importing import fragments, staging
from rayrec.importing.import_plan import ImportConfig, choose_buckets, make_plan
from rayrec.importing.import_workers import UnitImporter
from rayrec.importing.readers.reader import Unit
from rayrec.importing.staging import Staging, finish_publishing
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace

MIB = 1 << 20


def write_plays(path: Path, rows: int = 50) -> Path:
    lines = [f"u{row % 7},s{row % 11},{1421163674 + row}" for row in range(rows)]
    path.write_text("user,song,played_at\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "xml"}, "unknown format 'xml'; expected one of csv, lastfm-1k"),
        ({"paths": ()}, r"paths is \[\]; expected a non-empty list of strings"),
        ({"kind": "songs"}, "kind is 'songs'"),
        ({"format": "lastfm-1k", "columns": {"user": "u"}}, "has fixed columns"),
        ({"format": "lastfm-1k", "kind": "playlists"}, "holds plays, not playlists"),
        ({"columns": {"time": "ts"}}, "unknown column role 'time'; expected some of user, song, played_at"),
        ({"kind": "playlists", "columns": {"user": "u"}}, "expected some of playlist, position, song"),
        ({"min_user_plays": 0}, "min_user_plays is 0"),
        ({"min_song_plays": -1}, "min_song_plays is -1"),
        ({"buckets": 5000}, "buckets is 5000"),
        ({"unit_mib": 0.0}, "unit_mib is 0.0"),
        ({"delimiter": ";;"}, "delimiter is ';;'; expected one character"),
        ({"format": "sequences", "song_separator": ""}, "song_separator is ''; expected a non-empty string"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImportConfig(**{"format": "csv", "paths": ("plays.csv",), **values})


def test_settings_come_from_plain_values_too() -> None:
    config = from_mapping(
        ImportConfig,
        {"format": "csv", "paths": ["a", "b"], "columns": {"user": "u"}, "delimiter": "\\t"},
        "import",
    )
    assert config.paths == ("a", "b")
    assert (config.columns, config.delimiter) == ({"user": "u"}, "\t")
    assert ImportConfig(format="mpd", paths=("a",)).produces == "playlists"
    assert config.produces == "plays"


def test_there_is_a_bucket_for_every_64_mib_within_16_and_4096() -> None:
    assert [choose_buckets(size * MIB) for size in (0, 1, 1024, 1025, 6400, 10**7)] == [16, 16, 16, 17, 100, 4096]


def test_a_plan_cuts_files_in_order_and_knows_the_lines_before_each_unit(tmp_path: Path) -> None:
    write_plays(tmp_path / "b.csv")
    write_plays(tmp_path / "a.csv", rows=5)
    plan = make_plan(ImportConfig(format="csv", paths=(str(tmp_path),), unit_mib=500 / MIB))
    assert [Path(file.source).name for file in plan.files] == ["a.csv", "b.csv"]
    assert plan.unit_files == [0, 1, 1]
    assert [(unit.start, unit.stop) for unit in plan.units[1:]] == [
        (0, 500),
        (500, (tmp_path / "b.csv").stat().st_size),
    ]
    assert plan.line_offsets([6, 30, 21]) == [0, 0, 30]


def test_a_plan_changes_with_settings_and_files(tmp_path: Path) -> None:
    file = write_plays(tmp_path / "a.csv")
    config = ImportConfig(format="csv", paths=(str(file),))
    first = make_plan(config).id
    assert make_plan(config).id == first
    assert make_plan(ImportConfig(format="csv", paths=(str(file),), min_user_plays=2)).id != first
    write_plays(file, rows=51)
    assert make_plan(config).id != first


def test_a_missing_column_is_found_before_any_work(tmp_path: Path) -> None:
    file = write_plays(tmp_path / "a.csv")
    with pytest.raises(InputError, match="no column 'ts' for played_at; it has user, song, played_at"):
        make_plan(ImportConfig(format="csv", paths=(str(file),), columns={"played_at": "ts"}))


def test_files_of_one_name_are_refused_where_users_are_named_by_file(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "day.txt").write_text("u:1 2\n")
    paths = (str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(InputError, match=r"day.txt is there twice.*rename one"):
        make_plan(ImportConfig(format="sequences", paths=paths))
    assert len(make_plan(ImportConfig(format="sequences", paths=paths, user_separator=":")).files) == 2


@pytest.mark.parametrize("rows_per_fragment", [1, 1 << 20])
def test_fragments_hold_every_row_in_the_bucket_of_its_user(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_fragment: int
) -> None:
    monkeypatch.setattr(fragments, "ROWS_PER_FRAGMENT", rows_per_fragment)
    file = write_plays(tmp_path / "a.csv")
    config = ImportConfig(format="csv", paths=(str(file),))
    place = Staging(workspace, "x", ["0004-u"])
    worker = UnitImporter(place, config, [Unit(source=str(file), stop=file.stat().st_size)], 4)
    worker(0)
    result = place.fragments.result(0)
    assert (result.read, result.kept, result.lines, result.error) == (50, 50, 51, "")
    seen = []
    for bucket in range(4):
        for batch in place.fragments.read_bucket(0, result, bucket):
            owners = batch.column("owner").to_numpy(zero_copy_only=False)
            assert (bucket_of(owners, 4) == bucket).all()
            seen += batch.column("line").to_pylist()
    assert sorted(seen) == list(range(2, 52))


def test_an_input_error_within_a_worker_is_noted_for_the_caller(workspace: Workspace, tmp_path: Path) -> None:
    config = ImportConfig(format="csv", paths=("gone.csv",))
    place = Staging(workspace, "x", ["0004-u"])
    UnitImporter(place, config, [Unit(source=str(tmp_path / "gone.csv"), stop=10)], 4)(0)
    assert "cannot be opened" in place.fragments.result(0).error


def test_histories_are_written_in_bounded_row_groups(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PLAYS_PER_ROW_GROUP", 10)
    histories = Histories.from_lists([[1] * 4] * 9 + [[2] * 25], [range(4)] * 9 + [range(25)])
    place = Staging(workspace, "x")
    place.write_histories("dataset/histories/h.parquet", histories)
    with workspace.open_input(place.out("dataset/histories/h.parquet")) as stream:
        file = pq.ParquetFile(stream)
        sizes = [
            sum(len(songs) for songs in file.read_row_group(group).column("songs").to_pylist())
            for group in range(file.num_row_groups)
        ]
        assert max(sizes[:-1]) <= 12
        assert sum(sizes) == histories.num_plays
        assert Histories.from_arrow(file.read()).songs.tolist() == histories.songs.tolist()


def test_publishing_goes_on_from_wherever_it_was_killed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"songs.parquet": "", "histories/a.parquet": "", "histories/b.parquet": "", "playlists/kept.parquet": ""}

    def stage() -> None:
        for name in files:
            workspace.write_bytes(f"dataset/{name}", b"old")
        workspace.write_bytes("dataset/histories/left-over.parquet", b"old")
        workspace.write_json(DATASET_MANIFEST, {"files": {}})
        place = Staging(workspace, "x")
        for name in list(files)[:3]:
            workspace.write_bytes(place.out(f"dataset/{name}"), b"new")
        workspace.write_json(place.out(DATASET_MANIFEST), {"files": files})

    move, allowed = Workspace.move, 0

    def failing_move(self: Workspace, source: str, target: str) -> None:
        nonlocal allowed
        if allowed == 0:
            raise KeyboardInterrupt
        allowed -= 1
        move(self, source, target)

    for moves in range(4):
        stage()
        allowed = moves
        monkeypatch.setattr(Workspace, "move", failing_move)
        with pytest.raises(KeyboardInterrupt):
            finish_publishing(workspace)
        assert not workspace.exists(DATASET_MANIFEST)  # half a data set is none
        monkeypatch.setattr(Workspace, "move", move)
        finish_publishing(workspace)
        assert workspace.read_json(DATASET_MANIFEST) == {"files": files}
        content = {name: workspace.read_bytes(f"dataset/{name}") for name in files}
        assert content == {**dict.fromkeys(files, b"new"), "playlists/kept.parquet": b"old"}
        assert not workspace.exists("dataset/histories/left-over.parquet")
        assert workspace.folders("dataset/.staging") == []
