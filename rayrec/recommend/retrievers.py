"""Retrievers: each proposes a bounded number of songs for a query, at a cost that does not depend on the catalog size.

Shapes: Q queries, N songs, D dimensions, E proposed songs of all queries together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.data.moments import DAY_MS
from rayrec.data.ragged import group_of_each_item, group_starts, ranges, stable_order, sum_groups
from rayrec.data.top_k import top_ranked
from rayrec.recommend.base import NO_SONG, HorizonName, Pairs, QueryBatch
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.stored_retrieval import DIRECT_WEIGHT, MAX_DISTANCE, Retrieval, SongGroups
from rayrec.recommend.two_step_config import RankedPart, RetrievalConfig


@dataclass(frozen=True, kw_only=True)
class Proposals(Pairs):
    """The songs that a retriever proposes, sorted by query and song."""

    scores: np.ndarray  # float32 (E,), above 0
    ranks: np.ndarray  # int64 (E,), rank within the query, from 0
    entries: int = 0  # entries of postings, rules and song lists that were read for all queries together

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
        """Return the `count` best songs of each query; equal scores are sorted by song row.

        `rows`, the queries, must be ascending, and no pair of a query and a song may occur twice.
        """
        best, ranks = top_ranked(rows, scores, songs, count)
        song_order = np.lexsort((songs[best], rows[best]))
        best = best[song_order]
        return cls(
            num_songs=num_songs,
            rows=rows[best],
            songs=songs[best].astype(np.int64),
            scores=scores[best].astype(np.float32),
            ranks=ranks[song_order],
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
        """As `best`, for `rows` in any order; the scores of a pair that occurs more than once are added."""
        pairs, totals = sum_pairs(rows, songs, scores, num_songs)
        return cls.best(pairs.rows, pairs.songs, totals, num_songs=num_songs, count=count, entries=entries)


def sum_pairs(rows: np.ndarray, songs: np.ndarray, scores: np.ndarray, num_songs: int) -> tuple[Pairs, np.ndarray]:
    """Return the different pairs of a query and a song, and the sum of the scores of each pair."""
    keys = rows * num_songs + songs
    order = stable_order(keys)
    first_positions = group_starts(keys[order])
    totals = sum_groups(scores[order], first_positions)
    return Pairs(num_songs=num_songs, rows=rows[order[first_positions]], songs=songs[order[first_positions]]), totals


class Retriever(ABC):
    """Base class of retrievers: proposes songs for each query of a batch."""

    name: str  # as in features and reports

    @abstractmethod
    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return at most `count` songs per query, with their scores."""

    def max_entries(self, count: int, config: RetrievalConfig) -> int:
        """Return the maximum number of entries that a query for `count` songs reads from a retrieval with `config`.

        0 if a retriever reads only the user's own plays, or only an index, whose cost is bounded by its `nprobe`.
        """
        return 0


class TasteRetriever(Retriever):
    """Proposes the songs nearest to the taste vector of a horizon, with the index."""

    def __init__(
        self, index: SongIndex, horizon: HorizonName, scale: float, *, name: str = "", songs: np.ndarray | None = None
    ) -> None:
        """`scale` turns cosines into logits: it is the inverse of the temperature that the network was trained with.

        `songs`, int64 (n,), maps the rows of the index to song rows, if the index holds only some of the songs.
        """
        self.name, self._index, self._horizon, self._scale = name or f"taste_{horizon}", index, horizon, scale
        self._songs = songs

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the `count` songs of highest cosine, scored exp(logit - highest logit); none for a vector of zeros."""
        vectors = batch.short_vectors if self._horizon == "short" else batch.long_vectors
        nearest = self._index.rank(vectors, count)
        songs, cosines = nearest.songs, nearest.scores
        is_known = np.logical_and(songs != NO_SONG, vectors.any(axis=1, keepdims=True))
        scores = np.exp(self._scale * (cosines - cosines[:, :1]))
        rows = group_of_each_item(is_known.sum(axis=1))
        song_rows = songs[is_known] if self._songs is None else self._songs[songs[is_known]]
        return Proposals.best(rows, song_rows, scores[is_known], num_songs=batch.num_songs, count=count)


@dataclass(frozen=True, kw_only=True)
class SessionKnnSettings:
    """Settings of session kNN: V-STAN's weights (Ludewig et al. 2020)."""

    last_plays: int = 10  # number of last plays that are compared with sessions
    neighbors: int = 200  # most similar sessions whose songs are scored
    plays_decay: float = 2.0  # age of a play, in later plays, at which its weight is 1/e
    days_decay: float = 365.0  # age of a session, in days, at which its weight is 1/e
    distance_decay: float = 5.0  # distance from the matched song, in places, at which a song's weight is 1/e
    places: int = 20  # places on each side of the matched song whose songs are scored
    just_played: float = 0.25  # factor of the score of a song that is among the last plays


