"""From what a request says to what the engine takes: rows instead of ids, one time line, one moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np

from rayrec.data.histories import Histories
from rayrec.data.moments import now_ms, parse_moment
from rayrec.errors import InputError
from rayrec.model.inference import States
from rayrec.recommend.answer import ASSUMED_GAP_MS
from rayrec.recommend.attributes import Wanted
from rayrec.recommend.choosing import Wish
from rayrec.recommend.filters import Limits
from rayrec.serving.catalog import Songs
from rayrec.serving.schemas import Play, RecommendationsRequest
from rayrec.serving.user_states import StoredUser


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One user's plays in the rows of a release."""

    songs: np.ndarray  # int32 (P,), known songs only, in the order of time
    played_at: np.ndarray  # int64 (P,), ms UTC
    contexts: np.ndarray  # int32 (P,), bit sets
    skipped: np.ndarray  # bool (P,)
    at: int  # ms UTC, the moment of the request
    unknown: int  # songs that the release does not know
    states: States | None = None  # of this one user, after the plays, where they are stored


def read_history(history: Sequence[Play | str], moment: int | str | None, songs: Songs) -> Asked:
    """The history of a request. Raises `InputError` for times that are none, or not for all, or after the request."""
    plays = [play if isinstance(play, Play) else Play(song=play) for play in history]
    rows = songs.find([play.song for play in plays])
    played_at, at = _times(plays, moment)
    order = np.argsort(played_at, kind="stable")
    order = order[rows[order] >= 0]
    return Asked(
        songs=rows[order],
        played_at=played_at[order],
        contexts=np.array([context_bits(play.contexts, songs) for play in plays], dtype=np.int32)[order],
        skipped=np.array([play.skipped for play in plays], dtype=bool)[order],
        at=at,
        unknown=int((rows < 0).sum()),
    )


def read_stored(user: StoredUser | None, moment: int | str | None) -> Asked:
    """A stored user's plays. Raises `InputError` for a moment before the last of them: a state does not go back."""
    if user is None:
        nothing = np.zeros(0, np.int32)
        at = now_ms() if moment is None else parse_moment(moment)
        return Asked(songs=nothing, played_at=nothing, contexts=nothing, skipped=nothing, at=at, unknown=0)
    plays = user.plays
    return Asked(
        songs=plays.songs,
        played_at=plays.played_at,
        contexts=np.zeros(len(plays.songs), np.int32) if plays.contexts is None else plays.contexts,
        skipped=np.zeros(len(plays.songs), bool) if plays.skipped is None else plays.skipped,
        at=moment_after(user.state.last_played_at, moment),
        unknown=0,
        states=user.states,
    )


def read_wish(request: RecommendationsRequest, asked: Asked, songs: Songs) -> tuple[Wish, int]:
    """What is asked for, and how many songs to leave out or to keep to are unknown.

    Raises `InputError` for days that are none, and for attributes that the catalog does not tell.
    """
    excluded = songs.find(request.exclude)
    parts = [excluded[excluded >= 0], asked.songs] if request.exclude_heard else [excluded[excluded >= 0]]
    allowed, unknown = _allowed(request, songs)
    limits = Limits(banned=np.concatenate(parts), allowed=allowed)
    wish = Wish(k=request.k, long_weight=request.long_weight, limits=limits, diversity=request.diversity)
    return wish, unknown + int((excluded < 0).sum())


def _allowed(request: RecommendationsRequest, songs: Songs) -> tuple[np.ndarray | None, int]:
    """bool (N,): the songs to keep to, None for all; and how many of those listed are unknown."""
    wanted = Wanted(
        artists=tuple(sorted(set(request.artists))),
        released_from=_day(request.released_from),
        released_to=_day(request.released_to),
        market=request.market,
    )
    mask = songs.masks.mask(wanted) if wanted else None
    if request.allow is None:
        return mask, 0
    rows = songs.find(request.allow)
    listed = np.zeros(len(songs.catalog), dtype=np.bool_)
    listed[rows[rows >= 0]] = True
    return listed if mask is None else listed & mask, int((rows < 0).sum())


def _day(text: str | None) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"day {text!r} is in no calendar; give YYYY-MM-DD") from error


def histories_of(asked: Sequence[Asked]) -> Histories:
    """The plays of all askers."""

    def together(parts: list[np.ndarray]) -> np.ndarray:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)  # one is what most requests are about

    return Histories(
        user_ids=np.array([str(row) for row in range(len(asked))], dtype=object),
        offsets=np.cumsum([0, *(len(one.songs) for one in asked)], dtype=np.int64),
        songs=together([one.songs for one in asked]),
        played_at=together([one.played_at for one in asked]),
        contexts=together([one.contexts for one in asked]),
        skipped=together([one.skipped for one in asked]),
    )


def moment_after(latest: int, moment: int | str | None) -> int:
    """ms UTC: the moment of a request about a user who played last at `latest`, now where it is not said.

    Raises `InputError` for one before that play.
    """
    if moment is None:
        return max(now_ms(), latest)  # a client's clock may run ahead of ours
    at = parse_moment(moment)
    if at < latest:
        raise InputError(f"the user has played after the moment `at` that the request is for: at {latest}, ms UTC")
    return at


def _times(plays: Sequence[Play], at: int | str | None) -> tuple[np.ndarray, int]:
    """int64 (P,), ms UTC: when each was played, and the moment of the request."""
    told = [play.played_at for play in plays if play.played_at is not None]
    if told and len(told) < len(plays):
        raise InputError(f"{len(told)} of {len(plays)} plays have a played_at; give it for all of them or for none")
    if not told:
        moment = now_ms() if at is None else parse_moment(at)
        return moment - ASSUMED_GAP_MS * np.arange(len(plays) - 1, -1, -1, dtype=np.int64), moment
    played_at = np.array([parse_moment(value) for value in told], dtype=np.int64)
    latest = int(played_at.max())
    # A client's clock may run ahead of ours: without a moment of its own the request comes after its plays.
    moment = max(now_ms(), latest) if at is None else parse_moment(at)
    if moment < latest:
        raise InputError("a song was played after the moment `at` that the request is for; leave such plays out")
    return played_at, moment


def context_bits(contexts: Sequence[str], songs: Songs) -> int:
    """The bit set of contexts by their names; names that the data set does not know are left out."""
    bits = 0
    for name in contexts:
        if name in songs.contexts:
            bits |= 1 << songs.contexts[name]
    return bits
