"""The service behind the routes of one replica: live release, engine, stored users, keys, limits and metrics."""

import logging
import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Literal

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rayrec.data.impressions import ImpressionLog, LogBounds
from rayrec.data.moments import EPOCH, now_ms
from rayrec.data.spelling import spell_id
from rayrec.data.windows import NEVER
from rayrec.errors import FieldError, InputError, NotFoundError
from rayrec.model.taste_table import States
from rayrec.online.state_store import StoreUnavailableError
from rayrec.online.user_state import Outcome
from rayrec.recommend.answer import SHOWN_PLAYS, reasons_of
from rayrec.recommend.filters import SongSet, first_of_order
from rayrec.recommend.reranking import AnswerOptions, SelectedSongs, choose_popular
from rayrec.recommend.stored_retrieval import NOT_PLAYED
from rayrec.serving.engine import Engine, Parts, Pool
from rayrec.serving.live_release import (
    Arms,
    Assigned,
    LiveRelease,
    ReleaseHolder,
    Reports,
    load_parts,
    model_card,
    report_page,
)
from rayrec.serving.middleware import Keys, load_keys
from rayrec.serving.online_songs import MAX_ONLINE_SONGS, OnlineSongs, OnlineWatch
from rayrec.serving.preparation import prepare
from rayrec.serving.problems import NotReadyError, field_errors, request_id
from rayrec.serving.requests import (
    RankingPage,
    UserQuery,
    find_matching,
    moment_after,
    query_histories,
    read_history,
    read_options,
    read_page,
    read_plays,
    read_query,
    read_song,
    read_songs_to_rank,
    read_stored,
)
from rayrec.serving.schemas import (
    AnsweredSongs,
    CatalogSong,
    InvalidEntry,
    ListedPlays,
    MapPoint,
    ModelCard,
    NewPlay,
    NewSong,
    NewSongs,
    PlayedSong,
    PlayOutcome,
    PlaysTaken,
    PopularSong,
    PopularSongs,
    RankedSongs,
    RankRequest,
    Recommendations,
    RecommendationsRequest,
    RecommendedSong,
    SentSongs,
    SimilarSongs,
    SongMatches,
    SongOutcome,
    SongPositions,
    SongsAdded,
    SongsQuery,
    Taste,
    TasteQuery,
    Tastes,
    UserOrHistory,
    UserTaste,
)
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.served_catalog import ServedCatalog, load_served_catalog
from rayrec.serving.telemetry import AccessLog, Metrics
from rayrec.serving.users import StoredUser, StoredUsers
from rayrec.storage.workspace import Workspace

log = logging.getLogger(__name__)

USERS_PER_GROUP = 32  # users of a batch that are answered at once; other requests can run between two such groups


