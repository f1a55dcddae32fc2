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
PATIENCE = 240.0  # seconds within which a play must be acknowledged: a replica may restart meanwhile


def send_all(urls: list[str], at_turn: Callable[[int], None], headers: Mapping[str, str] | None = None) -> None:
    """Send each play to one replica after another until one acknowledges it; call `at_turn(place)` before each play."""
    with httpx.Client(timeout=20, headers=headers) as client:
        for place in range(PLAYS):
            at_turn(place)
            deadline, turn = time.monotonic() + PATIENCE, place
            while True:
                turn += 1
                try:
                    response = client.post(f"{urls[turn % len(urls)]}/v1/plays", json=play(place))
                except httpx.TransportError:
                    response = None
                if response is not None and response.status_code == 200:
                    assert response.json()["outcomes"][0] in ("taken", "repeated")
                    break
                assert response is None or response.status_code == 503, response.text
                assert time.monotonic() < deadline, f"play {place} was not acknowledged"
                time.sleep(0.02)


def play(place: int) -> dict[str, Any]:
    """Return the play with number `place`."""
    return {
        "event_id": f"event-{place}",
        "user_id": USERS[place % 2],
        "song_id": f"song-{place % NUM_SONGS}",
        "played_at": 1_700_000_000_000 + place * 60_000,
    }


def require_each_play_once(world: Workspace, store: str) -> None:
    """Fail unless the store holds all plays in order, each once."""
    opened = open_store(store, Dataset(world).lineage)
    try:
        for number, user in enumerate(USERS):
            (whole,) = opened.read([user])
            assert whole is not None
            state = unpack_state(whole.stored.state)
            held = Plays.joined([unpack_plays(whole.log), state.window])
            own = range(number, PLAYS, len(USERS))
            assert held.played_at.tolist() == [play(place)["played_at"] for place in own]
            assert (state.plays, state.rejected) == (len(own), 0)
    finally:
        opened.close()