# For the taste in the last 50 plays: weights fall about ten times more slowly, so the order of plays matters little.
HISTORY_KNN = SessionKnnSettings(last_plays=50, neighbors=300, plays_decay=25.0, distance_decay=50.0)


class SessionRetriever(Retriever):
    """Session kNN over the newest sessions that hold one of the last songs: V-STAN's weights, VMIS-kNN's postings.

    A session's similarity is the summed weight of the last plays that it shares, divided by the square root of its
    number of songs, and falls with its age. A song's score is the summed similarity of the sessions that hold it; a
    session counts less the farther the song is from the matched song, which is the song of the session that the user
    played most recently.
    """

    def __init__(
        self, retrieval: Retrieval, settings: SessionKnnSettings | None = None, *, name: str = "sessions"
    ) -> None:
        self.name, self._sessions, self._settings = name, retrieval.sessions, settings or SessionKnnSettings()

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the `count` songs of highest score."""
        settings, postings = self._settings, self._sessions
        plays = batch.latest(settings.last_plays)
        rows, songs, later_plays = batch.rows[plays], batch.songs[plays], batch.back[plays]
        is_known = songs < postings.num_songs
        rows, songs, later_plays = rows[is_known], songs[is_known], later_plays[is_known]
        # Entries of the postings: each is a session that holds one of the last songs.
        entry_counts = postings.song_offsets[songs + 1] - postings.song_offsets[songs]
        entries = ranges(postings.song_offsets[songs], entry_counts)
        play_indices = group_of_each_item(entry_counts)
        session_rows = postings.song_sessions[entries].astype(np.int64)
        song_positions = postings.song_places[entries].astype(np.int64)
        pair_keys = rows[play_indices] * max(1, len(postings)) + session_rows
        # The match of the latest play comes first.
        order = stable_order(pair_keys * settings.last_plays + later_plays[play_indices])
        session_rows, song_positions, play_indices = session_rows[order], song_positions[order], play_indices[order]
        first_positions = group_starts(pair_keys[order])
        weights = np.exp(-later_plays[play_indices] / settings.plays_decay)
        similarity = sum_groups(weights, first_positions)
        query_rows = rows[play_indices[first_positions]]
        session_rows = session_rows[first_positions]
        match_positions = song_positions[first_positions]
        lengths = postings.offsets[session_rows + 1] - postings.offsets[session_rows]
        days = np.maximum(0, batch.queries.at[query_rows] - postings.ended_at[session_rows]) / DAY_MS
        similarity = similarity / np.sqrt(lengths) * np.exp(-days / settings.days_decay)
        nearest, _ = top_ranked(query_rows, similarity, session_rows, settings.neighbors)
        query_rows, session_rows, match_positions = query_rows[nearest], session_rows[nearest], match_positions[nearest]
        similarity, lengths = similarity[nearest], lengths[nearest]
        # The songs of the neighbors near the matched song.
        window_starts = np.maximum(0, match_positions - settings.places)
        window_lengths = np.minimum(lengths, match_positions + settings.places + 1) - window_starts
        window_entries = ranges(postings.offsets[session_rows] + window_starts, window_lengths)
        neighbor_indices = group_of_each_item(window_lengths)
        distances = np.abs(window_entries - (postings.offsets[session_rows] + match_positions)[neighbor_indices])
        scores = similarity[neighbor_indices] * np.exp(-distances / settings.distance_decay)
        window_songs = postings.songs[window_entries].astype(np.int64)
        pairs, totals = sum_pairs(query_rows[neighbor_indices], window_songs, scores, batch.num_songs)
        is_just_played = batch.user_songs.back < settings.last_plays
        played_pairs = pairs.find(batch.user_songs.keys[is_just_played])
        totals[played_pairs[played_pairs >= 0]] *= settings.just_played
        return Proposals.best(
            pairs.rows,
            pairs.songs,
            totals,
            num_songs=batch.num_songs,
            count=count,
            entries=len(entries) + len(window_entries),
        )

    def max_entries(self, count: int, config: RetrievalConfig) -> int:
        """The sessions of the songs of the last plays, and the songs near the matched song in each neighbor."""
        settings = self._settings
        return settings.last_plays * config.sessions_per_song + settings.neighbors * (2 * settings.places + 1)


class RuleRetriever(Retriever):
    """Proposes followers of the last song: within 10 plays, weighted 1/distance, or only direct ones (`at_once`)."""

    def __init__(self, retrieval: Retrieval, *, at_once: bool = False) -> None:
        self.name, self._rules = "next_rules" if at_once else "rules", retrieval.rules
        self._values, self._unit = (self._rules.at_once, 1) if at_once else (self._rules.weights, DIRECT_WEIGHT)

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the songs of the `count` strongest rules of the last song."""
        last_songs = batch.last_songs
        rows = np.flatnonzero((last_songs >= 0) & (last_songs < self._rules.num_songs))
        starts = self._rules.offsets[last_songs[rows]]
        counts = self._rules.offsets[last_songs[rows] + 1] - starts
        entries = ranges(starts, counts)
        rows, scores = np.repeat(rows, counts), self._values[entries] / np.float32(self._unit)
        positive = np.flatnonzero(scores > 0)
        songs = self._rules.followers[entries[positive]]
        return Proposals.best(
            rows[positive], songs, scores[positive], num_songs=batch.num_songs, count=count, entries=len(entries)
        )

    def max_entries(self, count: int, config: RetrievalConfig) -> int:
        """The followers of the last song."""
        return config.rules_per_song


