"""Ranks of target songs in a recommender's ranking, the metrics computed from ranks, and the tuning of baselines.

The same rules hold for models that score every song and for models that score a few candidates: ties count against a
target, a song with the score NaN or -inf is never found, and a song that is not a candidate has no rank.

Q queries, N songs, C candidates of all queries together, T target songs, L listed songs, K cut-offs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayrec.data.histories import Histories, Queries, uniform_draws, user_hash
from rayrec.data.top_k import top_positions
from rayrec.evaluation.calibration import BIN_COLUMNS, CALIBRATED, PROBABILITY_BINS, calibration_sums
from rayrec.evaluation.protocol import USUAL_K, HeardSongs, TargetSongs, in_mask, target_songs
from rayrec.recommend.base import NO_SONG, BaseRecommender, CandidateRecommender, HorizonName, ScoredCandidates
from rayrec.recommend.session_knn import VsknnRecommender, VstanRecommender

if TYPE_CHECKING:
    from rayrec.recommend.baselines import Selection, Settings

METRICS = ("recall", "mrr", "ndcg")
NOT_FOUND = np.iinfo(np.int64).max  # rank of a song that is below the depth or not in the ranking
LIST_LENGTH = 20  # first songs of a query, used for coverage, popularity, repeats and calibration
SCORES_AT_ONCE = 1 << 21  # scores compared at once; if many songs tie for the last place, all are compared

TUNING_QUERIES = 1_000  # queries of the validation range, drawn by a hash of user and play
TUNED_TARGETS = ("served", "next")
MRR_WEIGHT = 0.2  # weight of MRR relative to recall

# The values to try for each setting. Settings are tuned one after another, the others as chosen so far.
BASELINE_CHOICES: dict[str, dict[str, Sequence[float]]] = {
    "vstan": {
        "days_decay": (7.0, 30.0, 120.0, 365.0, 1825.0),
        "plays_decay": (1.0, 2.0, 4.0),
        "distance_decay": (2.0, 5.0, 20.0),
        "neighbors": (100, 200, 500),
        "just_played": (0.05, 0.25, 1.0),
    },
    "vsknn": {"last_plays": (3, 5, 10, 20), "neighbors": (50, 100, 200, 500)},
    "sequential-rules": {"decay": (0.5, 1.0, 2.0)},
    "popularity-recent": {"days": (1.0, 7.0, 21.0, 60.0, 180.0)},
}


class Ranked(NamedTuple):
    """The ranks of the targets, and the first songs of some queries."""

    ranks: dict[str, np.ndarray]  # target -> int64 (T,), NOT_FOUND beyond the depth
    listed_rows: np.ndarray  # int64 (L,), the query of each listed song
    listed_songs: np.ndarray  # int64 (L,)
    # For a candidate recommender with R retrievers; the first column is the union of all, then one column for each:
    proposed: dict[str, np.ndarray]  # target -> bool (T, R + 1), which of them propose the target song
    candidates: np.ndarray | None  # float64 (Q, R + 1), number of candidates per query
    # If scores are probabilities: CALIBRATED -> `calibration_sums` of the first LIST_LENGTH songs of all queries.
    bin_sums: dict[str, np.ndarray]


def rank_targets(
    recommender: BaseRecommender,
    histories: Histories,
    queries: Queries,
    targets: Mapping[str, TargetSongs],
    known_songs: np.ndarray,
    *,
    depth: int,
    horizons: Mapping[str, HorizonName] | None = None,
    listed: np.ndarray | None = None,
    heard_songs: HeardSongs | None = None,
) -> Ranked:
    """Return the rank of each target song, exact up to `depth`.

    A song that is not in `known_songs`, bool (N,), is NOT_FOUND whatever its score, unless it was added to the
    recommender. `horizons` are the horizons of the targets; the default is short. For the queries in `listed`, bool
    (Q,), the result also holds the first LIST_LENGTH of all songs on the short horizon. Scores that are probabilities
    are compared with the next plays if both targets of CALIBRATED are given. `heard_songs` are those of `histories`, if
    they are already known.
    """
    heard = HeardSongs(histories) if heard_songs is None else heard_songs
    target_horizons: dict[str, HorizonName] = {name: (horizons or {}).get(name, "short") for name in targets}
    list_horizons: tuple[HorizonName, ...] = () if listed is None else ("short",)
    needed_horizons = list(dict.fromkeys([*list_horizons, *target_horizons.values()]))
    ranks = {name: np.full(len(target.songs), NOT_FOUND, dtype=np.int64) for name, target in targets.items()}
    is_rankable, is_cold = rankable_songs(recommender, known_songs), np.ones(recommender.num_songs, dtype=bool)
    is_cold[: len(known_songs)] &= ~known_songs[: len(is_cold)]
    rankable_masks = {name: in_mask(is_rankable, target.songs) for name, target in targets.items()}
    list_parts = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
    proposals = (
        _TargetProposals(recommender, targets, len(queries)) if isinstance(recommender, CandidateRecommender) else None
    )
    calibration = None
    if recommender.scores_are_probabilities and targets.keys() >= set(CALIBRATED):
        calibration = _CalibrationSums(targets["next"], len(queries))
    for chunk, horizon, ranking in _rankings(recommender, histories, queries, needed_horizons, max(depth, LIST_LENGTH)):
        chunk_queries = queries.take(chunk)
        unheard_ranking = None  # the ranking without heard songs, of all queries
        if calibration is not None and horizon == "short":
            unheard_ranking = ranking.without_heard(heard, chunk_queries, np.arange(len(chunk_queries)))
            calibration.add(chunk, {"served": unheard_ranking, "next": ranking})
        positions_by_name: dict[str, np.ndarray] = {}
        names_by_kind: dict[tuple[bool, bool], list[str]] = {}
        for name, target in targets.items():
            if target_horizons[name] == horizon:
                positions_by_name[name] = _positions_of_chunk(target, rankable_masks[name], chunk)
                names_by_kind.setdefault((target.served, target.among_cold), []).append(name)
        for (is_served, among_cold), names in names_by_kind.items():
            if not any(len(positions_by_name[name]) for name in names):
                continue
            target_ranking = ranking
            if is_served and unheard_ranking is not None and not among_cold:
                target_ranking = unheard_ranking
            elif is_served:
                rows = np.unique(np.concatenate([targets[name].rows[positions_by_name[name]] for name in names]))
                target_ranking = ranking.without_heard(
                    heard, chunk_queries, rows - chunk.start, is_cold if among_cold else None
                )
            for name in names:
                target, positions = targets[name], positions_by_name[name]
                ranks[name][positions] = target_ranking.ranks(
                    target.rows[positions] - chunk.start, target.songs[positions]
                )
        if proposals is not None and isinstance(ranking, CandidateRankings):
            proposals.add(chunk, ranking, targets, positions_by_name)
        if listed is not None and horizon == "short":
            rows, songs, _ = ranking.first(np.flatnonzero(listed[chunk]), LIST_LENGTH)
            list_parts.append((chunk.start + rows, songs))
    rows, songs = (np.concatenate(parts) for parts in zip(*list_parts, strict=True))
    return Ranked(
        ranks,
        rows,
        songs,
        {} if proposals is None else proposals.masks,
        None if proposals is None else proposals.counts,
        {} if calibration is None else calibration.bin_sums,
    )


class _TargetProposals:
    """Which retrievers propose the target songs, and the number of candidates of each query; see `Ranked`."""

    def __init__(self, recommender: CandidateRecommender, targets: Mapping[str, TargetSongs], num_queries: int) -> None:
        columns = 1 + len(recommender.retrievers)
        self.masks = {name: np.zeros((len(target.songs), columns), dtype=bool) for name, target in targets.items()}
        self.counts = np.zeros((num_queries, columns))

    def add(
        self,
        chunk: slice,
        ranking: CandidateRankings,
        targets: Mapping[str, TargetSongs],
        positions_by_name: Mapping[str, np.ndarray],
    ) -> None:
        """Add a chunk's candidates; `positions_by_name` are the positions of its known targets, int64 each."""
        self.counts[chunk] = ranking.counts()
        for name, positions in positions_by_name.items():
            rows, songs = targets[name].rows[positions] - chunk.start, targets[name].songs[positions]
            self.masks[name][positions] = ranking.proposed(rows, songs)


