"""What is done for stored users: plays from ids to rows and into states, states to tastes."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rayrec.data.moments import now_ms, parse_moment
from rayrec.data.windows import NEVER
from rayrec.errors import InputError, NotFoundError
from rayrec.online.user_state import Plays
from rayrec.serving.catalog import Songs
from rayrec.serving.live import LiveRelease
from rayrec.serving.prometheus import Metrics
from rayrec.serving.requests import context_bits, moment_after
from rayrec.serving.user_schemas import NewPlay, PlaysTaken, UserTaste
from rayrec.serving.user_states import UserStates

# A play of the future would hold the end of the window and make every later one come out of order.
AHEAD_MS = 24 * 3600 * 1000  # that a client's clock may be ahead of ours

Fate = Literal["taken", "repeated", "rejected", "unknown"]


async def take_plays(states: UserStates, live: LiveRelease, metrics: Metrics, sent: Sequence[NewPlay]) -> PlaysTaken:
    """Take plays as they were sent. Raises `InputError` for a time that is none, or over a day ahead."""
    places, plays = read_plays(sent, live.songs)
    fates: list[Fate] = ["unknown"] * len(sent)
    for user_id, outcomes in (await states.take(live, plays)).items() if plays else ():
        for place, outcome in zip(places[user_id], outcomes, strict=True):
            fates[place] = outcome
    counts = {fate: fates.count(fate) for fate in ("taken", "repeated", "rejected", "unknown")}
    for fate, count in counts.items():
        metrics.plays(fate, count)
    return PlaysTaken(
        release=live.id,
        taken=counts["taken"],
        repeated=counts["repeated"],
        rejected=counts["rejected"],
        unknown_songs=counts["unknown"],
        outcomes=fates,
    )


def read_plays(sent: Sequence[NewPlay], songs: Songs) -> tuple[dict[str, list[int]], dict[str, Plays]]:
    """The places among those sent, and the plays, of each user; without plays of unknown songs."""
    rows, now = songs.find([play.song for play in sent]), now_ms()
    times = np.array([_time(play, now) for play in sent], dtype=np.int64)
    places: dict[str, list[int]] = {}
    for place, play in enumerate(sent):
        if rows[place] >= 0:
            places.setdefault(play.user_id, []).append(place)
    plays = {
        user_id: Plays.of(
            rows[own],
            times[own],
            contexts=[context_bits(sent[place].contexts, songs) for place in own],
            skipped=[sent[place].skipped for place in own],
            events=[sent[place].event_id for place in own],
        )
        for user_id, own in places.items()
    }
    return places, plays


async def user_taste(states: UserStates, live: LiveRelease, user_id: str, moment: str | None) -> UserTaste:
    """A stored user's taste. Raises `NotFoundError` for one who is not in the store."""
    user = (await states.read(live, [user_id]))[0]
    if user is None:
        raise NotFoundError(
            f"user {user_id!r} is not in the store; send plays, or load the batch job's with `rayrec states load`"
        )
    state = user.state
    at = moment_after(state.last_played_at, moment)
    vectors = await live.engine.vectors(user.states, np.array([at]), ("short", "long"))
    return UserTaste(
        release=live.id,
        model=state.model,
        user_id=user_id,
        at=at,
        plays=state.plays,
        last_played_at=None if state.last_played_at == NEVER else state.last_played_at,
        rejected=state.rejected,
        short=vectors["short"][0].tolist(),
        long=vectors["long"][0].tolist(),
    )


def _time(play: NewPlay, now: int) -> int:
    played_at = now if play.played_at is None else parse_moment(play.played_at)
    if played_at > now + AHEAD_MS:
        raise InputError(
            f"event {play.event_id!r} was played at {play.played_at!r}, over a day from now; check the sender's clock"
        )
    return played_at