class Service:
    """Answers the requests of one replica. A route reads `live` once and passes it to every call for its request."""

    def __init__(
        self,
        holder: ReleaseHolder,
        config: ServeConfig,
        keys: Keys,
        metrics: Metrics,
        users: StoredUsers,
        arms: Arms,
        log: ImpressionLog | None,
        access: AccessLog | None,
    ) -> None:
        self.holder, self.config, self.keys, self.metrics, self.users = holder, config, keys, metrics, users
        self.arms, self.log, self.access = arms, log, access
        self._online_watch = OnlineWatch(
            holder.workspace,
            lambda: [live.online for live in (holder.loaded, *arms.releases) if live is not None],
        )

    @property
    def live(self) -> LiveRelease:
        """The release to answer with. Raises `NotReadyError` if none is loaded."""
        return self.holder.live

    def start(self) -> None:
        """Load the live release, and follow it and the songs that are added online until `close`."""
        self.holder.start()
        self._online_watch.start()

    def close(self) -> None:
        """Close the logs, delete the report of this replica, stop the watches, and close the store of users."""
        # The logs first: the others may wait for storage for longer than Serve lets a replica live.
        if self.log is not None:
            self.log.close()
        if self.access is not None:
            self.access.close()
        self.holder.stop()
        self._online_watch.stop()
        self.users.close()

    async def recommend(
        self, live: LiveRelease, requests: Sequence[RecommendationsRequest | InvalidEntry], *, alone: bool = False
    ) -> list[Recommendations | InvalidEntry]:
        """Return the answers to requests. An invalid request raises, or with `alone` gets an `InvalidEntry`."""
        self.metrics.batch(len(requests))
        answers: dict[int, Recommendations | InvalidEntry] = {}
        by_release: dict[str, list[tuple[int, Assigned]]] = {}
        for index, request in enumerate(requests):
            if isinstance(request, InvalidEntry):
                answers[index] = request
                continue
            assigned = self.arms.assign(request, live)
            by_release.setdefault(assigned.release.id, []).append((index, assigned))
        for entries in by_release.values():
            for start in range(0, len(entries), USERS_PER_GROUP):
                indices, group = zip(*entries[start : start + USERS_PER_GROUP], strict=True)
                answers |= dict(zip(indices, await self._recommend(group[0].release, group, alone), strict=True))
        return [answers[index] for index in range(len(requests))]

    async def rank(self, live: LiveRelease, request: RankRequest) -> RankedSongs:
        """Rank the given songs by how likely the user is to play them."""
        self.metrics.batch(1)
        stored_users = await self._read_stored_users(live, [request])
        with self.metrics.stage("read"):
            query = read_query(request, stored_users.get(request.user_id), request.at, live.catalog)
            options = read_songs_to_rank(request, live.catalog)
        (selection,) = await self._choose(live, [query], [options])
        with self.metrics.stage("write"):
            answer = self._build_answer(live, query, selection, unknown=query.unknown)
            if request.explain:
                add_reasons(answer, selection, query.plays.songs, live.catalog)
            rows = live.catalog.find(request.songs)
            unknown_indices = np.flatnonzero(~np.isin(rows, selection.songs)).tolist()
            unknown_song_ids = list(dict.fromkeys(request.songs[index] for index in unknown_indices))
            ranked = RankedSongs.model_construct(**dict(answer), unknown_song_ids=unknown_song_ids)
            self._log_answer(request.user_id, ranked)
            return ranked

    async def tastes(self, live: LiveRelease, users: Sequence[TasteQuery | InvalidEntry]) -> Tastes:
        """Return the taste vectors of histories. An invalid history gets an `InvalidEntry`."""
        self.metrics.batch(len(users))
        tastes: list[Taste | InvalidEntry] = []
        for start in range(0, len(users), USERS_PER_GROUP):
            tastes += await self._compute_tastes(live, users[start : start + USERS_PER_GROUP])
        return Tastes.model_construct(release=live.id, model=live.model_id, dim=live.catalog.dim, tastes=tastes)

    async def popular_songs(self, live: LiveRelease, query: SongsQuery) -> PopularSongs:
        """Return one page of the most played songs."""
        catalog = live.catalog
        matching_songs = await find_matching(query, catalog)
        rows, cursor = await run_in_threadpool(_page_rows, "popular", catalog.by_plays, query, matching_songs)
        plays = catalog.plays[rows].tolist()
        songs = [
            PopularSong(song_id=song_id, title=title, artist=artist, plays=count)
            for (song_id, title, artist), count in zip(catalog.describe(rows), plays, strict=True)
        ]
        return PopularSongs(release=live.id, songs=songs, cursor=cursor)

    async def new_songs(self, live: LiveRelease, query: SongsQuery) -> NewSongs:
        """Return one page of the newest songs. Raises `NotFoundError` if the release has no retrieval."""
        catalog = live.catalog
        if catalog.first_days is None:
            raise NotFoundError(
                f"Release {live.id} has no retrieval, which contains the day of each song's first play; "
                "run `rayrec retrieval`, `rayrec rank` and `rayrec release create`"
            )
        matching_songs = await find_matching(query, catalog)
        rows, cursor = await run_in_threadpool(_page_rows, "new", catalog.by_age, query, matching_songs)
        songs = [
            NewSong(song_id=song_id, title=title, artist=artist, first_played=_format_day(day))
            for (song_id, title, artist), day in zip(
                catalog.describe(rows), catalog.first_days[rows].tolist(), strict=True
            )
        ]
        return NewSongs(release=live.id, songs=songs, cursor=cursor)

    async def take_plays(self, live: LiveRelease, events: Sequence[NewPlay | InvalidEntry]) -> PlaysTaken:
        """Store plays and likes of any users; return the outcome of each. They are stored when this returns."""
        valid_events = [(index, event) for index, event in enumerate(events) if isinstance(event, NewPlay)]
        outcomes: list[PlayOutcome] = ["invalid"] * len(events)
        indices_by_user, plays_by_user = read_plays([entry for _, entry in valid_events], live.catalog)
        for index, _ in valid_events:
            outcomes[index] = "unknown"

        def log_taken(user_id: str, outcomes_of_user: Sequence[Outcome]) -> None:
            for valid_index, user_outcome in zip(indices_by_user[user_id], outcomes_of_user, strict=True):
                if user_outcome == "taken":  # a play that is sent again is logged and counted once
                    self.metrics.plays("taken", 1)
                    self._log_event(live, valid_events[valid_index][1])

        for user_id, outcomes_of_user in (
            (await self.users.take(live, plays_by_user, log_taken)).items() if plays_by_user else ()
        ):
            for valid_index, user_outcome in zip(indices_by_user[user_id], outcomes_of_user, strict=True):
                outcomes[valid_events[valid_index][0]] = user_outcome
        counts = Counter(outcomes)
        for outcome in counts.keys() - {"taken"}:
            self.metrics.plays(outcome, counts[outcome])
        errors = [
            {"where": f"plays.{index}.{error['where']}".removesuffix(".body"), "detail": error["detail"]}
            for index, entry in enumerate(events)
            if isinstance(entry, InvalidEntry)
            for error in entry.errors
        ]
        return PlaysTaken.model_construct(
            release=live.id,
            taken=counts["taken"],
            repeated=counts["repeated"],
            rejected=counts["rejected"],
            unknown_songs=counts["unknown"],
            invalid=counts["invalid"],
            outcomes=outcomes,
            errors=errors[:20],
        )

    async def user_taste(self, live: LiveRelease, user_id: str, at: int | None) -> UserTaste:
        """Return the taste vectors of a stored user. Raises `NotFoundError` if the user is not in the store."""
        user = _require_stored(user_id, (await self.users.read(live, [user_id]))[0])
        state = user.state
        query_at = moment_after(state.last_played_at, at)
        vectors = await live.engine.pool.run(
            live.engine.parts.vectors, user.states, np.array([query_at]), ("short", "long")
        )
        return UserTaste(
            release=live.id,
            model=live.model_id,
            user_id=user_id,
            at=query_at,
            plays=state.plays,
            last_played_at=None if state.last_played_at == NEVER else state.last_played_at,
            rejected=state.rejected,
            short=vectors["short"][0].tolist(),
            long=vectors["long"][0].tolist(),
        )

    async def user_plays(self, live: LiveRelease, user_id: str, k: int) -> ListedPlays:
        """Return the last `k` plays of a stored user. Raises `NotFoundError` if the user is not in the store."""
        user = _require_stored(user_id, (await self.users.read(live, [user_id]))[0])
        query, context_names = read_stored(user, None), list(live.catalog.contexts)
        plays = [
            PlayedSong(
                song_id=song_id,
                title=title,
                artist=artist,
                played_at=played_at,
                contexts=[name for name in context_names if contexts >> live.catalog.contexts[name] & 1],
                skipped=skipped,
            )
            for (song_id, title, artist), played_at, contexts, skipped in zip(
                live.catalog.describe(query.plays.songs[-k:]),
                query.plays.played_at[-k:].tolist(),
                query.plays.contexts[-k:].tolist(),
                query.plays.skipped[-k:].tolist(),
                strict=True,
            )
        ]
        return ListedPlays(release=live.id, user_id=user_id, count=query.num_plays, plays=plays)

    async def forget(self, live: LiveRelease, user_id: str) -> None:
        """Delete a user; plays from before this moment are rejected from now on."""
        await self.users.forget(live, user_id, now_ms())

    async def add_songs(self, live: LiveRelease, sent_songs: SentSongs) -> SongsAdded:
        """Add songs until the next release. Every other replica has them within a second after this returns.

        Raises `HTTPException` 507 if there would be more than `MAX_ONLINE_SONGS`, and `FieldError` for a release day
        that does not exist or a content vector that differs in length from those of the catalog.
        """
        online = live.online
        songs = [read_song(song, sent_songs.where(index, "released")) for index, song in enumerate(sent_songs.songs)]
        index_of_dim = {len(song.vector): index for index, song in enumerate(songs) if song.vector is not None}
        if index_of_dim:
            expected = await run_in_threadpool(lambda: online.content_dim)
            for dim, index in index_of_dim.items():
                if dim != expected:
                    expected_text = f"content vectors of {expected} numbers" if expected else "no content vectors"
                    raise FieldError(
                        sent_songs.where(index, "vector"),
                        f"got {dim} numbers, but the catalog has {expected_text}; give a vector of the same "
                        "model, or none",
                    )
        await run_in_threadpool(self.users.store, live.catalog.lineage)
        is_added = await run_in_threadpool(online.add, songs)
        if is_added is None:
            raise HTTPException(
                507,
                f"the store would have more than {MAX_ONLINE_SONGS:,} songs that were added online, so none of the new "
                "songs was added; activate releases with the earlier songs first: a song leaves the store when the "
                "live release, the one before, and the releases of an experiment's arms contain it",
            )
        outcomes: list[SongOutcome] = ["added" if is_new else "known" for is_new in is_added]
        return SongsAdded.model_construct(
            release=live.id, added=sum(is_added), online=online.count, limit=MAX_ONLINE_SONGS, outcomes=outcomes
        )

    async def find_songs(self, live: LiveRelease, query: str, limit: int) -> SongMatches:
        """Find songs by words of their title or artist."""
        rows, count = await run_in_threadpool(live.catalog.search_names, query, limit)
        songs = [
            CatalogSong(song_id=song_id, title=title, artist=artist)
            for song_id, title, artist in live.catalog.describe(rows)
        ]
        return SongMatches(release=live.id, count=count, songs=songs)

    async def similar_songs(self, live: LiveRelease, song_id: str, k: int) -> SimilarSongs:
        """Return the songs most similar to a song. Raises `NotFoundError` if the song is not in the catalog."""
        row = int(live.catalog.find([song_id])[0])
        if row < 0:
            raise NotFoundError(f"Song {song_id!r} is not in the catalog; find IDs with /v1/songs?query=")
        path, songs = "exact", []
        if live.catalog.embedded(np.array([row])).any():
            selection = await live.engine.pool.run(live.engine.parts.similar, row, k)
            self.metrics.path(selection.path)
            path, songs = selection.path, _recommended_songs(live.catalog, selection)
        ((catalog_id, title, artist),) = live.catalog.describe(np.array([row]))
        plays = int(live.catalog.plays[row])
        return SimilarSongs(
            release=live.id, song_id=catalog_id, title=title, artist=artist, plays=plays, path=path, songs=songs
        )

    async def map_songs(self, live: LiveRelease, song_ids: Sequence[str]) -> SongPositions:
        """Return the positions of songs on a map of their embeddings, each song once."""
        rows = live.catalog.find(list(dict.fromkeys(song_ids)))
        is_embedded = live.catalog.embedded(rows)
        mapped_rows = np.array(list(dict.fromkeys(rows[is_embedded].tolist())), dtype=rows.dtype)
        positions = await live.engine.pool.run(live.engine.parts.layout, mapped_rows)
        points = [
            MapPoint(song_id=song_id, title=title, artist=artist, x=x, y=y)
            for (song_id, title, artist), (x, y) in zip(
                live.catalog.describe(mapped_rows), positions.tolist(), strict=True
            )
        ]
        return SongPositions(release=live.id, points=points, unknown_songs=int((~is_embedded).sum()))

    def card(self, live: LiveRelease) -> ModelCard:
        """Return the model card of the live release."""
        return model_card(self.holder.workspace, live.release)

    def report(self, live: LiveRelease) -> bytes:
        """Return the HTML page of the release's last report. Raises `NotFoundError` if it has none."""
        return report_page(self.holder.workspace, live.release)

    async def _recommend(
        self, live: LiveRelease, requests: Sequence[Assigned], alone: bool
    ) -> list[Recommendations | InvalidEntry]:
        stored_users = await self._read_stored_users(live, [assigned.request for assigned in requests])
        answers: dict[int, Recommendations | InvalidEntry] = {}
        queries: dict[int, UserQuery] = {}
        all_options: dict[int, tuple[AnswerOptions, int]] = {}
        pages: dict[int, RankingPage] = {}
        with self.metrics.stage("read"):
            for index, assigned in enumerate(requests):
                request = assigned.request
                try:
                    page = read_page(assigned.sent, "recommendations")  # the arm must not change the cursor
                    user = stored_users.get(request.user_id)
                    at = request.at if page.at is None else page.at
                    if page.at is not None and user is not None:
                        at = max(page.at, user.state.last_played_at)  # played since the last page
                    query = read_query(request, user, at, live.catalog)
                    matching_songs = await find_matching(request, live.catalog)
                    all_options[index] = read_options(request, query, page, live.catalog, matching_songs)
                    queries[index], pages[index] = query, page
                except InputError as error:
                    if not alone:
                        raise
                    answers[index] = InvalidEntry(detail=str(error), errors=field_errors(error))
        indices = list(queries)
        selections = await self._choose(live, list(queries.values()), [all_options[index][0] for index in indices])
        with self.metrics.stage("write"):
            for index, full_selection in zip(indices, selections, strict=True):
                query, page, (options, unknown_count) = queries[index], pages[index], all_options[index]
                page_selection = full_selection.take(slice(page.first, page.end))
                answered_songs = self._build_answer(live, query, page_selection, unknown=query.unknown + unknown_count)
                if options.explain:
                    add_reasons(answered_songs, page_selection, query.plays.songs, live.catalog)
                has_more = len(full_selection.songs) > page.end
                answer = Recommendations.model_construct(
                    **dict(answered_songs),
                    arm=requests[index].arm,
                    cursor=page.next(len(page_selection.songs), query.at) if has_more else None,
                )
                assigned = requests[index]
                self._log_answer(
                    assigned.request.user_id,
                    answer,
                    experiment=assigned.experiment,
                    arm=assigned.arm,
                    first=page.first,
                )
                answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def _log_answer(
        self,
        user_id: str | None,
        answer: AnsweredSongs,
        *,
        experiment: str | None = None,
        arm: str | None = None,
        first: int = 0,
    ) -> None:
        """Add an answer to the impression log, if there is one. `user_id` is None if the request has a history."""
        if self.log is None:
            return
        row = {
            "recommendation_id": answer.recommendation_id,
            "request_id": request_id.get(),
            "user_id": user_id,
            "moment": now_ms(),
            "at": answer.at,
            "release": answer.release,
            "experiment": experiment,
            "arm": arm,
            "first": first,
            "song_ids": [song.song_id for song in answer.songs],
            "explored": [song.explored for song in answer.songs],
            "probability": [song.probability for song in answer.songs],
        }
        self.log.add("answers", row)

    def _log_event(self, live: LiveRelease, event: NewPlay) -> None:
        """Add a play, skip or like to the impression log, if there is one."""
        if self.log is None:
            return
        row = {
            "event_id": event.event_id,
            "user_id": event.user_id,
            "song_id": spell_id(event.song_id) or event.song_id,  # spelled as in answers
            "type": event.type,
            "moment": (now := now_ms()),
            "played_at": now if event.played_at is None else event.played_at,
            "skipped": event.was_skipped(live.catalog.skip_below),
            "share_listened": event.share_listened,
            "recommendation_id": event.recommendation_id,
        }
        self.log.add("events", row)

    async def _read_stored_users(
        self, live: LiveRelease, requests: Sequence[UserOrHistory | InvalidEntry]
    ) -> dict[str | None, StoredUser]:
        """Return the stored users that requests name, by id; users who are not in the store are left out."""
        user_ids = sorted(
            {request.user_id for request in requests if isinstance(request, UserOrHistory) and request.user_id}
        )
        users = await self.users.read(live, user_ids) if user_ids else []
        return {user_id: user for user_id, user in zip(user_ids, users, strict=True) if user is not None}

    async def _choose(
        self, live: LiveRelease, queries: Sequence[UserQuery], all_options: Sequence[AnswerOptions]
    ) -> list[SelectedSongs]:
        """Choose the songs of each query: by taste, or popular songs if no play is known."""
        with_plays = [index for index, query in enumerate(queries) if len(query.plays)]
        with_states = [index for index in with_plays if queries[index].states is not None]
        without_states = [index for index in with_plays if queries[index].states is None]
        selections: dict[int, SelectedSongs] = {}
        for indices in (with_states, without_states):
            if indices:
                group = [queries[index] for index in indices]
                group_selections = await live.engine.pool.run(
                    live.engine.parts.answer,
                    query_histories(group),
                    np.array([query.at for query in group], dtype=np.int64),
                    [all_options[index] for index in indices],
                    _states_of(group),
                )
                selections |= dict(zip(indices, group_selections, strict=True))
        without_plays = [index for index, query in enumerate(queries) if not len(query.plays)]
        if without_plays:  # in a thread, since a filter may leave out nearly all songs of the order
            starting = live.catalog.starting
            group_selections = await run_in_threadpool(
                lambda: [choose_popular(starting, all_options[index]) for index in without_plays]
            )
            selections |= dict(zip(without_plays, group_selections, strict=True))
        return [selections[index] for index in range(len(queries))]

    def _build_answer(
        self, live: LiveRelease, query: UserQuery, selection: SelectedSongs, *, unknown: int
    ) -> AnsweredSongs:
        self.metrics.path(selection.path)
        return AnsweredSongs.model_construct(
            recommendation_id=uuid.uuid4().hex,
            release=live.id,
            at=query.at,
            source="popular" if selection.path == "popular" else "taste",
            path=selection.path,
            plays=query.num_plays,
            unknown_songs=unknown,
            songs=_recommended_songs(live.catalog, selection),
        )

    async def _compute_tastes(
        self, live: LiveRelease, users: Sequence[TasteQuery | InvalidEntry]
    ) -> list[Taste | InvalidEntry]:
        answers: dict[int, Taste | InvalidEntry] = {}
        queries: dict[int, UserQuery] = {}
        with self.metrics.stage("read"):
            for index, user in enumerate(users):
                if isinstance(user, InvalidEntry):
                    answers[index] = user
                    continue
                try:
                    queries[index] = read_history(user.history, user.at, live.catalog)
                except InputError as error:
                    answers[index] = InvalidEntry(detail=str(error), errors=field_errors(error))
        if queries:
            at = np.array([query.at for query in queries.values()], dtype=np.int64)
            engine = live.engine
            states = await engine.pool.run(engine.parts.states, query_histories(list(queries.values())))
            vectors = await engine.pool.run(engine.parts.vectors, states, at, ("short", "long"))
            for (index, query), short, long in zip(queries.items(), vectors["short"], vectors["long"], strict=True):
                answers[index] = Taste.model_construct(
                    at=query.at,
                    plays=query.num_plays,
                    unknown_songs=query.unknown,
                    short=short.tolist(),
                    long=long.tolist(),
                )
        return [answers[index] for index in range(len(users))]


