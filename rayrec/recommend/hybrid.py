"""The network with a memory: its chances of the next song mixed with what is remembered.

A network learns where tastes drift and forgets single albums; session neighbours and sequential
rules remember what was played together and what followed what, own rules how this user plays it
again. Q questions, N songs, M members.
"""

from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
from safetensors.numpy import load_file, save
from scipy.sparse import csr_matrix

from rayrec.artifacts import Manifest, load
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.errors import DamagedArtifactError
from rayrec.recommend.own_rules import OwnRulesRecommender
from rayrec.recommend.recommender import Horizon, Kind, Recommender
from rayrec.recommend.sequential_rules import SequentialRulesRecommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.vstan import VstanRecommender
from rayrec.taste.config import MEMORY, has_memory
from rayrec.workspace import Workspace

ENDED_AT = "sessions.ended_at"
MEMBERS = ("network", "sessions", "rules", "own")
# Rules are raised to this power before they become shares: on 30Music's validation range the strongest
# rule deserves more than its share. MRR@20 there is 0.268 with it and 0.251 without.
RULES_POWER = 1.5

Weights = tuple[float, ...]  # one a member; they add up to 1
Batches = Callable[[], Iterable[Histories]]  # histories in batches, from the start at each call


class Memory:
    """What was played together and what followed what, in a fit range."""

    def __init__(self, sessions: VstanRecommender, rules: SequentialRulesRecommender) -> None:
        self.sessions, self.rules = sessions, rules

    @classmethod
    def fit(cls, batches: Batches, *, num_songs: int, allowed: FitRange) -> "Memory":
        """Two passes over the histories. Raises `LeakError` for a play that `allowed` forbids."""
        return cls(
            VstanRecommender.fit(batches(), num_songs=num_songs, allowed=allowed),
            SequentialRulesRecommender.fit(batches(), num_songs=num_songs, allowed=allowed),
        )

    def save(self, workspace: Workspace, path: str, weights: Weights) -> None:
        """Write sparse matrices and weights into one safetensors file."""
        matrices = {"sessions": self.sessions.sessions, "rules": self.rules.rules}
        tensors = {
            f"{name}.{part}": np.ascontiguousarray(getattr(matrix, part))
            for name, matrix in matrices.items()
            for part in ("data", "indices", "indptr")
        }
        tensors[ENDED_AT] = self.sessions.ended_at
        workspace.write_bytes(path, save({**tensors, "weights": np.array(weights, dtype=np.float64)}))

    @classmethod
    def load(cls, workspace: Workspace, path: str, num_songs: int) -> "tuple[Memory, Weights]":
        """The memory and its weights. Raises `DamagedArtifactError` for one whose sessions tell no times."""
        with workspace.local_copy(path) as local:
            tensors = load_file(local)
        if ENDED_AT not in tensors:
            raise DamagedArtifactError(f"{path} does not tell when its sessions ended; train the model again")

        def matrix(name: str) -> csr_matrix:
            indptr = tensors[f"{name}.indptr"]
            parts = (tensors[f"{name}.data"], tensors[f"{name}.indices"], indptr)
            return csr_matrix(parts, shape=(len(indptr) - 1, num_songs))

        weights = tuple(float(weight) for weight in tensors["weights"])
        sessions = VstanRecommender(matrix("sessions"), tensors[ENDED_AT])
        return cls(sessions, SequentialRulesRecommender(matrix("rules"))), weights


class HybridRecommender(Recommender):
    """A song's score is its weighted chance to be next: of the network by softmax, of the others by share.

    On the long horizon the network answers alone: the others know the next songs only. Costs a pass
    over all songs and a few sparse products a question.
    """

    name = "hybrid"
    kind: ClassVar[Kind] = "network"
    horizons: tuple[Horizon, ...] = ("short", "long")

    def __init__(self, network: TasteRecommender, memory: Memory, weights: Weights) -> None:
        self.network, self.memory, self.weights = network, memory, weights
        self.num_songs = network.num_songs
        self._own = OwnRulesRecommender(self.num_songs)

    @classmethod
    def load(cls, workspace: Workspace, model_id: str, index_id: str | None = None) -> "HybridRecommender":
        """From a models artifact that has a memory. Raises as `TasteRecommender.load` does."""
        network = TasteRecommender.load(workspace, model_id, index_id)
        path = load(workspace, "models", model_id).path(MEMORY)
        return cls(network, *Memory.load(workspace, path, network.num_songs))

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the chances mixed; -inf for songs that the network does not know."""
        if horizon == "long":
            return self.network.score(histories, questions, horizon)
        return self.mix(self.chances(histories, questions), self.weights)

    def mix(self, chances: list[np.ndarray], weights: Weights) -> np.ndarray:
        """float32 (Q, N): the weighted sum of what the members think; -inf for songs that the network does not know."""
        mixed = np.zeros_like(chances[0])
        for weight, member in zip(weights, chances, strict=True):
            if weight:
                mixed += np.float32(weight) * member
        mixed[:, self.network.without_vector] = -np.inf
        return mixed

    def chances(self, histories: Histories, questions: Questions) -> list[np.ndarray]:
        """M times float32 (Q, N): what each member thinks of each song as the next; rows add up to 1 or 0."""
        return self.chances_beside(self.network.score(histories, questions, "short"), histories, questions)

    def chances_beside(self, cosines: np.ndarray, histories: Histories, questions: Questions) -> list[np.ndarray]:
        """As `chances`, where the network's cosines, float32 (Q, N), are known; the histories then feed the memory."""
        return [
            softmax(cosines * np.float32(self.network.scale("short"))),
            shares(self.memory.sessions.score(histories, questions)),
            shares(_raised(self.memory.rules.score(histories, questions))),
            shares(self._own.score(histories, questions)),
        ]


def _raised(rules: np.ndarray) -> np.ndarray:
    """float32 (Q, N): the rules raised to their power, in place: few are not zero, and powers are slow."""
    there = np.nonzero(rules)
    rules[there] **= RULES_POWER
    return rules


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (Q, N): rows of chances; a row of -inf stays without any."""
    top = logits.max(axis=1, keepdims=True)
    exponents = np.exp(logits - np.where(np.isfinite(top), top, 0))
    return shares(exponents)


def shares(scores: np.ndarray) -> np.ndarray:
    """float32 (Q, N): rows scaled to add up to 1; rows of zeros stay."""
    totals = scores.sum(axis=1, keepdims=True)
    return np.asarray(scores / np.where(totals > 0, totals, 1), dtype=np.float32)


def load_recommender(
    workspace: Workspace, manifest: Manifest, index_id: str | None = None
) -> HybridRecommender | TasteRecommender:
    """What answers for a models artifact: the hybrid where it has a memory, else the network alone."""
    if has_memory(manifest):
        return HybridRecommender.load(workspace, manifest.id, index_id)
    return TasteRecommender.load(workspace, manifest.id, index_id)
