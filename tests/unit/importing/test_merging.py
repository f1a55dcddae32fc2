"""The merge of one bucket."""

from typing import Any

import numpy as np
import pyarrow as pa

from rayrec.data.moments import ASSUMED_GAP_MS, LINE_GAP_MS
from rayrec.importing.merging import (
    MergedRows,
    choose_contexts,
    context_bits,
    drop_rare,
    song_counts,
    sort_rows,
    to_histories,
    to_playlists,
    to_positions,
)
from rayrec.importing.staging import ROWS
from rayrec.importing.vocabulary import SongRows


def part(
    *rows: tuple[str, int, int],
    contexts: list[list[str]] | None = None,
    skipped: list[bool | None] | None = None,
    liked: list[bool | None] | None = None,
    is_play: list[bool | None] | None = None,
) -> pa.Table:
    """A table of the rows (owner, song key, order), with lines counted from 1."""
    data = [
        pa.array([row[0] for row in rows], pa.string()),
        pa.array([row[1] for row in rows], pa.uint64()),
        pa.array([row[2] for row in rows], pa.int64()),
        pa.array(contexts or [None] * len(rows), pa.list_(pa.string())),
        *(pa.array(flags or [None] * len(rows), pa.bool_()) for flags in (skipped, liked, is_play)),
        pa.array([0] * len(rows), pa.int32()),
        pa.array(range(1, len(rows) + 1), pa.int64()),
    ]
    return pa.table(data, schema=ROWS)


def sorted_plays(parts: list[Any], *, in_lines: bool = False) -> tuple[MergedRows, int]:
    """The sorted plays of `parts`, and the number of duplicates that were merged."""
    result = sort_rows(parts, in_lines=in_lines)
    return result.plays, result.merged


SONGS = SongRows.of(np.array([10, 11, 12], dtype=np.uint64))  # keys of the songs 0, 1 and 2


def test_rows_are_sorted_by_owner_and_time_and_ties_stay_in_the_order_of_import() -> None:
    rows, merged = sorted_plays(
        [([0], [0], part(("b", 10, 5), ("a", 12, 9), ("a", 11, 3))), ([1], [0], part(("a", 10, 9), ("a", 11, 1)))]
    )
    histories = to_histories(rows, SONGS, [], has_skipped=False)
    assert merged == 0
    assert histories.user_ids.tolist() == ["a", "b"]
    assert histories.offsets.tolist() == [0, 4, 5]
    assert histories.played_at.tolist() == [1, 3, 9, 9, 5]
    assert histories.songs.tolist() == [1, 1, 2, 0, 0]
    assert histories.contexts is None
    assert histories.skipped is None


def test_exact_duplicates_merge_and_the_first_in_the_order_of_import_stays() -> None:
    same_time = part(("a", 10, 5), ("a", 11, 5), ("a", 10, 5), ("a", 10, 6), ("b", 10, 5), skipped=[True] + [False] * 4)
    rows, merged = sorted_plays([([0], [0], same_time), ([1], [0], part(("a", 11, 5)))])
    assert merged == 2
    assert [rows.owners[owner] for owner in rows.owner] == ["a", "a", "a", "b"]
    assert rows.key.tolist() == [10, 11, 10, 10]
    assert rows.source.tolist() == [0, 0, 0, 0]
    assert to_histories(rows, SONGS, [], has_skipped=True).skipped.tolist() == [True, False, False, False]


def test_lines_are_those_of_the_file() -> None:
    rows, _ = sorted_plays([([3], [0], part(("a", 10, 1))), ([3], [100], part(("a", 10, 2), ("a", 10, 3)))])
    assert rows.line.tolist() == [1, 101, 102]
    assert rows.source.tolist() == [3, 3, 3]


def test_an_empty_bucket_has_no_rows() -> None:
    rows, merged = sorted_plays([([0], [0], part())])
    assert (len(rows), merged) == (0, 0)
    assert len(to_histories(rows, SONGS, ["radio"], has_skipped=True)) == 0


def test_songs_are_counted_over_users_with_enough_plays() -> None:
    rows, _ = sorted_plays([([0], [0], part(("a", 10, 1), ("a", 11, 2), ("a", 10, 3), ("b", 12, 1)))])
    assert [values.tolist() for values in song_counts(rows, 1)] == [[10, 11, 12], [2, 1, 1]]
    assert [values.tolist() for values in song_counts(rows, 2)] == [[10, 11], [2, 1]]


