"""Sends plays until they are acknowledged, while processes are killed; checks that each play is stored once."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from served import NUM_SONGS

from rayrec.data.dataset import Dataset
from rayrec.online.state_codec import unpack_plays, unpack_state
from rayrec.online.state_store import open_store
from rayrec.online.user_state import Plays
from rayrec.storage.workspace import Workspace

PLAYS = 120
USERS = ("ann", "bob")
TIMEOUT_SECONDS = 240.0  # seconds within which a play must be acknowledged: a replica may restart meanwhile


def send_all(urls: list[str], before_play: Callable[[int], None], headers: Mapping[str, str] | None = None) -> None:
    """Send each play to one replica after another until one acknowledges it; call `before_play(number)` before each."""
    with httpx.Client(timeout=20, headers=headers) as client:
        for number in range(PLAYS):
            before_play(number)
            deadline, replica = time.monotonic() + TIMEOUT_SECONDS, number
            while True:
                replica += 1
                try:
                    response = client.post(f"{urls[replica % len(urls)]}/v1/plays", json=play(number))
                except httpx.TransportError:
                    response = None
                if response is not None and response.status_code == 200:
                    assert response.json()["outcomes"][0] in ("taken", "repeated")
                    break
                assert response is None or response.status_code == 503, response.text
                assert time.monotonic() < deadline, f"play {number} was not acknowledged"
                time.sleep(0.02)


def play(number: int) -> dict[str, Any]:
    """Return the play with this number."""
    return {
        "event_id": f"event-{number}",
        "user_id": USERS[number % 2],
        "song_id": f"song-{number % NUM_SONGS}",
        "played_at": 1_700_000_000_000 + number * 60_000,
    }


def require_each_play_once(world: Workspace, store: str) -> None:
    """Fail unless the store holds all plays in order, each once."""
    state_store = open_store(store, Dataset(world).lineage)
    try:
        for user_number, user in enumerate(USERS):
            (full_user,) = state_store.read([user])
            assert full_user is not None
            state = unpack_state(full_user.stored.state)
            stored_plays = Plays.concatenate([unpack_plays(full_user.log), state.window])
            play_numbers = range(user_number, PLAYS, len(USERS))
            assert stored_plays.played_at.tolist() == [play(play_number)["played_at"] for play_number in play_numbers]
            assert (state.plays, state.rejected) == (len(play_numbers), 0)
    finally:
        state_store.close()
