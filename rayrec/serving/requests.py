"""Converts requests into input of the engine: song rows instead of ids, plays in time order, one moment."""

import binascii
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Literal

import numpy as np
from starlette.concurrency import run_in_threadpool

from rayrec.data.histories import Histories
from rayrec.data.moments import ASSUMED_GAP_MS, END_MS, format_iso, now_ms
from rayrec.errors import FieldError
from rayrec.model.taste_table import States
from rayrec.online.user_state import Plays, join_plays
from rayrec.recommend.filters import AnswerFilter, SongAttributes, SongSet, intersect_songs, parse_day
from rayrec.recommend.reranking import AnswerOptions
from rayrec.serving.online_songs import SongToAdd
from rayrec.serving.schemas import (
    AddedSong,
    NewPlay,
    Play,
    RankRequest,
    RecommendationsRequest,
    SongFilters,
    SongsQuery,
    UserOrHistory,
)
from rayrec.serving.serve_config import MAX_K
from rayrec.serving.served_catalog import ServedCatalog
from rayrec.serving.users import StoredUser, UserPlays

MAX_ROW = int(np.iinfo(np.int32).max)  # of a song


@dataclass(frozen=True, kw_only=True)
class UserQuery:
    """One user's plays, as song rows of a release, and the moment that the request is for."""

    plays: Plays  # of known songs, in time order
    at: int  # ms UTC
    unknown: int = 0  # number of songs that are not in the catalog
    earlier: int = 0  # number of a stored user's plays before `plays`
    earlier_songs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32 (any,), of those plays
    states: States | None = None  # network state of a stored user after all plays
    likes: Plays = field(default_factory=lambda: Plays.of([], []))  # songs that a stored user liked, and when

    @property
    def num_plays(self) -> int:
        """Number of all plays of known songs."""
        return self.earlier + len(self.plays)


def read_history(history: Sequence[Play | str], at: int | None, catalog: ServedCatalog) -> UserQuery:
    """Return the query of a history. Raises `InputError` if only some plays have times, or one is after the request."""
    plays = [play if isinstance(play, Play) else Play.model_construct(song_id=play) for play in history]
    rows = catalog.find([play.song_id for play in plays])
    played_at, query_at = _play_times(plays, at)
    order = np.argsort(played_at, kind="stable")
    return UserQuery(
        plays=Plays.of(
            rows,
            played_at,
            contexts=[play_contexts(play.contexts, catalog) for play in plays],
            skipped=[play.was_skipped(catalog.skip_below) for play in plays],
        ).take(order[rows[order] >= 0]),
        at=query_at,
        unknown=int((rows < 0).sum()),
    )


def read_stored(user: StoredUser | None, at: int | None) -> UserQuery:
    """Return the query of a stored user; None is a user without plays.

    Raises `InputError` if `at` is before the user's last play, since a network state cannot go back in time.
    """
    if user is None:
        return UserQuery(plays=Plays.of([], []), at=now_ms() if at is None else at)
    return UserQuery(
        plays=user.plays,
        at=moment_after(user.state.last_played_at, at),
        earlier=user.state.plays - len(user.plays),
        earlier_songs=user.heard,
        states=user.states,
        likes=user.likes,
    )


def read_query(request: UserOrHistory, user: StoredUser | None, at: int | None, catalog: ServedCatalog) -> UserQuery:
    """Return the query of a request. Raises `InputError` as `read_stored` or `read_history` does."""
    if request.history is not None:
        return read_history(request.history, at, catalog)
    return read_stored(user, at)


