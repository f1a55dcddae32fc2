"""The true probabilities of the next song of generated plays, computed from the rules of rayrec/data/synthetic.py.

U users, P plays, Q queries, N songs, G genres, C contexts.
"""

import numpy as np
import scipy.sparse as sp

from rayrec.data.histories import Histories, Queries
from rayrec.data.ragged import offsets_of, ranges
from rayrec.data.synthetic import ALBUM, COLLECTION, CONTEXTS, MINUTE, PLAYLIST, RADIO, SEARCH, TASTE, World

SESSION_GAP = 30 * MINUTE  # gaps from this length on start a session; generated sessions are at least an hour apart
PROBABILITIES_PER_CHUNK = 1 << 22  # float64 probabilities held at once: 32 MiB


def user_index(user_ids: np.ndarray) -> np.ndarray:
    """int64 (U,): the index of each user of a world; the inverse of `World.user_ids`."""
    return np.array([int(user_id.removeprefix("user-")) for user_id in user_ids], dtype=np.int64)


class Oracle:
    """Computes the true probabilities of the next song."""

    def __init__(self, world: World, *, know_contexts: bool = True) -> None:
        self.world = world
        self.know_contexts = know_contexts

    def probabilities(self, histories: Histories, queries: Queries) -> np.ndarray:
        """float32 (Q, N): the probability of each song to be played at the moment of each query."""
        world, config = self.world, self.world.config
        states = _QueryStates(world, histories, queries)
        contexts = self._next_contexts(histories, queries, states.starts_session)
        collection_shares = _collection_shares(world, histories, queries)
        has_no_collection = _weights_before(world, histories, queries) == 0
        mood_probabilities = states.moods[:, world.genre] * world.share
        probabilities = collection_shares.multiply(contexts[:, [COLLECTION]]).toarray()
        # A user who has heard no songs, or only disliked ones, has no collection: the song comes from the mood.
        from_mood = contexts[:, [PLAYLIST, ALBUM, RADIO]].sum(axis=1)
        from_mood += np.where(has_no_collection, contexts[:, COLLECTION], 0.0)
        follow_probability = np.where(states.starts_session, 0.0, config.follow)
        rows = np.arange(len(queries))
        for context, successor in ((PLAYLIST, world.playlist_next), (ALBUM, world.album_next)):
            weight = contexts[:, context] * follow_probability
            probabilities[rows, successor[states.last_songs]] += weight
            from_mood -= weight
        probabilities += mood_probabilities * from_mood[:, None]
        probabilities += contexts[:, [SEARCH]] * (world.share / config.genres)
        return np.asarray(probabilities, dtype=np.float32)

    def best_recall(self, k: int, users: np.ndarray | None = None, *, first_play: int = 0) -> float:
        """Return the highest recall@k that a predictor with this knowledge can reach, over all plays of `users`.

        It is the mean, over the plays from each user's `first_play` on, of the sum of the k largest probabilities.
        `users`, int (U,), are the first 200 by default.
        """
        users = np.arange(min(200, self.world.config.users)) if users is None else users
        total, count = 0.0, 0
        for histories in self.world.blocks(users):
            queries = every_play(histories, first_play)
            step = max(1, PROBABILITIES_PER_CHUNK // self.world.config.songs)
            for start in range(0, len(queries), step):
                probabilities = self.probabilities(histories, queries.take(slice(start, start + step)))
                best = np.partition(probabilities, -k, axis=1)[:, -k:] if k < probabilities.shape[1] else probabilities
                total += float(best.sum(dtype=np.float64))
            count += len(queries)
        return total / max(1, count)

    def _next_contexts(self, histories: Histories, queries: Queries, starts_session: np.ndarray) -> np.ndarray:
        """float64 (Q, C): the probability of each context for the next play."""
        if self.know_contexts:
            last_contexts = _context_indices(histories)[_last_play_positions(histories, queries)]
            return np.asarray(self.world.context_shares[np.where(starts_session, len(CONTEXTS), last_contexts)])
        context_probabilities = infer_contexts(self.world, histories)[_last_play_positions(histories, queries)]
        transitions, first_shares = self.world.context_shares[:-1], self.world.context_shares[-1]
        return np.asarray(np.where(starts_session[:, None], first_shares, context_probabilities @ transitions))


class _QueryStates:
    """The state before each query's play, from which the rules decide."""

    starts_session: np.ndarray  # bool (Q,), whether the play starts a session
    last_songs: np.ndarray  # int32 (Q,), the song before the play; 0 if there is none
    moods: np.ndarray  # float64 (Q, G), distribution of the mood: the last song's genre or, in a new session, the taste

    def __init__(self, world: World, histories: Histories, queries: Queries) -> None:
        last_plays = _last_play_positions(histories, queries)
        has_no_plays = queries.plays_before == 0
        self.starts_session = has_no_plays | (queries.at - histories.played_at[last_plays] >= SESSION_GAP)
        self.last_songs = np.where(has_no_plays, 0, histories.songs[last_plays])
        config = world.config
        tastes = world.tastes(user_index(histories.user_ids))[queries.rows]
        self.moods = np.full((len(queries), config.genres), config.outside / config.genres)
        np.put_along_axis(self.moods, tastes, self.moods[:, :1] + (1 - config.outside) * TASTE, axis=1)
        in_session = np.flatnonzero(~self.starts_session)
        self.moods[in_session] = 0.0
        self.moods[in_session, world.genre[self.last_songs[in_session]]] = 1.0


def every_play(histories: Histories, first_play: int = 0) -> Queries:
    """Return one query before every play, from each user's `first_play` on."""
    positions = np.arange(histories.num_plays) - histories.offsets[histories.rows]
    return Queries.before_plays(histories, np.flatnonzero(positions >= first_play))


def infer_contexts(world: World, histories: Histories) -> np.ndarray:
    """float64 (P, C): the probability of each play's context, given the songs up to and including that play.

    The forward pass of a hidden Markov model (Rabiner 1989): contexts are hidden, songs observed.
    """
    queries = every_play(histories)
    states = _QueryStates(world, histories, queries)
    likelihoods = _likelihoods(world, histories, queries, states)
    transitions, first_shares = world.context_shares[:-1], world.context_shares[-1]
    probabilities = np.zeros((histories.num_plays, len(CONTEXTS)))
    for step in range(histories.lengths.max(initial=0)):
        plays = histories.offsets[:-1][histories.lengths > step] + step
        prior = np.where(
            states.starts_session[plays, None], first_shares, probabilities[plays - (step > 0)] @ transitions
        )
        joint = prior * likelihoods[plays]
        probabilities[plays] = joint / joint.sum(axis=1, keepdims=True)
    return probabilities


def _likelihoods(world: World, histories: Histories, queries: Queries, states: _QueryStates) -> np.ndarray:
    """float64 (P, C): the probability of each played song, given each context."""
    songs = histories.songs
    share, genre = world.share[songs], world.genre[songs]
    likelihoods = np.empty((len(songs), len(CONTEXTS)))
    likelihoods[:, RADIO] = states.moods[np.arange(len(songs)), genre] * share
    likelihoods[:, SEARCH] = share / world.config.genres
    for context, successor in ((PLAYLIST, world.playlist_next), (ALBUM, world.album_next)):
        follow_probability = np.where(states.starts_session, 0.0, world.config.follow)
        likelihoods[:, context] = (
            follow_probability * (successor[states.last_songs] == songs)
            + (1 - follow_probability) * likelihoods[:, RADIO]
        )
    weights_before = _weights_before(world, histories, queries)
    song_weights = _earlier_play_counts(histories) * _weights(world, histories)
    likelihoods[:, COLLECTION] = np.where(
        weights_before == 0, likelihoods[:, RADIO], song_weights / np.where(weights_before == 0, 1, weights_before)
    )
    return likelihoods


def _weights(world: World, histories: Histories) -> np.ndarray:
    """float64 (P,): the weight of each play in its user's collection."""
    return world.collection_weights(user_index(histories.user_ids)[histories.rows], histories.songs)


def _weights_before(world: World, histories: Histories, queries: Queries) -> np.ndarray:
    """float64 (Q,): the sum of the weights of the plays before each query."""
    weight_sums = np.concatenate([[0], np.cumsum(_weights(world, histories))])
    starts = histories.offsets[queries.rows]
    return np.asarray(weight_sums[starts + queries.plays_before] - weight_sums[starts])


def _earlier_play_counts(histories: Histories) -> np.ndarray:
    """int64 (P,): how often the user had played the song before each play."""
    keys = histories.rows * (int(histories.songs.max(initial=0)) + 1) + histories.songs
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = np.arange(len(keys)) - np.searchsorted(sorted_keys, sorted_keys)
    return counts


def _last_play_positions(histories: Histories, queries: Queries) -> np.ndarray:
    """int64 (Q,): position of the play before each query in the flat arrays; of an unrelated play if there is none."""
    return np.asarray(np.maximum(histories.offsets[queries.rows] + queries.plays_before - 1, 0))


def _context_indices(histories: Histories) -> np.ndarray:
    if histories.contexts is None:
        raise ValueError("this oracle needs contexts; the histories have none")
    return np.asarray(np.log2(histories.contexts), dtype=np.int64)


def _collection_shares(world: World, histories: Histories, queries: Queries) -> sp.csr_array:
    """float64 (Q, N), sparse: each song's share of the collection before each query."""
    starts = histories.offsets[queries.rows]
    offsets = offsets_of(queries.plays_before)
    plays = ranges(starts, queries.plays_before)
    weights_before = _weights_before(world, histories, queries)
    weights = _weights(world, histories)[plays] * np.repeat(
        1 / np.where(weights_before == 0, 1, weights_before), queries.plays_before
    )
    shape = (len(queries), world.config.songs)
    return sp.csr_array((weights, histories.songs[plays], offsets), shape=shape)
