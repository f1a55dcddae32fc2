"""States and logs come back from their bytes unchanged; bytes that are damaged are refused."""

import zlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from networks import NUM_SONGS

from rayrec.data.histories import PLAY_COLUMNS
from rayrec.data.windows import NEVER
from rayrec.errors import DamagedArtifactError, DivergedError
from rayrec.model.taste_table import States
from rayrec.online.state_codec import (
    pack_heard,
    pack_histories,
    pack_new_states,
    pack_plays,
    pack_state,
    unpack_heard,
    unpack_plays,
    unpack_state,
)
from rayrec.online.user_state import ModelState, Plays, UserState, join_plays


def random_plays(count: int = 7, *, bare: bool = False) -> Plays:
    random = np.random.default_rng(count)
    return Plays.of(
        random.integers(0, NUM_SONGS, count),
        np.cumsum(random.integers(1, 10**12, count)),
        contexts=None if bare else random.integers(0, 2**31 - 1, count),
        skipped=None if bare else np.arange(count) % 2 == 0,
    )


def random_state(window: Plays) -> UserState:
    random = np.random.default_rng(3)
    hidden = random.normal(size=(4, 2, 6)).astype(np.float32)
    models = {
        name: ModelState(
            hidden=hidden[row],
            start_hidden=hidden[row + 1] if len(window) else hidden[row],
            before_at=-5,
            log_plays=10**9 - row,
            restarts=row,
            turn=7,
        )
        for name, row in (("abc.2", 0), ("def", 2))
    }
    counts = {"log_plays": 10**9, "folded": 5, "rejected": 2, "turn": 7, "restarts": 1}
    return UserState(before_at=-5, window=window, forgotten_at=-9, models=models, **counts)


@pytest.mark.parametrize("window", [random_plays(), random_plays(bare=True), Plays.of([], [])])
@pytest.mark.parametrize("likes", [Plays.of([], []), Plays.of([7, 3], [4, 9])])
def test_a_state_comes_back_as_it_was_with_network_states_to_24_bits(window: Plays, likes: Plays) -> None:
    state = replace(random_state(window), likes=likes)
    unpacked = unpack_state(pack_state(state))
    counts = ("log_plays", "folded", "rejected", "turn", "restarts", "plays")
    for name in ("before_at", "forgotten_at", "last_played_at", *counts):
        assert getattr(unpacked, name) == getattr(state, name), name
    assert list(unpacked.models) == list(state.models)
    for model, model_state in state.models.items():
        for name in ("hidden", "start_hidden"):
            hidden = getattr(model_state, name)
            limit = np.abs(hidden).max(axis=1, keepdims=True) * 2.0**-23
            assert (np.abs(getattr(unpacked.models[model], name) - hidden) <= limit).all()
        for name in ("before_at", "log_plays", "restarts", "turn"):
            assert getattr(unpacked.models[model], name) == getattr(model_state, name)
    for name in PLAY_COLUMNS:
        np.testing.assert_array_equal(getattr(unpacked.likes, name), getattr(likes, name))
        np.testing.assert_array_equal(getattr(unpacked.window, name), getattr(window, name))
        assert getattr(unpacked.window, name).dtype == getattr(window, name).dtype


def test_a_sum_over_many_plays_keeps_what_one_more_adds() -> None:
    hidden = np.array([[3_000.0, -0.25, 0.0], [0.5, 0.0, 0.0]], np.float32)
    model_state = ModelState(hidden=hidden, start_hidden=hidden, before_at=1, log_plays=2, restarts=0, turn=0)
    for _ in range(10):
        (unpacked,) = unpack_state(pack_state(UserState(models={"m": model_state}))).models.values()
        model_state = replace(unpacked, hidden=unpacked.hidden + np.float32(0.1))
    np.testing.assert_allclose(model_state.hidden[0], [3_001.0, 0.75, 1.0], atol=1e-3)


