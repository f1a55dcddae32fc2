"""The baselines: popularity, the user's own songs, neighbours of the last song, sequential rules; how each is fitted.

Q queries, N songs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import DAY_MS, FitRange
from rayrec.errors import InputError
from rayrec.recommend.base import BaseRecommender, Horizon
from rayrec.recommend.selection import Selection
from rayrec.recommend.session_knn import VsknnRecommender, VstanRecommender, last_plays
from rayrec.recommend.vector_recommender import VectorRecommender
from rayrec.recommend.weighted_average import OFFSETS, AverageRecommender, fit_weighted

RECENT_DAYS = 21.0  # whose plays popularity-recent counts, where no validation range chooses them
LATEST = 1_000  # plays of a user that are counted, so that long histories cost no more
MAX_DISTANCE = 10  # plays between a song and one that follows it
DECAY = 1.0  # a pair of plays so many plays apart counts distance^-DECAY, where no validation range chooses it
RULES_PER_SONG = 1_000  # kept, the strongest
MAX_RULES = 20_000_000  # held at a time while counting: 160 MB
DISCOUNTS = (0.25, 0.5, 0.75, 0.9, 1.0)


class PopularityRecommender(BaseRecommender):
    """Scores a song by its plays in the fit range, or the end of it; a song not played there scores 0.

    `plays` is int64 (N,).
    """

    def __init__(self, plays: np.ndarray, name: str = "popularity") -> None:
        self.plays, self.name = np.asarray(plays), name
        self.num_songs = len(self.plays)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, since: int | None = None
    ) -> "PopularityRecommender":
        """Count the plays, those from `since` (ms UTC) on where it is given.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        plays = np.zeros(num_songs, dtype=np.int64)
        for histories in batches:
            allowed.require(histories)
            songs = histories.songs if since is None else histories.songs[histories.played_at >= since]
            plays += np.bincount(songs, minlength=num_songs)
        return cls(plays, "popularity" if since is None else "popularity-recent")

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the plays of each song, the same read-only row for every query."""
        return np.broadcast_to(self.plays.astype(np.float32), (len(questions), self.num_songs))


class UserTopRecommender(BaseRecommender):
    """How often the user has played each song of late: P-TopFreq of next-basket research (Li et al. 2023).

    Nothing is fitted: the plays before a query hold all that it needs.
    """

    name = "user-top"

    def __init__(self, num_songs: int) -> None:
        self.num_songs = num_songs

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): times that each song is among the last 1,000 plays."""
        rows, songs, _ = last_plays(histories, questions, self.num_songs, LATEST)
        once = np.ones(len(rows), dtype=np.float32)
        counts: np.ndarray = coo_matrix((once, (rows, songs)), shape=(len(questions), self.num_songs)).toarray()
        return counts


class ItemKnnRecommender(VectorRecommender):
    """The taste vector is the vector of the last song played: item-to-item in the space of the songs."""

    name = "item-knn"

    def vectors(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, D): the last song's vector; zeros where there is no play, or the song has no vector."""
        last = last_songs(histories, questions, self.num_songs)
        return np.where(last[:, None] >= 0, self.song_vectors[last], np.float32(0))


def last_songs(histories: Histories, questions: Questions, num_songs: int) -> np.ndarray:
    """int64 (Q,): the last song played before each query, -1 where there is none among the first `num_songs`."""
    last = np.full(len(questions), -1, dtype=np.int64)
    with_plays = questions.seen > 0
    last[with_plays] = histories.songs[histories.offsets[questions.rows[with_plays]] + questions.seen[with_plays] - 1]
    last[last >= num_songs] = -1
    return last


