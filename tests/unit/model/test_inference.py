"""Inference: a batch gives what each user gives alone, and a carried state equals one pass over the whole history."""

import time
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from networks import MINUTE, NUM_SONGS, model_config, network, with_other_inputs
from worlds import random_histories

from rayrec.data.histories import Histories, Queries
from rayrec.data.windows import NEVER
from rayrec.model import inference
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import States
from rayrec.model.train_config import Cell, FeatureSpec

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def histories() -> Histories:
    """Users of 0 to 40 plays, some without any."""
    all_histories = random_histories(25, NUM_SONGS, longest=40, seed=8)
    return all_histories.keep(all_histories.rows % 8 != 3)


@pytest.fixture(params=[(cell, *shape) for cell in get_args(Cell) for shape in ((1, True), (2, False))], ids=str)
def encoder(request: pytest.FixtureRequest) -> TasteEncoder:
    cell, layers, input_table = request.param
    features = FeatureSpec(hour=True, pause_hours=0.05)
    shape = model_config(layers=layers, cell=cell, input_table=input_table, features=features)
    return TasteEncoder(with_other_inputs(network(shape)))


@pytest.fixture(params=[1024, 7], ids=["whole", "in pieces"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of plays in one pass; with 7, most histories need several passes, which hand over their state."""
    monkeypatch.setattr(inference, "PLAYS_PER_CHUNK", request.param)
    return int(request.param)


def every_query(histories: Histories) -> Queries:
    """A query before each play, and one after the last, of every user."""
    rows = np.repeat(np.arange(len(histories)), histories.lengths + 1)
    row_starts = np.repeat(np.cumsum(histories.lengths + 1) - histories.lengths - 1, histories.lengths + 1)
    at = np.full(len(rows), histories.played_at.max() + MINUTE)
    order = np.random.default_rng(0).permutation(len(rows))
    return Queries(rows=rows, plays_before=np.arange(len(rows)) - row_starts, at=at).take(order)


def halves(histories: Histories, shares: np.ndarray) -> tuple[Histories, Histories]:
    """Each history cut in two, the first part holding `shares` of it."""
    position = np.arange(histories.num_plays) - histories.offsets[histories.rows]
    is_early = position < np.floor(histories.lengths * shares)[histories.rows]
    return histories.keep(is_early), histories.keep(~is_early)


@pytest.mark.usefixtures("piece")
def test_a_batch_gives_what_each_user_gives_alone(encoder: TasteEncoder, histories: Histories) -> None:
    at = int(histories.played_at.max())
    batch_vectors = encoder.vectors(histories, Queries.at_end(histories, at), "long")
    _, states = encoder.run(histories)
    for row in range(len(histories)):
        history = histories.take(np.array([row]))
        np.testing.assert_allclose(
            encoder.vectors(history, Queries.at_end(history, at), "long")[0], batch_vectors[row], **TOLERANCE
        )
        np.testing.assert_allclose(encoder.run(history)[1].hidden[0], states.hidden[row], **TOLERANCE)


@pytest.mark.usefixtures("piece")
def test_any_query_is_answered_from_only_the_plays_before_it(encoder: TasteEncoder, histories: Histories) -> None:
    queries = every_query(histories)
    vectors = encoder.vectors(histories, queries, "short")
    for number in range(0, len(queries), 7):
        row, plays_before = int(queries.rows[number]), int(queries.plays_before[number])
        history = histories.take(np.array([row]))
        prefix = history.keep(np.arange(history.num_plays) < plays_before)
        expected = encoder.vectors(prefix, Queries.at_end(prefix, queries.at[number]), "short")
        np.testing.assert_allclose(vectors[number], expected[0], **TOLERANCE)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("seed", range(3))
def test_going_on_from_a_state_equals_one_pass(encoder: TasteEncoder, histories: Histories, seed: int) -> None:
    full_hidden, states = encoder.run(histories, Queries.at_end(histories, 0))
    early, late = halves(histories, np.random.default_rng(seed).random(len(histories)))
    _, early_states = encoder.run(early)
    hidden, carried_states = encoder.run(late, Queries.at_end(late, 0), early_states)
    np.testing.assert_allclose(carried_states.hidden, states.hidden, **TOLERANCE)
    np.testing.assert_allclose(hidden, full_hidden, **TOLERANCE)
    np.testing.assert_array_equal(carried_states.last_played_at, states.last_played_at)


def test_queries_after_a_carried_state_equal_those_of_the_whole_history(
    encoder: TasteEncoder, histories: Histories
) -> None:
    early, late = halves(histories, np.full(len(histories), 0.5))
    _, early_states = encoder.run(early)
    late_queries = every_query(late)
    actual, _ = encoder.run(late, late_queries, early_states)
    full_queries = Queries(
        rows=late_queries.rows,
        plays_before=late_queries.plays_before + early.lengths[late_queries.rows],
        at=late_queries.at,
    )
    np.testing.assert_allclose(actual, encoder.run(histories, full_queries)[0], **TOLERANCE)


def test_running_does_not_change_the_states_it_started_from(encoder: TasteEncoder, histories: Histories) -> None:
    _, states = encoder.run(histories)
    hidden, last_played_at = states.hidden.copy(), states.last_played_at.copy()
    encoder.run(histories, start=states)
    np.testing.assert_array_equal(states.hidden, hidden)
    np.testing.assert_array_equal(states.last_played_at, last_played_at)


def test_read_only_states_are_enough(encoder: TasteEncoder, histories: Histories) -> None:
    """Arrays from Ray's object store cannot be written to."""
    _, states = encoder.run(histories)
    states.hidden.setflags(write=False)
    states.last_played_at.setflags(write=False)
    np.testing.assert_array_equal(
        encoder.run(histories.keep(histories.songs < 0), start=states)[1].hidden, states.hidden
    )


def test_a_history_longer_than_a_piece_carries_its_state_on(encoder: TasteEncoder) -> None:
    random = np.random.default_rng(3)
    plays = inference.PLAYS_PER_CHUNK * 2 + 100
    history = Histories.from_lists(
        [random.integers(0, NUM_SONGS, plays), [5]],  # type: ignore[list-item]
        [np.arange(plays) * MINUTE, [3]],  # type: ignore[list-item]
    )
    plays_before = np.array([0, 1, inference.PLAYS_PER_CHUNK, inference.PLAYS_PER_CHUNK + 1, plays])
    queries = Queries(rows=np.zeros(5, np.int64), plays_before=plays_before, at=np.full(5, plays * MINUTE))
    vectors = encoder.vectors(history, queries, "short")
    state = encoder.initial_states(1)
    for start, end, expected in zip(plays_before[:-1], plays_before[1:], vectors[1:], strict=True):
        part = history.take(np.array([0])).keep((np.arange(plays) >= start) & (np.arange(plays) < end))
        _, state = encoder.run(part, start=state)
        np.testing.assert_allclose(encoder.tastes(state, plays * MINUTE, "short")[0], expected, **TOLERANCE)


def test_states_alone_give_the_vectors_of_the_histories(encoder: TasteEncoder, histories: Histories) -> None:
    at = int(histories.played_at.max()) + 5 * MINUTE
    _, states = encoder.run(histories)
    for horizon in ("short", "long"):
        expected = encoder.vectors(histories, Queries.at_end(histories, at), horizon)
        np.testing.assert_allclose(encoder.tastes(states, at, horizon), expected, **TOLERANCE)


def test_vectors_are_normalized_float32_for_users_without_plays_too(
    encoder: TasteEncoder, histories: Histories
) -> None:
    vectors = encoder.vectors(histories, Queries.at_end(histories, 10**9), "short")
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(histories), 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    empty_histories = Histories.from_lists([[], []], [[], []])
    empty_vectors = encoder.vectors(empty_histories, Queries.at_end(empty_histories, 10**9), "short")
    np.testing.assert_allclose(empty_vectors, vectors[histories.lengths == 0][[0, 0]], **TOLERANCE)
    assert encoder.initial_states(2).last_played_at.tolist() == [NEVER, NEVER]


def test_the_time_of_the_request_changes_the_vector(encoder: TasteEncoder, histories: Histories) -> None:
    nonempty_histories = histories.take(histories.lengths > 0)
    last_played_at = nonempty_histories.played_at[nonempty_histories.offsets[1:] - 1]
    soon_vectors = encoder.vectors(
        nonempty_histories, Queries.at_end(nonempty_histories, last_played_at + MINUTE), "short"
    )
    late_vectors = encoder.vectors(
        nonempty_histories, Queries.at_end(nonempty_histories, last_played_at + 10_000 * MINUTE), "short"
    )
    assert (np.abs(soon_vectors - late_vectors).max(axis=1) > 1e-3).all()


def test_no_queries_and_no_users_are_answered_with_nothing(encoder: TasteEncoder, histories: Histories) -> None:
    no_queries = Queries(rows=np.zeros(0, np.int64), plays_before=np.zeros(0, np.int64), at=np.zeros(0, np.int64))
    assert encoder.vectors(histories, no_queries, "short").shape == (0, 8)
    no_users = Histories.from_lists([], [])
    hidden, states = encoder.run(no_users)
    assert hidden.shape[0] == len(states.hidden) == 0


def test_the_encoder_switches_dropout_off(histories: Histories) -> None:
    model = network(replace(model_config(), dropout=0.9))
    model.train()
    encoder = TasteEncoder(model)
    first, second = (encoder.vectors(histories, Queries.at_end(histories, 10**9), "short") for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("plays_per_pass", [inference.PLAYS_PER_PASS, 4 * inference.PLAYS_PER_PASS])
def test_passes_are_bounded_and_hold_every_user_with_plays_once(plays_per_pass: int) -> None:
    lengths = np.random.default_rng(1).integers(0, 3_000, size=500)
    passes = list(inference.passes(lengths, plays_per_pass))
    assert sorted(np.concatenate(passes).tolist()) == np.flatnonzero(lengths).tolist()
    for rows in passes:
        assert len(rows) * min(lengths[rows].max(), inference.PLAYS_PER_CHUNK) <= plays_per_pass
        assert lengths[rows[-1]] == lengths[rows].max()  # shorter histories are looked up within the longest


def test_states_can_be_made_by_hand() -> None:
    encoder = TasteEncoder(network())
    layers = encoder.model.config.state_layers
    states = States(hidden=np.zeros((1, layers, 12), np.float32), last_played_at=np.array([NEVER]))
    history = Histories.from_lists([[1, 2]], [[1, 2]])
    with torch.no_grad():
        np.testing.assert_array_equal(encoder.run(history, start=states)[1].hidden, encoder.run(history)[1].hidden)


@pytest.mark.parametrize("plays", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_very_long_history_costs_what_its_plays_cost(plays: int) -> None:
    random = np.random.default_rng(0)
    encoder = TasteEncoder(network())

    def measure_seconds(count: int) -> float:
        songs = random.integers(0, NUM_SONGS, size=count)
        history = Histories.from_lists([songs], [np.arange(count) * MINUTE])  # type: ignore[list-item]
        started = time.process_time()
        encoder.run(history)
        return time.process_time() - started

    measure_seconds(2_000)
    # Ten times the plays take about ten times as long; reading all plays for every piece would take a hundred times.
    assert measure_seconds(plays) < 25 * measure_seconds(plays // 10)
