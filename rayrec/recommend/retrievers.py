"""Retrievers: each proposes a bounded number of songs for a query, at a cost that no size of catalog changes.

Q queries, N songs, E proposed songs of all queries together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.data.ragged import best_of_each, first_of_each, highest_of_each, places_in, ranges, stable_order
from rayrec.data.split import DAY_MS
from rayrec.recommend.base import NO_SONG, HorizonName, Pairs, QueryBatch
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.stored_retrieval import MAX_DISTANCE, UNIT, Retrieval, SongGroups
from rayrec.recommend.two_step_config import RankedPart, RetrievalConfig


@dataclass(frozen=True, kw_only=True)
class Proposals(Pairs):
    """What a retriever proposes, sorted by query and song."""

    scores: np.ndarray  # float32 (E,), above 0
    ranks: np.ndarray  # int64 (E,), from 0, within the query
    entries: int = 0  # of postings, rules and lists of songs that were read for all queries together

    @classmethod
    def best(
        cls,
        rows: np.ndarray,
        songs: np.ndarray,
        scores: np.ndarray,
        *,
        num_songs: int,
        count: int,
        entries: int = 0,
    ) -> Proposals:
        """The `count` best of each query, rows ascending; each pair once, equal scores in the order of song rows."""
        best, ranks = best_of_each(rows, scores, songs, count)
        by_song = np.lexsort((songs[best], rows[best]))
        best = best[by_song]
        return cls(
            num_songs=num_songs,
            rows=rows[best],
            songs=songs[best].astype(np.int64),
            scores=scores[best].astype(np.float32),
            ranks=ranks[by_song],
            entries=entries,
        )

    @classmethod
    def summed(
        cls,
        rows: np.ndarray,
        songs: np.ndarray,
        scores: np.ndarray,
        *,
        num_songs: int,
        count: int,
        entries: int = 0,
    ) -> Proposals:
        """As `best`, of rows in any order, where the scores of a pair that comes more than once add up."""
        pairs, sums = summed_pairs(rows, songs, scores, num_songs)
        return cls.best(pairs.rows, pairs.songs, sums, num_songs=num_songs, count=count, entries=entries)


def summed_pairs(rows: np.ndarray, songs: np.ndarray, scores: np.ndarray, num_songs: int) -> tuple[Pairs, np.ndarray]:
    """Pairs of a query and a song, each once, and the sum of the scores of each."""
    keys = rows * num_songs + songs
    order = stable_order(keys)
    first = first_of_each(keys[order])
    sums = np.add.reduceat(scores[order], first) if len(first) else scores[:0]
    return Pairs(num_songs=num_songs, rows=rows[order[first]], songs=songs[order[first]]), sums


class Retriever(ABC):
    """Proposes songs for queries from what is known of each and of its plays."""

    name: str  # as features and reports spell it

    @abstractmethod
    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """At most `count` songs a query with their scores."""

    def most_entries(self, count: int, config: RetrievalConfig) -> int:
        """The bound of a query's work: entries read at most, of a retrieval with these settings, for `count` songs.

        0 where a retriever reads the user's own plays alone, or an index, whose work its `nprobe` bounds.
        """
        return 0


class TasteRetriever(Retriever):
    """The songs nearest to the taste vector of a horizon, from the index."""

    def __init__(
        self, index: SongIndex, horizon: HorizonName, scale: float, *, name: str = "", songs: np.ndarray | None = None
    ) -> None:
        """`scale` makes logits of cosines: the inverse of the temperature that the network was trained with.

        `songs`, int64 (n,), are the song rows of the index's rows where it is one of some songs.
        """
        self.name, self._index, self._horizon, self._scale = name or f"taste_{horizon}", index, horizon, scale
        self._songs = songs

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The `count` songs of highest cosine, scored exp(logit) over the best; none where nothing is known."""
        vectors = batch.short_vectors if self._horizon == "short" else batch.long_vectors
        songs, cosines = self._index.search(vectors, count)
        known = np.logical_and(songs != NO_SONG, vectors.any(axis=1, keepdims=True))
        scores = np.exp(self._scale * (cosines - cosines[:, :1]))
        rows = np.repeat(np.arange(len(batch)), known.sum(axis=1))
        song_rows = songs[known] if self._songs is None else self._songs[songs[known]]
        return Proposals.best(rows, song_rows, scores[known], num_songs=batch.num_songs, count=count)


