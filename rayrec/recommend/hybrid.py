"""The network with a memory: its chances of the next song mixed with what is remembered.

A network learns where tastes drift and forgets single albums; session neighbours and sequential
rules remember what was played together and what followed what, own rules how this user plays it
again. How likely the user is to repeat a song at all just now is a question of its own. Q questions, N songs,
M members, E pairs of a question and a song heard.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from safetensors.numpy import load_file, save
from scipy.sparse import csr_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.errors import DamagedArtifactError
from rayrec.model.train_config import MEMORY, has_memory
from rayrec.recommend.base import Horizon, Kind, Recommender, chunks_of
from rayrec.recommend.own_rules import OwnRulesRecommender
from rayrec.recommend.repeats import RepeatGate, Repeats, gate_features
from rayrec.recommend.sequential_rules import SequentialRulesRecommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.user_top import OwnPlaysRecommender
from rayrec.recommend.vstan import VstanRecommender
from rayrec.storage.artifacts import Manifest, load
from rayrec.storage.workspace import Workspace

ENDED_AT, WEIGHTS, GATE, PRIOR = "sessions.ended_at", "mix.weights", "mix.gate", "long.prior"
MEMBERS = ("network", "sessions", "rules", "own")
# Rules are raised to this power before they become shares: on 30Music's validation range the strongest
# rule deserves more than its share. MRR@20 there is 0.268 with it and 0.251 without.
RULES_POWER = 1.5

# Of the prior, added to the likeness of the long horizon: on 30Music's validation range three quarters of it find
# 0.070 of the songs at offsets 25 to 50, half of it 0.067, all of it 0.068, none 0.064.
PRIOR_SHARE = np.float32(0.75)
# Of the network, the sessions and the user's own plays in a chance on the long horizon. On the validation ranges of
# 30Music and of its long histories, with networks of other powers of hits, they find 0.090 and 0.149 of the songs at
# offsets 25 to 50; the network alone 0.065 and 0.134, sessions 0.062 and 0.080, own plays 0.078 and 0.138, network
# and own plays (0.6, 0.4) 0.083 and 0.150.
LATER_WEIGHTS = (0.5, 0.1, 0.4)

Weights = tuple[float, ...]  # one a member; they add up to 1
Batches = Callable[[], Iterable[Histories]]  # histories in batches, from the start at each call


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How what the members think becomes one chance."""

    heard: Weights  # for songs that the user has heard
    new: Weights  # for the others
    gate: RepeatGate  # gives the chance of all songs heard together


