"""How much of a hybrid's answer comes from the network and how much from its memory: weighed on validation plays.

Q questions, N songs, M members, C candidates.
"""

from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.recommend.hybrid import MEMBERS, HybridRecommender, Memory, Weights
from rayrec.recommend.recommender import chunk_size
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.taste.config import MEMORY
from rayrec.taste.fitting import Validation

WEIGHT_STEP = 0.1  # of the grid over which weights are chosen
JUDGED_AT = 20  # recall@20 chooses the weights, as it chooses the epochs
PLACE_MATTERS = 0.2  # share of MRR@20 in it: a first place is worth a fifth more than a twentieth

FIRST_SONGS = 100  # of each member that are looked at
MOST_PLAYS = 4_000  # that are asked for each of the weights
USUAL_WEIGHTS: Weights = (0.1, 0.3, 0.2, 0.4)  # where there is no validation range; about what 30Music's chose


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

    Best by recall@20, with a share of MRR@20, of the next play, ties counted against, on plays that
    no member was fitted on [ours]. A song that none of the members has among its first 100 is not
    looked at.
    """
    questions = Questions.before_plays(histories, plays)
    step = chunk_size(hybrid.num_songs * len(MEMBERS))
    parts = []
    for begin in range(0, len(plays), step):
        chunk = slice(begin, begin + step)
        members = np.stack(hybrid.chances(histories, questions.take(chunk)))
        members[:, :, hybrid.network.without_vector] = 0  # these are never recommended
        parts.append(_candidates(members, histories.songs[plays[chunk]]))
    rivals_MQC = np.concatenate([rivals for rivals, _ in parts], axis=1)
    own_MQ = np.concatenate([own for _, own in parts], axis=1)
    grid = weight_grid(WEIGHT_STEP)
    return max(grid, key=lambda weights: _gain(np.array(weights, dtype=np.float32), rivals_MQC, own_MQ))


def weight_grid(step: float) -> list[Weights]:
    """All weights in steps of `step` that give the network some and add up to 1."""
    count = round(1 / step)
    others = product(range(count), repeat=len(MEMBERS) - 1)
    return [tuple(part / count for part in (count - sum(parts), *parts)) for parts in others if sum(parts) < count]


def _candidates(members_MQN: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chances (M, Q, C) of the songs that may come first, -1 where a place is empty, and of the targets (M, Q)."""
    kept = min(FIRST_SONGS, members_MQN.shape[2])
    firsts = np.argpartition(-members_MQN, kept - 1, axis=2)[:, :, :kept]
    songs = np.sort(np.concatenate(list(firsts), axis=1), axis=1)
    empty = songs == targets[:, None]
    empty[:, 1:] |= songs[:, 1:] == songs[:, :-1]
    rivals = np.take_along_axis(members_MQN, songs[None], axis=2)
    rivals[:, empty] = -1
    return rivals, members_MQN[:, np.arange(len(targets)), targets]


def _gain(weights: np.ndarray, rivals_MQC: np.ndarray, own_MQ: np.ndarray) -> float:
    own = weights @ own_MQ
    ranks = 1 + (np.tensordot(weights, rivals_MQC, axes=1) >= own[:, None]).sum(axis=1)
    found = (ranks <= JUDGED_AT) & (own > 0)
    return float(found.sum() + PLACE_MATTERS * (found / ranks).sum())
