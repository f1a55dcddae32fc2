"""Features of candidates: the inputs of the ranker, for each candidate and its query.

Shapes: Q queries, N songs, D dimensions, C candidates of all queries together, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rayrec.data.moments import DAY_MS, HOUR_MS
from rayrec.data.ragged import group_sizes, group_starts, stable_order, sum_groups
from rayrec.recommend.base import LATEST_PLAYS, QueryBatch
from rayrec.recommend.retrievers import Candidates
from rayrec.recommend.stored_retrieval import NO_GROUP, NOT_PLAYED, Retrieval, SongGroups
from rayrec.recommend.two_step_config import RankedPart, kept_features

RECENT = 10  # number of last plays that count as recent
REPEATS = 20  # number of last plays in which repeats are counted
LIFT_PLAYS = 5.0  # added to a song's plays before the strength of a rule is divided by them
SKIP_PLAYS = 10.0  # plays with the mean share of skips that are added to a song's plays, to smooth its share
NO_PLAY = -1.0  # value of plays or hours since a song, an artist or an album that the user has never played


@dataclass(frozen=True, kw_only=True)
class FeatureSources:
    """The data that features are computed from, apart from the queries."""

    retrieval: Retrieval
    song_vectors: np.ndarray  # float32 (N, D), normalized
    retrievers: tuple[str, ...]  # names, in the order of their features
    scales: tuple[float, float] = (1.0, 1.0)  # turn cosines of the short and long horizon into logits
    real_times: bool = True  # False if times only give the order of plays
    without: RankedPart | None = None  # the part whose features are left out

    @property
    def names(self) -> list[str]:
        """The names of the features, in the order of the columns."""
        names = self._all_names()
        return [names[position] for position in kept_features(names, self.without)]

    def _all_names(self) -> list[str]:
        group_names = [name for name, group in self._groups() if group]
        return [
            *(f"{retriever}_{suffix}" for retriever in self.retrievers for suffix in ("score", "share", "rank")),
            *CANDIDATE_FEATURES,
            *(SKIP_FEATURES if self._has_skips else []),
            *(LIKE_FEATURES if self.retrieval.has_likes else []),
            *(f"{group}_{suffix}" for group in group_names for suffix in GROUP_FEATURES),
            *QUERY_FEATURES,
            *(["recent_skips"] if self._has_skips else []),
            *(f"recent_{group}s" for group in group_names),
        ]

    @property
    def _has_skips(self) -> bool:
        return self.retrieval.plays.skips is not None

    def _groups(self) -> list[tuple[str, SongGroups]]:
        return [("artist", self.retrieval.artists), ("album", self.retrieval.albums)]

    def features(self, batch: QueryBatch, candidates: Candidates) -> np.ndarray:
        """float32 (C, F): one row for each candidate."""
        names = self._all_names()
        matrix = np.zeros((len(candidates.rows), len(names)), dtype=np.float32, order="F")
        columns = iter(range(matrix.shape[1]))

        def add_column(values: np.ndarray) -> None:
            matrix[:, next(columns)] = values

        for name in self.retrievers:
            proposals, positions = candidates.proposals[name], candidates.positions[name]
            totals = np.bincount(proposals.rows, weights=np.abs(proposals.scores), minlength=len(batch))
            retriever_columns = next(columns), next(columns), next(columns)
            matrix[positions, retriever_columns[0]] = proposals.scores
            matrix[positions, retriever_columns[1]] = proposals.scores / np.maximum(totals, 1e-12)[proposals.rows]
            matrix[positions, retriever_columns[2]] = 1.0 / (1.0 + proposals.ranks)
        self._add_candidate_features(batch, candidates, add_column)
        query_features = self._query_features(batch)
        for _, group in self._groups():
            if group:
                query_features.append(_group_features(batch, candidates, group, add_column))
        for values in query_features:
            add_column(values[candidates.rows])
        return matrix if self.without is None else matrix[:, kept_features(names, self.without)]

    def _add_candidate_features(
        self, batch: QueryBatch, candidates: Candidates, add_column: Callable[[np.ndarray], None]
    ) -> None:
        rows, songs, user_songs = candidates.rows, candidates.songs, batch.user_songs
        vectors = look_up(self.song_vectors, songs)
        first_positions = group_starts(rows)
        counts = group_sizes(first_positions, len(rows))
        for taste_vectors, scale in zip((batch.short_vectors, batch.long_vectors), self.scales, strict=True):
            cosines = np.einsum("cd,cd->c", vectors, taste_vectors[rows])
            add_column(cosines)
            # The logarithm of the softmax over the candidates of the query.
            logits = scale * cosines
            if len(first_positions):
                logits -= np.repeat(np.maximum.reduceat(logits, first_positions), counts)
                logits -= np.repeat(np.log(sum_groups(np.exp(logits), first_positions)), counts)
            add_column(logits)
        add_column(np.einsum("cd,cd->c", vectors, look_up(self.song_vectors, batch.last_songs)[rows]))
        nearest_cosines, mean_cosines = self._similarity_to_recent(batch, rows, vectors)
        add_column(nearest_cosines)
        add_column(mean_cosines)
        add_column(_proposal_counts(candidates))
        positions = user_songs.find(candidates.keys)
        is_heard = positions >= 0
        positions = np.where(is_heard, positions, 0)

        def user_values(values: np.ndarray, default: float) -> np.ndarray:
            return np.where(is_heard, values[positions], default) if len(values) else np.full(len(rows), default)

        history_lengths = np.maximum(1, np.diff(batch.offsets))
        add_column(user_values(user_songs.plays, 0))
        add_column(user_values(user_songs.plays / history_lengths[user_songs.rows], 0))
        add_column(user_values(user_songs.back, NO_PLAY))
        add_column(user_values(user_songs.hours, NO_PLAY) if self.real_times else np.zeros(len(rows)))
        add_column(user_values(user_songs.base_level, -20))
        add_column(user_values(user_songs.base_level_hours, -20) if self.real_times else np.zeros(len(rows)))
        add_column(user_values(user_songs.session_plays, 0))
        log_plays = np.log1p(look_up(self.retrieval.plays.plays, songs))
        log_recent_plays = np.log1p(look_up(self.retrieval.recent_plays, songs))
        add_column(log_plays)
        add_column(log_recent_plays)
        add_column(log_recent_plays - log_plays)
        add_column(self._age_days(batch, candidates) if self.real_times else np.zeros(len(rows)))
        rule_proposals, rule_positions = candidates.proposals.get("rules"), candidates.positions.get("rules")
        lifts = np.zeros(len(rows))
        if rule_proposals is not None and rule_positions is not None:
            lifts[rule_positions] = rule_proposals.scores / (LIFT_PLAYS + np.expm1(log_plays[rule_positions]))
        add_column(lifts)
        if self.retrieval.plays.skips is not None:
            add_column(user_values(user_songs.skips, 0))
            add_column(user_values(user_songs.skips / np.maximum(1, user_songs.plays), 0))
            skips, mean_skip_share = look_up(self.retrieval.plays.skips, songs), self.retrieval.skip_share
            add_column((skips + SKIP_PLAYS * mean_skip_share) / (np.expm1(log_plays) + SKIP_PLAYS) - mean_skip_share)
        if self.retrieval.has_likes:
            add_column(batch.liked.find(candidates.keys) >= 0)

    def _age_days(self, batch: QueryBatch, candidates: Candidates) -> np.ndarray:
        """float64 (C,): days since the first play of each candidate by any user; NO_PLAY if there was none."""
        first_days = look_up(self.retrieval.plays.first_days, candidates.songs, NOT_PLAYED).astype(np.int64)
        days = batch.queries.at[candidates.rows] // DAY_MS - first_days
        return np.where(first_days == NOT_PLAYED, NO_PLAY, np.maximum(0, days))

    def _similarity_to_recent(
        self, batch: QueryBatch, rows: np.ndarray, vectors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest and the mean cosine of each candidate with the last ten songs; 0 if there are none."""
        latest_plays = batch.latest(RECENT)
        recent_vectors = np.zeros((len(batch), RECENT, self.song_vectors.shape[1]), dtype=np.float32)
        recent_vectors[batch.rows[latest_plays], batch.back[latest_plays]] = look_up(
            self.song_vectors, batch.songs[latest_plays]
        )
        bounds = np.searchsorted(rows, np.arange(len(batch) + 1)).tolist()
        cosines = np.zeros((len(rows), RECENT), dtype=np.float32)
        for row, (start, end) in enumerate(pairwise(bounds)):
            np.matmul(vectors[start:end], recent_vectors[row].T, out=cosines[start:end])
        recent_counts = np.maximum(1, np.bincount(batch.rows[latest_plays], minlength=len(batch)))
        return cosines.max(axis=1), cosines.sum(axis=1) / recent_counts[rows]

    def _query_features(self, batch: QueryBatch) -> list[np.ndarray]:
        """Return the features QUERY_FEATURES, and the recent share of skips if the data has skips, (Q,) each."""
        lengths = np.diff(batch.offsets)
        session_lengths = np.bincount(batch.rows, weights=batch.in_session, minlength=len(batch))
        last_plays = np.where(lengths > 0, batch.offsets[1:] - 1, 0)
        hours_since = np.full(len(batch), NO_PLAY)
        if len(batch.played_at):
            hours_since = np.where(lengths > 0, (batch.queries.at - batch.played_at[last_plays]) / HOUR_MS, NO_PLAY)
        hours_of_day = (batch.queries.at // HOUR_MS) % 24
        return [
            np.log1p(np.minimum(batch.queries.plays_before, LATEST_PLAYS)),  # a server reads at most this many plays
            session_lengths,
            hours_since if self.real_times else np.zeros(len(batch)),
            _repeat_share(batch, lengths),
            _repeat_share(batch, session_lengths.astype(np.int64)),
            hours_of_day if self.real_times else np.zeros(len(batch)),
            np.bincount(batch.user_songs.rows, minlength=len(batch)) / np.maximum(1, lengths),
            self._session_similarity(batch),
            *([_skip_share(batch, lengths)] if self._has_skips else []),
        ]

    def _session_similarity(self, batch: QueryBatch) -> np.ndarray:
        """float64 (Q,): the cosine of the mean of the session's last ten songs with the long-horizon vector.

        0 if no session has begun. The ranker can learn from it when the session matters more than older plays.
        """
        latest_plays = batch.latest(RECENT)
        latest_plays = latest_plays[batch.in_session[latest_plays]]
        session_vectors = np.zeros((len(batch), self.song_vectors.shape[1]))
        np.add.at(session_vectors, batch.rows[latest_plays], look_up(self.song_vectors, batch.songs[latest_plays]))
        norms = np.linalg.norm(session_vectors, axis=1)
        return np.asarray(np.einsum("qd,qd->q", session_vectors, batch.long_vectors) / np.where(norms > 0, norms, 1))


CANDIDATE_FEATURES = [
    "cosine_short",
    "logit_short",
    "cosine_long",
    "logit_long",
    "cosine_last_song",
    "cosine_nearest_recent",
    "cosine_mean_recent",
    "proposed_by",
    "user_plays",
    "user_share",
    "user_plays_since",
    "user_hours_since",
    "user_base_level",
    "user_base_level_hours",
    "user_session_plays",
    "plays",
    "recent_plays",
    "trend",
    "age_days",
    "rules_lift",
]
# Features that exist only if the data has skips or likes. `skip_share` is the skipped share of a song's plays minus the
# skipped share of all plays.
SKIP_FEATURES = ["user_skips", "user_skip_share", "skip_share"]
LIKE_FEATURES = ["user_liked"]
GROUP_FEATURES = ["of_last_song", "recent_share", "user_plays", "plays_since"]
QUERY_FEATURES = [
    "history_length",
    "session_length",
    "hours_since_last",
    "recent_repeats",
    "session_repeats",
    "hour",
    "different_songs",
    "cosine_session_long",
]


def look_up(values: np.ndarray, songs: np.ndarray, default: int = 0) -> np.ndarray:
    """Return the values of `songs`, int; `default` for songs that are -1 or beyond the end of `values`."""
    is_known = (songs >= 0) & (songs < len(values))
    song_values = np.full((len(songs), *values.shape[1:]), default, dtype=values.dtype)
    song_values[is_known] = values[songs[is_known]]
    return song_values


def _proposal_counts(candidates: Candidates) -> np.ndarray:
    """float64 (C,): how many retrievers propose each candidate."""
    counts = np.zeros(len(candidates.rows))
    for positions in candidates.positions.values():
        counts[positions] += 1
    return counts


def _repeat_share(batch: QueryBatch, counts: np.ndarray) -> np.ndarray:
    """float64 (Q,): the share of repeats among the last `counts` plays, int (Q,), of each query, at most 20."""
    is_recent = batch.back < np.minimum(counts, REPEATS)[batch.rows]
    repeats = np.bincount(batch.rows, weights=batch.repeated & is_recent, minlength=len(batch))
    return np.asarray(repeats / np.maximum(1, np.minimum(counts, REPEATS)))


def _skip_share(batch: QueryBatch, lengths: np.ndarray) -> np.ndarray:
    """float64 (Q,): the share of the last ten plays that were skipped; `lengths`, int (Q,), counts the known plays."""
    latest_plays = batch.latest(RECENT)
    skips = np.bincount(batch.rows[latest_plays], weights=batch.skipped[latest_plays], minlength=len(batch))
    return np.asarray(skips / np.maximum(1, np.minimum(lengths, RECENT)))


def _group_features(
    batch: QueryBatch, candidates: Candidates, groups: SongGroups, add_column: Callable[[np.ndarray], None]
) -> np.ndarray:
    """Pass the features GROUP_FEATURES to `add_column`; return the number of artists or albums in the last ten plays.

    The number is float64 (Q,).
    """
    play_groups = look_up(groups.of_song, batch.songs, NO_GROUP).astype(np.int64)
    grouped_plays = np.flatnonzero(play_groups >= 0)
    num_groups = max(1, len(groups.offsets))
    keys = batch.rows[grouped_plays] * num_groups + play_groups[grouped_plays]
    order = stable_order(keys)
    first_positions = group_starts(keys[order])
    group_keys = keys[order][first_positions]
    group_plays = group_sizes(first_positions, len(order))
    last_plays = grouped_plays[order[np.append(first_positions[1:], len(order)) - 1]] if len(order) else order
    is_recent = batch.back[grouped_plays][order] < RECENT
    recent_plays = sum_groups(is_recent.astype(np.int64), first_positions)
    candidate_groups = look_up(groups.of_song, candidates.songs, NO_GROUP).astype(np.int64)
    candidate_keys = np.where(candidate_groups >= 0, candidates.rows * num_groups + candidate_groups, -1)
    positions = np.minimum(np.searchsorted(group_keys, candidate_keys), max(0, len(group_keys) - 1))
    is_known = group_keys[positions] == candidate_keys if len(group_keys) else np.zeros(len(candidate_keys), dtype=bool)

    def group_values(values: np.ndarray, default: float) -> np.ndarray:
        return np.where(is_known, values[positions], default) if len(values) else np.full(len(candidate_keys), default)

    last_groups = look_up(groups.of_song, batch.last_songs, NO_GROUP)
    add_column((last_groups[candidates.rows] == candidate_groups) & (candidate_groups >= 0))
    add_column(
        group_values(recent_plays, 0) / np.maximum(1, np.minimum(np.diff(batch.offsets), RECENT))[candidates.rows]
    )
    add_column(group_values(group_plays, 0))
    add_column(group_values(batch.back[last_plays], NO_PLAY))
    recent_groups = np.bincount((group_keys // num_groups)[recent_plays > 0], minlength=len(batch))
    return np.asarray(recent_groups, dtype=np.float64)
