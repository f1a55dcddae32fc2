"""The listens of Music4All-Onion."""

import bz2
from pathlib import Path

from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import ReadOptions, find_files

LINES = b"user_id\ttrack_id\ttimestamp\n11\tUHgY1m\t2013-01-27 21:42:38\n12\tUHgY1m\t2013-01-27 21:42\n12\t\t\n"


def test_listens_are_plays_in_utc_packed_or_not(tmp_path: Path) -> None:
    for name, content in {"userid_trackid_timestamp.tsv.bz2": bz2.compress(LINES), "plain.tsv": LINES}.items():
        path = tmp_path / name
        path.write_bytes(content)
        reader = FORMATS["music4all-onion"].make(ReadOptions())
        (unit,) = reader.plan(str(path), len(content), 1 << 20)
        (batch,) = reader.read(unit)
        rows = [(row["user_id"], row["song_id"], row["played_at"]) for row in batch.rows.to_pylist()]
        assert rows == [("11", "UHgY1m", 1359322958000), ("12", "UHgY1m", 1359322920000)]
        assert batch.rejected.column("reason").to_pylist() == ["no song"]
    files = find_files([str(tmp_path)], FORMATS["music4all-onion"].patterns)
    assert [Path(file.source).name for file in files] == ["userid_trackid_timestamp.tsv.bz2"]
