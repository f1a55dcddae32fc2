"""Why: which of the last plays moved a taste vector most, and which of them speaks for a song.

M plays looked at, n songs, D numbers per vector.
"""

from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.model.inference import States
from rayrec.recommend.base import Horizon
from rayrec.recommend.taste_recommender import TasteRecommender

LAST_PLAYS = 10  # looked at, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What would be otherwise if single plays had not happened."""

    plays: np.ndarray  # int64 (M,), places of the plays in the history, the latest last
    moved: np.ndarray  # float32 (M,), 1 − cosine of the taste vector with the one without this play; 0 to 2
    because: np.ndarray  # int64 (n,), the place in the history of the play that each song owes most to; -1: none


def explain(
    network: TasteRecommender,
    history: Histories,
    at: int,
    songs: np.ndarray,
    *,
    horizon: Horizon = "short",
    count: int = LAST_PLAYS,
    start: States | None = None,
) -> Explanation:
    """Leave out each of the last plays in turn and see where the taste vector would be then.

    That is the answer itself rather than an estimate: gradients of a recurrent network speak of small
    changes of a vector, and a play is there or not. It costs one pass over the plays before the last
    `count` and one over these as often as they are. Of a hybrid it explains the network.

    `history` is one user's, `at` (ms UTC) the moment of the request, `songs` int (n,) the song rows of
    the answer. `start` holds the network's state before the history where plays came before it.
    """
    if len(history) != 1:
        raise ValueError(f"explain takes the history of one user, got {len(history)}")
    plays = np.arange(max(0, history.num_plays - count), history.num_plays)
    if not len(plays):
        return Explanation(plays=plays, moved=np.zeros(0, np.float32), because=np.full(len(songs), -1))
    encoder, states = network.encoder, start
    if plays[0] > 0:
        _, states = encoder.run(history.keep(np.arange(history.num_plays) < plays[0]), start=start)
    variants = _without_each(history, plays)
    if states is not None:
        states = _repeated(states, len(variants))
    asked = Questions.at_end(variants, at)
    vectors = encoder.vectors(variants, asked, network.head(horizon), start=states)
    taste, others = vectors[-1], vectors[:-1]
    gains = (taste - others) @ network.song_vectors[songs].T  # (M, n), what the cosine of each song owes to each play
    best = gains.argmax(axis=0)
    because = np.where(gains[best, np.arange(len(songs))] > 0, plays[best], -1)
    return Explanation(plays=plays, moved=(1 - others @ taste).astype(np.float32), because=because)


def _without_each(history: Histories, plays: np.ndarray) -> Histories:
    """M + 1 rows: these plays without the first, without the second, ..., and all of them."""
    count = len(plays)
    kept = ~np.eye(count + 1, count, dtype=np.bool_)
    picked = np.tile(plays, count + 1)[kept.ravel()]
    return Histories(
        user_ids=np.array([str(row) for row in range(count + 1)], dtype=object),
        offsets=np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int64),
        songs=history.songs[picked],
        played_at=history.played_at[picked],
        contexts=None if history.contexts is None else history.contexts[picked],
        skipped=None if history.skipped is None else history.skipped[picked],
    )


def _repeated(states: States, times: int) -> States:
    return States(
        hidden=np.repeat(states.hidden, times, axis=0), last_played_at=np.repeat(states.last_played_at, times)
    )