@dataclass(frozen=True, kw_only=True)
class RecentRulesSettings:
    """Settings of `RecentRulesRetriever`: how many last plays count, and how much."""

    last_plays: int = 10
    decay: float = 0.75  # factor of a play's weight for each later play
    followers: int = 40  # strongest followers that are read for each of the last songs


HISTORY_RULES = RecentRulesSettings(last_plays=50, decay=0.97, followers=20)


class RecentRulesRetriever(Retriever):
    """Proposes the songs that followed the last songs; followers of older plays weigh less.

    The weight of a follower is relative to that of the strongest follower of the same song.
    """

    def __init__(
        self, retrieval: Retrieval, settings: RecentRulesSettings | None = None, *, name: str = "recent_rules"
    ) -> None:
        self.name, self._rules, self._settings = name, retrieval.rules, settings or RecentRulesSettings()

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the `count` songs of highest weight."""
        settings = self._settings
        plays = batch.latest(settings.last_plays)
        plays = plays[batch.songs[plays] < self._rules.num_songs]
        songs = batch.songs[plays]
        starts = self._rules.offsets[songs]
        counts = np.minimum(self._rules.offsets[songs + 1] - starts, settings.followers)
        entries = ranges(starts, counts)
        entry_plays = np.repeat(plays, counts)
        strongest_weights = (
            self._rules.weights[np.minimum(starts, max(0, len(self._rules.weights) - 1))] + DIRECT_WEIGHT
        )
        shares = self._rules.weights[entries] / np.repeat(strongest_weights, counts)
        return Proposals.summed(
            batch.rows[entry_plays],
            self._rules.followers[entries].astype(np.int64),
            shares * settings.decay ** batch.back[entry_plays],
            num_songs=batch.num_songs,
            count=count,
            entries=len(entries),
        )

    def max_entries(self, count: int, config: RetrievalConfig) -> int:
        """The strongest followers of the songs of the last plays."""
        return self._settings.last_plays * self._settings.followers


class UserTopRetriever(Retriever):
    """Proposes the user's own songs by ACT-R base level: songs played often and recently."""

    name = "user_top"

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the `count` songs of highest base level."""
        user_songs = batch.user_songs
        return Proposals.best(
            user_songs.rows, user_songs.songs, np.exp(user_songs.base_level), num_songs=batch.num_songs, count=count
        )


class UserRulesRetriever(Retriever):
    """Proposes the songs that followed the last song when this user played it earlier."""

    name = "user_rules"

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the `count` songs of highest weight: Σ 1/distance over pairs of plays at most 10 plays apart."""
        earlier_plays = np.flatnonzero((batch.songs == batch.last_songs[batch.rows]) & (batch.back > 0))
        rows = batch.rows[earlier_plays]
        follower_counts = np.minimum(batch.back[earlier_plays], MAX_DISTANCE)
        followers = ranges(earlier_plays + 1, follower_counts)
        play_indices = group_of_each_item(follower_counts)
        scores = 1.0 / (followers - earlier_plays[play_indices])
        return Proposals.summed(
            rows[play_indices], batch.songs[followers], scores, num_songs=batch.num_songs, count=count
        )


