"""Import settings, the plan of units, fragments and the workers, without a cluster."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.config import from_mapping
from rayrec.data.dataset import bucket_of
from rayrec.data.histories import Histories
from rayrec.errors import InputError
from rayrec.importing import import_plan, staging, vocabulary
from rayrec.importing.import_plan import ImportConfig, bucket_groups, choose_buckets, plan_import
from rayrec.importing.merging import PieceImporter, SongRange
from rayrec.importing.readers.reader import Unit
from rayrec.importing.staging import Staging, finish_publishing
from rayrec.importing.vocabulary import Vocabulary, song_keys
from rayrec.jobs.job_config import FitConfig, UpdateConfig
from rayrec.storage.artifacts import DatasetManifest, read_dataset_manifest, write_dataset_manifest
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace

MIB = 1 << 20


def write_plays(path: Path, rows: int = 50) -> Path:
    lines = [f"u{row % 7},s{row % 11},{1421163674 + row}" for row in range(rows)]
    path.write_text("user,song,played_at\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "xml"}, "unknown format 'xml'; expected one of apple-music, csv"),
        ({"paths": ()}, r"paths is \[\]; expected a non-empty list of strings"),
        ({"kind": "songs"}, "kind is 'songs'"),
        ({"format": "lastfm-1k", "columns": {"user": "u"}}, "has fixed columns"),
        ({"format": "lastfm-1k", "kind": "playlists"}, "contains plays, not playlists"),
        ({"columns": {"time": "ts"}}, "unknown column role 'time'; expected one of user, song, played_at"),
        ({"kind": "playlists", "columns": {"user": "u"}}, "expected one of playlist, position, song"),
        ({"min_user_plays": 0}, "min_user_plays is 0"),
        ({"min_song_plays": -1}, "min_song_plays is -1"),
        ({"buckets": 5000}, "buckets is 5000"),
        ({"unit_mib": 0.0}, "unit_mib is 0.0"),
        ({"delimiter": ";;"}, "delimiter is ';;'; expected one character"),
        ({"format": "sequences", "song_separator": ""}, "song_separator is ''; expected a non-empty string"),
        *(
            ({"format": name, "user": "ann"}, f"format {name} names its users; omit --user")
            for name in ("lastfm-1k", "music4all-onion", "yambda")
        ),
        ({"format": "mpd", "user": "ann"}, "playlists have no users; omit --user"),
        ({"kind": "playlists", "user": "ann"}, "playlists have no users; omit --user"),
        ({"format": "sequences", "user": "ann", "user_separator": ","}, "omit --user or --user-separator"),
        ({"user": "nan"}, "user is 'nan'; not a user ID; expected text other than spaces"),
        ({"user": "  "}, "user is '  '; not a user ID"),
        ({"user": "x" * 513}, "expected at most 512 characters"),
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


def test_the_user_of_the_settings_is_spelled_as_in_files() -> None:
    users = {"": "", " ann ": "ann", " 7.0 ": "7", "x" * 512 + " ": "x" * 512}
    for given_user, expected in users.items():
        assert ImportConfig(format="csv", paths=("a",), user=given_user).user == expected
        assert FitConfig(paths=("a",), user=given_user).user == expected
        assert UpdateConfig(paths=("a",), user=given_user).user == expected
    assert FitConfig(paths=("a",)).user is None
    for config_type in (FitConfig, UpdateConfig):
        with pytest.raises(InputError, match="user is 'nan'; not a user ID"):
            config_type(paths=("a",), user="nan")


def test_there_is_a_bucket_for_every_64_mib_within_16_and_4096() -> None:
    assert [choose_buckets(size * MIB) for size in (0, 1, 1024, 1025, 6400, 10**7)] == [16, 16, 16, 17, 100, 4096]


def test_a_plan_cuts_files_in_order_and_knows_the_lines_before_each_unit(tmp_path: Path) -> None:
    write_plays(tmp_path / "b.csv")
    write_plays(tmp_path / "a.csv", rows=5)
    plan = plan_import(ImportConfig(format="csv", paths=(str(tmp_path),), unit_mib=500 / MIB))
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
    first_id = plan_import(config).id
    assert plan_import(config).id == first_id
    assert plan_import(ImportConfig(format="csv", paths=(str(file),), min_user_plays=2)).id != first_id
    write_plays(file, rows=51)
    assert plan_import(config).id != first_id


def test_a_missing_column_is_found_before_any_work(tmp_path: Path) -> None:
    file = write_plays(tmp_path / "a.csv")
    with pytest.raises(InputError, match="no column 'ts' for played_at; it has user, song, played_at"):
        plan_import(ImportConfig(format="csv", paths=(str(file),), columns={"played_at": "ts"}))


def test_files_of_one_name_are_refused_where_users_are_named_by_file(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "day.txt").write_text("u:1 2\n")
    paths = (str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(InputError, match=r"two files are named day.txt.*rename one"):
        plan_import(ImportConfig(format="sequences", paths=paths))
    assert len(plan_import(ImportConfig(format="sequences", paths=paths, user_separator=":")).files) == 2


def test_a_unit_holds_a_bounded_number_of_context_names_the_most_frequent(workspace: Workspace, tmp_path: Path) -> None:
    names = [f"session{row}" if row % 2 else f"c{row % 10}" for row in range(100_000)]
    lines = [f"u,s,{1421163674 + row},{name}" for row, name in enumerate(names)]
    (tmp_path / "p.csv").write_text("\n".join(["user,song,played_at,contexts", *lines]) + "\n")
    _, result = importer(workspace, [tmp_path / "p.csv"])(0)
    (unit,) = result.units
    assert len(unit.contexts) == staging.CONTEXTS_PER_UNIT
    assert {name: count for name, count in unit.contexts.items() if count > 1} == {
        f"c{digit}": 10_000 for digit in range(0, 10, 2)
    }


def importer(workspace: Workspace, paths: list[Path], *, buckets: int = 4, **settings: Any) -> PieceImporter:
    """A worker with a single piece that holds all of `paths`, one unit per file."""
    config = ImportConfig(format="csv", paths=tuple(map(str, paths)), **settings)
    units = [Unit(source=str(path), stop=path.stat().st_size if path.exists() else 10) for path in paths]
    return PieceImporter(Staging(workspace, "x", ["0004-u"]), config, units, [list(range(len(units)))], buckets)


@pytest.mark.parametrize("rows_per_chunk", [1, 1 << 20])
@pytest.mark.parametrize("group", [(0, 3), (1, 2)])
def test_fragments_hold_every_row_in_the_bucket_of_its_user(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows_per_chunk: int,
    group: tuple[int, int],
) -> None:
    monkeypatch.setattr(staging, "ROWS_PER_CHUNK", rows_per_chunk)
    paths = [write_plays(tmp_path / "a.csv"), write_plays(tmp_path / "b.csv", rows=20)]
    worker = importer(workspace, paths, min_user_plays=2)
    _, result = worker(0)
    stored_result = worker.store.result(0)
    assert stored_result.units == result.units
    assert [(unit.read, unit.usable, unit.lines, unit.error) for unit in result.units] == [
        (50, 50, 51, ""),
        (20, 20, 21, ""),
    ]
    np.testing.assert_array_equal(stored_result.rows, result.rows)
    actual = []
    with (tmp_path / "spool").open("w+b") as spool:
        rows = worker.store.read_group(result.rows[None], *group, spool)
        for bucket in range(group[0], group[1] + 1):
            for piece, table in rows.read(bucket):
                assert piece == 0
                assert (bucket_of(table.column("owner").to_numpy(), 4) == bucket).all()
                names = ("unit", "line", "owner", "order", "key")
                actual += list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    keys = song_keys(pa.array([f"s{row % 11}" for row in range(50)])).tolist()
    expected = [
        (unit, row + 2, f"u{row % 7}", (1421163674 + row) * 1000, keys[row])
        for unit, count in enumerate((50, 20))
        for row in range(count)
        if group[0] <= bucket_of(np.array([f"u{row % 7}"], dtype=object), 4)[0] <= group[1]
    ]
    assert sorted(actual) == sorted(expected)


def test_line_numbers_are_stored_only_where_they_are_needed(workspace: Workspace, tmp_path: Path) -> None:
    worker = importer(workspace, [write_plays(tmp_path / "a.csv")])
    _, result = worker(0)
    with (tmp_path / "spool").open("w+b") as spool:
        rows = worker.store.read_group(result.rows[None], 0, 3, spool)
        tables = [table for bucket in range(4) for _, table in rows.read(bucket)]
    assert sum(table.num_rows for table in tables) == 50
    assert sum(table.column("line").null_count for table in tables) == 50


def test_songs_are_merged_in_the_order_of_import_whatever_the_ranges_of_keys(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "ROWS_PER_CHUNK", 7)
    for ranges in (1, 5):
        for module in (staging, vocabulary):
            monkeypatch.setattr(module, "key_ranges", lambda buckets, ranges=ranges: ranges)
        worker = importer(workspace, [write_plays(tmp_path / "a.csv"), write_plays(tmp_path / "b.csv", rows=90)])
        _, result = worker(0)
        merge = SongRange(
            Staging(workspace, "x", ["0004-u"]), ImportConfig(format="csv", paths=("a",)), result.songs[None]
        )
        tables = [workspace.read_table(merge.staging.songs_file(merge(number))) for number in range(ranges)]
        assert Vocabulary(None, tables).table().column("song_id").to_pylist() == [f"s{row}" for row in range(11)]


def test_an_input_error_within_a_worker_is_noted_for_the_caller(workspace: Workspace, tmp_path: Path) -> None:
    worker = importer(workspace, [tmp_path / "gone.csv"])
    _, result = worker(0)
    assert "cannot be opened" in result.units[0].error
    assert worker.store.pieces_done() == set()  # the next import reads the piece again


def test_many_units_are_few_pieces_and_few_pieces_are_read_bucket_by_bucket() -> None:
    assert import_plan.group_units([1.0, 5.0, 1.0]) == [[0], [1], [2]]
    pieces = import_plan.group_units([1.0] * 10_000)
    assert len(pieces) == import_plan.MAX_PIECES
    assert [unit for piece in pieces for unit in piece] == list(range(10_000))
    assert max(map(len, pieces)) <= 20
    assert bucket_groups(20, 16) == [(bucket, bucket) for bucket in range(16)]
    groups = bucket_groups(import_plan.MAX_PIECES, 4096)
    assert [bucket for first, last in groups for bucket in range(first, last + 1)] == list(range(4096))
    assert len(groups) * import_plan.MAX_PIECES <= import_plan.MAX_READS


def test_histories_are_written_in_bounded_row_groups(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PLAYS_PER_ROW_GROUP", 10)
    histories = Histories.from_lists([[1] * 4] * 9 + [[2] * 25], [range(4)] * 9 + [range(25)])
    staging.write_histories(workspace, "h.parquet", [histories])
    with workspace.open_input("h.parquet") as stream:
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

    manifest = DatasetManifest(id="new", source="", buckets=1, parts=1, users=0, plays=0, songs=0, files=files)

    def stage_dataset() -> None:
        for name in files:
            workspace.write_bytes(f"dataset/{name}", b"old")
        workspace.write_bytes("dataset/histories/left-over.parquet", b"old")
        write_dataset_manifest(workspace, replace(manifest, id="old", files={}))
        new_staging = Staging(workspace, "x")
        for name in list(files)[:3]:
            workspace.write_bytes(new_staging.out(f"dataset/{name}"), b"new")
        workspace.write_json(new_staging.out(DATASET_MANIFEST), asdict(manifest))

    move, remaining_moves = Workspace.move, 0

    def failing_move(self: Workspace, source: str, target: str) -> None:
        nonlocal remaining_moves
        if remaining_moves == 0:
            raise KeyboardInterrupt
        remaining_moves -= 1
        move(self, source, target)

    for moves in range(4):
        stage_dataset()
        remaining_moves = moves
        monkeypatch.setattr(Workspace, "move", failing_move)
        with pytest.raises(KeyboardInterrupt):
            finish_publishing(workspace)
        assert not workspace.exists(DATASET_MANIFEST)  # a half-published data set has no manifest
        monkeypatch.setattr(Workspace, "move", move)
        finish_publishing(workspace)
        assert read_dataset_manifest(workspace) == manifest
        content = {name: workspace.read_bytes(f"dataset/{name}") for name in files}
        assert content == {**dict.fromkeys(files, b"new"), "playlists/kept.parquet": b"old"}
        assert not workspace.exists("dataset/histories/left-over.parquet")
        assert workspace.folders("dataset/.staging") == []