def test_rare_users_and_songs_are_dropped_with_reason_source_and_line() -> None:
    rows, _ = sorted_plays(
        [([0], [0], part(("a", 10, 1), ("a", 11, 2), ("b", 10, 1), ("c", 10, 4), ("c", 99, 5), ("a", 99, 7)))]
    )
    kept_rows, dropped_rows = drop_rare(rows, SONGS, 2, ("user", "song"))
    assert [kept_rows.owners[owner] for owner in kept_rows.owner] == ["a", "a"]
    # b has one play; song 99 is not in the vocabulary; without song 99, c has one play too.
    assert dropped_rows.counts() == {"user": 2, "song": 2}
    assert [
        (row["source"], row["line"], row["reason"], row["text"]) for row in dropped_rows.table(["f"]).to_pylist()
    ] == [
        ("f", 3, "user", "b 1"),
        ("f", 6, "song", "a 7"),
        ("f", 5, "song", "c 5"),
        ("f", 4, "user", "c 4"),
    ]
    assert to_histories(kept_rows, SONGS, [], has_skipped=False).user_ids.tolist() == ["a"]


def test_contexts_become_bits_and_unknown_ones_none() -> None:
    names = pa.array([["radio"], ["search", "radio"], [], None, ["other", "search"], ["radio", "radio"]])
    assert context_bits(names, ["radio", "search"]).tolist() == [1, 3, 0, 0, 2, 1]
    assert context_bits(names.slice(1, 2), ["radio", "search"]).tolist() == [3, 0]
    assert context_bits(pa.array([["c30"]]), [f"c{bit}" for bit in range(31)]).tolist() == [1 << 30]


def test_contexts_follow_their_plays_through_sorting() -> None:
    rows, _ = sorted_plays([([0], [0], part(("a", 10, 2), ("a", 11, 1), contexts=[["x"], ["y"]]))])
    assert to_histories(rows, SONGS, ["x", "y"], has_skipped=False).contexts.tolist() == [2, 1]


def test_the_most_frequent_contexts_get_the_bits() -> None:
    counts = {f"c{number:02d}": number for number in range(40)}
    assert choose_contexts(counts) == [f"c{number:02d}" for number in range(39, 8, -1)]
    assert choose_contexts({"b": 1, "a": 1}) == ["a", "b"]


def test_playlists_run_in_the_order_of_positions() -> None:
    rows, merged = sorted_plays(
        [([0], [0], part(("p", 12, 1), ("p", 10, 0), ("q", 11, 7), ("p", 10, 2), ("p", 12, 1)))]
    )
    assert merged == 1
    assert to_playlists(rows, SONGS).to_pylist() == [
        {"playlist_id": "p", "songs": [0, 2, 0]},
        {"playlist_id": "q", "songs": [1]},
    ]


def line(number: int, owner: str, *keys: int) -> pa.Table:
    """The rows of one line of a file of sequences, with the line number `number`."""
    rows = part(*((owner, key, position) for position, key in enumerate(keys)))
    lines = pa.array([number] * len(keys), pa.int64())
    return rows.set_column(rows.schema.get_field_index("line"), ROWS.field("line"), lines)


def test_lines_of_an_owner_follow_each_other_across_files_and_repeats_stay() -> None:
    parts = [
        ([0], [0], line(1, "a", 10, 10)),
        ([0], [0], line(2, "b", 11)),
        ([0], [2], line(1, "a", 11, 10)),
        ([1], [0], line(1, "a", 12)),
    ]
    rows, merged = sorted_plays(parts, in_lines=True)
    histories = to_histories(to_positions(rows), SONGS, [], has_skipped=False)
    assert merged == 0
    assert histories.user_ids.tolist() == ["a", "b"]
    assert histories.songs.tolist() == [0, 0, 1, 0, 2, 1]
    gaps = [ASSUMED_GAP_MS, LINE_GAP_MS, ASSUMED_GAP_MS, LINE_GAP_MS]
    assert histories.played_at.tolist() == [0, *np.cumsum(gaps).tolist(), 0]


def test_positions_leave_no_hole_where_songs_were_left_out() -> None:
    rows, _ = sorted_plays([([0], [0], line(1, "a", *[10, *[99] * 20, 11]))], in_lines=True)
    kept_rows, _ = drop_rare(rows, SONGS, 1, ("few plays", "rare"))
    assert to_positions(kept_rows).order.tolist() == [0, ASSUMED_GAP_MS]
    assert len(to_positions(sorted_plays([], in_lines=True)[0])) == 0


def test_a_session_gap_falls_between_lines_and_never_within_one() -> None:
    half_an_hour = 30 * 60_000
    assert ASSUMED_GAP_MS < half_an_hour < LINE_GAP_MS
