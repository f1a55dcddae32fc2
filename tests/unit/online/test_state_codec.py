"""States and logs come back from their bytes as they were, or not at all."""

import zlib

import msgpack
import numpy as np
import pytest
from networks import NUM_SONGS

from rayrec.data.windows import NEVER
from rayrec.errors import DamagedArtifactError
from rayrec.online.state_codec import _sealed, pack_plays, pack_state, unpack_plays, unpack_state
from rayrec.online.user_state import PLAY_FIELDS, Plays, UserState


def some_plays(count: int = 7, *, bare: bool = False) -> Plays:
    random = np.random.default_rng(count)
    events = None if bare else [f"e{place}" for place in range(count)]
    return Plays.of(
        random.integers(0, NUM_SONGS, count),
        np.cumsum(random.integers(1, 10**12, count)),
        contexts=None if bare else random.integers(0, 2**31 - 1, count),
        skipped=None if bare else np.arange(count) % 2 == 0,
        events=events,
    )


def some_state(window: Plays) -> UserState:
    random = np.random.default_rng(3)
    hidden = random.normal(size=(2, 2, 6)).astype(np.float32)
    return UserState(
        model="abc.2",
        hidden=hidden[0],
        before=hidden[1] if len(window) else hidden[0],
        before_at=-5,
        left=10**9,
        window=window,
        rejected=2,
    )


@pytest.mark.parametrize("window", [some_plays(), some_plays(bare=True), Plays.of([], [])])
def test_a_state_comes_back_as_it_was(window: Plays) -> None:
    state = some_state(window)
    found = unpack_state(pack_state(state))
    for name in ("model", "before_at", "left", "rejected", "plays", "last_played_at"):
        assert getattr(found, name) == getattr(state, name), name
    np.testing.assert_array_equal(found.hidden, state.hidden)
    np.testing.assert_array_equal(found.before, state.before)
    for name in PLAY_FIELDS:
        np.testing.assert_array_equal(getattr(found.window, name), getattr(window, name))
        assert getattr(found.window, name).dtype == getattr(window, name).dtype


def test_a_state_before_the_first_play_comes_back() -> None:
    state = UserState(model="m", hidden=np.zeros((1, 3), np.float32), before=np.zeros((1, 3), np.float32))
    assert unpack_state(pack_state(state)).last_played_at == NEVER


def test_the_pieces_of_a_log_come_back_as_one() -> None:
    parts = [some_plays(3), some_plays(5, bare=True), some_plays(2)]
    found, wanted = unpack_plays([pack_plays(part) for part in parts]), Plays.joined(parts)
    for name in PLAY_FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert len(unpack_plays([])) == 0


def test_plays_without_contexts_skips_and_events_take_twelve_bytes_each() -> None:
    assert len(pack_plays(some_plays(1000, bare=True))) < 12_100


def test_any_changed_bit_is_noticed() -> None:
    whole = pack_state(some_state(some_plays(2)))
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DamagedArtifactError, match="rayrec states load"):
            unpack_state(bytes(damaged))


@pytest.mark.parametrize("cut", [0, 3, 7, 8, 40, -1])
def test_bytes_cut_short_are_noticed(cut: int) -> None:
    with pytest.raises(DamagedArtifactError):
        unpack_state(pack_state(some_state(some_plays(2)))[:cut])
    with pytest.raises(DamagedArtifactError):
        unpack_plays([pack_plays(some_plays(2)), pack_plays(some_plays(2))[:cut]])


def test_another_version_is_named() -> None:
    with pytest.raises(DamagedArtifactError, match=r"begins with b'RrS2', expected b'RrS1'"):
        unpack_state(b"RrS2" + pack_state(some_state(some_plays(2)))[4:])
    with pytest.raises(DamagedArtifactError, match="a log of plays begins with"):
        unpack_plays([pack_state(some_state(some_plays(2)))])


@pytest.mark.parametrize(
    "fields", [{}, {"model": "m", "shape": [2, 2], "hidden": b"1234", "before_at": 1, "left": 1, "rejected": 0}]
)
def test_whole_bytes_of_something_else_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DamagedArtifactError, match="not as it was written"):
        unpack_state(_sealed(b"RrS1", fields))


def test_the_format_of_version_1_stays_readable() -> None:
    """Written by hand as the first version did: stores on disk hold such bytes."""
    fields = {
        "model": "m",
        "shape": [1, 2],
        "hidden": np.array([1, 2], "<f4").tobytes(),
        "before": np.array([3, 4], "<f4").tobytes(),
        "before_at": None,
        "left": 0,
        "rejected": 1,
        "window": {"songs": np.array([7], "<i4").tobytes(), "played_at": np.array([9], "<i8").tobytes()},
    }
    body = msgpack.packb(fields)
    state = unpack_state(b"RrS1" + zlib.crc32(body).to_bytes(4, "little") + body)
    assert (state.hidden.tolist(), state.before.tolist()) == ([[1, 2]], [[3, 4]])
    assert (state.window.songs.tolist(), state.window.played_at.tolist()) == ([7], [9])
