"""The protocol: which plays are predicted, for whom, and how the figures add up.

Every play of the test range that has an earlier play by the same user is a question, asked at its
time. Figures are means over plays: sums and counts are carried, never means of means.

Q questions, U users, N songs, M models, G groups of users, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.config import setting
from rayrec.data.histories import Histories, Questions, user_hash
from rayrec.data.split import Split
from rayrec.errors import InputError
from rayrec.evaluation.bootstrap import poisson_weights
from rayrec.evaluation.curves import cosine_sums, curves_of
from rayrec.evaluation.metrics import NEVER, metrics_of, ranks_of
from rayrec.recommend.recommender import Horizon, Recommender

GROUPS = ("seen", "new", "held_out")  # every user is in one; "all" is their sum
QUESTIONS_PER_BLOCK = 1 << 16
CURVE_SAMPLES = 200  # bootstrap samples of the curves, whose sums are large


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and how finely."""

    models: tuple[str, ...] | None = setting(None, help="models by name; without it the network and every baseline")
    ks: tuple[int, ...] = setting((10, 20), help="cut-offs of recall, MRR and NDCG")
    bootstrap_samples: int = setting(1000, help="samples of the bootstrap over users; 0: no intervals")
    confidence: float = setting(0.95, help="share of the bootstrap samples within low and high, in (0, 1)")
    offsets: int = setting(100, help="plays ahead in the curve of mean cosine; 0: no curve")
    max_curve_users: int = setting(5_000, help="about how many users of the data set are drawn for the curves")
    seed: int = setting(0, help="of the bootstrap and of the users drawn")

    def __post_init__(self) -> None:
        if self.models is not None and not self.models:
            raise InputError("models is empty; name at least one, or leave it out for all")
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"ks is {self.ks}; give cut-offs of at least 1, such as 10,20")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence {self.confidence} is not in (0, 1); give a share such as 0.95")
        for name in ("bootstrap_samples", "offsets", "max_curve_users"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass
class Tally:
    """Sums over users. Tallies of different users add up to the tally of all of them.

    Axis B + 1 holds the data itself and then the bootstrap samples.
    """

    users: np.ndarray  # int64 (G,): users with test plays
    plays: np.ndarray  # float64 (G, B + 1): test plays
    metrics: np.ndarray  # float64 (M, G, B + 1, 3 · K): see metric_columns
    curve_sums: np.ndarray  # float64 (curves, CURVE_SAMPLES + 1, offsets): cosines
    curve_counts: np.ndarray  # the same shape: plays behind them

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            users=self.users + other.users,
            plays=self.plays + other.plays,
            metrics=self.metrics + other.metrics,
            curve_sums=self.curve_sums + other.curve_sums,
            curve_counts=self.curve_counts + other.curve_counts,
        )