def open_service(
    workspace: Workspace, config: ServeConfig, *, replica: str | None = None, keys: Keys | None = None
) -> Service:
    """Open a service with model and index in this process, which follows the live release. The caller closes it.

    Raises `InputError` if the service needs API keys and has none.
    """
    replica_name = replica or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    metrics, pool = Metrics(replica_name), Pool(config.max_waiting)
    metrics.watch_waiting(lambda: pool.waiting)

    users = StoredUsers(workspace, config.store, metrics)

    def load(release_id: str) -> LiveRelease:
        use_one_thread()
        prepare(workspace, release_id)
        release, recommender = load_parts(workspace, release_id)
        catalog = load_served_catalog(workspace, release, recommender)
        engine = Engine(Parts(recommender, metrics), pool)
        store = partial(users.existing_store, catalog.lineage)
        next_number = partial(users.next_song_number, catalog.lineage)
        online = OnlineSongs(workspace, release, catalog, engine, store, next_number)
        try:
            online.refresh()
        except (NotReadyError, StoreUnavailableError) as error:  # the watch reads them later
            log.warning("songs that were added online cannot be read yet: %s", error)
        return LiveRelease(release=release, catalog=catalog, engine=engine, online=online)

    return make_service(workspace, config, keys or load_keys(config), metrics, users, load)


