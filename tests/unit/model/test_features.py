"""Features against values worked out by hand."""

from datetime import datetime, timezone

import numpy as np
import pytest
import torch

from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER
from rayrec.model.network import LONGEST_GAP_S, encode, gap_seconds, pad, scale_gap
from rayrec.model.train_config import FeatureSpec

EVERYTHING = FeatureSpec(contexts=("album", "search", "radio"), hour=True, weekday=True, skipped=True)


def to_ms(text: str) -> int:
    """A moment in UTC as ms."""
    return int(datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp() * 1000)


@pytest.fixture
def plays() -> Histories:
    """Two rows; the second is shorter."""
    return Histories.from_lists(
        songs=[[4, 5, 6], [7]],
        played_at=[
            [to_ms("2024-01-01 00:00"), to_ms("2024-01-01 01:00"), to_ms("2024-01-07 23:59")],
            [to_ms("2024-02-29 12:30")],
        ],
        contexts=[[0b001, 0b110, 0b1000], [0b010]],
        skipped=[[False, True, False], [True]],
    )


def feature_parts(plays: Histories, spec: FeatureSpec, previous: int = NEVER) -> list[np.ndarray]:
    batch = pad(plays, np.full(len(plays), previous), spec)
    return [values.numpy() for values in encode(batch, spec)]


def test_gaps_are_scaled_by_their_logarithm() -> None:
    scaled = scale_gap(np.array([0.0, 59.0, LONGEST_GAP_S, LONGEST_GAP_S * 9, -5.0]))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [0, np.log(60) / np.log(2_592_001), 1, 1, 0], rtol=1e-6)


def test_no_previous_play_counts_as_the_longest_gap() -> None:
    seconds = gap_seconds(np.array([NEVER, 1_000, 5_000]), np.array([7_000, 7_000, 4_000]))
    np.testing.assert_array_equal(seconds, [LONGEST_GAP_S, 6.0, -1.0])


def test_a_row_begins_with_the_gap_to_the_play_before_it(plays: Histories) -> None:
    previous_at = np.array([plays.played_at[0] - 60_000, NEVER])
    gap = pad(plays, previous_at, FeatureSpec()).gap_BL.numpy()
    expected = scale_gap(np.array([60.0, 3600.0, (6 * 24 + 22) * 3600 + 59 * 60]))
    np.testing.assert_array_equal(gap, [expected, [1.0, 0.0, 0.0]])


def test_rows_are_padded_on_the_right(plays: Histories) -> None:
    batch = pad(plays, np.full(2, NEVER), EVERYTHING)
    assert batch.songs_BL.tolist() == [[4, 5, 6], [7, 0, 0]]
    assert batch.length_B.tolist() == [3, 1]
    assert batch.contexts_BL is not None
    assert batch.contexts_BL[1].tolist() == [0b010, 0, 0]
    assert batch.skipped_BL is not None
    assert batch.skipped_BL.tolist() == [[False, True, False], [True, False, False]]


def test_rows_without_plays_are_all_padding(plays: Histories) -> None:
    first_row_empty = plays.keep(np.array([False, False, False, True]))
    batch = pad(first_row_empty, np.array([NEVER, plays.played_at[3] - 1_000]), FeatureSpec())
    assert batch.songs_BL.tolist() == [[0], [7]]
    np.testing.assert_allclose(batch.gap_BL.numpy(), [[0], scale_gap(np.array([1.0]))])
    empty_batch = pad(Histories.from_lists([], []), np.zeros(0, np.int64), EVERYTHING)
    assert empty_batch.songs_BL.shape == (0, 1)


def test_contexts_are_multi_hot_and_unknown_ones_all_zeros(plays: Histories) -> None:
    contexts = feature_parts(plays, FeatureSpec(contexts=EVERYTHING.contexts, gap=False))[0]
    assert contexts[0].tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert contexts[1].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_hours_and_weekdays_are_one_hot_in_utc(plays: Histories) -> None:
    hours, weekdays = feature_parts(plays, FeatureSpec(gap=False, hour=True, weekday=True))
    assert hours[0].argmax(-1).tolist() == [0, 1, 23]
    assert weekdays[0].argmax(-1).tolist() == [0, 0, 6]  # a Monday, the same, a Sunday
    assert (hours[1, 0].argmax(), weekdays[1, 0].argmax()) == (12, 3)  # a Thursday
    assert (hours.sum(-1) == 1).all()
    assert (weekdays.sum(-1) == 1).all()


def test_moments_before_1970_have_an_hour_too() -> None:
    plays = Histories.from_lists([[1]], [[to_ms("1969-12-28 22:00")]])
    hours, weekdays = feature_parts(plays, FeatureSpec(gap=False, hour=True, weekday=True))
    assert (hours.argmax(), weekdays.argmax()) == (22, 6)


def test_the_width_is_what_the_spec_says(plays: Histories) -> None:
    for spec in (EVERYTHING, FeatureSpec(), FeatureSpec(gap=False), FeatureSpec(hour=True, gap=False)):
        assert sum(part.shape[-1] for part in feature_parts(plays, spec)) == spec.dim
    assert EVERYTHING.dim == 3 + 1 + 24 + 7 + 1


def test_plays_without_contexts_or_skips_have_zeros() -> None:
    plain_plays = Histories.from_lists([[1, 2]], [[1, 2]])
    contexts, skipped = feature_parts(plain_plays, FeatureSpec(contexts=("album",), gap=False, skipped=True))
    assert not contexts.any()
    assert not skipped.any()


def test_features_outside_the_spec_are_not_made(plays: Histories) -> None:
    batch = pad(plays, np.full(2, NEVER), FeatureSpec())
    assert batch.contexts_BL is None
    assert batch.hour_BL is None
    assert batch.skipped_BL is None


def test_a_shortened_batch_holds_the_first_plays(plays: Histories) -> None:
    batch = pad(plays, np.full(2, NEVER), EVERYTHING).shortened(torch.tensor([2, 1]))
    assert batch.songs_BL.tolist() == [[4, 5], [7, 0]]
    assert batch.length_B.tolist() == [2, 1]
    assert batch.hour_BL is not None
    assert batch.hour_BL.shape == (2, 2)