@dataclass(frozen=True, kw_only=True)
class SessionKnnSettings:
    """V-STAN's weights (Ludewig et al. 2020)."""

    last_plays: int = 10  # that sessions are compared with
    neighbors: int = 200  # sessions that vote, the most similar
    plays_decay: float = 2.0  # plays since, after which a play weighs 1/e
    days_decay: float = 365.0  # days since, after which a session weighs 1/e
    places_decay: float = 5.0  # places from the matched song, after which a song weighs 1/e
    places: int = 20  # on both sides of the matched song that are looked at
    just_played: float = 0.25  # weight of a song that is among the last plays


# Of what the user likes over the last 50 plays, in whatever order: fades five to ten times slower.
HISTORY_KNN = SessionKnnSettings(last_plays=50, neighbors=300, plays_decay=25.0, places_decay=50.0)


class SessionRetriever(Retriever):
    """Session kNN over the newest sessions of each of the last songs: V-STAN's weights, VMIS-kNN's postings.

    A session's similarity is the weight of the last plays that it shares, over the square root of its number of songs,
    less the older it is. A song scores the similarity of the sessions that hold it, less the farther it stands from
    the song that was matched last.
    """

    def __init__(
        self, retrieval: Retrieval, settings: SessionKnnSettings | None = None, *, name: str = "sessions"
    ) -> None:
        self.name, self._sessions, self._settings = name, retrieval.sessions, settings or SessionKnnSettings()

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The `count` songs of most weight."""
        settings, sessions = self._settings, self._sessions
        plays = batch.latest(settings.last_plays)
        rows, songs, back = batch.rows[plays], batch.songs[plays], batch.back[plays]
        held = songs < sessions.num_songs
        rows, songs, back = rows[held], songs[held], back[held]
        # Entries of the postings: each is a session that holds one of the last songs.
        entries_of = sessions.song_offsets[songs + 1] - sessions.song_offsets[songs]
        entry = ranges(sessions.song_offsets[songs], entries_of)
        play = np.repeat(np.arange(len(songs)), entries_of)
        session, place = sessions.song_sessions[entry].astype(np.int64), sessions.song_places[entry].astype(np.int64)
        pair = rows[play] * max(1, len(sessions)) + session
        order = stable_order(pair * settings.last_plays + back[play])  # the match of the latest play first
        session, place, play = session[order], place[order], play[order]
        first = first_of_each(pair[order])
        weights = np.exp(-back[play] / settings.plays_decay)
        similarity = np.add.reduceat(weights, first) if len(first) else weights
        row, session, match = rows[play[first]], session[first], place[first]
        lengths = sessions.offsets[session + 1] - sessions.offsets[session]
        days = np.maximum(0, batch.queries.at[row] - sessions.ended_at[session]) / DAY_MS
        similarity = similarity / np.sqrt(lengths) * np.exp(-days / settings.days_decay)
        nearest = highest_of_each(row, similarity, settings.neighbors)
        nearest = nearest[np.lexsort((session[nearest], -similarity[nearest], row[nearest]))]
        nearest = nearest[places_in(row[nearest]) < settings.neighbors]
        row, session, match = row[nearest], session[nearest], match[nearest]
        similarity, lengths = similarity[nearest], lengths[nearest]
        # The songs of the neighbors around the matched one.
        left = np.maximum(0, match - settings.places)
        neighbor_counts = np.minimum(lengths, match + settings.places + 1) - left
        position = ranges(sessions.offsets[session] + left, neighbor_counts)
        neighbor = np.repeat(np.arange(len(row)), neighbor_counts)
        apart = np.abs(position - (sessions.offsets[session] + match)[neighbor])
        scores = similarity[neighbor] * np.exp(-apart / settings.places_decay)
        voted = sessions.songs[position].astype(np.int64)
        pairs, sums = summed_pairs(row[neighbor], voted, scores, batch.num_songs)
        just = batch.user_songs.back < settings.last_plays
        played = pairs.find(batch.user_songs.keys[just])
        sums[played[played >= 0]] *= settings.just_played
        return Proposals.best(
            pairs.rows,
            pairs.songs,
            sums,
            num_songs=batch.num_songs,
            count=count,
            entries=len(entry) + len(position),
        )

    def most_entries(self, count: int, config: RetrievalConfig) -> int:
        """The sessions of the last plays, and the songs around the matched one in each neighbor."""
        settings = self._settings
        return settings.last_plays * config.sessions_per_song + settings.neighbors * (2 * settings.places + 1)


class RuleRetriever(Retriever):
    """What followed the last song most often, weighted 1/distance; or what followed with no song between."""

    def __init__(self, retrieval: Retrieval, *, at_once: bool = False) -> None:
        self.name, self._rules = "next_rules" if at_once else "rules", retrieval.rules
        self._values, self._unit = (self._rules.at_once, 1) if at_once else (self._rules.weights, UNIT)

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The `count` strongest rules of the last song."""
        last = batch.last_songs
        rows = np.flatnonzero((last >= 0) & (last < self._rules.num_songs))
        starts = self._rules.offsets[last[rows]]
        counts = self._rules.offsets[last[rows] + 1] - starts
        entry = ranges(starts, counts)
        rows, scores = np.repeat(rows, counts), self._values[entry] / np.float32(self._unit)
        some = np.flatnonzero(scores > 0)
        songs = self._rules.followers[entry[some]]
        return Proposals.best(
            rows[some], songs, scores[some], num_songs=batch.num_songs, count=count, entries=len(entry)
        )

    def most_entries(self, count: int, config: RetrievalConfig) -> int:
        """The followers of the last song."""
        return config.rules_per_song


