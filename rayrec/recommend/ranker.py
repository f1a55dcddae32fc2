"""The ranker: orders candidates by their features, with trees or a weighted sum, and turns scores into probabilities.

Shapes: Q queries, C candidates of all queries together, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import lightgbm
import numpy as np
from scipy.optimize import isotonic_regression, minimize, minimize_scalar

from rayrec.data.ragged import (
    group_of_each_item,
    group_sizes,
    group_starts,
    offsets_of,
    positions_in_groups,
    ranges,
    sum_groups,
)
from rayrec.errors import DamagedArtifactError, TooFewQueriesError
from rayrec.storage.workspace import Workspace

TOP = 20  # first places that count in NDCG and in training
SOME_QUERIES = 10_000  # with fewer training queries, trees with few leaves are tried, too
FEW_LEAVES = 4
FEW_QUERIES = 2_000  # with fewer training queries, linear models are tried, too
PENALTIES = (1.0, 10.0, 100.0)  # factors of the squared weights that are tried
KNOTS = 60  # points of the curve from shares to probabilities
SHARPNESS = (0.25, 8.0)  # lowest and highest factor of the scores that is tried
SLOPE = 0.01  # slope of the curve where it would be flat
ROWS_AT_ONCE = 1 << 14  # candidates that a linear model scores at once
TREES_A_CHECK = 5  # trees between checks; a check takes half as long as a tree
LEAST_LEAF = 50  # candidates; for small data the minimum leaf size is not reduced below this
LEAF_PART = 200  # the minimum leaf size is at most a 200th of the candidates, or few candidates would grow no tree


@dataclass(frozen=True, kw_only=True)
class RankerSettings:
    """How trees are grown."""

    trees: int = 600  # maximum; training stops when the held-out users gain nothing more
    leaves: int = 31
    learning_rate: float = 0.05
    min_leaf: int = LEAST_LEAF  # minimum candidates per leaf, less if there are few, see LEAF_PART
    feature_share: float = 0.6  # share of the features that is drawn for each tree
    query_share: float = 1.0  # share of the queries that is drawn for each tree
    patience: int = 30  # trees without a gain before training stops
    seed: int = 0
    threads: int = 1  # training threads; the result does not depend on their number

    def overlapping(self) -> RankerSettings:
        """Return settings for queries that share right songs: larger leaves, and trees that differ more.

        Many such queries add little information, and trees would memorize the users.
        """
        return replace(self, min_leaf=1000, feature_share=0.3, query_share=0.3, patience=60)


@dataclass(frozen=True, kw_only=True)
class RankingExamples:
    """Queries with their candidates, and which candidates are right.

    Held-out queries may have no right candidate: the calibration of probabilities must count them.
    """

    features: np.ndarray  # float32 (C, F)
    right: np.ndarray  # bool (C,)
    counts: np.ndarray  # int64 (Q,), candidates of each query, in order
    held_out: np.ndarray  # bool (Q,), queries used to choose the number of trees and to calibrate
    drawn: np.ndarray  # bool (C,), candidates to learn from: the right ones and a sample of the wrong ones

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def none(cls, features: int) -> RankingExamples:
        """Return examples without queries."""
        return cls(
            features=np.zeros((0, features), dtype=np.float32),
            right=np.zeros(0, dtype=bool),
            counts=np.zeros(0, dtype=np.int64),
            held_out=np.zeros(0, dtype=bool),
            drawn=np.zeros(0, dtype=bool),
        )

    @property
    def has_right_candidate(self) -> np.ndarray:
        """bool (Q,): queries with a right candidate."""
        return np.asarray(np.bincount(self.rows, weights=self.right, minlength=len(self)) > 0)

    @property
    def rows(self) -> np.ndarray:
        """int64 (C,): the query of each candidate."""
        return group_of_each_item(self.counts)

    @classmethod
    def concatenate(cls, parts: Sequence[RankingExamples]) -> RankingExamples:
        """Return the queries of all parts together."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def take(self, queries: np.ndarray) -> RankingExamples:
        """Return the queries for which `queries`, bool (Q,), is True."""
        starts = offsets_of(self.counts)[:-1][queries]
        rows = ranges(starts, self.counts[queries])
        return RankingExamples(
            features=self.features[rows],
            right=self.right[rows],
            counts=self.counts[queries],
            held_out=self.held_out[queries],
            drawn=self.drawn[rows],
        )

    @property
    def teaching(self) -> RankingExamples:
        """The queries with a right candidate, with only the candidates to learn from, see `drawn`."""
        with_right = self.take(self.has_right_candidate)
        return RankingExamples(
            features=with_right.features[with_right.drawn],
            right=with_right.right[with_right.drawn],
            counts=np.bincount(with_right.rows[with_right.drawn], minlength=len(with_right)),
            held_out=with_right.held_out,
            drawn=np.ones(int(with_right.drawn.sum()), dtype=bool),
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Turns scores into probabilities: a softmax over the candidates of a query, then an increasing curve."""

    sharpness: float  # factor of the scores before the softmax
    shares: tuple[float, ...]  # softmax shares at the points of the curve, ascending
    probabilities: tuple[float, ...]  # probabilities at the same points, ascending

    def __call__(self, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """float64 (C,): the probability of each candidate; `rows`, int (C,), ascending, are the candidates' queries."""
        return np.asarray(np.interp(self.shares_of(rows, scores), self.shares, self.probabilities))

    def shares_of(self, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """float64 (C,): the softmax share of each candidate in its query; the shares of a query add up to 1."""
        return softmax_shares(rows, scores.astype(np.float64) * self.sharpness)


class TreeModel:
    """Boosted trees of LightGBM."""

    form = "trees"

    def __init__(self, booster: lightgbm.Booster) -> None:
        self._booster = booster

    @property
    def trees(self) -> int:
        """The number of trees."""
        return int(self._booster.num_trees())

    def importance(self) -> list[float]:
        """Return the total gain of each feature over all trees."""
        gains: list[float] = self._booster.feature_importance("gain").tolist()
        return gains

    def scores(self, features: np.ndarray, threads: int = 1) -> np.ndarray:
        """float64 (C,): the score of each candidate, from its features, float32 (C, F)."""
        return np.asarray(self._booster.predict(np.ascontiguousarray(features), num_threads=threads))

    @classmethod
    def fit(
        cls,
        train_examples: RankingExamples,
        check_examples: RankingExamples,
        names: list[str],
        settings: RankerSettings,
    ) -> TreeModel:
        """Train trees by lambdarank (Burges 2010) until NDCG@20 on `check_examples` no longer improves."""
        data, parameters = _lightgbm_data(train_examples, names, settings)
        check_data = data.create_valid(
            check_examples.features, check_examples.right, group=check_examples.counts, params=parameters
        )
        booster = lightgbm.Booster(parameters, data).add_valid(check_data, "checked")
        best_ndcg, best_trees = -1.0, 0
        for trees in range(1, settings.trees + 1):
            booster.update()
            if trees % TREES_A_CHECK and trees < settings.trees:
                continue  # lightgbm.train would check after every tree
            check_ndcg = booster.eval_valid()[0][2]
            if check_ndcg > best_ndcg:
                best_ndcg, best_trees = check_ndcg, trees
            elif trees - best_trees >= settings.patience:
                break
        return cls(lightgbm.Booster(model_str=booster.model_to_string(num_iteration=best_trees)))

    @classmethod
    def grow(cls, train_examples: RankingExamples, names: list[str], settings: RankerSettings) -> TreeModel:
        """Train exactly `settings.trees` trees, without checks."""
        data, parameters = _lightgbm_data(train_examples, names, settings)
        return cls(lightgbm.train(parameters, data, num_boost_round=settings.trees))

    def save(self, workspace: Workspace, folder: str, name: str) -> list[str]:
        """Write the model in LightGBM's text format; return the names of the files."""
        workspace.write_bytes(f"{folder}/{name}.trees.txt", self._booster.model_to_string().encode())
        return [f"{name}.trees.txt"]

    @classmethod
    def load(cls, workspace: Workspace, folder: str, name: str) -> TreeModel:
        """Read a model that `save` wrote. Raises `DamagedArtifactError` if LightGBM cannot read it."""
        text = workspace.read_bytes(f"{folder}/{name}.trees.txt").decode()
        try:
            return cls(lightgbm.Booster(model_str=text))
        except lightgbm.basic.LightGBMError as error:
            raise DamagedArtifactError(
                f"{folder}/{name}.trees.txt is not a valid LightGBM model; run `rayrec rank --force`"
            ) from error


def _lightgbm_data(
    train_examples: RankingExamples, names: list[str], settings: RankerSettings
) -> tuple[lightgbm.Dataset, dict[str, Any]]:
    """Return the training data of the trees and LightGBM's parameters."""
    parameters: dict[str, Any] = {
        "objective": "lambdarank",
        "metric": "ndcg",
        "eval_at": [TOP],
        "lambdarank_truncation_level": TOP + 10,
        "num_leaves": settings.leaves,
        "learning_rate": settings.learning_rate,
        "min_data_in_leaf": min(settings.min_leaf, max(LEAST_LEAF, len(train_examples.features) // LEAF_PART)),
        "feature_fraction": settings.feature_share,
        "bagging_fraction": settings.query_share,
        "bagging_by_query": True,
        "bagging_freq": int(settings.query_share < 1),
        "max_bin": 127,
        "num_threads": settings.threads,
        "deterministic": True,
        "force_col_wise": True,
        "seed": settings.seed,
        "verbosity": -1,
    }
    data = lightgbm.Dataset(
        train_examples.features,
        train_examples.right,
        group=train_examples.counts,
        feature_name=names,
        params=parameters,
    )
    return data, parameters


class LinearModel:
    """A weighted sum of standardized features. Features are clipped to the range of the training data."""

    form = "linear"

    def __init__(self, weights: np.ndarray) -> None:
        """`weights`, float64 (5, F): mean, standard deviation, lowest, highest value and weight of each feature."""
        self._parameters = weights
        self._mean, self._deviation, self._lowest, self._highest, self._weight = weights

    def importance(self) -> list[float]:
        """Return the absolute weight of each feature."""
        return [abs(weight) for weight in self._weight.tolist()]

    def scores(self, features: np.ndarray, threads: int = 1) -> np.ndarray:
        """float32 (C,): the score of each candidate, from its features, float32 (C, F); `threads` is ignored."""
        # Clipping: a request years after the last play counts like the longest pause in the training data.
        lowest, highest = self._lowest.astype(np.float32), self._highest.astype(np.float32)
        scaled_weights = self._weight / self._deviation
        scores = np.empty(len(features), dtype=np.float32)
        for start in range(0, len(features), ROWS_AT_ONCE):  # limits the memory of copies
            chunk = slice(start, start + ROWS_AT_ONCE)
            scores[chunk] = np.clip(features[chunk], lowest, highest) @ scaled_weights.astype(np.float32)
        return scores - np.float32(self._mean @ scaled_weights)

    @classmethod
    def fit(cls, examples: RankingExamples, penalty: float) -> LinearModel:
        """Fit the weights that maximize the softmax likelihood of each query's right candidates (McFadden 1974).

        `penalty` is the factor of the squared weights in the loss.
        """
        features = examples.features.astype(np.float64)
        mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-9
        lowest, highest = features.min(axis=0), features.max(axis=0)
        features = (features - mean) / deviation
        rows, num_queries = examples.rows, len(examples)
        right_shares = examples.right / np.bincount(rows, weights=examples.right, minlength=num_queries)[rows]

        def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
            shares = softmax_shares(rows, features @ weight)
            value = -(right_shares * np.log(shares + 1e-300)).sum() + penalty * (weight @ weight)
            return value / num_queries, (features.T @ (shares - right_shares) + 2 * penalty * weight) / num_queries

        def curvature(weight: np.ndarray) -> np.ndarray:
            weighted_features = features * softmax_shares(rows, features @ weight)[:, None]
            mean_features = sum_groups(weighted_features, group_starts(rows))
            hessian = features.T @ weighted_features - mean_features.T @ mean_features
            return np.asarray(hessian + 2 * penalty * np.eye(len(hessian))) / num_queries

        # Second derivatives need a few passes over the examples instead of a hundred.
        initial_weights = np.zeros(features.shape[1])
        weight = minimize(
            loss, initial_weights, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-5}
        ).x
        return cls(np.stack([mean, deviation, lowest, highest, weight]))

    def save(self, workspace: Workspace, folder: str, name: str) -> list[str]:
        """Write the weights; return the names of the files."""
        workspace.write_array(f"{folder}/{name}.weights.npy", self._parameters)
        return [f"{name}.weights.npy"]

    @classmethod
    def load(cls, workspace: Workspace, folder: str, name: str) -> LinearModel:
        """Read a model that `save` wrote."""
        return cls(np.array(workspace.read_array(f"{folder}/{name}.weights.npy")))


MODELS: dict[str, type[TreeModel] | type[LinearModel]] = {"trees": TreeModel, "linear": LinearModel}


class Ranker:
    """Orders candidates and estimates the probability that each is right."""

    def __init__(self, model: TreeModel | LinearModel, names: list[str], calibration: Calibration) -> None:
        self.model, self.names, self.calibration = model, names, calibration

    @property
    def form(self) -> str:
        """The form of the model, `trees` or `linear`."""
        return self.model.form

    @property
    def importance(self) -> dict[str, float]:
        """The importance of each feature for the order, by name, most important first."""
        pairs = zip(self.names, self.model.importance(), strict=True)
        return dict(sorted(pairs, key=lambda pair: -pair[1]))

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float32 (C,): higher is better; comparable within a query only."""
        if not len(features):
            return np.zeros(0, dtype=np.float32)
        return self.model.scores(features).astype(np.float32)

    def save(self, workspace: Workspace, folder: str, name: str) -> list[str]:
        """Write the model and a JSON file about it; return the names of the files."""
        description = {"form": self.form, "features": self.names, "calibration": asdict(self.calibration)}
        workspace.write_json(f"{folder}/{name}.json", description)
        return [f"{name}.json", *self.model.save(workspace, folder, name)]

    @classmethod
    def load(cls, workspace: Workspace, folder: str, name: str) -> Ranker:
        """Read a ranker that `save` wrote. Raises `DamagedArtifactError` for trees that LightGBM cannot read."""
        description = workspace.read_json(f"{folder}/{name}.json")
        curve = description["calibration"]
        calibration = Calibration(
            sharpness=curve["sharpness"], shares=tuple(curve["shares"]), probabilities=tuple(curve["probabilities"])
        )
        return cls(
            MODELS[description["form"]].load(workspace, folder, name), list(description["features"]), calibration
        )


@dataclass(frozen=True, kw_only=True)
class FittedRanker:
    """The result of `fit_ranker`."""

    ranker: Ranker  # trained on all queries
    checked: Ranker  # the same, trained without the held-out queries, so that it can be evaluated on them


def fit_ranker(examples: RankingExamples, names: list[str], settings: RankerSettings | None = None) -> FittedRanker:
    """Train models without the held-out queries, choose one and calibrate it on these, and train it again on all.

    With fewer than 10,000 training queries, trees of four leaves are tried, too; with fewer than 2,000, where trees do
    worse, also linear models. The choice is the simplest model whose NDCG@20 on the held-out queries is at most one
    standard error below the best (Breiman et al. 1984). Raises `TooFewQueriesError` if there are no queries to train on
    or none to check on.
    """
    settings = settings or RankerSettings()
    models = _train_models(examples, names, settings)
    held_out = examples.take(examples.held_out)
    model_scores = [model.scores(held_out.features, settings.threads) for model, _ in models]
    has_right = held_out.has_right_candidate
    is_checked = has_right[held_out.rows]
    rows, is_right = group_of_each_item(held_out.counts[has_right]), held_out.right[is_checked]
    query_gains = [query_ndcg(rows, scores[is_checked], is_right) for scores in model_scores]
    best_index = simplest_of_best(query_gains)
    (model, learn), calibration = models[best_index], calibrate(held_out.rows, model_scores[best_index], held_out.right)
    return FittedRanker(
        ranker=Ranker(learn(examples.teaching), names, calibration), checked=Ranker(model, names, calibration)
    )


Model = TreeModel | LinearModel
Learn = Callable[[RankingExamples], Model]


def _train_models(examples: RankingExamples, names: list[str], settings: RankerSettings) -> list[tuple[Model, Learn]]:
    """Return models trained without the held-out queries, simplest first, each with a function to train it on more."""
    train_examples, check_examples = (
        examples.take(examples.has_right_candidate & mask) for mask in (~examples.held_out, examples.held_out)
    )
    if not len(train_examples) or not len(check_examples):
        raise TooFewQueriesError(
            f"too few queries whose target song is among the candidates: {len(train_examples)} for training, "
            f"{len(check_examples)} held out; run `rayrec split` with more --validation-days"
        )
    models: list[tuple[Model, Learn]] = []  # the simplest first
    if len(train_examples) < FEW_QUERIES:
        learn_functions = [partial(LinearModel.fit, penalty=penalty) for penalty in reversed(PENALTIES)]
        models += [(learn(train_examples), learn) for learn in learn_functions]
    small_settings = [replace(settings, leaves=FEW_LEAVES, patience=60)] if len(train_examples) < SOME_QUERIES else []
    for tree_settings in (*small_settings, settings):
        tree_model = TreeModel.fit(train_examples, check_examples, names, tree_settings)
        models.append(
            (tree_model, partial(TreeModel.grow, names=names, settings=replace(tree_settings, trees=tree_model.trees)))
        )
    return models


def simplest_of_best(gains: Sequence[np.ndarray]) -> int:
    """Return the position of the first model that is at most one standard error below the best on the same queries.

    `gains`, float (Q,) per model, are the metric on each query; the simplest model comes first. An advantage within
    that error may be due to chance and is lost on later queries.
    """
    best_gains = gains[int(np.argmax([gain.mean() for gain in gains]))]
    deficits = [best_gains - gain for gain in gains]
    return next(
        index for index, deficit in enumerate(deficits) if deficit.mean() <= deficit.std() / np.sqrt(len(deficit))
    )


def ndcg(rows: np.ndarray, scores: np.ndarray, is_right: np.ndarray) -> float:
    """Return the mean of `query_ndcg`."""
    return float(query_ndcg(rows, scores, is_right).mean())


def query_ndcg(rows: np.ndarray, scores: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """float64 (Q,): NDCG@20 of each query, which must have a right candidate; right candidates are last among ties.

    `rows`, int (C,), are the queries of the candidates, `scores` float (C,), `is_right` bool (C,).
    """
    order = np.lexsort((is_right, -scores, rows))
    ranks = positions_in_groups(rows[order])
    gains = np.where(is_right[order] & (ranks < TOP), 1 / np.log2(ranks + 2), 0)
    right_counts = np.bincount(rows, weights=is_right).astype(int)
    ideal = np.cumsum(1 / np.log2(np.arange(TOP) + 2))[np.minimum(right_counts, TOP) - 1]
    return np.asarray(np.bincount(rows[order], weights=gains) / ideal)


def softmax_shares(rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """float64 (C,): the softmax of the scores within each query; `rows`, int (C,), are the queries, ascending."""
    if not len(rows):
        return np.zeros(0)
    first_positions = group_starts(rows)
    counts = group_sizes(first_positions, len(rows))
    exponentials = np.exp(scores - np.repeat(np.maximum.reduceat(scores, first_positions), counts))
    return np.asarray(exponentials / np.repeat(sum_groups(exponentials, first_positions), counts))


def calibrate(rows: np.ndarray, scores: np.ndarray, is_right: np.ndarray) -> Calibration:
    """Fit the calibration under which probabilities agree with how often candidates are right.

    `rows`, int (C,), are the queries of the candidates, ascending, `scores` float (C,), `is_right` bool (C,). Queries
    without a right candidate count as well.
    """

    def loss(log_sharpness: float) -> float:
        return float(-np.log(softmax_shares(rows, scores * np.exp(log_sharpness))[is_right] + 1e-9).mean())

    minimum = minimize_scalar(loss, bounds=tuple(np.log(SHARPNESS).tolist()), method="bounded", options={"xatol": 0.01})
    sharpness = float(np.exp(minimum.x))
    shares = softmax_shares(rows, scores * sharpness)
    order = np.argsort(shares, kind="stable")
    # Each bin holds equally many right candidates, so that the curve is equally reliable everywhere.
    bins = np.minimum(np.cumsum(is_right[order]) * KNOTS // max(1, int(is_right.sum())), KNOTS - 1)
    # Equal shares must be in the same bin, since the curve has one value for each share.
    first_positions = group_starts(shares[order])
    sizes = group_sizes(first_positions, len(order))
    bins = np.repeat(bins[first_positions + sizes - 1], sizes)
    bin_counts = np.bincount(bins, minlength=KNOTS).astype(float)
    bin_hits = np.bincount(bins, weights=is_right[order], minlength=KNOTS)
    bin_shares = np.bincount(bins, weights=shares[order], minlength=KNOTS)
    not_empty = bin_counts > 0
    bin_counts = bin_counts[not_empty]
    bin_shares = np.maximum.accumulate(bin_shares[not_empty] / bin_counts)
    bin_probabilities = isotonic_regression(bin_hits[not_empty] / bin_counts, weights=bin_counts).x
    # A small part of the share itself keeps the order where the curve is flat, and beyond its last point.
    bin_probabilities = (1 - SLOPE) * bin_probabilities + SLOPE * bin_shares
    last_probability = bin_probabilities[-1] + SLOPE * (1 - bin_shares[-1])
    return Calibration(
        sharpness=sharpness,
        shares=(0.0, *bin_shares.tolist(), 1.0),
        probabilities=(0.0, *bin_probabilities.tolist(), float(last_probability)),
    )
