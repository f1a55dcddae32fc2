"""The weight-based baselines of the paper: the last songs, each weighed by its age with a learned weight.

Q queries, P plays, D dimensions, J weights.
"""

from collections.abc import Iterable

import numpy as np
from scipy.linalg import solve
from scipy.sparse import csr_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.errors import InputError
from rayrec.recommend.base import Horizon
from rayrec.recommend.selection import Selection
from rayrec.recommend.vector_recommender import VectorRecommender, normalized

WEIGHTS = 100  # last songs that are weighed
OFFSETS = {"weighted-short": (1, 1), "weighted-long": (25, 50)}  # plays ahead of the target, as a network's horizons
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # λ to choose from; a song's vector has the squared length 1
USUAL_PENALTY = 1e-1  # λ where there is no validation range
MOST_PLAYS = 2_000_000  # that are looked at: a hundred weights are sure long before


class AverageRecommender(VectorRecommender):
    """t_u = Σ_j γ^(n−j) s_j over the n plays so far, normalized (De Boom et al. 2018, their baseline).

    `discount` is γ in (0, 1]: 1 is the plain average, near 0 only the last song counts. A play of a
    song without a vector adds nothing, and the plays before it are discounted all the same.
    Raises `InputError` for another discount.
    """

    def __init__(self, song_vectors: np.ndarray, discount: float) -> None:
        if not 0 < discount <= 1:
            raise InputError(f"discount {discount} is not in (0, 1]; 1 is the plain average")
        super().__init__(song_vectors)
        self.discount = discount
        self.name = f"average-{float(discount)}"

    def vectors(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, D): the discounted average of the songs before each query."""
        order = np.lexsort((questions.seen, questions.rows))
        rows, seen = questions.rows[order], questions.seen[order]
        follows = np.concatenate([[False], rows[1:] == rows[:-1]])  # another query of the same user
        plays_since = seen - np.where(follows, np.concatenate([[0], seen[:-1]]), 0)
        sums = self._sums_of_recent(histories, rows, seen, plays_since)
        _carry(sums, follows, np.float32(self.discount) ** plays_since)
        vectors = np.empty_like(sums)
        vectors[order] = normalized(sums)
        return vectors

    def _sums_of_recent(
        self, histories: Histories, rows: np.ndarray, seen: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """float32 (Q, D): the discounted sum over the last counts[q] plays before each query.

        As one sparse product, so that no (P, D) array is made.
        """
        ends = np.cumsum(counts)
        ages = np.repeat(ends, counts) - np.arange(counts.sum()) - 1  # plays between this one and the query
        songs = histories.songs[np.repeat(histories.offsets[rows] + seen, counts) - ages - 1]
        known = songs < self.num_songs
        weights = np.where(known, np.float32(self.discount) ** ages, 0).astype(np.float32)
        pointers = np.concatenate([[0], ends])
        matrix = csr_matrix((weights, np.where(known, songs, 0), pointers), shape=(len(rows), self.num_songs))
        return np.asarray(matrix @ self.song_vectors, dtype=np.float32)


def _carry(sums: np.ndarray, follows: np.ndarray, decay: np.ndarray) -> None:
    """Add to each row of `sums`, in place, the finished row before it, decayed, where it `follows` that row.

    One step per query of the user who has the most, over all users at once.
    """
    starts = np.flatnonzero(~follows)
    lengths = np.diff(np.append(starts, len(follows)))
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[longest_first], lengths[longest_first]
    for step in range(1, int(lengths.max(initial=0))):
        rows = starts[: np.searchsorted(-lengths, -step)] + step
        sums[rows] += decay[rows, None] * sums[rows - 1]


class WeightedRecommender(VectorRecommender):
    """t_u = Σ_j w_j s_(n−j) over the last songs, normalized (De Boom et al. 2018: their b_WST and b_WLT).

    A play of a song without a vector adds nothing, and the plays before it keep their weights.
    """

    def __init__(
        self, song_vectors: np.ndarray, weights: np.ndarray, name: str, penalty: float = USUAL_PENALTY
    ) -> None:
        """`weights` float (J,): of the last song first, fitted under the penalty λ."""
        super().__init__(song_vectors)
        self.weights = np.asarray(weights, dtype=np.float32)
        self.name, self.settings = name, {"penalty": penalty}

    @classmethod
    def fit(
        cls,
        batches: Iterable[Histories],
        vectors: np.ndarray,
        *,
        name: str,
        allowed: FitRange,
        penalty: float = USUAL_PENALTY,
    ) -> "WeightedRecommender":
        """The weights w that minimize the mean of ‖t_u − s‖² over positions and targets s, plus λ‖w‖².

        The squared distance [ours] and not L_cos, to which every multiple of w is alike, so that λ‖w‖²
        would shrink w and choose nothing. w then solves J linear equations in sums that one pass
        collects, however many plays there are. L_cos chooses λ. On 30Music's validation range the mean
        cosine with the target is 0.686 (long: 0.524); L_cos itself, minimized by L-BFGS over 50
        weights, gives 0.687 (0.524). Raises `LeakError` for a play that `allowed` forbids.
        """
        sums = _fit_sums(batches, vectors, OFFSETS[name], allowed)
        return cls(vectors, sums.weights(penalty), name, penalty)

    def vectors(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, D): the weighted sum of the last songs before each query."""
        counts = np.minimum(questions.seen, len(self.weights))
        ends = np.cumsum(counts)
        ages = np.repeat(ends, counts) - np.arange(counts.sum()) - 1
        last = np.repeat(histories.offsets[questions.rows] + questions.seen, counts) - 1
        songs = histories.songs[last - ages]
        known = songs < self.num_songs
        weights = np.where(known, self.weights[ages], 0).astype(np.float32)
        pointers = np.concatenate([[0], ends])
        matrix = csr_matrix((weights, np.where(known, songs, 0), pointers), shape=(len(questions), self.num_songs))
        return normalized(np.asarray(matrix @ self.song_vectors, dtype=np.float32))