class _CalibrationSums:
    """The `calibration_sums` of the first LIST_LENGTH songs of all queries, for each target of CALIBRATED."""

    def __init__(self, next_target: TargetSongs, num_queries: int) -> None:
        self.bin_sums = {name: np.zeros((PROBABILITY_BINS, BIN_COLUMNS)) for name in CALIBRATED}
        self._next_songs = np.full(num_queries, NO_SONG)
        self._next_songs[next_target.rows] = next_target.songs

    def add(self, chunk: slice, rankings: Mapping[str, _Rankings]) -> None:
        """Add the rankings of a chunk's queries, by target."""
        next_songs = self._next_songs[chunk]
        for name, ranking in rankings.items():
            rows, songs, scores = ranking.first(np.arange(len(next_songs)), LIST_LENGTH)
            self.bin_sums[name] += calibration_sums(scores, songs == next_songs[rows])


def _positions_of_chunk(target: TargetSongs, is_rankable: np.ndarray, chunk: slice) -> np.ndarray:
    """int64: the positions of the known targets of a chunk's queries."""
    start, stop = np.searchsorted(target.rows, [chunk.start, chunk.stop])
    return np.asarray(start + np.flatnonzero(is_rankable[start:stop]))


def rankable_songs(recommender: BaseRecommender, known_songs: np.ndarray) -> np.ndarray:
    """bool (N,): songs that a recommender can find: those played in the fit range and those added to it."""
    rankable = np.zeros(recommender.num_songs, dtype=bool)
    rankable[: len(known_songs)] = known_songs[: len(rankable)]
    rankable[recommender.added_songs] = True
    return rankable