class Memory:
    """What was played together, what followed what and what was popular, in a fit range.

    `prior`, float32 (N,), is what the long horizon's cosines leave out of popularity: `log_prior`.
    """

    def __init__(self, sessions: VstanRecommender, rules: SequentialRulesRecommender, prior: np.ndarray) -> None:
        self.sessions, self.rules, self.prior = sessions, rules, prior

    @classmethod
    def fit(cls, batches: Batches, *, num_songs: int, allowed: FitRange, prior: np.ndarray | None = None) -> "Memory":
        """Two passes over the histories; no prior is one that changes nothing.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        return cls(
            VstanRecommender.fit(batches(), num_songs=num_songs, allowed=allowed),
            SequentialRulesRecommender.fit(batches(), num_songs=num_songs, allowed=allowed),
            np.zeros(num_songs, np.float32) if prior is None else prior,
        )

    def save(self, workspace: Workspace, path: str, mix: Mix) -> None:
        """Write sparse matrices and mix into one safetensors file."""
        matrices = {"sessions": self.sessions.sessions, "rules": self.rules.rules}
        tensors = {
            f"{name}.{part}": np.ascontiguousarray(getattr(matrix, part))
            for name, matrix in matrices.items()
            for part in ("data", "indices", "indptr")
        }
        tensors[ENDED_AT] = self.sessions.ended_at
        tensors |= {
            WEIGHTS: np.array([mix.heard, mix.new], dtype=np.float64),
            GATE: np.array(mix.gate.coefficients, dtype=np.float64),
            PRIOR: self.prior,
        }
        workspace.write_bytes(path, save(tensors))

    @classmethod
    def load(cls, workspace: Workspace, path: str, num_songs: int) -> "tuple[Memory, Mix]":
        """The memory and its mix. Raises `DamagedArtifactError` for one of an earlier version without some of it."""
        tensors = load_file(workspace.local_file(path))
        missing = {ENDED_AT, WEIGHTS, GATE, PRIOR} - tensors.keys()
        if missing:
            raise DamagedArtifactError(f"{path} holds no {', '.join(sorted(missing))}; train the model again")

        def matrix(name: str) -> csr_matrix:
            indptr = tensors[f"{name}.indptr"]
            parts = (tensors[f"{name}.data"], tensors[f"{name}.indices"], indptr)
            return csr_matrix(parts, shape=(len(indptr) - 1, num_songs))

        heard, new = (tuple(weights) for weights in tensors[WEIGHTS].tolist())
        mix = Mix(heard=heard, new=new, gate=RepeatGate(tuple(tensors[GATE].tolist())))
        sessions = VstanRecommender(matrix("sessions"), tensors[ENDED_AT])
        return cls(sessions, SequentialRulesRecommender(matrix("rules")), tensors[PRIOR]), mix


class HybridRecommender(Recommender):
    """A song's score is its chance to be next, or, on the long horizon, to be among the plays to come.

    A gate gives the chance that it is one that the user has heard, which those songs share by the weighted
    chances that the members give them: the network's softmax, the others' shares. The other songs share the rest.
    On the long horizon the rules, which know the next songs only, are silent, and the user's own plays speak instead.
    Costs a pass over all songs and a few sparse products a question.
    """

    name = "hybrid"
    kind: ClassVar[Kind] = "network"
    horizons: tuple[Horizon, ...] = ("short", "long")

    def __init__(self, network: TasteRecommender, memory: Memory, mix: Mix) -> None:
        self.network, self.memory, self.mix = network, memory, mix
        self.num_songs = network.num_songs
        self._rules = _raised(memory.rules.rules)
        self._own = OwnRulesRecommender(self.num_songs)
        self._own_plays = OwnPlaysRecommender(self.num_songs)

    @classmethod
    def load(cls, workspace: Workspace, model_id: str, index_id: str | None = None) -> "HybridRecommender":
        """From a models artifact that has a memory. Raises as `TasteRecommender.load` does."""
        network = TasteRecommender.load(workspace, model_id, index_id)
        path = load(workspace, "models", model_id).path(MEMORY)
        return cls(network, *Memory.load(workspace, path, network.num_songs))

    def short_only(self) -> "HybridRecommender":
        """The same, answering for every horizon as for its short one."""
        other = copy(self)
        other.name, other.horizons, other.network = f"{self.name}-short", ("short",), self.network.short_only()
        return other

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the chances; -inf for songs that the network does not know."""
        scores = np.empty((len(questions), self.num_songs), dtype=np.float32)
        for chunk, chunk_scores in self.score_chunks(histories, questions, horizon):
            scores[chunk] = chunk_scores
        return scores

    def score_chunks(
        self, histories: Histories, questions: Questions, horizon: Horizon = "short"
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """As in `Recommender`; the network's vectors of all questions are computed in one pass."""
        vectors = self.network.vectors(histories, questions, horizon)
        answer = self.later if horizon == "long" and "long" in self.horizons else self.next
        for chunk in chunks_of(len(questions), self.num_songs):
            yield chunk, answer(self.network.score_vectors(vectors[chunk]), histories, questions.take(chunk))

    def later(self, cosines: np.ndarray, histories: Histories, questions: Questions) -> np.ndarray:
        """As `score` on the long horizon, where the network's cosines there, float32 (Q, N), are known."""
        network, together, own = np.array(LATER_WEIGHTS, dtype=np.float32)
        sessions, played = self.memory.sessions.score(histories, questions), self._own_plays.score(histories, questions)
        sessions[:, self.network.without_vector] = played[:, self.network.without_vector] = 0
        likeness = cosines * np.float32(self.network.scale("long"))
        likeness += PRIOR_SHARE * self.memory.prior
        mixed = softmax(likeness)
        mixed *= network
        for weight, scores in ((together, sessions), (own, played)):
            mixed += np.multiply(weight, shares(scores), out=scores)
        mixed[:, self.network.without_vector] = -np.inf
        return mixed

    def next(self, cosines: np.ndarray, histories: Histories, questions: Questions) -> np.ndarray:
        """As `score` on the short horizon, where the network's cosines are known; the histories feed the memory."""
        mixed = combined(*self.chances(cosines, histories, questions), self.mix)
        mixed[:, self.network.without_vector] = -np.inf
        return mixed

    def chances(
        self, cosines: np.ndarray, histories: Histories, questions: Questions
    ) -> tuple[list[np.ndarray], Repeats]:
        """M times float32 (Q, N): what each member thinks of each song as the next; rows add up to 1 or 0.

        Beside them what is known of repeats. The network's cosines, float32 (Q, N), are known, and the histories
        feed the memory. Songs that the network does not know are given no chance.
        """
        remembered = [
            self.memory.sessions.score(histories, questions),
            self._rules.score(histories, questions),
            self._own.score(histories, questions),
        ]
        for scores in remembered:
            scores[:, self.network.without_vector] = 0
        network = softmax(cosines * np.float32(self.network.scale("short")))
        members = [network, *(shares(scores) for scores in remembered)]
        return members, Repeats.of(histories, questions, self.num_songs)


def combined(chances: list[np.ndarray], repeats: Repeats, mix: Mix) -> np.ndarray:
    """float32 (Q, N): rows of chances that add up to 1, or to less where nothing is thought of songs heard or new."""
    asked, songs, count = repeats.asked, repeats.songs, len(chances[0])
    again_ME = np.stack([member[asked, songs] for member in chances])
    heard_MQ = np.stack([np.bincount(asked, weights=again, minlength=count) for again in again_ME]).astype(np.float32)
    new_MQ = np.maximum(0, np.stack([member.sum(axis=1) for member in chances]) - heard_MQ)
    chance = mix.gate.chances(gate_features(repeats, heard_MQ, new_MQ))
    heard, new = (np.array(weights, dtype=np.float32) for weights in (mix.heard, mix.new))
    factors = over(1 - chance, new @ new_MQ)
    mixed = np.zeros_like(chances[0])
    for weight, member in zip(new, chances, strict=True):
        if weight:
            mixed += (weight * factors)[:, None] * member
    mixed[asked, songs] = heard @ again_ME * over(chance, heard @ heard_MQ)[asked]
    return mixed


def over(chance: np.ndarray, total: np.ndarray) -> np.ndarray:
    """float32: by what to multiply parts of a total so that they add up to the chance; 0 where there is nothing."""
    return np.asarray(np.divide(chance, total, out=np.zeros_like(chance), where=total > 0, casting="same_kind"))


def _raised(rules: csr_matrix) -> SequentialRulesRecommender:
    """Rules raised to their power; where they lead is shared with those given."""
    parts = (rules.data**RULES_POWER, rules.indices, rules.indptr)
    return SequentialRulesRecommender(csr_matrix(parts, shape=rules.shape))


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (Q, N): rows of chances, written over the logits; a row of -inf stays without any."""
    top = logits.max(axis=1, keepdims=True)
    logits -= np.where(np.isfinite(top), top, 0)
    return shares(np.exp(logits, out=logits))


def shares(scores: np.ndarray) -> np.ndarray:
    """float32 (Q, N): rows scaled to add up to 1, written over the scores; rows of zeros stay."""
    totals = scores.sum(axis=1, keepdims=True)
    scores /= np.where(totals > 0, totals, 1)
    return scores


def load_recommender(
    workspace: Workspace, manifest: Manifest, index_id: str | None = None
) -> HybridRecommender | TasteRecommender:
    """What answers for a models artifact: the hybrid where it has a memory, else the network alone."""
    if has_memory(manifest):
        return HybridRecommender.load(workspace, manifest.id, index_id)
    return TasteRecommender.load(workspace, manifest.id, index_id)
