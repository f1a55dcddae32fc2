"""Features of candidates: the inputs of the ranker, for each candidate and its query.

Shapes: Q queries, N songs, D dimensions, C candidates of all queries together, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rayrec.data.ragged import first_of_each, stable_order
from rayrec.data.split import DAY_MS
from rayrec.recommend.base import HOUR_MS, LATEST_PLAYS, QueryBatch
from rayrec.recommend.retrievers import Candidates
from rayrec.recommend.stored_retrieval import NO_GROUP, NOT_PLAYED, Retrieval, SongGroups
from rayrec.recommend.two_step_config import RankedPart, kept_features

RECENT = 10  # number of last plays that count as recent
REPEATS = 20  # number of last plays in which repeats are counted
LIFT_PLAYS = 5.0  # added to a song's plays before the strength of a rule is divided by them
SKIP_PLAYS = 10.0  # plays with the mean share of skips that are added to a song's plays, to smooth its share
NEVER = -1.0  # value of plays or hours since a song, an artist or an album that the user has never played


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
        return [names[place] for place in kept_features(names, self.without)]

    def _all_names(self) -> list[str]:
        groups = [name for name, group in self._groups() if group]
        return [
            *(f"{retriever}_{what}" for retriever in self.retrievers for what in ("score", "share", "rank")),
            *OF_CANDIDATES,
            *(OF_SKIPS if self._has_skips else []),
            *(OF_LIKES if self.retrieval.has_likes else []),
            *(f"{group}_{what}" for group in groups for what in OF_GROUPS),
            *OF_QUERIES,
            *(["recent_skips"] if self._has_skips else []),
            *(f"recent_{group}s" for group in groups),
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

        def put(values: np.ndarray) -> None:
            matrix[:, next(columns)] = values

        for name in self.retrievers:
            proposals, position = candidates.proposals[name], candidates.positions[name]
            totals = np.bincount(proposals.rows, weights=np.abs(proposals.scores), minlength=len(batch))
            where = next(columns), next(columns), next(columns)
            matrix[position, where[0]] = proposals.scores
            matrix[position, where[1]] = proposals.scores / np.maximum(totals, 1e-12)[proposals.rows]
            matrix[position, where[2]] = 1.0 / (1.0 + proposals.ranks)
        self._of_candidates(batch, candidates, put)
        of_queries = self._of_queries(batch)
        for _, group in self._groups():
            if group:
                of_queries.append(_group_features(batch, candidates, group, put))
        for values in of_queries:
            put(values[candidates.rows])
        return matrix if self.without is None else matrix[:, kept_features(names, self.without)]

    def _of_candidates(self, batch: QueryBatch, candidates: Candidates, put: Callable[[np.ndarray], None]) -> None:
        rows, songs, known = candidates.rows, candidates.songs, batch.user_songs
        vectors = _looked_up(self.song_vectors, songs)
        first = first_of_each(rows)
        counts = np.diff(np.append(first, len(rows)))
        for of_query, scale in zip((batch.short_vectors, batch.long_vectors), self.scales, strict=True):
            cosines = np.einsum("cd,cd->c", vectors, of_query[rows])
            put(cosines)
            # The logarithm of the softmax over the candidates of the query.
            logits = scale * cosines
            if len(first):
                logits -= np.repeat(np.maximum.reduceat(logits, first), counts)
                logits -= np.repeat(np.log(np.add.reduceat(np.exp(logits), first)), counts)
            put(logits)
        put(np.einsum("cd,cd->c", vectors, _looked_up(self.song_vectors, batch.last_songs)[rows]))
        nearest, mean = self._likeness_to_recent(batch, rows, vectors)
        put(nearest)
        put(mean)
        put(_proposed_by(candidates))
        positions = known.find(candidates.keys)
        heard = positions >= 0
        positions = np.where(heard, positions, 0)

        def of_user(values: np.ndarray, otherwise: float) -> np.ndarray:
            return np.where(heard, values[positions], otherwise) if len(values) else np.full(len(rows), otherwise)

        history = np.maximum(1, np.diff(batch.offsets))
        put(of_user(known.plays, 0))
        put(of_user(known.plays / history[known.rows], 0))
        put(of_user(known.back, NEVER))
        put(of_user(known.hours, NEVER) if self.real_times else np.zeros(len(rows)))
        put(of_user(known.base_level, -20))
        put(of_user(known.base_level_hours, -20) if self.real_times else np.zeros(len(rows)))
        put(of_user(known.session_plays, 0))
        plays = np.log1p(_looked_up(self.retrieval.plays.plays, songs))
        recent = np.log1p(_looked_up(self.retrieval.recent_plays, songs))
        put(plays)
        put(recent)
        put(recent - plays)
        put(self._age_days(batch, candidates) if self.real_times else np.zeros(len(rows)))
        rules, position = candidates.proposals.get("rules"), candidates.positions.get("rules")
        lift = np.zeros(len(rows))
        if rules is not None and position is not None:
            lift[position] = rules.scores / (LIFT_PLAYS + np.expm1(plays[position]))
        put(lift)
        if self.retrieval.plays.skips is not None:
            put(of_user(known.skips, 0))
            put(of_user(known.skips / np.maximum(1, known.plays), 0))
            skips, share_of_all = _looked_up(self.retrieval.plays.skips, songs), self.retrieval.skip_share
            put((skips + SKIP_PLAYS * share_of_all) / (np.expm1(plays) + SKIP_PLAYS) - share_of_all)
        if self.retrieval.has_likes:
            put(batch.liked.find(candidates.keys) >= 0)

    def _age_days(self, batch: QueryBatch, candidates: Candidates) -> np.ndarray:
        """float64 (C,): days since the first play of each candidate by any user; NEVER if there was none."""
        first = _looked_up(self.retrieval.plays.first_days, candidates.songs, NOT_PLAYED).astype(np.int64)
        days = batch.queries.at[candidates.rows] // DAY_MS - first
        return np.where(first == NOT_PLAYED, NEVER, np.maximum(0, days))

    def _likeness_to_recent(
        self, batch: QueryBatch, rows: np.ndarray, vectors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest and the mean cosine of each candidate with the last ten songs; 0 if there are none."""
        latest = batch.latest(RECENT)
        table = np.zeros((len(batch), RECENT, self.song_vectors.shape[1]), dtype=np.float32)
        table[batch.rows[latest], batch.back[latest]] = _looked_up(self.song_vectors, batch.songs[latest])
        bounds = np.searchsorted(rows, np.arange(len(batch) + 1)).tolist()
        cosines = np.zeros((len(rows), RECENT), dtype=np.float32)
        for row, (begin, end) in enumerate(pairwise(bounds)):
            np.matmul(vectors[begin:end], table[row].T, out=cosines[begin:end])
        known = np.maximum(1, np.bincount(batch.rows[latest], minlength=len(batch)))
        return cosines.max(axis=1), cosines.sum(axis=1) / known[rows]

    def _of_queries(self, batch: QueryBatch) -> list[np.ndarray]:
        """Return the features OF_QUERIES, and the recent share of skips if the data has skips, (Q,) each."""
        lengths = np.diff(batch.offsets)
        session = np.bincount(batch.rows, weights=batch.in_session, minlength=len(batch))
        last = np.where(lengths > 0, batch.offsets[1:] - 1, 0)
        since = np.full(len(batch), NEVER)
        if len(batch.played_at):
            since = np.where(lengths > 0, (batch.queries.at - batch.played_at[last]) / HOUR_MS, NEVER)
        hour = (batch.queries.at // HOUR_MS) % 24
        return [
            np.log1p(np.minimum(batch.queries.seen, LATEST_PLAYS)),  # a server reads at most this many plays
            session,
            since if self.real_times else np.zeros(len(batch)),
            _repeat_share(batch, lengths),
            _repeat_share(batch, session.astype(np.int64)),
            hour if self.real_times else np.zeros(len(batch)),
            np.bincount(batch.user_songs.rows, minlength=len(batch)) / np.maximum(1, lengths),
            self._session_with_long_term(batch),
            *([_skip_share(batch, lengths)] if self._has_skips else []),
        ]

    def _session_with_long_term(self, batch: QueryBatch) -> np.ndarray:
        """float64 (Q,): the cosine of the mean of the session's last ten songs with the long-horizon vector.

        0 if no session has begun. The ranker can learn from it when the session matters more than older plays.
        """
        latest = batch.latest(RECENT)
        latest = latest[batch.in_session[latest]]
        sums = np.zeros((len(batch), self.song_vectors.shape[1]))
        np.add.at(sums, batch.rows[latest], _looked_up(self.song_vectors, batch.songs[latest]))
        lengths = np.linalg.norm(sums, axis=1)
        return np.asarray(np.einsum("qd,qd->q", sums, batch.long_vectors) / np.where(lengths > 0, lengths, 1))


OF_CANDIDATES = [
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
OF_SKIPS = ["user_skips", "user_skip_share", "skip_share"]
OF_LIKES = ["user_liked"]
OF_GROUPS = ["of_last_song", "recent_share", "user_plays", "plays_since"]
OF_QUERIES = [
    "history_length",
    "session_length",
    "hours_since_last",
    "recent_repeats",
    "session_repeats",
    "hour",
    "different_songs",
    "cosine_session_long",
]


def _looked_up(values: np.ndarray, songs: np.ndarray, otherwise: int = 0) -> np.ndarray:
    """Return the values of `songs`, int; `otherwise` for songs that are -1 or beyond the end of `values`."""
    known = (songs >= 0) & (songs < len(values))
    rows = np.full((len(songs), *values.shape[1:]), otherwise, dtype=values.dtype)
    rows[known] = values[songs[known]]
    return rows


def _proposed_by(candidates: Candidates) -> np.ndarray:
    """float64 (C,): how many retrievers propose each candidate."""
    counts = np.zeros(len(candidates.rows))
    for position in candidates.positions.values():
        counts[position] += 1
    return counts


def _repeat_share(batch: QueryBatch, counts: np.ndarray) -> np.ndarray:
    """float64 (Q,): the share of repeats among the last `counts` plays, int (Q,), of each query, at most 20."""
    looked_at = batch.back < np.minimum(counts, REPEATS)[batch.rows]
    repeats = np.bincount(batch.rows, weights=batch.repeated & looked_at, minlength=len(batch))
    return np.asarray(repeats / np.maximum(1, np.minimum(counts, REPEATS)))


def _skip_share(batch: QueryBatch, lengths: np.ndarray) -> np.ndarray:
    """float64 (Q,): the share of the last ten plays that were skipped; `lengths`, int (Q,), counts the known plays."""
    latest = batch.latest(RECENT)
    skips = np.bincount(batch.rows[latest], weights=batch.skipped[latest], minlength=len(batch))
    return np.asarray(skips / np.maximum(1, np.minimum(lengths, RECENT)))


def _group_features(
    batch: QueryBatch, candidates: Candidates, groups: SongGroups, put: Callable[[np.ndarray], None]
) -> np.ndarray:
    """Pass the features OF_GROUPS of artists or albums to `put`; return the number of groups in the last ten plays.

    The number is float64 (Q,).
    """
    group = _looked_up(groups.of_song, batch.songs, NO_GROUP).astype(np.int64)
    some = np.flatnonzero(group >= 0)
    width = max(1, len(groups.offsets))
    keys = batch.rows[some] * width + group[some]
    order = stable_order(keys)
    first = first_of_each(keys[order])
    unique = keys[order][first]
    plays = np.diff(np.append(first, len(order)))
    last = some[order[np.append(first[1:], len(order)) - 1]] if len(order) else order
    recent = batch.back[some][order] < RECENT
    late = np.add.reduceat(recent.astype(np.int64), first) if len(first) else plays
    candidate_group = _looked_up(groups.of_song, candidates.songs, NO_GROUP).astype(np.int64)
    candidate_keys = np.where(candidate_group >= 0, candidates.rows * width + candidate_group, -1)
    positions = np.minimum(np.searchsorted(unique, candidate_keys), max(0, len(unique) - 1))
    is_known = unique[positions] == candidate_keys if len(unique) else np.zeros(len(candidate_keys), dtype=bool)

    def of_group(values: np.ndarray, otherwise: float) -> np.ndarray:
        return (
            np.where(is_known, values[positions], otherwise) if len(values) else np.full(len(candidate_keys), otherwise)
        )

    last_group = _looked_up(groups.of_song, batch.last_songs, NO_GROUP)
    put((last_group[candidates.rows] == candidate_group) & (candidate_group >= 0))
    put(of_group(late, 0) / np.maximum(1, np.minimum(np.diff(batch.offsets), RECENT))[candidates.rows])
    put(of_group(plays, 0))
    put(of_group(batch.back[last], NEVER))
    different = np.bincount((unique // width)[late > 0], minlength=len(batch))
    return np.asarray(different, dtype=np.float64)