class _Rankings(ABC):
    """The rankings of the queries of a chunk."""

    @abstractmethod
    def ranks(self, rows: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """int64 (T,): the ranks, 1 + number of other songs that score at least as high; NOT_FOUND below depth."""

    @abstractmethod
    def first(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return queries and songs, int64 (L,) each, and scores, float32 (L,), of the `count` best of each of `rows`.

        Songs with equal scores are sorted by song row.
        """

    @abstractmethod
    def without_heard(
        self, heard: HeardSongs, queries: Queries, rows: np.ndarray, song_mask: np.ndarray | None = None
    ) -> _Rankings:
        """Return the rankings of the queries at `rows`, ascending, without the songs that their users have heard.

        With `song_mask`, bool (N,), only these songs are ranked. The result can be read for the queries at `rows` only.
        """


def _rankings(
    recommender: BaseRecommender, histories: Histories, queries: Queries, horizons: Sequence[HorizonName], depth: int
) -> Iterator[tuple[slice, HorizonName, _Rankings]]:
    if isinstance(recommender, CandidateRecommender):
        for chunk, candidates in recommender.candidate_chunks(histories, queries):
            start, stop, _ = chunk.indices(len(queries))
            for horizon in horizons:
                ranking = CandidateRankings(
                    candidates, recommender.retrievers, horizon, stop - start, recommender.num_songs, depth
                )
                yield slice(start, stop), horizon, ranking
        return
    for horizon in horizons:
        for chunk, scores in recommender.score_chunks(histories, queries, horizon):
            yield slice(chunk.start, chunk.start + len(scores)), horizon, DenseRankings(scores, depth)


class DenseRankings(_Rankings):
    """Rankings by the score of every song, float32 (Q, N)."""

    def __init__(self, scores: np.ndarray, depth: int, rows: np.ndarray | None = None) -> None:
        """`rows`, int64, ascending, are the queries of the scores, if the scores belong to a part of the queries."""
        self._scores, self._depth, self._rows = scores, depth, rows
        self._best = best_scores(scores, depth + 1)

    def ranks(self, rows: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """As in `_Rankings`."""
        return ranks_of(self._scores, self._score_rows(rows), songs, self._best)

    def first(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As in `_Rankings`."""
        score_rows = self._score_rows(rows)
        query_of_song, songs = listed_songs(self._scores[score_rows], self._best[score_rows], count)
        return rows[query_of_song], songs, self._scores[score_rows[query_of_song], songs]

    def _score_rows(self, rows: np.ndarray) -> np.ndarray:
        return rows if self._rows is None else np.searchsorted(self._rows, rows)

    def without_heard(
        self, heard: HeardSongs, queries: Queries, rows: np.ndarray, song_mask: np.ndarray | None = None
    ) -> DenseRankings:
        """As in `_Rankings`."""
        scores = np.array(self._scores[rows])
        if song_mask is not None:
            scores[:, ~song_mask] = -np.inf
        score_rows, songs = heard.songs_before(queries.rows[rows], queries.plays_before[rows])
        is_scored = songs < scores.shape[1]
        scores[score_rows[is_scored], songs[is_scored]] = -np.inf
        return DenseRankings(scores, self._depth, rows)


class CandidateRankings(_Rankings):
    """Rankings of the candidates of each query."""

    def __init__(
        self,
        candidates: ScoredCandidates,
        retrievers: Sequence[str],
        horizon: HorizonName,
        num_queries: int,
        num_songs: int,
        depth: int,
        is_heard: np.ndarray | None = None,
        song_mask: np.ndarray | None = None,
    ) -> None:
        """`is_heard`, bool (C,), is True for candidates to leave out; `song_mask` is as in `without_heard`."""
        self._candidates, self._retrievers, self._horizon = candidates, retrievers, horizon
        self._num_queries, self._num_songs, self._depth = num_queries, num_songs, depth
        scores = candidates.scores(horizon, is_heard is not None)
        keys = candidates.rows * num_songs + candidates.songs
        is_rankable = scores > -np.inf  # False for NaN
        if is_heard is not None:
            is_rankable &= ~is_heard
        if song_mask is not None:
            is_rankable &= song_mask[candidates.songs]
        selected = np.flatnonzero(is_rankable)
        selected = selected[top_positions(candidates.rows[selected], scores[selected], depth)]
        order = selected[np.lexsort((candidates.songs[selected], -scores[selected], candidates.rows[selected]))]
        self._rows, self._songs, self._scores = candidates.rows[order], candidates.songs[order], scores[order]
        self._keys = keys[order]
        self._starts = np.searchsorted(self._rows, np.arange(num_queries + 1))

    def ranks(self, rows: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """As in `_Rankings`."""
        ranks = np.full(len(rows), NOT_FOUND, dtype=np.int64)
        if not len(self._keys):
            return ranks
        order = np.argsort(self._keys)
        target_keys = rows * self._num_songs + songs
        positions = order[np.minimum(np.searchsorted(self._keys, target_keys, sorter=order), len(order) - 1)]
        is_candidate = self._keys[positions] == target_keys
        # A run of equal scores ends where the next score or query begins; a tied song has the rank of the last of them.
        is_last = np.append((np.diff(self._rows) != 0) | (np.diff(self._scores) != 0), True)
        ends = np.flatnonzero(is_last) + 1
        ends = ends[np.searchsorted(ends, positions[is_candidate], side="right")]
        ranks[is_candidate] = ends - self._starts[rows[is_candidate]]
        return ranks

    def first(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As in `_Rankings`."""
        is_within = np.arange(len(self._rows)) - self._starts[self._rows] < count
        is_within &= np.isin(self._rows, rows)
        return self._rows[is_within], self._songs[is_within], self._scores[is_within]

    def without_heard(
        self, heard: HeardSongs, queries: Queries, rows: np.ndarray, song_mask: np.ndarray | None = None
    ) -> CandidateRankings:
        """As in `_Rankings`."""
        candidate_rows, songs = self._candidates.rows, self._candidates.songs
        is_heard = heard(queries.rows[candidate_rows], queries.plays_before[candidate_rows], songs)
        return CandidateRankings(
            self._candidates,
            self._retrievers,
            self._horizon,
            self._num_queries,
            self._num_songs,
            self._depth,
            is_heard,
            song_mask,
        )

    def counts(self) -> np.ndarray:
        """float64 (Q, R + 1): number of candidates of each query, in total and by retriever."""
        rows = self._candidates.rows
        row_arrays = [rows, *(rows[self._candidates.retrievers[name]] for name in self._retrievers)]
        return np.stack(
            [np.bincount(proposed_rows, minlength=self._num_queries) for proposed_rows in row_arrays], axis=1
        ).astype(np.float64)

    def proposed(self, rows: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """bool (T, R + 1): whether each song is a candidate, and which retrievers propose it."""
        keys = self._candidates.rows * self._num_songs + self._candidates.songs
        target_keys = rows * self._num_songs + songs
        key_arrays = [keys, *(keys[self._candidates.retrievers[name]] for name in self._retrievers)]
        return np.stack([np.isin(target_keys, proposed_keys) for proposed_keys in key_arrays], axis=1)


def best_scores(scores: np.ndarray, depth: int) -> np.ndarray:
    """float32 (Q, min(depth, N)): the best of each row of `scores`, float32 (Q, N), ascending. NaN counts as -inf."""
    depth = min(depth, scores.shape[1])
    floor = _floor(scores, depth)
    flat_indices = np.flatnonzero(scores > floor[:, None])  # False for NaN
    rows, songs = np.divmod(flat_indices, max(1, scores.shape[1]))
    counts = np.bincount(rows, minlength=len(scores))
    # The scores above the floor; the floor itself fills the remaining places.
    above = np.full((len(scores), depth + int(counts.max(initial=0))), floor[:, None], dtype=np.float32)
    above[rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]] = scores[rows, songs]
    return np.sort(np.partition(above, above.shape[1] - depth, axis=1)[:, above.shape[1] - depth :], axis=1)


def _floor(scores: np.ndarray, depth: int) -> np.ndarray:
    """float32 (Q,): a score that at least `depth` scores of each row reach, so that only a few must be sorted.

    Each row is divided into 2 · `depth` groups. The result is the `depth`-th best of the best scores of the groups.
    """
    groups = 2 * depth
    width = scores.shape[1] // groups
    if not width:
        return np.full(len(scores), -np.inf, dtype=np.float32)
    best = np.fmax.reduce(scores[:, : groups * width].reshape(len(scores), width, groups), axis=1)
    best[np.isnan(best)] = -np.inf
    return np.asarray(np.partition(best, depth, axis=1)[:, depth])


def ranks_of(scores: np.ndarray, rows: np.ndarray, songs: np.ndarray, best: np.ndarray) -> np.ndarray:
    """int64 (T,): the rank, from 1, of song songs[t] in row rows[t] of `scores`, float32 (Q, N).

    `best` are the `best_scores` of a depth larger than any cut-off. A song that is not among them, or has the score
    -inf, is NOT_FOUND. Ties count against a song: its rank is 1 + the number of others that score at least as high.
    """
    target_scores = scores[rows, songs]
    near_targets = np.flatnonzero((target_scores >= best[rows, 0]) & (target_scores > -np.inf))
    # The number of best scores that are at least as high, including the song itself.
    num_reached = np.count_nonzero(best[rows[near_targets]] >= target_scores[near_targets, None], axis=1)
    # The song is the last of the best scores, and songs that are not among them may tie with it.
    may_tie = (num_reached == best.shape[1]) & (best.shape[1] < scores.shape[1])
    ranks = np.full(len(target_scores), NOT_FOUND, dtype=np.int64)
    ranks[near_targets] = np.where(may_tie, NOT_FOUND, num_reached)
    return ranks


def listed_songs(scores: np.ndarray, best: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and songs, int64 (L,) each, of the `count` best scores of each row of `scores`, float32 (Q, N).

    `best` are the `best_scores` of at least this depth. As in `BaseRecommender.recommend`, lower song rows come first
    among equal scores, and songs with the score -inf are left out.
    """
    lowest_scores = best[:, -min(count, best.shape[1])]
    step = max(1, SCORES_AT_ONCE // max(1, scores.shape[1]))
    rows, songs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(scores), step):
        chunk, chunk_lowest = scores[start : start + step], lowest_scores[start : start + step]
        chunk_rows, chunk_songs = np.nonzero((chunk >= chunk_lowest[:, None]) & (chunk > -np.inf))
        is_tied = chunk[chunk_rows, chunk_songs] == chunk_lowest[chunk_rows]
        starts = np.searchsorted(chunk_rows, np.arange(len(chunk)))
        ties_before = np.cumsum(is_tied) - is_tied
        tie_positions = ties_before - np.append(ties_before, 0)[np.minimum(starts, len(is_tied))][chunk_rows]
        free_counts = count - np.bincount(chunk_rows, weights=~is_tied, minlength=len(chunk))
        is_listed = ~is_tied | (tie_positions < free_counts[chunk_rows])
        rows.append(chunk_rows[is_listed] + start)
        songs.append(chunk_songs[is_listed])
    return np.concatenate(rows), np.concatenate(songs)


def metric_columns(ks: Sequence[int]) -> list[tuple[str, int]]:
    """Return the metric and the cut-off of each column of `metrics_of`."""
    return [(metric, k) for metric in METRICS for k in ks]


def metrics_of(ranks: np.ndarray, rows: np.ndarray, sizes: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """float64 (Q, 3 · K): recall, reciprocal rank and NDCG, each at every k.

    `ranks` and `rows` are int64 (T,), the rank of each target song and its query; `sizes` is int64 (Q,), the number
    of target songs of each query. Recall at k is the share of the targets among the first k; MRR is 1 / the best rank
    there; NDCG is Σ 1 / log2(rank + 1) over those there, divided by the same sum for min(k, size) targets in the first
    places.
    """
    num_queries = len(sizes)
    columns = np.zeros((len(METRICS), len(ks), num_queries))
    ideals = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, max(ks) + 2)))])
    for index, k in enumerate(ks):
        is_within = ranks <= k
        found_ranks, found_rows = ranks[is_within].astype(np.float64), rows[is_within]
        recall, reciprocal, gain = columns[:, index]
        recall += np.bincount(found_rows, minlength=num_queries) / np.maximum(sizes, 1)
        np.maximum.at(reciprocal, found_rows, 1 / found_ranks)
        ideal = ideals[np.clip(sizes, 1, k)]
        gain += np.bincount(found_rows, weights=1 / np.log2(found_ranks + 1), minlength=num_queries) / ideal
    return np.asarray(columns.reshape(len(METRICS) * len(ks), num_queries).T)


