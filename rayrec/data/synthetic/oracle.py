"""What a perfect predictor would say in a generated world (ours).

It knows the world's rules, each user's long-term taste, the earlier plays, and the moment of the
play to come, which tells whether a session starts. It does not know the context of the play to
come. The contexts of earlier plays it knows, or, with `know_contexts=False`, infers as well as can
be done from the songs alone: the difference is what contexts are worth in this world.

Q questions, N songs, P plays, C contexts.
"""

import numpy as np
import scipy.sparse as sp

from rayrec.data.histories import Histories, Questions
from rayrec.data.synthetic.world import ALBUM, COLLECTION, CONTEXTS, PLAYLIST, RADIO, SEARCH, SESSION_GAP, TASTE, World

CHANCES_PER_CHUNK = 1 << 22  # float64 probabilities held at once: 32 MiB


class Oracle:
    """The true probabilities of the next song."""

    def __init__(self, world: World, *, know_contexts: bool = True) -> None:
        self.world = world
        self.know_contexts = know_contexts

    def probabilities(self, histories: Histories, questions: Questions) -> np.ndarray:
        """float32 (Q, N): the probability of each song to be played at the moment of each question."""
        world, config = self.world, self.world.config
        asked = _Asked(world, histories, questions)
        contexts = self._next_contexts(histories, questions, asked.starts)
        heard = _heard(world, histories, questions)
        nothing = _weight_before(world, histories, questions) == 0
        genres = asked.moods[:, world.genre] * world.share
        answer = heard.multiply(contexts[:, [COLLECTION]]).toarray()
        # Who has heard nothing yet, or nothing but disliked songs, has no collection: the song comes from the mood.
        from_mood = contexts[:, [PLAYLIST, ALBUM, RADIO]].sum(axis=1)
        from_mood += np.where(nothing, contexts[:, COLLECTION], 0.0)
        followed = np.where(asked.starts, 0.0, config.follow)
        rows = np.arange(len(questions))
        for context, successor in ((PLAYLIST, world.playlist_next), (ALBUM, world.album_next)):
            weight = contexts[:, context] * followed
            answer[rows, successor[asked.last]] += weight
            from_mood -= weight
        answer += genres * from_mood[:, None]
        answer += contexts[:, [SEARCH]] * (world.share / config.genres)
        return np.asarray(answer, dtype=np.float32)

    def best_recall(self, k: int, users: np.ndarray | None = None, *, first_play: int = 0) -> float:
        """The recall@k that no predictor with this knowledge can pass, over all plays of some users.

        The mean over plays, from each user's `first_play` on, of the k largest probabilities.
        `users`, int (U,), are 200 by default.
        """
        users = np.arange(min(200, self.world.config.users)) if users is None else users
        total, count = 0.0, 0
        for histories in self.world.blocks(users):
            questions = every_play(histories, first_play)
            step = max(1, CHANCES_PER_CHUNK // self.world.config.songs)
            for start in range(0, len(questions), step):
                chance = self.probabilities(histories, questions.take(slice(start, start + step)))
                best = np.partition(chance, -k, axis=1)[:, -k:] if k < chance.shape[1] else chance
                total += float(best.sum(dtype=np.float64))
            count += len(questions)
        return total / max(1, count)

    def _next_contexts(self, histories: Histories, questions: Questions, starts: np.ndarray) -> np.ndarray:
        """float64 (Q, C): the probability of each context for the play to come."""
        if self.know_contexts:
            known = _context_numbers(histories)[_last_play(histories, questions)]
            return np.asarray(self.world.context_shares[np.where(starts, len(CONTEXTS), known)])
        inferred = infer_contexts(self.world, histories)[_last_play(histories, questions)]
        moves, first = self.world.context_shares[:-1], self.world.context_shares[-1]
        return np.asarray(np.where(starts[:, None], first, inferred @ moves))


class _Asked:
    """What the rules look at before each question's play."""

    starts: np.ndarray  # bool (Q,), whether it starts a session
    last: np.ndarray  # int32 (Q,), the song before; 0 where there is none
    moods: np.ndarray  # float64 (Q, G), the mood's distribution: the last song's genre, or the taste

    def __init__(self, world: World, histories: Histories, questions: Questions) -> None:
        before = _last_play(histories, questions)
        none = questions.seen == 0
        self.starts = none | (questions.at - histories.played_at[before] >= SESSION_GAP)
        self.last = np.where(none, 0, histories.songs[before])
        config = world.config
        tastes = world.tastes(world.user_index(histories.user_ids))[questions.rows]
        self.moods = np.full((len(questions), config.genres), config.outside / config.genres)
        np.put_along_axis(self.moods, tastes, self.moods[:, :1] + (1 - config.outside) * TASTE, axis=1)
        following = np.flatnonzero(~self.starts)
        self.moods[following] = 0.0
        self.moods[following, world.genre[self.last[following]]] = 1.0


def every_play(histories: Histories, first_play: int = 0) -> Questions:
    """One question before every play, from each user's `first_play` on."""
    place = np.arange(histories.num_plays) - histories.offsets[histories.rows]
    return Questions.before_plays(histories, np.flatnonzero(place >= first_play))


def infer_contexts(world: World, histories: Histories) -> np.ndarray:
    """float64 (P, C): the probability of each play's context, given the songs up to and with that play.

    The forward pass of a hidden Markov model (Rabiner 1989): contexts are hidden, songs observed.
    """
    questions = every_play(histories)
    asked = _Asked(world, histories, questions)
    likely = _likelihoods(world, histories, questions, asked)
    moves, first = world.context_shares[:-1], world.context_shares[-1]
    inferred = np.zeros((histories.num_plays, len(CONTEXTS)))
    for step in range(histories.lengths.max(initial=0)):
        plays = histories.offsets[:-1][histories.lengths > step] + step
        before = np.where(asked.starts[plays, None], first, inferred[plays - (step > 0)] @ moves)
        joint = before * likely[plays]
        inferred[plays] = joint / joint.sum(axis=1, keepdims=True)
    return inferred


def _likelihoods(world: World, histories: Histories, questions: Questions, asked: _Asked) -> np.ndarray:
    """float64 (P, C): the probability of each played song, had it come from each context."""
    songs = histories.songs
    share, genre = world.share[songs], world.genre[songs]
    likely = np.empty((len(songs), len(CONTEXTS)))
    likely[:, RADIO] = asked.moods[np.arange(len(songs)), genre] * share
    likely[:, SEARCH] = share / world.config.genres
    for context, successor in ((PLAYLIST, world.playlist_next), (ALBUM, world.album_next)):
        follow = np.where(asked.starts, 0.0, world.config.follow)
        likely[:, context] = follow * (successor[asked.last] == songs) + (1 - follow) * likely[:, RADIO]
    before = _weight_before(world, histories, questions)
    earlier = _earlier_plays_of_song(histories) * _weights(world, histories)
    likely[:, COLLECTION] = np.where(before == 0, likely[:, RADIO], earlier / np.where(before == 0, 1, before))
    return likely


def _weights(world: World, histories: Histories) -> np.ndarray:
    """float64 (P,): how much each play counts in its user's collection."""
    return world.collection_weights(world.user_index(histories.user_ids)[histories.rows], histories.songs)


def _weight_before(world: World, histories: Histories, questions: Questions) -> np.ndarray:
    """float64 (Q,): of the plays before each question together."""
    sums = np.concatenate([[0], np.cumsum(_weights(world, histories))])
    starts = histories.offsets[questions.rows]
    return np.asarray(sums[starts + questions.seen] - sums[starts])


def _earlier_plays_of_song(histories: Histories) -> np.ndarray:
    """int64 (P,): how often the user had played the song before each play."""
    keys = histories.rows * (int(histories.songs.max(initial=0)) + 1) + histories.songs
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = np.arange(len(keys)) - np.searchsorted(ranked, ranked)
    return counts


def _last_play(histories: Histories, questions: Questions) -> np.ndarray:
    """int64 (Q,): position of the play before each question in the flat arrays; where there is none, of some play."""
    return np.asarray(np.maximum(histories.offsets[questions.rows] + questions.seen - 1, 0))


def _context_numbers(histories: Histories) -> np.ndarray:
    if histories.contexts is None:
        raise ValueError("an oracle that knows contexts was given histories without contexts")
    return np.asarray(np.log2(histories.contexts), dtype=np.int64)


def _heard(world: World, histories: Histories, questions: Questions) -> sp.csr_array:
    """float64 (Q, N), sparse: each song's share of the collection before each question."""
    starts = histories.offsets[questions.rows]
    offsets = np.concatenate([[0], np.cumsum(questions.seen)])
    plays = np.repeat(starts - offsets[:-1], questions.seen) + np.arange(offsets[-1])
    before = _weight_before(world, histories, questions)
    weights = _weights(world, histories)[plays] * np.repeat(1 / np.where(before == 0, 1, before), questions.seen)
    shape = (len(questions), world.config.songs)
    return sp.csr_array((weights, histories.songs[plays], offsets), shape=shape)
