"""Stored taste vectors: each row holds the encoder's vectors, and a state from which the encoder continues."""

import numpy as np
import pytest
from networks import MINUTE, NUM_SONGS, model_config, network
from worlds import random_histories

from rayrec.data.histories import Histories, Queries
from rayrec.data.windows import NEVER
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import heard_songs, read_states, taste_column, taste_table

AT = 100 * MINUTE
LAYERS = 2


@pytest.fixture(scope="module")
def encoder() -> TasteEncoder:
    return TasteEncoder(network(model_config(layers=LAYERS)))


@pytest.fixture(scope="module")
def histories() -> Histories:
    return random_histories(20, NUM_SONGS, longest=15, seed=6)


def test_heard_songs_come_once_each_in_order() -> None:
    histories = Histories.from_lists([[5, 3, 5, 0], [], [2, 2]], [[1, 2, 3, 4], [], [1, 2]])
    assert heard_songs(histories).to_pylist() == [[0, 3, 5], [], [2]]
    assert heard_songs(Histories.from_lists([], [])).to_pylist() == []


def test_a_row_per_user_holds_the_encoders_vectors(encoder: TasteEncoder, histories: Histories) -> None:
    table = taste_table(encoder, histories, AT)
    assert table.column("user_id").to_pylist() == histories.user_ids.tolist()
    assert table.column("plays").to_pylist() == histories.lengths.tolist()
    for horizon in ("short", "long"):
        expected = encoder.vectors(histories, Queries.at_end(histories, AT), horizon)
        actual = np.array(table.column(taste_column(horizon)).to_pylist(), dtype=np.float32)
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_states_come_back_from_rows_and_go_on(encoder: TasteEncoder, histories: Histories) -> None:
    early_histories = histories.keep(np.arange(histories.num_plays) % 15 < 8)
    states = read_states(taste_table(encoder, early_histories, AT), encoder.model.config.state_layers)
    _, expected = encoder.run(early_histories)
    np.testing.assert_array_equal(states.hidden, expected.hidden)
    np.testing.assert_array_equal(states.last_played_at, expected.last_played_at)
    reversed_histories = histories.take(np.arange(len(histories))[::-1])
    np.testing.assert_array_equal(
        encoder.run(reversed_histories, start=states)[1].hidden,
        encoder.run(reversed_histories, start=expected)[1].hidden,
    )


def test_states_come_back_from_a_slice_and_from_no_rows(encoder: TasteEncoder, histories: Histories) -> None:
    table = taste_table(encoder, histories, AT)
    np.testing.assert_array_equal(
        read_states(table.slice(3, 4), encoder.model.config.state_layers).hidden,
        read_states(table, encoder.model.config.state_layers).hidden[3:7],
    )
    empty_table = taste_table(encoder, Histories.from_lists([], []), AT)
    assert empty_table.schema == table.schema
    assert len(read_states(empty_table, encoder.model.config.state_layers).hidden) == 0


def test_a_user_without_plays_has_never_played(encoder: TasteEncoder) -> None:
    table = taste_table(encoder, Histories.from_lists([[]], [[]]), AT)
    assert table.column("last_played_at").to_pylist() == [NEVER]
    assert table.column("heard").to_pylist() == [[]]
