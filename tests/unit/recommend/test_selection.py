"""Settings are chosen on the validation range, and trial fits see none of its plays."""

from collections.abc import Iterator

import numpy as np
import pytest
from worlds import random_histories, random_vectors, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.recommend import baselines
from rayrec.recommend.baselines import Selection, make_selection
from rayrec.storage.workspace import Workspace

NUM_SONGS = 30
SPLIT = Split(id="s", dataset="by-hand", validation_from=1_500_000, test_from=2_500_000)


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    return write_dataset(workspace, random_histories(80, NUM_SONGS, longest=60, seed=2), NUM_SONGS)


def _selection(dataset: Dataset) -> Selection:
    selection = make_selection(dataset, SPLIT, random_vectors(NUM_SONGS))
    assert selection is not None
    return selection


def _all_times(dataset: Dataset) -> Iterator[int]:
    for batch in dataset.read_all():
        yield from batch.played_at.tolist()


def test_a_selection_is_all_of_the_validation_range_and_nothing_after_it(dataset: Dataset) -> None:
    selection = _selection(dataset)
    times = selection.histories.played_at
    assert times.max() < SPLIT.test_from  # type: ignore[operator]
    expected = sorted(time for time in _all_times(dataset) if 1_500_000 <= time < 2_500_000)
    assert sorted(times[selection.plays].tolist()) == expected
    assert all((batch.played_at < 1_500_000).all() for batch in selection.batches())


def test_a_selection_holds_whole_buckets_though_their_users_are_read_in_batches(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "SELECTION_PLAYS", 10)
    users = 6_000
    histories = Histories.from_lists(
        [[0, 1]] * users, [[0, 2_000_000]] * users, [f"user-{user:04}" for user in range(users)]
    )
    dataset = write_dataset(workspace, histories, NUM_SONGS, buckets=1)
    assert len(list(dataset.read_bucket(0))) > 1
    selection = make_selection(dataset, SPLIT, None)
    assert selection is not None
    assert len(selection.plays) == users


def test_queries_lie_the_drawn_number_of_plays_before_their_answers(dataset: Dataset) -> None:
    selection = _selection(dataset)
    queries, targets = selection.ahead(3, 5)
    histories = selection.histories
    for row, plays_before, at, song in zip(queries.rows, queries.plays_before, queries.at, targets, strict=True):
        user_plays = slice(histories.offsets[row], histories.offsets[row + 1])
        songs, positions = histories.songs[user_plays], np.flatnonzero(histories.played_at[user_plays] == at)
        assert any(3 <= position - plays_before + 1 <= 5 and songs[position] == song for position in positions)
    assert len(queries) > 100


def test_there_is_no_selection_without_validation_plays(dataset: Dataset) -> None:
    late_split = Split(id="s", dataset="by-hand", validation_from=10**12, test_from=10**12 + 1)
    assert make_selection(dataset, late_split, random_vectors(NUM_SONGS)) is None