def test_averages_of_a_few_plays_are_kept_beside_sums_over_a_million() -> None:
    averages, sums = np.random.default_rng(0).normal(size=(2, 1, 32)).astype(np.float32)
    hidden = np.concatenate([averages, 1e6 * sums], axis=1)
    model_state = ModelState(hidden=hidden, start_hidden=hidden, before_at=1, log_plays=2, restarts=0, turn=0)
    (unpacked,) = unpack_state(pack_state(UserState(models={"m": model_state}))).models.values()
    np.testing.assert_allclose(unpacked.hidden[:, :32], averages, atol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_network_state_that_is_not_finite_is_refused(broken: float) -> None:
    state = random_state(random_plays())
    (model, model_state), *_ = state.models.items()
    hidden = model_state.hidden.copy()
    hidden[0, 1] = broken
    with pytest.raises(DivergedError, match="not finite; train the model again"):
        pack_state(state.with_model(model, replace(model_state, hidden=hidden)))


def test_a_state_before_the_first_play_comes_back() -> None:
    assert unpack_state(pack_state(UserState())).last_played_at == NEVER


def test_heard_songs_come_back_and_take_less_than_two_bytes_each() -> None:
    songs = np.unique(np.random.default_rng(1).integers(0, 100_000, 5_000)).astype(np.int32)
    packed = pack_heard(songs)
    np.testing.assert_array_equal(unpack_heard(packed), songs)
    assert len(packed) < 2 * len(songs)
    assert len(unpack_heard(pack_heard(songs[:0]))) == len(unpack_heard(None)) == 0


def test_the_pieces_of_a_log_come_back_as_one() -> None:
    parts = [random_plays(3), random_plays(5, bare=True), random_plays(2)]
    actual, expected = unpack_plays([pack_plays(part) for part in parts]), Plays.concatenate(parts)
    for name in PLAY_COLUMNS:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    assert len(unpack_plays([])) == 0


def test_plays_minutes_apart_take_less_than_six_bytes_each() -> None:
    random = np.random.default_rng(0)
    songs, times = random.integers(0, 10_000, 1000), 1_700_000_000_000 + np.cumsum(random.integers(1, 300_000, 1000))
    assert len(pack_plays(Plays.of(songs, times))) < 6_000


@pytest.mark.parametrize("optional_columns", [(), ("contexts",), ("skipped",), ("contexts", "skipped")])
def test_many_users_are_packed_to_the_same_bytes_as_each_alone(optional_columns: tuple[str, ...]) -> None:
    users = [random_plays(count, bare=count % 3 == 0) for count in (3, 1, 64, 500, 12, 9)]
    histories = join_plays(users)
    for name in {"contexts", "skipped"} - set(optional_columns):
        users = [replace(plays, **{name: np.zeros_like(getattr(plays, name))}) for plays in users]
        histories = replace(histories, **{name: None})
    assert pack_histories(histories) == [pack_plays(plays) for plays in users]
    random = np.random.default_rng(5)
    hidden = np.tanh(random.normal(size=(len(users), 3, 40))).astype(np.float32)
    hidden[1::2, 1] *= 70_000
    hidden[2, 2, 4:] = hidden[3, 1] = 0
    last_played_at = np.array([5, NEVER, 10**12, -3, 0, 7])
    states = States(hidden=hidden, last_played_at=last_played_at)
    single_states = [UserState.start("model", states, row, plays=len(plays)) for row, plays in enumerate(users)]
    packed = pack_new_states("model", states, histories.lengths)
    assert packed == [pack_state(state) for state in single_states]
    assert len(msgpack.unpackb(packed[0][8:])) == 5  # no bytes are stored for likes if a user has none
    likes = [random_plays(row, bare=True) for row in range(len(users))]
    assert pack_new_states("model", states, histories.lengths, likes) == [
        pack_state(replace(state, likes=user_likes)) for state, user_likes in zip(single_states, likes, strict=True)
    ]


def test_any_changed_bit_is_noticed() -> None:
    packed = pack_state(random_state(random_plays(2)))
    for position in range(len(packed)):
        damaged_bytes = bytearray(packed)
        damaged_bytes[position] ^= 1 << position % 8
        with pytest.raises(DamagedArtifactError, match="rayrec states load"):
            unpack_state(bytes(damaged_bytes))


@pytest.mark.parametrize("cut", [0, 3, 7, 8, 40, -1])
def test_bytes_cut_short_are_noticed(cut: int) -> None:
    with pytest.raises(DamagedArtifactError):
        unpack_state(pack_state(random_state(random_plays(2)))[:cut])
    with pytest.raises(DamagedArtifactError):
        unpack_plays([pack_plays(random_plays(2)), pack_plays(random_plays(2))[:cut]])


def test_the_error_for_another_version_names_it() -> None:
    with pytest.raises(DamagedArtifactError, match=r"begins with b'RrS9', expected b'RrS3'"):
        unpack_state(b"RrS9" + pack_state(random_state(random_plays(2)))[4:])
    with pytest.raises(DamagedArtifactError, match="a log of plays begins with"):
        unpack_plays([pack_state(random_state(random_plays(2)))])


@pytest.mark.parametrize("fields", [[], [1, 2, 3], [1, None, [1, 0, 0, 0, 0], [3, 1, False, b"y", b""], []]])
def test_undamaged_bytes_of_other_data_are_refused(fields: list[object]) -> None:
    body = msgpack.packb(fields)
    with pytest.raises(DamagedArtifactError, match="is damaged"):
        unpack_state(b"RrS3" + zlib.crc32(body).to_bytes(4, "little") + body)