@dataclass(frozen=True)
class RankingPage:
    """The part of a ranking that one answer contains."""

    request: str  # digest of the request, the same for all its pages
    k: int  # number of songs in the answer
    first: int = 0  # number of songs in the ranking before those of the answer
    at: int | None = None  # ms UTC, the moment of the first answer

    @property
    def end(self) -> int:
        """Number of songs of the ranking up to and including the last song of the answer."""
        return self.first + self.k

    def next(self, songs: int, at: int | None = None) -> str:
        """Return the cursor for the songs that follow the first `songs` songs of this answer."""
        text = json.dumps([self.request, self.first + songs, at])
        return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_page(
    request: RecommendationsRequest | SongsQuery, ranking: Literal["recommendations", "popular", "new"]
) -> RankingPage:
    """Return the place in `ranking` that a request's cursor names.

    Raises `FieldError` if the cursor is not from this request.
    """
    history = (request.history or []) if isinstance(request, UserOrHistory) else []
    songs = [play.song_id if isinstance(play, Play) else play for play in history]  # faster than dumping the plays
    text = "\n".join([ranking, request.model_dump_json(exclude={"k", "cursor", "explain", "history"}), *songs])
    digest = sha256(text.encode()).hexdigest()[:16]
    if request.cursor is None:
        return RankingPage(digest, request.k)
    try:
        padded = request.cursor + "=" * (-len(request.cursor) % 4)
        cursor_digest, first, at = json.loads(urlsafe_b64decode(padded.encode()))
    except (binascii.Error, ValueError, TypeError) as error:
        raise FieldError("cursor", "invalid cursor; send the cursor of an earlier answer, or omit it") from error
    if cursor_digest != digest:
        raise FieldError("cursor", "the cursor belongs to another request; only k, explain and cursor may change")
    is_place = isinstance(first, int) and 0 <= first <= MAX_ROW
    if not is_place or not (at is None or (isinstance(at, int) and 0 <= at < END_MS)):
        raise FieldError("cursor", "invalid cursor; send the cursor of an earlier answer, or omit it")
    return RankingPage(digest, request.k, first, at)


def read_options(
    request: RecommendationsRequest,
    query: UserQuery,
    page: RankingPage,
    catalog: ServedCatalog,
    matching_songs: SongSet | None,
) -> tuple[AnswerOptions, int]:
    """Return the options of an answer, and the number of songs of `exclude` and `allow` that are not in the catalog.

    `matching_songs` pass the filters of the request; None means all songs. The options ask for all songs up to the end
    of `page`, and for one more if another page may follow. Raises `InputError` for a page beyond the first 1,000 songs,
    and for a second page of an answer with diversity or explore.
    """
    if page.first and request.explore:
        raise FieldError("cursor", "an answer with explore has no further pages; leave out cursor or explore")
    if page.first and request.diversity:
        raise FieldError("cursor", "an answer with diversity has no further pages; leave out cursor or diversity")
    if page.first >= MAX_K:
        raise FieldError("cursor", f"the last page ends at song {MAX_K:,} of a ranking; omit the cursor to begin again")
    excluded_rows = catalog.find(request.exclude)
    excluded_parts = [
        excluded_rows[excluded_rows >= 0],
        *([query.plays.songs, query.earlier_songs] if request.exclude_heard else []),
    ]
    allowed_songs, unknown_count = _allowed_songs(request, catalog, matching_songs)
    has_pages = not (request.diversity or request.explore)
    answer_filter = AnswerFilter(
        excluded=np.concatenate(excluded_parts), allowed=allowed_songs, new_only=request.exclude_heard
    )
    options = AnswerOptions(
        k=min(page.end + has_pages, MAX_K),
        long_weight=request.horizon,
        answer_filter=answer_filter,
        diversity=request.diversity,
        explore=request.explore,
        explain=request.explain,
    )
    return options, unknown_count + int((excluded_rows < 0).sum())


def read_song(song: AddedSong, field_name: str) -> SongToAdd:
    """Convert a song of a request. Raises `FieldError` with `field_name` if its release day does not exist."""
    parse_day(song.released, field_name)
    return SongToAdd(
        song_id=song.song_id,
        title=song.title,
        artist=song.artist,
        album=song.album,
        released=song.released,
        markets=song.markets,
        vector=song.vector,
    )


def read_songs_to_rank(request: RankRequest, catalog: ServedCatalog) -> AnswerOptions:
    """Return options that rank the songs of a request, heard or not. Songs without a vector are left out."""
    rows = np.unique(catalog.find(request.songs))
    rows = rows[rows >= 0]
    rows = rows[catalog.embedded(rows)]
    return AnswerOptions(k=max(1, len(rows)), long_weight=request.horizon, explain=request.explain, songs_to_rank=rows)


def _allowed_songs(
    request: RecommendationsRequest, catalog: ServedCatalog, matching_songs: SongSet | None
) -> tuple[SongSet | None, int]:
    """Return the songs that may be recommended, None for all; and the number of unknown songs in `allow`."""
    if request.allow is None:
        return matching_songs, 0
    rows = catalog.find(request.allow)
    return intersect_songs(rows, matching_songs), int((rows < 0).sum())