def make_service(
    workspace: Workspace,
    config: ServeConfig,
    keys: Keys,
    metrics: Metrics,
    users: StoredUsers,
    load: Callable[[str], LiveRelease],
) -> Service:
    """Make a service that loads releases with `load`, which takes an id, and follows the live release.

    Raises `RayrecError` if a release that an arm of the experiment names cannot be loaded, or if the access log cannot
    be written.
    """
    access = AccessLog(config.access_log) if config.access_log else None
    # If an arm names the release that is live, both use the same object.
    arm_releases = {
        release_id: load(release_id) for release_id in (config.experiment.releases if config.experiment else ())
    }

    def record_switch(live: LiveRelease) -> None:
        metrics.release(live.id, live.model_id)
        metrics.watch_cache("masks", live.catalog.mask_lookups)

    holder = ReleaseHolder(
        workspace=workspace,
        load=lambda release_id: arm_releases.get(release_id) or load(release_id),
        reports=Reports(workspace),
        replica=metrics.replica,
        watch_seconds=config.watch_seconds,
        on_switch=record_switch,
        arms=list(arm_releases),
    )
    log = None
    if config.log_impressions:
        bounds = LogBounds(
            seconds=config.log_seconds, rows=config.log_rows, disk_bytes=config.log_megabytes * 1_000_000
        )
        log = ImpressionLog(workspace, metrics.replica, bounds, metrics.logged)
    service = Service(holder, config, keys, metrics, users, Arms(config.experiment, arm_releases), log, access)
    service.start()  # last, since its threads would go on after an error
    return service


