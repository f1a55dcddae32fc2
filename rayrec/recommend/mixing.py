"""How a hybrid's answer comes from the network and from its memory: weighed on validation plays.

Q questions, N songs, M members, C candidates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.model.fit import Validation
from rayrec.model.train_config import MEMORY
from rayrec.recommend.base import chunks_of
from rayrec.recommend.hybrid import MEMBERS, HybridRecommender, Memory, Mix, Weights, over
from rayrec.recommend.repeats import RepeatGate, Repeats, gate_features
from rayrec.recommend.taste_recommender import TasteRecommender

WEIGHT_STEP = 0.1  # of the grid over which weights are chosen
JUDGED_AT = 20  # recall@20 chooses the weights, as it chooses the epochs
PLACE_MATTERS = 0.2  # share of MRR@20 in it: a first place is worth a fifth more than a twentieth
# A new song found counts as three repeats: what users know they find by themselves. Chosen on one half of a validation
# range's users and judged on the other, by weights of 1, 2 and 3: all plays' recall@20 and MRR 0.439 and 0.293, 0.436
# and 0.294, 0.433 and 0.297 on 30Music, new songs' 0.398 and 0.262, 0.402 and 0.268, 0.404 and 0.275; on its long
# histories 0.432 and 0.284, 0.431 and 0.287, 0.425 and 0.293, and 0.283 and 0.165, 0.283 and 0.171, 0.285 and 0.188.
# Its lead over V-STAN in new songs shrinks with the plays since the fit, and most answers come long after it.
NEW_COUNTS = 3.0
SHIFTS = (0.0, -0.25, -0.5, -0.75, -1.0)  # of the gate's log-odds: it is fitted to all plays alike

FIRST_SONGS = 100  # of each member that are looked at
MOST_PLAYS = 10_000  # that are asked for each of the weights: those of 4,000 found 0.224 of #nowplaying, these 0.226
# Where there is no validation range; about what 30Music's chose.
USUAL_MIX = Mix(
    heard=(0.1, 0.4, 0.3, 0.2),
    new=(0.3, 0.6, 0.1, 0.0),
    gate=RepeatGate((-3.2, 0.1, 2.4, 0.5, 0.3, 1.4, 0.0, 0.0, 0.3, 0.2)),
)


def write_memory(
    dataset: Dataset,
    folder: str,
    allowed: FitRange,
    selection: FitRange | None,
    validation: Validation | None,
    selected: str,
    prior: np.ndarray,
) -> Iterator[Mix]:
    """Fit a memory on `allowed` and write it into the folder of a models artifact; yields its mix.

    With a validation range the mix is chosen on it, with a memory fitted on `selection` and
    the network in folder `selected`, neither of which has seen it. `prior`, float32 (N,), is that of `Memory`.
    """
    workspace = dataset.workspace
    mix = USUAL_MIX
    if validation is not None and selection is not None and len(validation.plays):
        memory = Memory.fit(lambda: _select(dataset, selection), num_songs=dataset.num_songs, allowed=selection)
        hybrid = HybridRecommender(TasteRecommender.from_folder(workspace, selected), memory, mix)
        spread = np.linspace(0, len(validation.plays) - 1, min(MOST_PLAYS, len(validation.plays))).astype(np.int64)
        mix = choose_mix(hybrid, validation.histories, validation.plays[spread])
    memory = Memory.fit(lambda: _select(dataset, allowed), num_songs=dataset.num_songs, allowed=allowed, prior=prior)
    memory.save(workspace, f"{folder}/{MEMORY}", mix)
    yield mix


def _select(dataset: Dataset, allowed: FitRange) -> Iterable[Histories]:
    return (allowed.select(histories) for histories in dataset.read_all())


@dataclass(frozen=True, kw_only=True)
class _Cases:
    """Questions, each with the song to find and those that may come before it."""

    rivals_MQC: np.ndarray  # float32, what the members think of other songs, -1 where a place is empty
    own_MQ: np.ndarray  # float32, and of the song to find
    rivals_heard_QC: np.ndarray  # bool, whether the user has heard them
    own_heard_Q: np.ndarray  # bool
    heard_MQ: np.ndarray  # float32, what the members think of all songs heard
    new_MQ: np.ndarray  # float32, and of all others
    features_QF: np.ndarray  # float64, of repeats


def choose_mix(hybrid: HybridRecommender, histories: Histories, plays: np.ndarray) -> Mix:
    """The mix under which the plays at positions `plays`, int (Q,), are found best.

    Best by recall@20, with a share of MRR@20, of the next play, ties counted against and new songs thrice, on plays
    that no member was fitted on [ours], among the mixes that find no less of all plays alike than the best member does
    alone; where none does, that which lacks least. The gate is fitted first, then the weights of songs heard are
    chosen, then those of new ones, then how far the gate is shifted towards new songs. A song that none of the members
    has among its first 100 is not looked at.
    """
    return _best_mix(_cases(hybrid, histories, plays))


def _best_mix(cases: _Cases) -> Mix:
    least = max(map(_gain, _ranks(cases.own_MQ, cases.rivals_MQC)))

    def best(mixes: Iterable[Mix]) -> Mix:
        return max(mixes, key=lambda mix: _worth(mix, cases, least))

    mix = replace(USUAL_MIX, gate=RepeatGate.fit(cases.features_QF, cases.own_heard_Q))
    mix = best(replace(mix, heard=weights) for weights in weight_grid(WEIGHT_STEP))
    # Own rules know of songs heard alone.
    mix = best(replace(mix, new=(*weights, 0.0)) for weights in weight_grid(WEIGHT_STEP, len(MEMBERS) - 1))
    return best(replace(mix, gate=mix.gate.shifted(by)) for by in SHIFTS)


def weight_grid(step: float, members: int = len(MEMBERS)) -> list[Weights]:
    """All weights in steps of `step` that give the network some and add up to 1."""
    count = round(1 / step)
    others = product(range(count), repeat=members - 1)
    return [tuple(part / count for part in (count - sum(parts), *parts)) for parts in others if sum(parts) < count]


def _cases(hybrid: HybridRecommender, histories: Histories, plays: np.ndarray) -> _Cases:
    questions, targets = Questions.before_plays(histories, plays), histories.songs[plays]
    vectors = hybrid.network.vectors(histories, questions)
    parts = []
    for chunk in chunks_of(len(plays), hybrid.num_songs * len(MEMBERS)):
        cosines = hybrid.network.score_vectors(vectors[chunk])
        members, repeats = hybrid.chances(cosines, histories, questions.take(chunk))
        parts.append(_candidates(np.stack(members), repeats, targets[chunk]))
    return _Cases(
        **{
            name: np.concatenate([getattr(part, name) for part in parts], axis=int("_M" in name))
            for name in _Cases.__dataclass_fields__
        }
    )


def _candidates(members_MQN: np.ndarray, repeats: Repeats, targets: np.ndarray) -> _Cases:
    """The songs that may come first, and the targets, int (Q,)."""
    kept = min(FIRST_SONGS, members_MQN.shape[2])
    firsts = np.argpartition(-members_MQN, kept - 1, axis=2)[:, :, :kept]
    songs = np.sort(np.concatenate(list(firsts), axis=1), axis=1)
    empty = songs == targets[:, None]
    empty[:, 1:] |= songs[:, 1:] == songs[:, :-1]
    rivals = np.take_along_axis(members_MQN, songs[None], axis=2)
    rivals[:, empty] = -1
    heard = np.zeros(members_MQN.shape[1:], dtype=bool)
    heard[repeats.asked, repeats.songs] = True
    heard_MQ = (members_MQN * heard).sum(axis=2)
    new_MQ = np.maximum(0, members_MQN.sum(axis=2) - heard_MQ)
    rows = np.arange(len(targets))
    return _Cases(
        rivals_MQC=rivals,
        own_MQ=members_MQN[:, rows, targets],
        rivals_heard_QC=np.take_along_axis(heard, songs, axis=1),
        own_heard_Q=heard[rows, targets],
        heard_MQ=heard_MQ,
        new_MQ=new_MQ,
        features_QF=gate_features(repeats, heard_MQ, new_MQ),
    )


def _worth(mix: Mix, cases: _Cases, least: float) -> tuple[float, float]:
    """What a mix lacks of finding `least` of all plays, at most 0, and what it finds with new songs counted thrice."""
    heard, new = (np.array(weights, dtype=np.float32) for weights in (mix.heard, mix.new))
    chance = mix.gate.chances(cases.features_QF)
    again, first = over(chance, heard @ cases.heard_MQ), over(1 - chance, new @ cases.new_MQ)
    own = np.where(cases.own_heard_Q, again * (heard @ cases.own_MQ), first * (new @ cases.own_MQ))
    rivals = np.where(
        cases.rivals_heard_QC,
        again[:, None] * np.tensordot(heard, cases.rivals_MQC, axes=1),
        first[:, None] * np.tensordot(new, cases.rivals_MQC, axes=1),
    )
    ranks = _ranks(own, rivals)
    return min(0.0, _gain(ranks) - least), _gain(ranks, np.where(cases.own_heard_Q, 1.0, NEW_COUNTS))


def _ranks(own: np.ndarray, rivals: np.ndarray) -> np.ndarray:
    """float64 (..., Q): the ranks of songs by their chances among rivals', (..., Q, C); infinite without a chance."""
    return np.where(own > 0, 1.0 + (rivals >= own[..., None]).sum(axis=-1), np.inf)


def _gain(ranks: np.ndarray, counts: np.ndarray | float = 1.0) -> float:
    """Recall and its share of MRR, as sums over ranks (Q,), each of which counts as often as is said."""
    found = counts * (ranks <= JUDGED_AT)
    return float(found.sum() + PLACE_MATTERS * (found / ranks).sum())