def read_attributes(filters: SongFilters) -> SongAttributes:
    """Return the attributes that the filters require. Raises `FieldError` for a day that does not exist."""
    return SongAttributes(
        artists=tuple(sorted(set(filters.artists))),
        released_from=parse_day(filters.released_from, "released_from"),
        released_to=parse_day(filters.released_to, "released_to"),
        market=filters.market,
    )


async def find_matching(filters: SongFilters, catalog: ServedCatalog) -> SongSet | None:
    """Return the songs that pass the filters, None for all. Raises `FieldError` for a value that no song can have.

    The first search for a filter reads the whole catalog, so it runs in another thread.
    """
    attributes = read_attributes(filters)
    return await run_in_threadpool(catalog.fitting, attributes) if attributes else None


def query_histories(queries: Sequence[UserQuery]) -> Histories:
    """Return the plays of queries, one row per query, with the likes if there are any."""
    histories = join_plays([query.plays for query in queries], [str(row) for row in range(len(queries))])
    has_likes = any(len(query.likes) for query in queries)
    return replace(histories, likes=join_plays([query.likes for query in queries])) if has_likes else histories


def read_plays(
    new_plays: Sequence[NewPlay], catalog: ServedCatalog
) -> tuple[dict[str, list[int]], dict[str, UserPlays]]:
    """Group plays and likes by user, without those of unknown songs. A like from the future counts as from now.

    Returns two mappings by user id: to the indices of the user's entries in `new_plays`, and to the plays and likes.
    """
    rows, now = catalog.find([play.song_id for play in new_plays]), now_ms()
    times = np.array([now if play.played_at is None else play.played_at for play in new_plays], dtype=np.int64)
    is_like = np.array([play.type == "like" for play in new_plays], dtype=np.bool_)
    # A client's clock may run ahead of ours, but requests for now must use the like.
    times = np.where(is_like, np.minimum(times, now), times)
    indices_by_user: dict[str, list[int]] = {}
    for index, play in enumerate(new_plays):
        if rows[index] >= 0:
            indices_by_user.setdefault(play.user_id, []).append(index)
    plays = {
        user_id: UserPlays(
            plays=Plays.of(
                catalog.stored_rows(rows[indices]),
                times[indices],
                contexts=[play_contexts(new_plays[index].contexts, catalog) for index in indices],
                skipped=[new_plays[index].was_skipped(catalog.skip_below) for index in indices],
            ),
            events=[new_plays[index].event_id for index in indices],
            liked=is_like[indices],
        )
        for user_id, indices in indices_by_user.items()
    }
    return indices_by_user, plays


def moment_after(last_played_at: int, at: int | None) -> int:
    """Return the moment, in ms UTC, of a request about a user who last played at `last_played_at`. The default is now.

    Raises `InputError` if `at` is before that play.
    """
    if at is None:
        return max(now_ms(), last_played_at)  # a client's clock may run ahead of ours
    if at < last_played_at:
        raise FieldError(
            "at", f"the user's last play, at {format_iso(last_played_at)}, is after the moment of the request"
        )
    return at


def _play_times(plays: Sequence[Play], at: int | None) -> tuple[np.ndarray, int]:
    """Return when each play was played, int64 (P,), and the moment of the request, both in ms UTC."""
    times = [play.played_at for play in plays if play.played_at is not None]
    if times and len(times) < len(plays):
        detail = f"{len(times)} of {len(plays)} plays have a played_at; give it for all of them or for none"
        raise FieldError("history", detail)
    if not times:
        query_at = now_ms() if at is None else at
        return query_at - ASSUMED_GAP_MS * np.arange(len(plays), 0, -1, dtype=np.int64), query_at
    played_at = np.array(times, dtype=np.int64)
    last_played_at = int(played_at.max())
    # A client's clock may run ahead of ours: a request without a moment is never before its own plays.
    query_at = max(now_ms(), last_played_at) if at is None else at
    if query_at < last_played_at:
        raise FieldError("at", "some plays of the history are after the moment of the request; leave them out")
    return played_at, query_at


def play_contexts(contexts: Sequence[str], catalog: ServedCatalog) -> int:
    """Return the bit set of the named contexts; names that the data set does not have are ignored."""
    bits = 0
    for name in contexts:
        if name in catalog.contexts:
            bits |= 1 << catalog.contexts[name]
    return bits
