"""How much of a hybrid's answer comes from the network and how much from its memory: weighed on validation plays.

Q questions, N songs.
"""

from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.recommend.hybrid import HybridRecommender, Memory, Weights
from rayrec.recommend.recommender import chunk_size
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.taste.config import MEMORY
from rayrec.taste.fitting import Validation

WEIGHT_STEP = 0.1  # of the grid over which weights are chosen
JUDGED_AT = 20  # recall@20 chooses the weights, as it chooses the epochs
PLACE_MATTERS = 0.2  # share of MRR@20 in it: a first place is worth a fifth more than a twentieth

MOST_PLAYS = 2_000  # that are asked for each of the weights
USUAL_WEIGHTS = (0.3, 0.5, 0.2)  # where there is no validation range; about what 30Music's chose


def write_memory(
    dataset: Dataset,
    folder: str,
    allowed: FitRange,
    selection: FitRange | None,
    validation: Validation | None,
    selected: str,
) -> Iterator[Weights]:
    """Fit a memory on `allowed` and write it into the folder of a models artifact; yields its weights.

    With a validation range the weights are chosen on it, with a memory fitted on `selection` and
    the network in folder `selected`, neither of which has seen it.
    """
    workspace = dataset.workspace
    weights = USUAL_WEIGHTS
    if validation is not None and selection is not None and len(validation.plays):
        memory = Memory.fit(lambda: _select(dataset, selection), num_songs=dataset.num_songs, allowed=selection)
        hybrid = HybridRecommender(TasteRecommender.from_folder(workspace, selected), memory, weights)
        spread = np.linspace(0, len(validation.plays) - 1, min(MOST_PLAYS, len(validation.plays))).astype(np.int64)
        weights = choose_weights(hybrid, validation.histories, validation.plays[spread])
    memory = Memory.fit(lambda: _select(dataset, allowed), num_songs=dataset.num_songs, allowed=allowed)
    memory.save(workspace, f"{folder}/{MEMORY}", weights)
    yield weights


def _select(dataset: Dataset, allowed: FitRange) -> Iterable[Histories]:
    return (allowed.select(histories) for histories in dataset.read_all())


def choose_weights(hybrid: HybridRecommender, histories: Histories, plays: np.ndarray) -> Weights:
    """The weights under which the plays at positions `plays`, int (Q,), are found best.

    Best by recall@20, with a share of MRR@20, of the next play over the full catalog, ties counted
    against, on plays that no member was fitted on [ours].
    """
    grid = weight_grid(WEIGHT_STEP)
    gains = np.zeros(len(grid))
    questions = Questions.before_plays(histories, plays)
    targets = histories.songs[plays]
    step = max(1, chunk_size(hybrid.num_songs) // 4)
    for begin in range(0, len(plays), step):
        chunk = slice(begin, begin + step)
        members = hybrid.chances(histories, questions.take(chunk))
        for number, weights in enumerate(grid):
            mixed = sum(np.float32(weight) * member for weight, member in zip(weights, members, strict=True))
            gains[number] += _gain(np.asarray(mixed), targets[chunk])
    return grid[int(gains.argmax())]


def weight_grid(step: float) -> list[Weights]:
    """All weights in steps of `step` that give the network some and add up to 1."""
    count = round(1 / step)
    return [
        ((count - sessions - rules) / count, sessions / count, rules / count)
        for sessions, rules in product(range(count), repeat=2)
        if sessions + rules < count
    ]


def _gain(scores: np.ndarray, targets: np.ndarray) -> float:
    own = scores[np.arange(len(targets)), targets]
    ranks = (scores >= own[:, None]).sum(axis=1)
    found = (ranks <= JUDGED_AT) & (own > 0)
    return float(found.sum() + PLACE_MATTERS * (found / ranks).sum())