class SequentialRulesRecommender(BaseRecommender):
    """Scores a song by how often it followed the last song, weighted distance^-decay (SR; Ludewig and Jannach 2018).

    `rules` is a sparse float32 (N, N): row the song, column what followed it. A song that never
    followed scores 0.
    """

    name = "sequential-rules"

    def __init__(self, rules: csr_matrix, decay: float = DECAY) -> None:
        self.rules, self.settings = rules, {"decay": decay}
        self.num_songs = rules.shape[0]

    @classmethod
    def fit(
        cls,
        batches: Iterable[Histories],
        *,
        num_songs: int,
        allowed: FitRange,
        max_distance: int = MAX_DISTANCE,
        decay: float = DECAY,
        rules_per_song: int = RULES_PER_SONG,
        max_rules: int = MAX_RULES,
    ) -> "SequentialRulesRecommender":
        """Count what follows what in each user's history.

        The strongest `rules_per_song` of each song are kept, fewer where `max_rules` would be passed:
        then the weaker ones go early, and with them a little of what they might have come to. Raises
        `LeakError` for a play that `allowed` forbids.
        """
        per_song = max(1, min(rules_per_song, max_rules // (2 * max(1, num_songs))))
        rules = count_rules(Histories.from_lists([], []), num_songs, max_distance, decay)
        for histories in batches:
            allowed.require(histories)
            rules = rules + count_rules(histories, num_songs, max_distance, decay)
            if rules.nnz > max_rules:
                rules = strongest(rules, per_song)
        return cls(strongest(rules, per_song), decay)

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the weight of the rule from the last song to each song."""
        last = last_songs(histories, questions, self.num_songs)
        scores = np.zeros((len(questions), self.num_songs), dtype=np.float32)
        known = np.flatnonzero(last >= 0)
        lengths = np.diff(self.rules.indptr)[last[known]]
        starts = self.rules.indptr[last[known]].astype(np.int64)
        entries = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        scores[np.repeat(known, lengths), self.rules.indices[entries]] = self.rules.data[entries]
        return scores


def count_rules(histories: Histories, num_songs: int, max_distance: int, decay: float = DECAY) -> csr_matrix:
    """Sparse float32 (N, N): Σ distance^-decay over pairs of plays of one user at most `max_distance` apart."""
    rows, songs = histories.rows, histories.songs
    rules = csr_matrix((np.zeros(0, np.float32), (np.zeros(0, np.int32),) * 2), shape=(num_songs, num_songs))
    for distance in range(1, max_distance + 1):  # one at a time, so that few pairs are held at once
        pairs = np.flatnonzero(rows[distance:] == rows[:-distance])
        weights = np.full(len(pairs), distance**-decay, dtype=np.float32)
        pair = (songs[pairs], songs[pairs + distance])
        rules = rules + csr_matrix((weights, pair), shape=(num_songs, num_songs))
    return rules


def strongest(rules: csr_matrix, count: int) -> csr_matrix:
    """The `count` largest entries of each row; of equal ones those with the lower column."""
    rows = np.repeat(np.arange(rules.shape[0]), np.diff(rules.indptr))
    order = np.lexsort((rules.indices, -rules.data, rows))
    place = np.arange(rules.nnz) - rules.indptr[rows]  # within the sorted row
    strongest_first = order[place < count]
    return csr_matrix(
        (rules.data[strongest_first], (rows[strongest_first], rules.indices[strongest_first])),
        shape=rules.shape,
        dtype=np.float32,
    )


Settings = Mapping[str, Any]  # numbers, of a baseline, by name; those that are left out have their defaults
FromPlays = Callable[[Iterator[Histories], Dataset, FitRange, Settings], BaseRecommender]
FromVectors = Callable[[np.ndarray], BaseRecommender]


def _popularity(
    batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, _settings: Settings
) -> BaseRecommender:
    return PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)


def _recent(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    """Where the data has no times, the last days are all of it."""
    end = dataset.manifest.last_play + 1 if allowed.before is None else allowed.before
    days = settings.get("days", RECENT_DAYS)
    since = end - round(days * DAY_MS)
    recent = PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed, since=since)
    recent.settings = {"days": days}
    return recent


def _rules(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    decay = settings.get("decay", DECAY)
    return SequentialRulesRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed, decay=decay)


def _vsknn(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    fitted = VsknnRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)
    return fitted.with_settings(replace(fitted.chosen, **settings))


def _vstan(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    fitted = VstanRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)
    return fitted.with_settings(replace(fitted.chosen, **settings))


def _user_top(
    _batches: Iterator[Histories], dataset: Dataset, _allowed: FitRange, _settings: Settings
) -> BaseRecommender:
    return UserTopRecommender(dataset.num_songs)


FROM_PLAYS: dict[str, FromPlays] = {
    "popularity": _popularity,
    "popularity-recent": _recent,
    "user-top": _user_top,
    "sequential-rules": _rules,
    "vsknn": _vsknn,
    "vstan": _vstan,
}


def _average(discount: float) -> FromVectors:
    return lambda vectors: AverageRecommender(vectors, discount)


FROM_VECTORS: dict[str, FromVectors] = {
    "item-knn": ItemKnnRecommender,
    **{f"average-{discount}": _average(discount) for discount in DISCOUNTS},
}
FROM_BOTH = tuple(OFFSETS)  # the weight-based ones

BASELINES: tuple[str, ...] = (*FROM_PLAYS, *FROM_VECTORS, *FROM_BOTH)


def needs_vectors(names: Sequence[str]) -> bool:
    """True if one of the named baselines works on song vectors."""
    return any(name in FROM_VECTORS or name in FROM_BOTH for name in names)


def fit_baselines(
    names: Sequence[str],
    dataset: Dataset,
    vectors: np.ndarray | None,
    allowed: FitRange,
    selection: Selection | None = None,
    settings: Mapping[str, Settings] | None = None,
) -> list[BaseRecommender]:
    """Fit the named baselines on what `allowed` lets through of the data set, in the order of the names.

    `vectors` is float32 (N, D), normalized, and must itself come from that range; it is needed by `item-knn`, the
    averages and the weight-based ones, which share it. These last choose λ by `selection`, and take a usual one where
    there is none. `settings` are those of the others, by baseline. Raises `InputError` for an unknown name.
    """
    fitted: list[BaseRecommender] = []
    for name in names:
        batches = (allowed.select(batch) for batch in dataset.read_all())
        if name in FROM_PLAYS:
            fitted.append(FROM_PLAYS[name](batches, dataset, allowed, (settings or {}).get(name, {})))
        elif name not in BASELINES:
            raise InputError(f"there is no baseline {name!r}; there are: {', '.join(BASELINES)}")
        elif vectors is None:
            raise InputError(f"{name} requires song embeddings; run `rayrec embed` first")
        elif name in FROM_VECTORS:
            fitted.append(FROM_VECTORS[name](vectors))
        else:
            fitted.append(fit_weighted(batches, vectors, name, allowed, selection))
    return fitted
