"""Histories as flat arrays: picking users and plays, Arrow and back, queries."""

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data.histories import Histories, Queries, concatenate, user_hash


@pytest.fixture
def histories() -> Histories:
    return Histories.from_lists(
        songs=[[3, 1, 2], [], [5], [4, 4]],
        played_at=[[10, 20, 30], [], [15], [5, 40]],
        user_ids=["ann", "bob", "cy", "dee"],
        contexts=[[1, 0, 3], [], [2], [0, 1]],
        skipped=[[True, False, False], [], [True], [False, True]],
    )


def field_lists(histories: Histories) -> dict[str, list[list[int]]]:
    """All fields of the histories, with one list per user."""
    fields = {"songs": histories.songs, "at": histories.played_at, "contexts": histories.contexts}
    fields["skipped"] = histories.skipped
    cuts = histories.offsets[1:-1]
    return {
        name: [] if values is None else [part.tolist() for part in np.split(values, cuts)]
        for name, values in fields.items()
    }


def test_lengths_and_rows_follow_the_offsets(histories: Histories) -> None:
    assert len(histories) == 4
    assert histories.num_plays == 6
    assert histories.lengths.tolist() == [3, 0, 1, 2]
    assert histories.rows.tolist() == [0, 0, 0, 2, 3, 3]


def test_users_are_taken_in_the_order_asked_for(histories: Histories) -> None:
    result = histories.take(np.array([3, 0, 3]))
    assert result.user_ids.tolist() == ["dee", "ann", "dee"]
    assert field_lists(result)["songs"] == [[4, 4], [3, 1, 2], [4, 4]]
    assert field_lists(result)["contexts"] == [[0, 1], [1, 0, 3], [0, 1]]
    result_by_mask = histories.take(np.array([False, False, True, True]))
    assert field_lists(result_by_mask)["skipped"] == [[True], [False, True]]


def test_keeping_plays_keeps_every_user(histories: Histories) -> None:
    result = histories.keep(histories.played_at >= 20)
    assert result.user_ids.tolist() == ["ann", "bob", "cy", "dee"]
    assert field_lists(result)["songs"] == [[1, 2], [], [], [4]]


def test_before_a_moment_users_without_plays_drop_out(histories: Histories) -> None:
    result = histories.before(15)
    assert result.user_ids.tolist() == ["ann", "dee"]
    assert field_lists(result)["songs"] == [[3], [4]]
    assert histories.before(None).user_ids.tolist() == ["ann", "cy", "dee"]


def test_last_songs_are_the_newest_oldest_first(histories: Histories) -> None:
    assert [songs.tolist() for songs in histories.last_songs(2)] == [[1, 2], [], [5], [4, 4]]


def test_arrow_gives_back_what_it_was_given_also_from_a_slice(histories: Histories) -> None:
    table = histories.to_arrow()
    assert field_lists(Histories.from_arrow(table)) == field_lists(histories)
    assert field_lists(Histories.from_arrow(table.slice(2, 2))) == field_lists(histories.take(np.array([2, 3])))
    batch = table.slice(1, 3).combine_chunks().to_batches()[0]
    assert field_lists(Histories.from_arrow(batch)) == field_lists(histories.take(np.array([1, 2, 3])))


def test_contexts_and_skips_that_are_absent_or_all_null_are_none(histories: Histories) -> None:
    table = histories.to_arrow().drop_columns(["contexts", "skipped"])
    assert Histories.from_arrow(table).contexts is None
    nulls = table.append_column("skipped", pa.nulls(4, pa.list_(pa.bool_())))
    assert Histories.from_arrow(nulls).skipped is None
    assert "contexts" not in Histories.from_arrow(table).to_arrow().column_names


def test_no_users_survive_arrow() -> None:
    empty = Histories.from_lists([], [])
    assert len(Histories.from_arrow(empty.to_arrow())) == 0
    assert len(concatenate([])) == 0


def test_parts_join_in_order(histories: Histories) -> None:
    parts = [histories.take(np.array([row])) for row in range(4)]
    assert field_lists(concatenate(parts)) == field_lists(histories)
    assert concatenate(parts).user_ids.tolist() == histories.user_ids.tolist()
    without_contexts = Histories.from_lists([[9]], [[1]])
    assert concatenate([histories, without_contexts]).contexts is None


def test_arrays_that_do_not_fit_the_offsets_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 offsets for 2 users, got 2"):
        Histories(
            user_ids=np.array(["a", "b"], dtype=object),
            offsets=np.array([0, 1]),
            songs=np.array([1]),
            played_at=np.array([1]),
        )
    with pytest.raises(ValueError, match="played_at has 1 values, expected 2, the last offset"):
        Histories.from_lists([[1, 2]], [[1]])


def test_queries_before_plays_count_what_came_before(histories: Histories) -> None:
    queries = Queries.before_plays(histories, np.array([0, 2, 3, 5]))
    assert queries.rows.tolist() == [0, 0, 2, 3]
    assert queries.plays_before.tolist() == [0, 2, 0, 1]
    assert queries.at.tolist() == [10, 30, 15, 40]


def test_queries_at_the_end_have_seen_everything(histories: Histories) -> None:
    queries = Queries.at_end(histories, 99)
    assert queries.plays_before.tolist() == [3, 0, 1, 2]
    assert queries.at.tolist() == [99] * 4
    assert Queries.at_end(histories, np.array([1, 2, 3, 4])).take(np.array([2])).at.tolist() == [3]


def test_the_hash_of_a_user_never_changes() -> None:
    """The buckets on disk depend on the hash: these numbers must stay."""
    hashes = user_hash(["ann", "bob", "Zoë"])
    assert hashes.dtype == np.uint64
    assert [int(value) % 1000 for value in hashes] == [139, 66, 193]
    assert len(set(user_hash(["ann", "bob"], salt="x").tolist()) & set(hashes.tolist())) == 0


def test_a_span_is_the_same_places_of_every_user(histories: Histories) -> None:
    assert field_lists(histories.span(1, 3)) == {
        "songs": [[1, 2], [], [], [4]],
        "at": [[20, 30], [], [], [40]],
        "contexts": [[0, 3], [], [], [1]],
        "skipped": [[False, False], [], [], [True]],
    }
    assert histories.span(7, 9).lengths.tolist() == [0, 0, 0, 0]
