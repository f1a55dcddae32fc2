"""What rankers learn from: the queries of the validation range, with the songs that were played next or later.

Q queries, T right songs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
from safetensors.numpy import load, save

from rayrec.data.histories import Histories, Questions, user_hash
from rayrec.data.split import Split
from rayrec.model.train_config import Horizon
from rayrec.recommend.ranker import RankingExamples
from rayrec.recommend.retrieval.ragged import ranges
from rayrec.recommend.two_step import HORIZONS, CandidateSource, RankerKind, examples_for

LONG = Horizon(min_offset=25, max_offset=50)  # unless the network's long horizon is one of days
HELD_OUT = 5  # one user in so many checks what the others' examples taught


def validation_queries(histories: Histories, split: Split, most: int) -> tuple[Histories, np.ndarray]:
    """Histories that end with the validation range, and positions int64 (Q,) of at most `most` plays in it.

    Each has an earlier play by the same user. Which are taken follows from user and time alone.
    """
    seen = split.final.select(histories)
    inside = split.is_validation(seen)
    inside[seen.offsets[:-1][seen.lengths > 0]] = False
    with_queries = np.bincount(seen.rows[inside], minlength=len(seen)) > 0
    kept = seen.take(with_queries)
    plays = np.flatnonzero(inside[with_queries[seen.rows]])
    if len(plays) > most:
        order = np.argsort(_play_hash(kept, plays), kind="stable")
        plays = np.sort(plays[order[:most]])
    return kept, plays


def checks_rankers(user_ids: np.ndarray) -> np.ndarray:
    """bool (U,): the users whose queries check what rankers learned from the others."""
    return np.asarray(user_hash(user_ids) % np.uint64(HELD_OUT) == 0)


def collect_examples(
    sources: Mapping[str, CandidateSource], histories: Histories, plays: np.ndarray
) -> dict[str, dict[RankerKind, RankingExamples]]:
    """The examples of each source and kind for the plays at positions `plays`, int (Q,), which no source has seen.

    The sources have one network.
    """
    queries = Questions.before_plays(histories, plays)
    held_out = checks_rankers(histories.user_ids)[queries.rows]
    network = next(iter(sources.values())).network
    begin, end = (network.long_days or LONG).spans(histories, queries)
    later = np.repeat(np.arange(len(plays)), end - begin), histories.songs[ranges(begin, end - begin)]
    following = np.arange(len(plays)), histories.songs[plays]
    answers: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {"next": following, "served": following, "long": later}
    vectors = network.vectors_of(histories, queries, HORIZONS)
    return {
        name: examples_for(source, histories, queries, answers, held_out=held_out, vectors=vectors)
        for name, source in sources.items()
    }


def pack_examples(examples: RankingExamples) -> bytes:
    """As bytes, for whoever trains."""
    arrays = {field.name: np.ascontiguousarray(getattr(examples, field.name)) for field in fields(examples)}
    return bytes(save(arrays))


def unpack_examples(data: bytes) -> RankingExamples:
    """What `pack_examples` made."""
    return RankingExamples(**load(data))


def _play_hash(histories: Histories, plays: np.ndarray) -> np.ndarray:
    """uint64: spreads plays evenly, whatever the order of the users."""
    rows = np.searchsorted(histories.offsets, plays, side="right") - 1
    mixed = user_hash(histories.user_ids)[rows] ^ (
        histories.played_at[plays].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    return np.asarray((mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9))