class LagSums:
    """Products of the songs of a user that are so many plays apart: all that the weights depend on.

    The equations of the weights sum over positions i and their targets the products
    s_(i−j) · s_(i−k) and s_(i−j) · target. Both are products of two songs of a user a number of
    plays apart, the lag, so these are summed once, by lag and by how many plays of the user follow
    the later one: that says for how many positions and targets the pair counts.
    """

    def __init__(self, offsets: tuple[int, int], weights: int = WEIGHTS) -> None:
        self._offsets, self._count = offsets, weights
        lags = ends = weights + offsets[1]
        self._sums = np.zeros((lags, ends))  # by lag and plays that follow, those of the last cell or more
        self._pairs = 0  # of positions and targets
        self.plays = 0

    def add(self, histories: Histories, vectors: np.ndarray) -> None:
        """Add the plays of some users; songs without a vector count as zeros."""
        songs, rows = np.minimum(histories.songs, len(vectors) - 1), histories.rows
        unknown = histories.songs >= len(vectors)
        played = np.where(unknown[:, None], np.float32(0), vectors[songs])
        follow = np.minimum(histories.offsets[1:][rows] - 1 - np.arange(len(rows)), self._sums.shape[1] - 1)
        for lag in range(min(len(self._sums), int(histories.lengths.max(initial=0)))):
            pairs = np.flatnonzero(rows[lag:] == rows[: len(rows) - lag])
            products = np.einsum("pd,pd->p", played[pairs], played[pairs + lag])
            self._sums[lag] += np.bincount(follow[pairs + lag], weights=products, minlength=self._sums.shape[1])
        self._pairs += int(self._targets(follow).sum())
        self.plays += histories.num_plays

    def weights(self, penalty: float) -> np.ndarray:
        """float64 (J,): the solution of the equations for λ = `penalty`."""
        count = self._count
        # A pair whose later song is the k-th last at position i has k more plays behind it than i has.
        behind = np.arange(self._sums.shape[1])
        targets = np.stack([self._targets(behind - age) for age in range(count)])  # (J, plays that follow)
        gram = np.zeros((count, count))
        for lag in range(count):
            along = targets[: count - lag] @ self._sums[lag]
            ages = np.arange(count - lag)
            gram[ages, ages + lag] = gram[ages + lag, ages] = along
        totals = self._sums.sum(axis=1)
        first, last = self._offsets
        right = np.array([totals[age + first : age + last + 1].sum() for age in range(count)])
        pairs = max(1, self._pairs)
        found: np.ndarray = solve(gram / pairs + penalty * np.eye(count), right / pairs, assume_a="pos")
        return found

    def _targets(self, follow: np.ndarray) -> np.ndarray:
        """How many targets a position has that so many plays follow."""
        first, last = self._offsets
        return np.asarray(np.clip(follow - first + 1, 0, last - first + 1))


def fit_weighted(
    batches: Iterable[Histories], vectors: np.ndarray, name: str, allowed: FitRange, selection: Selection | None
) -> WeightedRecommender:
    """The baseline `name` of OFFSETS, its λ the one with the smallest L_cos on the plays of `selection`."""
    penalty = USUAL_PENALTY
    if selection is not None and selection.vectors is not None:
        penalty = choose_penalty(selection, name)
    return WeightedRecommender.fit(batches, vectors, name=name, allowed=allowed, penalty=penalty)


def choose_penalty(selection: Selection, name: str) -> float:
    """λ of PENALTIES under which the taste vectors lie nearest to the plays of `selection`, by L_cos."""
    vectors = selection.vectors
    if vectors is None:
        raise ValueError("the penalty is chosen on song embeddings, and the selection has none")
    sums = _fit_sums(selection.batches(), vectors, OFFSETS[name], selection.allowed)
    queries, targets = selection.ahead(*OFFSETS[name])
    wanted = vectors[targets]

    def cosine(penalty: float) -> float:
        trial = WeightedRecommender(vectors, sums.weights(penalty), name)
        taste = trial.vectors(selection.histories, queries)
        return float(np.einsum("qd,qd->", taste, wanted, dtype=np.float64))

    return max(PENALTIES, key=cosine)


def _fit_sums(
    batches: Iterable[Histories], vectors: np.ndarray, offsets: tuple[int, int], allowed: FitRange
) -> LagSums:
    sums = LagSums(offsets)
    for histories in batches:
        allowed.require(histories)
        sums.add(histories, vectors)
        if sums.plays >= MOST_PLAYS:
            break
    return sums
