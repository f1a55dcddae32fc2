"""The evaluation protocol: which plays are predicted, the targets of each query, and the groups of users.

Every play of the test range that has an earlier play by the same user gives a query, at the time of the play. Metrics
are means over queries. Workers return sums and counts, so that means are never averaged.

Q queries, U users, P plays, S slices, T target songs of all queries together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from rayrec.config import Settings
from rayrec.data.histories import Histories, Queries, uniform_draws, user_hash
from rayrec.data.moments import DAY_MS
from rayrec.data.ragged import group_of_each_item, ranges
from rayrec.data.split import Split
from rayrec.model.train_config import DaysHorizon
from rayrec.recommend.base import SESSION_GAP_MS, BaseRecommender, HorizonName, VectorRecommender

USUAL_K = 20

# served: the next play if its song is new to the user, ranked among the songs that the user has not heard.
# cold_songs: the same, if the song has no play in the fit range; cold_among_cold: ranked only among such songs.
TARGETS = (
    *("served", "next", "next_new", "next_repeat", "next10", "offsets25_50", "served25_50"),
    *("cold_songs", "cold_among_cold"),
)
OFFSETS = {
    "served": (1, 1),
    "next": (1, 1),
    "next10": (1, 10),
    "offsets25_50": (25, 50),
    "served25_50": (25, 50),
    "cold_songs": (1, 1),
    "cold_among_cold": (1, 1),
}  # first and last play ahead of the query, 1 is the next; next_new and next_repeat are parts of next
COLD_TARGETS = ("cold_songs", "cold_among_cold")  # targets without a play in the fit range
SERVED_TARGETS = (
    "served",
    "served25_50",
    *COLD_TARGETS,
)  # songs that the user has heard are neither targets nor in the ranking
LONG_TERM = ("offsets25_50", "served25_50")
DAYS, SERVED_DAYS = "days", "served_days"  # how the names of targets in days begin

COUNTED_BUCKETS = 16  # buckets in which plays to predict are counted, to find the share that gives a number of queries
GROUPS = ("seen", "new", "held_out")  # every user is in one; "all" is their sum
CLASS_BOUNDS = (1, 2, 5, 20, 100)  # smallest number of plays in each class
CLASSES = ("1", "2-4", "5-19", "20-99", "100+")
KNOWN_PLAY_COUNTS = (0, 1, 5)  # numbers of known plays of a user
GAP_DAYS = (0, 1, 7, 30, 90)  # smallest number of days in each class
GAPS = ("under 1 day", "1-6 days", "7-29 days", "30-89 days", "90+ days")
DRIFT_COSINES = (0.0, 0.25, 0.5)  # smallest cosine in each class except the first
DRIFTS = ("below 0", "0 to 0.25", "0.25 to 0.5", "0.5 or more")
SESSION_SONGS = 10  # last songs of a session, whose mean vector represents it


class EvaluateConfig(Settings):
    """How to evaluate models."""

    models: tuple[str, ...] | None = Field(
        None, description="Models to compare; NAME=ID adds another network; default: two-step, taste and all baselines"
    )
    ablation: bool = Field(
        False,
        description="Also evaluate two-step without one part at a time (network, sessions, rules, user plays, "
        "artists), each time with a newly trained ranker",
    )
    ks: tuple[PositiveInt, ...] = Field((10, 20, 100), description="Cutoffs k of recall, MRR and NDCG")
    queries: int = Field(
        0, ge=0, description="Approximate number of queries, sampled by a hash of user and play; 0 evaluates all"
    )
    bootstrap_samples: int = Field(1000, ge=0, description="Bootstrap samples over users; 0 computes no intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="Confidence level of the intervals")
    offsets: int = Field(100, ge=0, description="Largest offset of the cosine curve, in plays; 0 computes no curve")
    max_curve_users: int = Field(
        5_000, ge=0, description="Users sampled for the cosine curve, pairwise accuracy and recommendation statistics"
    )
    seed: int = Field(0, ge=0, description="Random seed of the bootstrap, sampled users and negatives")

    @model_validator(mode="after")
    def _check_lists(self) -> EvaluateConfig:
        if self.models is not None and not self.models:
            raise ValueError("models is empty; expected at least one name, or no value for all models")
        if not self.ks or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks is {list(self.ks)}; expected distinct cutoffs such as 10, 20, 100")
        return self

    @property
    def interval_title(self) -> str:
        """The confidence level of the intervals, such as "95 %"; empty if no intervals are computed."""
        return f"{100 * self.confidence:g} %" if self.bootstrap_samples else ""


DEFAULT_CONFIG = EvaluateConfig()


def usual_k(ks: Sequence[int]) -> int:
    """Return the cut-off of comparisons, breakdowns and headlines: 20, or the largest one if 20 is not in `ks`."""
    return USUAL_K if USUAL_K in ks else max(ks)


def horizon_of(recommender: BaseRecommender, target: str) -> HorizonName:
    """Return the horizon for a target: long for a long-term target if the recommender has this horizon, else short."""
    is_long_term = target in LONG_TERM or target.startswith((DAYS, SERVED_DAYS))
    return "long" if is_long_term and "long" in recommender.horizons else "short"


def day_targets(recommenders: Sequence[BaseRecommender]) -> dict[str, DaysHorizon]:
    """Return the targets of long horizons in days, such as days0_7 (the next 7 days) and served_days0_7 (as served)."""
    horizons = {recommender.long_days for recommender in recommenders if recommender.long_days is not None}
    sorted_horizons = sorted(horizons, key=lambda days: (days.first_day, days.last_day))
    return {f"{kind}{days.first_day}_{days.last_day}": days for days in sorted_horizons for kind in (DAYS, SERVED_DAYS)}


def plays_to_predict(histories: Histories, split: Split) -> np.ndarray:
    """int64 (Q,): positions of the plays to predict, those in the test range with an earlier play by the user."""
    has_earlier = np.ones(histories.num_plays, dtype=bool)
    has_earlier[histories.offsets[:-1][histories.lengths > 0]] = False
    return np.flatnonzero(has_earlier & split.is_test(histories))


def sample_plays_to_predict(histories: Histories, split: Split, share: float) -> np.ndarray:
    """int64 (Q,): positions of a share of the plays to predict, drawn by a hash of user and place in the history.

    Whether a play is drawn does not depend on other users or on models. The plays of a smaller share are a subset of
    those of a larger share.
    """
    plays = plays_to_predict(histories, split)
    if share >= 1:
        return plays
    hashes = user_hash(histories.user_ids, salt="queries ")
    rows = np.searchsorted(histories.offsets, plays, side="right") - 1
    return plays[uniform_draws(hashes[rows], plays - histories.offsets[rows]) < share]


def blocks(
    histories: Histories, split: Split, queries: int, share: float = 1.0
) -> Iterator[tuple[Histories, np.ndarray]]:
    """Yield users with plays to predict, and the positions of a share of these plays, in blocks of about `queries`."""
    rows = histories.rows[sample_plays_to_predict(histories, split, share)]
    users, counts = np.unique(rows, return_counts=True)
    block_numbers = (np.cumsum(counts) - counts) // queries
    for block_users in np.split(users, np.flatnonzero(np.diff(block_numbers)) + 1):
        if len(block_users):
            block = histories.take(block_users)
            yield block, sample_plays_to_predict(block, split, share)


def user_groups(histories: Histories, split: Split) -> np.ndarray:
    """int64 (U,): index in GROUPS of each user: held_out, else seen with a play before the test range, else new."""
    has_earlier = np.bincount(histories.rows[~split.is_test(histories)], minlength=len(histories)) > 0
    groups = np.where(has_earlier, GROUPS.index("seen"), GROUPS.index("new"))
    is_allowed = split.held_out.allowed_users(histories.user_ids)
    return np.where(is_allowed, groups, GROUPS.index("held_out"))


@dataclass(frozen=True, kw_only=True)
class TargetSongs:
    """The distinct target songs of the queries."""

    rows: np.ndarray  # int64 (T,), the query of each target, ascending
    songs: np.ndarray  # int64 (T,)
    sizes: np.ndarray  # int64 (Q,), number of targets of each query; a query without targets is not counted
    served: bool = False  # ranked among the songs that the user has not heard
    among_cold: bool = False  # ranked only among those of these songs that have no play in the fit range


def target_songs(
    histories: Histories,
    queries: Queries,
    target: str,
    heard_songs: HeardSongs,
    known_songs: np.ndarray | None = None,
    days: DaysHorizon | None = None,
) -> TargetSongs:
    """Return the songs played at the offsets of a target of OFFSETS, or in `days`, as far as the histories reach.

    A song that is played more than once there counts once. The targets of SERVED_TARGETS are songs new to the user at
    the query; those of COLD_TARGETS are songs without a play in the fit range. `known_songs`, bool (N,), are the songs
    with one.
    """
    if days is None:
        rows, plays = plays_ahead(histories, queries, *OFFSETS[target])
    else:
        starts, ends = days.spans(histories, queries)
        rows, plays = group_of_each_item(ends - starts), ranges(starts, ends - starts)
    songs = histories.songs[plays].astype(np.int64)
    if days is not None or OFFSETS[target][0] < OFFSETS[target][1]:
        num_songs = int(histories.songs.max(initial=0)) + 1
        rows, songs = np.divmod(np.unique(rows * num_songs + songs), num_songs)
    is_served = target in SERVED_TARGETS or target.startswith(SERVED_DAYS)
    if is_served:
        is_new = ~heard_songs(queries.rows[rows], queries.plays_before[rows], songs)
        rows, songs = rows[is_new], songs[is_new]
    if target in COLD_TARGETS:
        assert known_songs is not None
        is_cold = ~in_mask(known_songs, songs)
        rows, songs = rows[is_cold], songs[is_cold]
    sizes = np.bincount(rows, minlength=len(queries))
    among_cold = target == "cold_among_cold"
    return TargetSongs(rows=rows, songs=songs, sizes=sizes, served=is_served, among_cold=among_cold)


def in_mask(mask: np.ndarray, songs: np.ndarray) -> np.ndarray:
    """bool: the values of `mask`, bool (N,), at song rows; False for songs from row N on."""
    is_inside = songs < len(mask)
    is_inside[is_inside] = mask[songs[is_inside]]
    return np.asarray(is_inside)


def plays_ahead(histories: Histories, queries: Queries, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries and positions, int64 each, of the plays at offsets `first` to `last` in the histories."""
    starts = histories.offsets[queries.rows] + queries.plays_before + first - 1
    counts = np.clip(histories.offsets[queries.rows + 1] - starts, 0, last - first + 1)
    rows = group_of_each_item(counts)
    plays = ranges(starts, counts)
    return rows, plays


