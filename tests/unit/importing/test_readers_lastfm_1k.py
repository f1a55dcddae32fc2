"""The Last.fm-1k table."""

from pathlib import Path

from rayrec.data import columns
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions

SAMPLE = (
    "user_000001\t2009-05-04T23:08:57Z\tf1b1cf71-bd35-4e99-8624-24a6e15f133a\tDeep Dish\t\tGeorge Is On\n"
    "user_000001\t2009-05-04T13:54:10Z\ta7f7df4a-77d8-4f12-8acd-5c60c93f4de8\t坂本龍一\t"
    "f5ae1a2e-aa6e-4ea1-8d5e-2e2e3f0a1b11\tComposition 0919 (Live_2009_4_15)\n"
    'user_000002\t2006-08-19T08:31:10Z\tx\t"Weird Al" Yankovic\t\t12" mix\n'
    "user_000002\t\tx\tArtist\ttrack-1\tNo time\n"
    "user_000002\t2006-08-19T08:31:10Z\tx\tArtist\t\t\n"
    "user_000002\t2006-08-19T08:31:10Z\tonly four\tvalues\n"
)


def read(path: Path, text: str = SAMPLE) -> Batch:
    path.write_text(text, encoding="utf-8")
    reader = FORMATS["lastfm-1k"].make(ReadOptions())
    (unit,) = reader.plan(str(path), path.stat().st_size, 1 << 20)
    (batch,) = reader.read(unit)
    return batch


def test_listens_are_read_with_their_names(tmp_path: Path) -> None:
    rows = read(tmp_path / "userid-timestamp.tsv").rows
    assert rows.schema == columns.PLAYS
    second = rows.slice(1, 1).to_pylist()[0]
    assert (second["user_id"], second["song_id"]) == ("user_000001", "f5ae1a2e-aa6e-4ea1-8d5e-2e2e3f0a1b11")
    assert (second["artist"], second["title"]) == ("坂本龍一", "Composition 0919 (Live_2009_4_15)")
    assert second["played_at"] == 1241445250000
    assert second["line"] == 2


def test_a_track_without_an_id_is_known_by_its_names_and_quotes_are_letters(tmp_path: Path) -> None:
    song_ids = read(tmp_path / "userid-timestamp.tsv").rows.column("song_id").to_pylist()
    assert song_ids[0] == "Deep Dish – George Is On"
    assert song_ids[2] == '"Weird Al" Yankovic – 12" mix'


def test_bad_lines_are_rejected_with_a_reason(tmp_path: Path) -> None:
    batch = read(tmp_path / "userid-timestamp.tsv")
    assert batch.read == 6
    assert [(row["line"], row["reason"]) for row in batch.rejected.to_pylist()] == [
        (4, "no time"),
        (5, "no song"),
        (6, "4 values, but the file has 6 columns"),
    ]