class Evaluator:
    """Asks recommenders the questions of a batch of users and tallies the answers.

    `known_songs` is bool (N,): the songs with a play in the fit range; any other is a miss for every
    model. `curve_share` in [0, 1] is the share of users, by hash, whose cosines by offset are taken.
    """

    def __init__(
        self,
        recommenders: Sequence[Recommender],
        *,
        split: Split,
        known_songs: np.ndarray,
        config: EvaluateConfig,
        curve_share: float = 1.0,
    ) -> None:
        self.recommenders = recommenders
        self.split = split
        self.known_songs = known_songs
        self.config = config
        self.curve_share = curve_share
        self.curves = curves_of(recommenders) if config.offsets else []

    def empty(self) -> Tally:
        """The tally of no users."""
        config, groups, curves = self.config, len(GROUPS), len(self.curves)
        samples = config.bootstrap_samples + 1
        curve_shape = (curves, min(samples, CURVE_SAMPLES + 1), config.offsets)
        return Tally(
            users=np.zeros(groups, dtype=np.int64),
            plays=np.zeros((groups, samples)),
            metrics=np.zeros((len(self.recommenders), groups, samples, 3 * len(config.ks))),
            curve_sums=np.zeros(curve_shape),
            curve_counts=np.zeros(curve_shape),
        )

    def __call__(self, histories: Histories) -> Tally:
        """The tally of whole histories; users without a test play cost next to nothing."""
        tally = self.empty()
        for block, plays in blocks(histories, self.split, QUESTIONS_PER_BLOCK):
            questions = Questions.before_plays(block, plays)
            weights = poisson_weights(block.user_ids, self.config.bootstrap_samples, self.config.seed)
            self._add_metrics(tally, block, questions, block.songs[plays], weights)
            self._add_curves(tally, block, questions, weights)
        return tally

    def _add_metrics(
        self, tally: Tally, histories: Histories, questions: Questions, targets: np.ndarray, weights: np.ndarray
    ) -> None:
        groups = user_groups(histories, self.split)
        plays_per_user = np.bincount(questions.rows, minlength=len(histories))
        members = [np.flatnonzero(groups == group) for group in range(len(GROUPS))]
        for group, users in enumerate(members):
            tally.users[group] += len(users)
            tally.plays[group] += weights[:, users] @ plays_per_user[users]
        for model, recommender in enumerate(self.recommenders):
            ranks = target_ranks(recommender, histories, questions, targets, self.known_songs)
            per_user = _sums_by_user(metrics_of(ranks, self.config.ks), questions.rows, len(histories))
            for group, users in enumerate(members):
                tally.metrics[model, group] += weights[:, users] @ per_user[users]

    def _add_curves(self, tally: Tally, histories: Histories, questions: Questions, weights: np.ndarray) -> None:
        if not self.curves:
            return
        drawn = user_hash(histories.user_ids, salt=f"curves {self.config.seed} ") / 2.0**64 < self.curve_share
        sampled = questions.take(np.flatnonzero(drawn[questions.rows]))
        weights = weights[: tally.curve_sums.shape[1]]
        for row, curve in enumerate(self.curves):
            sums, counts = cosine_sums(curve, histories, sampled, self.config.offsets)
            tally.curve_sums[row] += weights @ sums
            tally.curve_counts[row] += weights @ counts


def plays_to_predict(histories: Histories, split: Split) -> np.ndarray:
    """int64 (Q,): positions of the plays to predict, those of the test range with an earlier play."""
    has_earlier = np.ones(histories.num_plays, dtype=bool)
    has_earlier[histories.offsets[:-1][histories.lengths > 0]] = False
    return np.flatnonzero(has_earlier & split.is_test(histories))


def blocks(histories: Histories, split: Split, questions: int) -> Iterator[tuple[Histories, np.ndarray]]:
    """The users who have test plays, with the positions of these, in blocks of about `questions` of them."""
    rows = histories.rows[plays_to_predict(histories, split)]
    users, counts = np.unique(rows, return_counts=True)
    number = (np.cumsum(counts) - counts) // questions
    for cut in np.split(users, np.flatnonzero(np.diff(number)) + 1):
        if len(cut):
            block = histories.take(cut)
            yield block, plays_to_predict(block, split)


def user_groups(histories: Histories, split: Split) -> np.ndarray:
    """int64 (U,): the place in GROUPS of each user: held out, else seen with a play before the test range, else new."""
    earlier = np.bincount(histories.rows[~split.is_test(histories)], minlength=len(histories)) > 0
    groups = np.where(earlier, GROUPS.index("seen"), GROUPS.index("new"))
    allowed = split.held_out.allowed_users(histories.user_ids)
    return np.where(allowed, groups, GROUPS.index("held_out"))


def target_ranks(
    recommender: Recommender,
    histories: Histories,
    questions: Questions,
    targets: np.ndarray,
    known_songs: np.ndarray,
    horizon: Horizon = "short",
) -> np.ndarray:
    """int64 (Q,): the rank of each target, NEVER for a song that is not known; see `ranks_of`."""
    ranks = np.full(len(questions), NEVER, dtype=np.int64)
    answerable = targets < min(len(known_songs), recommender.num_songs)
    answerable[answerable] = known_songs[targets[answerable]]
    asked = np.flatnonzero(answerable)
    for chunk, scores in recommender.score_chunks(histories, questions.take(asked), horizon):
        ranks[asked[chunk]] = ranks_of(scores, targets[asked[chunk]])
    return ranks


def _sums_by_user(values: np.ndarray, rows: np.ndarray, users: int) -> np.ndarray:
    """float64 (U, C): the sums of values (Q, C) over each user's questions."""
    columns = [np.bincount(rows, weights=column, minlength=users) for column in values.T]
    return np.stack(columns, axis=1)