class GroupRetriever(Retriever):
    """Proposes the most played songs of the artists, or of the albums, of the last plays."""

    last_plays, decay = 10, 0.7

    def __init__(self, name: str, groups: SongGroups, plays: np.ndarray) -> None:
        self.name, self._groups, self._plays = name, groups, plays

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the `count` songs of highest weight; none if the catalog has no groups."""
        plays = batch.latest(self.last_plays)
        plays = plays[batch.songs[plays] < len(self._groups.of_song)]
        group_ids = self._groups.of_song[batch.songs[plays]].astype(np.int64)
        plays, group_ids = plays[group_ids >= 0], group_ids[group_ids >= 0]
        # Each group of a query once, with the summed weight of its plays.
        num_groups = max(1, len(self._groups.offsets))
        keys = batch.rows[plays] * num_groups + group_ids
        order = stable_order(keys)
        first_positions = group_starts(keys[order])
        weights = sum_groups(self.decay ** batch.back[plays][order], first_positions)
        rows, group_ids = np.divmod(keys[order][first_positions], num_groups)
        starts = self._groups.offsets[group_ids]
        counts = np.minimum(self._groups.offsets[group_ids + 1] - starts, count)
        entries = ranges(starts, counts)
        songs = self._groups.songs[entries].astype(np.int64)
        scores = np.repeat(weights, counts) * np.log1p(self._plays[songs] + 1.0)
        return Proposals.best(
            np.repeat(rows, counts), songs, scores, num_songs=batch.num_songs, count=count, entries=len(entries)
        )

    def max_entries(self, count: int, config: RetrievalConfig) -> int:
        """`count` songs for the group of each of the last plays."""
        return self.last_plays * count


class PopularRetriever(Retriever):
    """Proposes the songs that all users played most in the last 7 days, the same songs for every query."""

    name = "popular"

    def __init__(self, retrieval: Retrieval) -> None:
        self._songs = retrieval.popular

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """Return the first `count` songs."""
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

    def max_entries(self, count: int, config: RetrievalConfig) -> int:
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
    """Return all retrievers except those of `without`; those of artists and albums only if the catalog has any.

    `scales` turn the cosines of the short and of the long horizon into logits.
    """
    plays = retrieval.plays.plays
    all_retrievers: list[Retriever] = [
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
    return [retriever for retriever in all_retrievers if without is None or retriever.name not in without.retrievers]


def make_new_song_retrievers(
    retrieval: Retrieval,
    vectors: np.ndarray,
    rows: np.ndarray,
    *,
    scale: float = 1.0,
    without: RankedPart | None = None,
) -> list[Retriever]:
    """Return the retrievers of songs without plays, int64 (n,) `rows`: by vector, by artist and by album.

    `vectors`, float32 (N, D), are the vectors of all songs. `retrieval` must hold the artists and albums of the songs
    without plays, too.
    """
    index = SongIndex.build(vectors[rows], IndexConfig(kind="flat"))
    all_retrievers: list[Retriever] = [TasteRetriever(index, "short", scale, name="new_content", songs=rows)]
    for name, groups in (("new_artists", retrieval.artists), ("new_albums", retrieval.albums)):
        all_retrievers.append(GroupRetriever(name, groups.listing(rows), np.zeros(len(groups.of_song), dtype=np.int64)))
    return [retriever for retriever in all_retrievers if without is None or retriever.name not in without.retrievers]


@dataclass(frozen=True, kw_only=True)
class Candidates(Pairs):
    """The union of the songs that all retrievers propose, sorted by query and song."""

    proposals: dict[str, Proposals]  # by name of the retriever
    positions: dict[str, np.ndarray]  # by name of the retriever, int64: position of each proposal in the candidates

    @classmethod
    def union(
        cls, batch: QueryBatch, proposals: dict[str, Proposals], extra_keys: np.ndarray | None = None
    ) -> Candidates:
        """Return the union of the proposals for a batch and of the pairs with the keys `extra_keys`, int64."""
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
    extra_keys: np.ndarray | None = None,
) -> Candidates:
    """Return the candidates that all retrievers propose for a batch, as many songs per query as COUNTS says.

    The pairs with the keys `extra_keys`, int64, are candidates even if no retriever proposes them.
    """
    proposals = {retriever.name: retriever.propose(batch, COUNTS[retriever.name]) for retriever in retrievers}
    return Candidates.union(batch, proposals, extra_keys)
