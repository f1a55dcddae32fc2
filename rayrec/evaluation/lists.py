"""What is recommended: the first songs of each answer, how popular they are, and whether they were heard before.

Q questions, N songs, L listed songs of all questions together.
"""

import numpy as np

LIST_LENGTH = 20
SCORES_AT_ONCE = 1 << 21  # where many songs tie for the last place, all of them are looked at


def listed_songs(scores: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and songs, int64 (L,) each, of the LIST_LENGTH best of each row of float32 (Q, N).

    `best` are the `best_scores` of at least that depth. As in `Recommender.recommend`, of equal
    scores those come with the lower song row, and songs at -inf do not come.
    """
    last = best[:, -min(LIST_LENGTH, best.shape[1])]
    step = max(1, SCORES_AT_ONCE // max(1, scores.shape[1]))
    rows, songs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(scores), step):
        chunk, least = scores[start : start + step], last[start : start + step]
        found, song = np.nonzero((chunk >= least[:, None]) & (chunk > -np.inf))
        tied = chunk[found, song] == least[found]
        starts = np.searchsorted(found, np.arange(len(chunk)))
        ties_before = np.cumsum(tied) - tied
        places = ties_before - np.append(ties_before, 0)[np.minimum(starts, len(tied))][found]
        room = LIST_LENGTH - np.bincount(found, weights=~tied, minlength=len(chunk))
        kept = ~tied | (places < room[found])
        rows.append(found[kept] + start)
        songs.append(song[kept])
    return np.concatenate(rows), np.concatenate(songs)