def tune_baseline(name: str, selection: Selection) -> Settings:
    """Return the best settings for a baseline of BASELINE_CHOICES; trials are fitted before the validation range."""
    metric = TuningMetric(selection)
    fit_trial = _trial_fitter(name, selection)
    best_settings = dict(fit_trial({}).settings)
    best_score = metric(fit_trial(best_settings))
    for setting, values in BASELINE_CHOICES[name].items():
        for value in values:
            settings = {**best_settings, setting: value}
            if settings != best_settings and (score := metric(fit_trial(settings))) > best_score:
                best_score, best_settings = score, settings
    return best_settings


def _trial_fitter(name: str, selection: Selection) -> Callable[[Settings], BaseRecommender]:
    """Return a function that fits a baseline with given settings; session kNN reads sessions once for all trials."""
    from rayrec.recommend.baselines import fit_baselines  # loads scipy.linalg, which slows the start of commands

    def fit(settings: Settings) -> BaseRecommender:
        return fit_baselines([name], selection.dataset, None, selection.allowed, settings={name: settings})[0]

    fitted = fit({})
    if isinstance(fitted, VstanRecommender):
        vstan = fitted
        return lambda settings: vstan.with_settings(replace(vstan.tuning, **settings))
    if isinstance(fitted, VsknnRecommender):
        vsknn = fitted
        return lambda settings: vsknn.with_settings(replace(vsknn.tuning, **settings))
    return fit