@dataclass(frozen=True, kw_only=True)
class RecentRulesSettings:
    """How far back rules look."""

    last_plays: int = 10
    decay: float = 0.75  # of the weight of a song with each play since
    followers: int = 40  # of each of the last songs, the strongest


HISTORY_RULES = RecentRulesSettings(last_plays=50, decay=0.97, followers=20)


class RecentRulesRetriever(Retriever):
    """What followed the last songs, those of each as shares, less the longer a song ago."""

    def __init__(
        self, retrieval: Retrieval, settings: RecentRulesSettings | None = None, *, name: str = "recent_rules"
    ) -> None:
        self.name, self._rules, self._settings = name, retrieval.rules, settings or RecentRulesSettings()

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The `count` songs of most weight."""
        settings = self._settings
        plays = batch.latest(settings.last_plays)
        plays = plays[batch.songs[plays] < self._rules.num_songs]
        songs = batch.songs[plays]
        starts = self._rules.offsets[songs]
        counts = np.minimum(self._rules.offsets[songs + 1] - starts, settings.followers)
        entry = ranges(starts, counts)
        play = np.repeat(plays, counts)
        strongest = self._rules.weights[np.minimum(starts, max(0, len(self._rules.weights) - 1))] + UNIT
        shares = self._rules.weights[entry] / np.repeat(strongest, counts)
        return Proposals.summed(
            batch.rows[play],
            self._rules.followers[entry].astype(np.int64),
            shares * settings.decay ** batch.back[play],
            num_songs=batch.num_songs,
            count=count,
            entries=len(entry),
        )

    def most_entries(self, count: int, config: RetrievalConfig) -> int:
        """The strongest followers of the last plays."""
        return self._settings.last_plays * self._settings.followers


class UserTopRetriever(Retriever):
    """The user's own songs by ACT-R base level: those played often and lately."""

    name = "user_top"

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The `count` songs of highest activation."""
        own = batch.user_songs
        return Proposals.best(own.rows, own.songs, np.exp(own.base_level), num_songs=batch.num_songs, count=count)


class UserRulesRetriever(Retriever):
    """What followed the last song when this user played it before."""

    name = "user_rules"

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The `count` songs of most weight, Σ 1/distance up to 10 plays apart."""
        earlier = np.flatnonzero((batch.songs == batch.last_songs[batch.rows]) & (batch.back > 0))
        rows = batch.rows[earlier]
        reach = np.minimum(batch.back[earlier], MAX_DISTANCE)
        position = ranges(earlier + 1, reach)
        origin = np.repeat(np.arange(len(earlier)), reach)
        scores = 1.0 / (position - earlier[origin])
        return Proposals.summed(rows[origin], batch.songs[position], scores, num_songs=batch.num_songs, count=count)