def use_one_thread() -> None:
    """Limit torch to one thread: spinning threads of several replicas on the same cores starve each other."""
    import torch

    torch.set_num_threads(1)


def _states_of(queries: Sequence[UserQuery]) -> States | None:
    """Return the network states of all queries together; None if no query has states."""
    states = [query.states for query in queries if query.states is not None]
    if not states:
        return None
    return States(
        hidden=np.concatenate([user_states.hidden for user_states in states]),
        last_played_at=np.concatenate([user_states.last_played_at for user_states in states]),
    )


def _page_rows(
    ranking: Literal["popular", "new"], order: np.ndarray, query: SongsQuery, matching_songs: SongSet | None
) -> tuple[np.ndarray, str | None]:
    """Return one page of `order`, int32 song rows, with `matching_songs` only; and the cursor of the next page."""
    page = read_page(query, ranking)
    rows = order if matching_songs is None else first_of_order(order, matching_songs.holds, page.end + 1)
    page_rows = rows[page.first : page.end]
    has_more = page.end < len(rows)
    return page_rows, page.next(len(page_rows)) if has_more else None


def _format_day(day: int) -> str | None:
    """Return `day`, counted in days since 1970 UTC, as YYYY-MM-DD; None for a song without plays."""
    return None if day == NOT_PLAYED else (EPOCH + timedelta(days=day)).date().isoformat()


