"""Settings are chosen on the validation range, and trial fits see none of its plays."""

from collections.abc import Iterator

import numpy as np
import pytest
from worlds import random_histories, random_vectors, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.recommend.baselines import Selection, make_selection
from rayrec.storage.workspace import Workspace

NUM_SONGS = 30
SPLIT = Split(id="s", dataset="by-hand", validation_from=1_500_000, test_from=2_500_000)


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    return write_dataset(workspace, random_histories(80, NUM_SONGS, longest=60, seed=2), NUM_SONGS)


def _made(dataset: Dataset, limit: int = 10_000) -> Selection:
    selection = make_selection(dataset, SPLIT, random_vectors(NUM_SONGS), limit)
    assert selection is not None
    return selection


def _all_plays(dataset: Dataset) -> Iterator[int]:
    for batch in dataset.read_all():
        yield from batch.played_at.tolist()


def test_a_selection_is_all_of_the_validation_range_and_nothing_after_it(dataset: Dataset) -> None:
    selection = _made(dataset)
    times = selection.histories.played_at
    assert times.max() < SPLIT.test_from  # type: ignore[operator]
    wanted = sorted(time for time in _all_plays(dataset) if 1_500_000 <= time < 2_500_000)
    assert sorted(times[selection.plays].tolist()) == wanted
    assert all((batch.played_at < 1_500_000).all() for batch in selection.batches())


def test_queries_lie_the_drawn_number_of_plays_before_their_answers(dataset: Dataset) -> None:
    selection = _made(dataset)
    queries, targets = selection.ahead(3, 5)
    histories = selection.histories
    for row, seen, at, song in zip(queries.rows, queries.seen, queries.at, targets, strict=True):
        user = slice(histories.offsets[row], histories.offsets[row + 1])
        ahead = [place - seen + 1 for place in np.flatnonzero(histories.played_at[user] == at)]
        assert any(3 <= one <= 5 and histories.songs[user][seen + one - 1] == song for one in ahead)
    assert len(queries) > 100


def test_there_is_no_selection_without_validation_plays(dataset: Dataset) -> None:
    late = Split(id="s", dataset="by-hand", validation_from=10**12, test_from=10**12 + 1)
    assert make_selection(dataset, late, random_vectors(NUM_SONGS)) is None