class HeardSongs:
    """Looks up whether users have played songs before a query."""

    def __init__(self, histories: Histories) -> None:
        self._num_songs = int(histories.songs.max(initial=0)) + 1
        keys = histories.rows * self._num_songs + histories.songs
        self._keys, plays = np.unique(keys, return_index=True)  # the first play of each user and song
        self._first_positions = histories.places[plays]

    def __call__(self, rows: np.ndarray, plays_before: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """bool: True for songs in the first `plays_before` plays of the users at `rows`; int arrays of one shape."""
        if not len(self._keys):
            return np.zeros(np.shape(songs), dtype=bool)
        keys = rows * self._num_songs + songs
        indices = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        has_played = (self._keys[indices] == keys) & (songs < self._num_songs)
        return np.asarray(has_played & (self._first_positions[indices] < plays_before))

    def songs_before(self, rows: np.ndarray, plays_before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the songs in the first `plays_before` plays of the users at `rows`, int (Q,) each, every song once.

        The result is two int64 arrays: the query of each song, ascending, and the song.
        """
        starts, ends = (np.searchsorted(self._keys, users * self._num_songs) for users in (rows, rows + 1))
        entries, query_rows = ranges(starts, ends - starts), group_of_each_item(ends - starts)
        is_before = self._first_positions[entries] < plays_before[query_rows]
        return query_rows[is_before], self._keys[entries[is_before]] % self._num_songs


def slices_of(contexts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the criterion and the name of each of the S slices.

    history: the number of the user's plays before the query. activity: the number of the user's plays to predict.
    known: users with exactly this number of known plays. gap: the pause before the session that the query continues or
    begins. drift: the cosine of the songs of this session with the long-term taste vector before it, if both exist.
    context: where the play to predict came from; a play with several contexts counts in each of them.
    """
    play_count_slices = [(criterion, name) for criterion in ("history", "activity") for name in CLASSES]
    other_slices = [("known", str(plays)) for plays in KNOWN_PLAY_COUNTS] + [("gap", name) for name in GAPS]
    return (
        play_count_slices
        + other_slices
        + [("drift", name) for name in DRIFTS]
        + [("context", name) for name in contexts]
    )


def slice_masks(
    histories: Histories,
    queries: Queries,
    predicted_counts: np.ndarray,
    contexts: Sequence[str],
    network: VectorRecommender | None = None,
) -> np.ndarray:
    """bool (S, Q): the queries in each slice of `slices_of`.

    `predicted_counts`, int (U,), are the numbers of plays to predict per user. The slices of drift need the taste
    vectors of `network`; without it they are empty.
    """
    activity = predicted_counts[queries.rows]
    masks = [class_of(plays) == index for plays in (queries.plays_before, activity) for index in range(len(CLASSES))]
    masks += [queries.plays_before == plays for plays in KNOWN_PLAY_COUNTS]
    session_starts = plays_before_session(histories, queries)
    gap_classes = np.searchsorted(GAP_DAYS, gap_days(histories, queries, session_starts), side="right")
    masks += [gap_classes == index for index in range(1, len(GAPS) + 1)]
    drift_classes = np.zeros(len(queries), dtype=np.int64)
    if network is not None:
        cosines = session_cosines(network, histories, queries, session_starts)
        drift_classes = np.where(np.isnan(cosines), 0, 1 + np.searchsorted(DRIFT_COSINES, cosines, side="right"))
    masks += [drift_classes == index for index in range(1, len(DRIFTS) + 1)]
    target_positions = histories.offsets[queries.rows] + queries.plays_before
    context_bits = (
        np.zeros(len(queries), np.int32) if histories.contexts is None else histories.contexts[target_positions]
    )
    masks += [(context_bits >> bit) & 1 == 1 for bit in range(len(contexts))]
    return np.stack(masks)


def plays_before_session(histories: Histories, queries: Queries) -> np.ndarray:
    """int64 (Q,): the user's plays before the session that the query continues; all plays if it begins one."""
    is_session_start = np.ones(histories.num_plays, dtype=bool)
    is_session_start[1:] = np.diff(histories.played_at) > SESSION_GAP_MS
    is_session_start[histories.offsets[:-1][histories.lengths > 0]] = True
    session_starts = np.maximum.accumulate(np.where(is_session_start, np.arange(histories.num_plays), 0))
    last_positions = histories.offsets[queries.rows] + queries.plays_before - 1
    is_same_session = queries.at - histories.played_at[last_positions] <= SESSION_GAP_MS
    plays_before = session_starts[last_positions] - histories.offsets[queries.rows]
    return np.asarray(np.where(is_same_session, plays_before, queries.plays_before))


def _session_started_at(histories: Histories, queries: Queries, session_starts: np.ndarray) -> np.ndarray:
    """int64 (Q,), ms UTC: the beginning of each query's session; the query itself if the session has no play yet."""
    first_positions = np.minimum(histories.offsets[queries.rows] + session_starts, histories.num_plays - 1)
    return np.asarray(np.where(session_starts < queries.plays_before, histories.played_at[first_positions], queries.at))


def gap_days(histories: Histories, queries: Queries, session_starts: np.ndarray) -> np.ndarray:
    """float64 (Q,): days from the last play before each query's session to the session; -1 if there is no such play."""
    last_positions = np.maximum(histories.offsets[queries.rows] + session_starts - 1, 0)
    days = (_session_started_at(histories, queries, session_starts) - histories.played_at[last_positions]) / DAY_MS
    return np.where(session_starts > 0, days, -1.0)


def session_cosines(
    network: VectorRecommender, histories: Histories, queries: Queries, session_starts: np.ndarray
) -> np.ndarray:
    """float64 (Q,): the cosine of the mean of the session's last ten songs with the long-term taste before it.

    NaN if the session has no song with a vector yet, or if there is no play before it.
    """
    cosines = np.full(len(queries), np.nan)
    rows = np.flatnonzero((session_starts > 0) & (session_starts < queries.plays_before))
    if not len(rows):
        return cosines
    vectors, vector_sums = network.song_vectors, np.zeros((len(rows), network.song_vectors.shape[1]))
    for plays_back in range(1, SESSION_SONGS + 1):
        is_in_session = queries.plays_before[rows] - plays_back >= session_starts[rows]
        songs = histories.songs[
            (histories.offsets[queries.rows[rows]] + queries.plays_before[rows] - plays_back)[is_in_session]
        ]
        has_vector = songs < len(vectors)
        vector_sums[np.flatnonzero(is_in_session)[has_vector]] += vectors[songs[has_vector]]
    # Queries of one session share the long-term taste vector before it.
    sessions, session_rows = np.unique(np.stack([queries.rows, session_starts])[:, rows], axis=1, return_inverse=True)
    started_at = np.zeros(sessions.shape[1], dtype=np.int64)
    started_at[session_rows.reshape(-1)] = _session_started_at(histories, queries, session_starts)[rows]
    session_queries = Queries(rows=sessions[0], plays_before=sessions[1], at=started_at)
    long_vectors = network.vectors(histories, session_queries, "long")[session_rows.reshape(-1)]
    norms = np.linalg.norm(vector_sums, axis=1) * np.linalg.norm(long_vectors, axis=1)
    cosines[rows[norms > 0]] = (vector_sums * long_vectors).sum(axis=1)[norms > 0] / norms[norms > 0]
    return cosines


def first_plays(histories: Histories, split: Split, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a share, by hash, of the users whose first play is in the test range, and its song, int64 (n,) each."""
    users = np.flatnonzero(histories.lengths > 0)
    plays = histories.offsets[:-1][users]
    is_sampled = (
        uniform_draws(user_hash(histories.user_ids, salt="queries ")[users], np.zeros(len(users), np.int64)) < share
    )
    is_selected = split.is_test(histories)[plays] & is_sampled
    return users[is_selected], histories.songs[plays[is_selected]].astype(np.int64)


def class_of(plays: np.ndarray) -> np.ndarray:
    """int64: the index in CLASSES of numbers of plays, which must be at least 1."""
    return np.asarray(np.searchsorted(CLASS_BOUNDS, plays, side="right") - 1)
