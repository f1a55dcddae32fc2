"""Ask recommenders the queries of a batch of users and tally the answers.

Each model scores each query once for each of its horizons; the ranks of all right answers, and
what is recommended, come from these scores.

N songs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.evaluation.accumulator import SLICED, VIEWS, Tally
from rayrec.evaluation.cosine_curves import cosine_sums, curves_of
from rayrec.evaluation.pairwise import PAIRED, Negatives, pair_sums, popularity_ranks
from rayrec.evaluation.protocol import EvaluateConfig, blocks, horizon_of, slices_of, usual_k
from rayrec.evaluation.query_block import QueryBlock
from rayrec.evaluation.ranks import Ranked, metric_columns, metrics_of, rank_targets
from rayrec.recommend.base import Recommender

QUERIES_PER_BLOCK = 1 << 16


class Evaluator:
    """Asks and tallies.

    `song_plays` is (N,), how often each song was played in the fit range: a song without a play is a
    miss for every model. `curve_share` in [0, 1] is the share of users, by hash, who are drawn for
    the curves, the pairs and what is recommended. `contexts` names the bits of the plays' contexts.
    """

    def __init__(
        self,
        recommenders: Sequence[Recommender],
        *,
        split: Split,
        song_plays: np.ndarray,
        config: EvaluateConfig,
        curve_share: float = 1.0,
        contexts: Sequence[str] = (),
    ) -> None:
        self.recommenders = recommenders
        self.split = split
        self.song_plays = song_plays
        self.known_songs = song_plays > 0
        self.config = config
        self.curve_share = curve_share
        self.contexts = contexts
        self.curves = curves_of(recommenders)
        self._negatives = Negatives(song_plays, config.seed)
        self._popularity_ranks = popularity_ranks(song_plays)

    def empty(self) -> Tally:
        """The tally of no users."""
        return Tally.empty(
            models=len(self.recommenders),
            curves=len(self.curves),
            slices=len(slices_of(self.contexts)),
            songs=len(self.known_songs),
            samples=self.config.bootstrap_samples,
            ks=len(self.config.ks),
            offsets=self.config.offsets,
        )

    def __call__(self, histories: Histories) -> Tally:
        """The tally of whole histories; users without a test play cost next to nothing."""
        tally = self.empty()
        for users, plays in blocks(histories, self.split, QUERIES_PER_BLOCK):
            block = QueryBlock.of(users, plays, self.split, self.config, self.curve_share, self.contexts)
            self._count(tally, block)
            for model in range(len(self.recommenders)):
                self._add_model(tally, model, block)
            self._add_curves(tally, block)
        return tally

    def _count(self, tally: Tally, block: QueryBlock) -> None:
        """The queries behind each view and each slice."""
        for place, view in enumerate(VIEWS):
            per_user = block.sums_by_user(np.ones((len(block.queries), 1)), block.counted[view])
            for group, users in enumerate(block.groups):
                tally.users[place, group] += np.count_nonzero(per_user[users])
                tally.questions[place, group] += block.weighted(per_user, users)[:, 0]
        few = tally.slice_questions.shape[1]
        tally.slice_questions += block.weights[:few].dot(block.sums_by_user(block.slices.T.astype(np.float64))).T

    def _add_model(self, tally: Tally, model: int, block: QueryBlock) -> None:
        recommender = self.recommenders[model]
        metrics: dict[str, np.ndarray] = {}
        for horizon in recommender.horizons:
            ranked = rank_targets(
                recommender,
                block.histories,
                block.queries,
                {name: target for name, target in block.targets.items() if horizon_of(recommender, name) == horizon},
                self.known_songs,
                depth=max(self.config.ks),
                horizon=horizon,
                listed=block.drawn if horizon == "short" else None,
            )
            for name, ranks in ranked.ranks.items():
                target = block.targets[name]
                metrics[name] = metrics_of(ranks, target.rows, target.sizes, self.config.ks)
            if horizon == "short":
                self._add_lists(tally, model, block, ranked)
        for place, view in enumerate(VIEWS):
            per_user = block.sums_by_user(metrics.get(view, metrics["next"]), block.counted[view])
            for group, users in enumerate(block.groups):
                tally.metrics[model, place, group] += block.weighted(per_user, users)
        self._add_slices(tally, model, block, metrics["next"])

    def _add_slices(self, tally: Tally, model: int, block: QueryBlock, metrics: np.ndarray) -> None:
        columns = metric_columns(self.config.ks)
        chosen = metrics[:, [columns.index((metric, usual_k(self.config.ks))) for metric in SLICED]]
        for place, mask in enumerate(block.slices):
            per_user = block.sums_by_user(chosen, mask)
            tally.slice_metrics[model, place] += block.weights[: tally.slice_questions.shape[1]] @ per_user

    def _add_lists(self, tally: Tally, model: int, block: QueryBlock, ranked: Ranked) -> None:
        rows, songs = ranked.listed_rows, ranked.listed_songs
        again = block.heard(block.queries.rows[rows], block.queries.seen[rows], songs)
        figures = np.stack([np.ones(len(songs)), self._popularity_ranks[songs], again], axis=1)
        users = block.queries.rows[rows]
        per_user = np.stack(
            [np.bincount(users, weights=column, minlength=len(block.histories)) for column in figures.T], axis=1
        )
        weighted = block.weights[: tally.list_counts.shape[1]] @ per_user
        tally.list_counts[model] += weighted[:, 0]
        tally.list_sums[model] += weighted[:, 1:]
        tally.listed[model, songs] = True
        tally.lists[model] += np.count_nonzero(block.drawn)

    def _add_curves(self, tally: Tally, block: QueryBlock) -> None:
        """Cosines and pairs of the drawn users."""
        if not self.curves:
            return
        histories, sampled = block.histories, block.queries.take(np.flatnonzero(block.drawn))
        weights = block.weights[: tally.curve_sums.shape[1]]
        for row, (recommender, horizon) in enumerate(self.curves):
            vectors = recommender.vectors(histories, sampled, horizon)
            sums, counts = cosine_sums(recommender, vectors, histories, sampled, self.config.offsets)
            tally.curve_sums[row] += weights @ sums
            tally.curve_counts[row] += weights @ counts
            for place, target in enumerate(PAIRED):
                if horizon_of(recommender, target) == horizon:
                    won, pairs = pair_sums(recommender, vectors, histories, sampled, target, self._negatives)
                    tally.pairs_won[row, place] += weights @ won
                    tally.pairs[row, place] += weights @ pairs
