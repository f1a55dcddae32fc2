"""ListenBrainz dumps."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.data import columns
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers import FORMATS, listenbrainz
from rayrec.importing.readers.reader import Batch, ReadOptions


def listen(**changes: Any) -> dict[str, Any]:
    """A line of a dump, as ListenBrainz writes it."""
    return {
        "listened_at": 1421163674,
        "user_id": 17,
        "user_name": "ann",
        "recording_msid": "msid-1",
        "track_metadata": {
            "artist_name": "Björk",
            "track_name": "Jóga",
            "release_name": "Homogenic",
            "additional_info": {"recording_mbid": "said-1", "music_service": "spotify.com"},
            "mbid_mapping": {"recording_mbid": "mapped-1", "artist_mbids": ["x"]},
        },
        **changes,
    }


def read(path: Path, lines: list[Any], user: str = "") -> list[Batch]:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    reader = FORMATS["listenbrainz"].make(ReadOptions(user=user))
    return [batch for unit in reader.plan(str(path), path.stat().st_size, 1 << 20) for batch in reader.read(unit)]


def test_a_listen_becomes_a_play(tmp_path: Path) -> None:
    (batch,) = read(tmp_path / "1.listens", [listen()])
    assert batch.rows.schema == columns.PLAYS
    row = batch.rows.to_pylist()[0]
    assert (row["user_id"], row["song_id"], row["played_at"]) == ("ann", "mapped-1", 1421163674000)
    assert (row["title"], row["artist"], row["line"]) == ("Jóga", "Björk", 1)


def test_the_song_is_the_best_id_that_a_listen_has(tmp_path: Path) -> None:
    names = {"artist_name": "Björk", "track_name": "Jóga"}
    lines = [
        listen(track_metadata={**names, "additional_info": {"recording_mbid": "said-1"}, "mbid_mapping": None}),
        listen(track_metadata=names),
        listen(track_metadata=names, recording_msid=None),
        listen(track_metadata={**names, "additional_info": {"recording_msid": "msid-2"}}, recording_msid=None),
    ]
    (batch,) = read(tmp_path / "1.listens", lines)
    assert batch.rows.column("song_id").to_pylist() == ["said-1", "msid-1", "Björk – Jóga", "msid-2"]


def test_bad_lines_are_rejected_with_their_numbers(tmp_path: Path) -> None:
    lines = [
        listen(),
        "{not json",
        "",
        {"user_name": "ann", "listened_at": 1},
        listen(listened_at=None),
        listen(user_name=None, user_id=None),
        listen(track_metadata={}, recording_msid=""),
        "[1, 2]",
        listen(),
    ]
    (batch,) = read(tmp_path / "1.listens", lines)
    assert batch.rows.column("line").to_pylist() == [1, 9]
    assert [(row["line"], row["reason"]) for row in batch.rejected.to_pylist()] == [
        (2, "not JSON"),
        (4, listenbrainz.NOT_A_LISTEN),
        (5, "no time"),
        (6, "no user"),
        (7, "no song"),
        (8, listenbrainz.NOT_A_LISTEN),
    ]
    assert batch.rejected.column("text")[0].as_py() == "{not json"
    assert (batch.read, batch.lines) == (8, 9)


def test_half_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    metadata = r'{"artist_name": "\ud83d", "track_name": "t"}'
    line = f'{{"user_name": "ann", "listened_at": 1421163674, "track_metadata": {metadata}}}'
    (batch,) = read(tmp_path / "1.listens", [line])
    assert batch.rows.column("artist").to_pylist() == ["?"]


def test_the_user_setting_names_whose_export_it_is(tmp_path: Path) -> None:
    (batch,) = read(tmp_path / "export.jsonl", [listen(user_name=None, user_id=None)], user="me")
    assert batch.rows.column("user_id").to_pylist() == ["me"]


def read_text(path: Path, text: str) -> list[Batch]:
    path.write_text(text, encoding="utf-8")
    reader = FORMATS["listenbrainz"].make(ReadOptions())
    return [batch for unit in reader.plan(str(path), path.stat().st_size, 500) for batch in reader.read(unit)]


@pytest.mark.parametrize("form", ["one line", "a listen a line", "indented", "API", "API on a line", "lines", "BOM"])
def test_every_form_of_an_export_gives_all_its_listens(tmp_path: Path, form: str) -> None:
    listens = [listen(listened_at=1421163674 + row) for row in range(50)]
    response = {"payload": {"count": 50, "listens": listens}}
    text = {
        "one line": json.dumps(listens),
        "a listen a line": "[\n" + ",\n".join(map(json.dumps, listens)) + "\n]\n",
        "indented": json.dumps(listens, indent=2),
        "API": json.dumps(response, indent=2),
        "API on a line": json.dumps(response),
        "lines": "\n".join(map(json.dumps, listens)),
        "BOM": "\ufeff" + json.dumps(listens),
    }[form]
    batches = read_text(tmp_path / "ann.json", text)
    assert sum(batch.rows.num_rows for batch in batches) == 50
    assert sum(batch.rejected.num_rows for batch in batches) == 0


def test_a_list_that_is_cut_off_is_an_error_that_names_it(tmp_path: Path) -> None:
    text = json.dumps([listen(), listen()])
    for end in (1, 100, len(text) - 1):
        with pytest.raises(DamagedInputError, match=r"ann\.json cannot be read completely"):
            read_text(tmp_path / "ann.json", text[:end])
    with pytest.raises(DamagedInputError, match="is empty"):
        read_text(tmp_path / "ann.json", "")


def test_a_user_setting_wins_and_never_merges_two_users(tmp_path: Path) -> None:
    (batch,) = read(tmp_path / "a.jsonl", [listen(), listen(user_name=None, user_id=None)], user="me")
    assert batch.rows.column("user_id").to_pylist() == ["me", "me"]
    with pytest.raises(InputError, match="several users, such as ann and bob"):
        read(tmp_path / "a.jsonl", [listen(), listen(user_name="bob")], user="me")


def write_export(folder: Path, name: str | None = "ann") -> list[str]:
    """Write the files of an export as ListenBrainz packs it, without user.json if `name` is None; return paths."""
    listens = [listen(listened_at=1704067200.0 + row, inserted_at=1704067300.0) for row in range(3)]
    for entry in listens:
        entry["track_metadata"]["recording_msid"] = entry.pop("recording_msid")
        del entry["user_id"], entry["user_name"]
    listens[2]["track_metadata"] |= {"additional_info": {}, "mbid_mapping": None}
    feedback = [{"recording_msid": "msid-1", "recording_mbid": None, "score": 1, "created": 1704067200}] * 9
    files = {"listens/2024/1.jsonl": listens, "listens/2024/12.jsonl": listens[:1], "feedback.jsonl": feedback}
    if name is not None:
        files["user.json"] = [{"user_id": 17, "username": name}]
    for path, records in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(folder / path) for path in files]


def plays_of(files: list[str], user: str = "") -> tuple[list[Any], set[str]]:
    """User and song of each play, and the reasons of rejected rows."""
    reader = FORMATS["listenbrainz"].make(ReadOptions(user=user))
    batches = [
        file_batch for file in files for unit in reader.plan(file, 1 << 20, 1 << 20) for file_batch in reader.read(unit)
    ]
    rows = [(row["user_id"], row["song_id"]) for batch in batches for row in batch.rows.to_pylist()]
    return rows, {row["reason"] for batch in batches for row in batch.rejected.to_pylist()}


@pytest.mark.parametrize(("name", "user"), [("Ann B.", "Ann B."), (None, "listenbrainz_ann_1")])
def test_an_export_belongs_to_the_user_of_its_user_file_or_folder_and_feedback_is_no_listen(
    tmp_path: Path, name: str | None, user: str
) -> None:
    files = write_export(tmp_path / "listenbrainz_ann_1", name)
    songs = ["mapped-1", "mapped-1", "msid-1", "mapped-1"]
    assert plays_of(files) == ([(user, song) for song in songs], {listenbrainz.NOT_A_LISTEN_FILE})
    assert plays_of(files, "me")[0] == [("me", song) for song in songs]
    assert listenbrainz.NOT_A_LISTEN_FILE in FORMATS["listenbrainz"].not_plays
    check = FORMATS["listenbrainz"].check_users
    assert check is not None
    assert [user in note for note in check(files, "")] == ([] if name else [True])


def test_exports_that_would_be_one_user_are_refused_and_a_dump_is_of_the_users_that_it_names(tmp_path: Path) -> None:
    check = FORMATS["listenbrainz"].check_users
    assert check is not None
    files = [file for folder in "xy" for file in write_export(tmp_path / folder / "export", None)]
    with pytest.raises(InputError, match="would both be imported as user 'export'"):
        check(files, "")
    dump = tmp_path / "listens" / "2024" / "1.listens"
    dump.parent.mkdir(parents=True)
    read(dump, [listen(), listen(user_name="bob"), listen(user_name=None, user_id=None)])
    assert check([str(dump)], "") == []
    assert plays_of([str(dump)]) == ([("ann", "mapped-1"), ("bob", "mapped-1")], {"no user"})