class GroupRetriever(Retriever):
    """The songs of the artists, or of the albums, of the last plays, the most played of each."""

    last_plays, decay = 10, 0.7

    def __init__(self, name: str, groups: SongGroups, plays: np.ndarray) -> None:
        self.name, self._groups, self._plays = name, groups, plays

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The `count` songs of most weight; none where the catalog knows no groups."""
        plays = batch.latest(self.last_plays)
        plays = plays[batch.songs[plays] < len(self._groups.of_song)]
        group = self._groups.of_song[batch.songs[plays]].astype(np.int64)
        plays, group = plays[group >= 0], group[group >= 0]
        # Each group of a query once, with the weight of all its plays.
        groups = max(1, len(self._groups.offsets))
        keys = batch.rows[plays] * groups + group
        order = stable_order(keys)
        first = first_of_each(keys[order])
        weights = self.decay ** batch.back[plays][order]
        weights = np.add.reduceat(weights, first) if len(first) else weights
        rows, group = np.divmod(keys[order][first], groups)
        starts = self._groups.offsets[group]
        counts = np.minimum(self._groups.offsets[group + 1] - starts, count)
        entry = ranges(starts, counts)
        songs = self._groups.songs[entry].astype(np.int64)
        scores = np.repeat(weights, counts) * np.log1p(self._plays[songs] + 1.0)
        return Proposals.best(
            np.repeat(rows, counts), songs, scores, num_songs=batch.num_songs, count=count, entries=len(entry)
        )

    def most_entries(self, count: int, config: RetrievalConfig) -> int:
        """`count` songs of the group of each of the last plays."""
        return self.last_plays * count


class PopularRetriever(Retriever):
    """What was played most of late, the same for everybody."""

    name = "popular"

    def __init__(self, retrieval: Retrieval) -> None:
        self._songs = retrieval.popular

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """The first `count` songs."""
        songs = np.asarray(self._songs[:count], dtype=np.int64)
        scores = 1.0 / np.arange(1, len(songs) + 1)
        rows = np.repeat(np.arange(len(batch)), len(songs))
        return Proposals.best(
            rows,
            np.tile(songs, len(batch)),
            np.tile(scores, len(batch)),
            num_songs=batch.num_songs,
            count=count,
            entries=len(rows),
        )

    def most_entries(self, count: int, config: RetrievalConfig) -> int:
        """The first `count` songs."""
        return count


# How many songs each retriever proposes for a query.
COUNTS = {
    "taste_short": 100,
    "taste_long": 50,
    "sessions": 100,
    "rules": 100,
    "next_rules": 50,
    "recent_rules": 50,
    "history_sessions": 100,
    "history_rules": 50,
    "user_top": 100,
    "user_rules": 30,
    "artists": 50,
    "albums": 30,
    "popular": 20,
    "new_content": 20,
    "new_artists": 20,
    "new_albums": 20,
}


def make_retrievers(
    retrieval: Retrieval,
    index: SongIndex,
    *,
    scales: tuple[float, float] = (1.0, 1.0),
    without: RankedPart | None = None,
) -> list[Retriever]:
    """All retrievers but those of `without`, and those of artists and albums where the catalog knows any.

    `scales` make logits of the cosines of the short and the long horizon.
    """
    plays = retrieval.plays.plays
    everything: list[Retriever] = [
        TasteRetriever(index, "short", scales[0]),
        TasteRetriever(index, "long", scales[1]),
        SessionRetriever(retrieval),
        RuleRetriever(retrieval),
        RuleRetriever(retrieval, at_once=True),
        RecentRulesRetriever(retrieval),
        SessionRetriever(retrieval, HISTORY_KNN, name="history_sessions"),
        RecentRulesRetriever(retrieval, HISTORY_RULES, name="history_rules"),
        UserTopRetriever(),
        UserRulesRetriever(),
        *([GroupRetriever("artists", retrieval.artists, plays)] if retrieval.artists else []),
        *([GroupRetriever("albums", retrieval.albums, plays)] if retrieval.albums else []),
        PopularRetriever(retrieval),
    ]
    return [retriever for retriever in everything if without is None or retriever.name not in without.retrievers]


def make_new_song_retrievers(
    retrieval: Retrieval,
    vectors: np.ndarray,
    rows: np.ndarray,
    *,
    scale: float = 1.0,
    without: RankedPart | None = None,
) -> list[Retriever]:
    """Retrievers of songs without plays, int64 (n,) rows: by content, and of the artists and albums played last.

    `vectors`, float32 (N, D), are those of all songs; `retrieval` knows the artists and albums of these, too.
    """
    index = SongIndex.build(vectors[rows], IndexConfig(kind="flat"))
    everything: list[Retriever] = [TasteRetriever(index, "short", scale, name="new_content", songs=rows)]
    for name, groups in (("new_artists", retrieval.artists), ("new_albums", retrieval.albums)):
        everything.append(GroupRetriever(name, groups.listing(rows), np.zeros(len(groups.of_song), dtype=np.int64)))
    return [retriever for retriever in everything if without is None or retriever.name not in without.retrievers]


@dataclass(frozen=True, kw_only=True)
class Candidates(Pairs):
    """The union of what all retrievers propose, sorted by query and song."""

    proposals: dict[str, Proposals]  # by retriever
    positions: dict[str, np.ndarray]  # int64, where each proposal stands among the candidates

    @classmethod
    def union(
        cls, batch: QueryBatch, proposals: dict[str, Proposals], extra_keys: np.ndarray | None = None
    ) -> Candidates:
        """Of what retrievers propose for a batch, and of the pairs of `extra_keys`, int64."""
        extra_keys = np.zeros(0, np.int64) if extra_keys is None else extra_keys
        keys = np.unique(np.concatenate([extra_keys, *(proposal.keys for proposal in proposals.values())]))
        rows, songs = np.divmod(keys, max(1, batch.num_songs))
        return cls(
            num_songs=batch.num_songs,
            rows=rows,
            songs=songs,
            proposals=proposals,
            positions={name: np.searchsorted(keys, proposal.keys) for name, proposal in proposals.items()},
        )


def retrieve(
    retrievers: Sequence[Retriever],
    batch: QueryBatch,
    counts: dict[str, int] | None = None,
    extra_keys: np.ndarray | None = None,
) -> Candidates:
    """Ask all retrievers; `counts` are songs a query by the name of the retriever, those of COUNTS where not given.

    `extra_keys`, int64, are keys of pairs that are candidates whether a retriever proposes them or not.
    """
    counts = {**COUNTS, **(counts or {})}
    proposals = {retriever.name: retriever.propose(batch, counts[retriever.name]) for retriever in retrievers}
    return Candidates.union(batch, proposals, extra_keys)