def _require_stored(user_id: str, user: StoredUser | None) -> StoredUser:
    if user is None:
        raise NotFoundError(
            f"User {user_id!r} is not in the store; send plays, or load states with `rayrec states load`"
        )
    return user


def _recommended_songs(catalog: ServedCatalog, selection: SelectedSongs) -> list[RecommendedSong]:
    songs = [
        RecommendedSong.model_construct(song_id=song_id, title=title, artist=artist, score=score)
        for (song_id, title, artist), score in zip(
            catalog.describe(selection.songs), selection.scores.tolist(), strict=True
        )
    ]
    if selection.probabilities is not None:
        for song, probability in zip(songs, selection.probabilities.tolist(), strict=True):
            song.explored, song.probability = not np.isnan(probability), None if np.isnan(probability) else probability
    return songs


def add_reasons(
    answer: AnsweredSongs, selection: SelectedSongs, played_songs: np.ndarray, catalog: ServedCatalog
) -> None:
    """Add the reasons of each song and the user's last plays to an answer. `played_songs` are song rows, int32 (P,)."""
    last_plays = catalog.describe(played_songs[-SHOWN_PLAYS:])
    answer.last_plays = [
        CatalogSong(song_id=song_id, title=title, artist=artist) for song_id, title, artist in last_plays
    ]
    last_title = last_plays[-1][1] if last_plays else None
    for song, reasons in zip(answer.songs, reasons_of(selection, last_title), strict=True):
        song.reasons = reasons