class TuningMetric:
    """Recall@20 + 0.2 · MRR@20 on the validation range, summed over the targets served and next."""

    def __init__(self, selection: Selection) -> None:
        histories = self._histories = selection.histories
        rows = histories.rows[selection.plays]
        plays_before = selection.plays - histories.offsets[rows]
        hashes = user_hash(histories.user_ids, salt="queries ")
        order = np.argsort(uniform_draws(hashes[rows], plays_before), kind="stable")
        sampled_plays = np.sort(selection.plays[order[plays_before[order] > 0][:TUNING_QUERIES]])
        self._queries = Queries.before_plays(histories, sampled_plays)
        self._heard_songs = HeardSongs(histories)
        self._targets = {
            name: target_songs(histories, self._queries, name, self._heard_songs) for name in TUNED_TARGETS
        }
        self._known_songs = np.ones(selection.dataset.num_songs, dtype=bool)

    def __len__(self) -> int:
        return len(self._queries)

    def __call__(self, recommender: BaseRecommender) -> float:
        """Return the metric of a recommender; 0 if there is no query."""
        ranked = rank_targets(
            recommender,
            self._histories,
            self._queries,
            self._targets,
            self._known_songs,
            depth=USUAL_K,
            heard_songs=self._heard_songs,
        )
        total, columns = 0.0, metric_columns((USUAL_K,))
        for name, target in self._targets.items():
            metrics = metrics_of(ranked.ranks[name], target.rows, target.sizes, (USUAL_K,))
            mean = metrics.sum(axis=0) / max(1, np.count_nonzero(target.sizes))
            total += mean[columns.index(("recall", USUAL_K))] + MRR_WEIGHT * mean[columns.index(("mrr", USUAL_K))]
        return float(total)
