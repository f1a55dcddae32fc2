"""How well a network answers the plays of the validation range, judged by all training workers together.

Each worker computes the taste vectors of some users, and scores all plays against the songs whose vectors it keeps;
the songs that score better than the right one are counted and added up. Q plays, U songs, n songs of a worker, D
embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from rayrec.data.histories import Histories, Queries
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import INPUT_TABLE, SONG_TABLE, TABLES, TasteModel
from rayrec.model.row_exchange import RowExchange
from rayrec.model.train_config import NEXT_PLAY, AnyHorizon
from rayrec.model.workers import Share

RECALL_AT = 20
CHOSEN_BY = f"validation_ndcg@{RECALL_AT}"  # as served: recall alone prefers networks that put few songs first
VALIDATION_FIGURES = (f"validation_recall@{RECALL_AT}", f"validation_mrr@{RECALL_AT}", CHOSEN_BY)
USERS_AT_ONCE = 1_000  # of a worker, the songs of whose histories it holds
SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Plays to predict: one in the horizon of each query, from all plays before it by the same user."""

    histories: Histories
    plays: np.ndarray  # int64 (Q,), positions of the flat arrays: the plays before which is asked
    horizon: AnyHorizon = NEXT_PLAY  # in which each query has a play

    @property
    def queries(self) -> Queries:
        """What is asked, in the order of `plays`."""
        return Queries.before_plays(self.histories, self.plays)

    @property
    def answers(self) -> np.ndarray:
        """int64 (Q,): the play to predict of each query; of a horizon of several one is drawn, always the same."""
        begin, end = self.horizon.spans(self.histories, self.queries)
        return np.asarray(begin + (np.random.default_rng(0).random(len(begin)) * (end - begin)).astype(np.int64))


def validation_tastes(model: TasteModel, exchange: RowExchange, validation: Validation, share: Share) -> Tensor:
    """float32 (Q, D): the taste vectors at the plays to predict, on the model's device, the same on all workers.

    The song tables of `model` hold this worker's rows.
    """
    histories, queries = validation.histories, validation.queries
    horizon = next(iter(model.config.horizons))  # short, where there is one
    device = model.songs.weight.device
    tastes = torch.zeros(len(queries), model.config.embedding_dim, device=device)
    users_of_all = USERS_AT_ONCE * share.workers
    for begin in range(0, len(histories), users_of_all):
        users = share.own(np.arange(begin, min(begin + users_of_all, len(histories))))
        some = histories.take(users)
        songs = np.unique(some.songs).astype(np.int64)
        encoder = TasteEncoder(network_over(model, exchange, songs), device)
        asked = np.flatnonzero(np.isin(queries.rows, users))
        if len(asked):
            places = np.searchsorted(songs, some.songs).astype(np.int32)
            of_users = replace(queries.take(asked), rows=np.searchsorted(users, queries.rows[asked]))
            vectors = encoder.vectors(replace(some, songs=places), of_users, horizon)
            tastes[torch.from_numpy(asked).to(device)] = torch.from_numpy(vectors).to(device)
    share.add_up(tastes)
    return tastes


def network_over(model: TasteModel, exchange: RowExchange, songs: np.ndarray) -> TasteModel:
    """The same network with the rows of some songs, int64 (U,), from all workers, who call it together."""
    weights = dict(model.named_parameters())
    tables = [exchange.rows_of(weights[name].detach(), songs) for name in (SONG_TABLE, INPUT_TABLE) if name in weights]
    network = TasteModel(replace(model.config, num_songs=len(songs)), *tables, shared=True)
    network.load_state_dict({name: value for name, value in weights.items() if name not in TABLES}, strict=False)
    return network


@dataclass(frozen=True, kw_only=True)
class PlayRanks:
    """Where each of Q plays stands; a play of a song that is never recommended stands behind the first `RECALL_AT`."""

    among_all: np.ndarray  # int64 (Q,), from 1
    among_unheard: np.ndarray  # int64 (Q,): as served, where songs that the user has heard are left out
    is_new: np.ndarray  # bool (Q,): of a song that the user had not heard

    @classmethod
    def joined(cls, parts: Sequence["PlayRanks"]) -> "PlayRanks":
        """Those of all parts."""
        return cls(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)})


def rank_metrics(ranks: np.ndarray) -> tuple[float, float, float]:
    """Recall, MRR and NDCG of ranks, int64 (Q,); zeros where there are none."""
    found = ranks <= RECALL_AT
    gains = np.where(found, 1 / np.log2(ranks + 1.0), 0.0)
    recall, mrr, ndcg = (float(values.sum() / max(1, len(ranks))) for values in (found, found / ranks, gains))
    return recall, mrr, ndcg


def judge(tastes_QD: Tensor, vectors_nD: Tensor, validation: Validation, share: Share) -> dict[str, float]:
    """Figures of the plays to predict, the same on all workers; arguments as of `rank_plays`.

    The NDCG by which epochs are chosen is of the plays of songs new to the user, as served; of all plays where none is
    new.
    """
    ranks = rank_plays(tastes_QD, vectors_nD, validation, share)
    recall, mrr, ndcg = rank_metrics(ranks.among_all)
    return {
        f"validation_recall@{RECALL_AT}": recall,
        f"validation_mrr@{RECALL_AT}": mrr,
        CHOSEN_BY: rank_metrics(ranks.among_unheard[ranks.is_new])[2] if ranks.is_new.any() else ndcg,
    }


@torch.inference_mode()
def rank_plays(tastes_QD: Tensor, vectors_nD: Tensor, validation: Validation, share: Share) -> PlayRanks:
    """The ranks of the plays to predict among all songs by dot product, the same on all workers.

    `vectors_nD` are those of this worker's songs; a song that is not known has zeros and is never recommended. Ties
    count against a play, and a score that is no number never finds one.
    """
    histories, queries = validation.histories, validation.queries
    targets = histories.songs[validation.answers]
    unknown_n = ~vectors_nD.any(dim=1)
    longest = -(-int(share.total(len(vectors_nD))) // share.workers)
    step = max(1, SCORES_AT_ONCE // max(1, longest))
    nothing: np.ndarray = np.zeros(0, dtype=np.int64)
    parts = [PlayRanks(among_all=nothing, among_unheard=nothing, is_new=nothing.astype(bool))]
    for begin in range(0, len(tastes_QD), step):
        wanted = targets[begin : begin + step]
        scores_Qn = tastes_QD[begin : begin + step] @ vectors_nD.T
        scores_Qn[:, unknown_n] = -torch.inf
        rows, places = _own(np.arange(len(wanted)), wanted, share, scores_Qn.device)
        target_Q = scores_Qn.new_zeros(len(wanted))
        target_Q[rows] = scores_Qn[rows, places]
        share.add_up(target_Q)
        among_all_Q = _not_below(scores_Qn, target_Q)
        heard_by, heard = _heard(histories, queries.take(slice(begin, begin + step)))
        scores_Qn[_own(heard_by, heard, share, scores_Qn.device)] = -torch.inf
        ranks_2Q = torch.stack([among_all_Q, _not_below(scores_Qn, target_Q)])
        share.add_up(ranks_2Q)
        among_all, among_unheard = ranks_2Q.where(target_Q.isfinite(), RECALL_AT + 1).cpu().numpy()
        is_new: np.ndarray = np.ones(len(wanted), dtype=bool)
        is_new[heard_by[heard == wanted[heard_by]]] = False
        parts.append(PlayRanks(among_all=among_all, among_unheard=among_unheard, is_new=is_new))
    return PlayRanks.joined(parts)


def _own(rows: np.ndarray, songs: np.ndarray, share: Share, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of pairs of a row and a song those whose song this worker keeps; the songs as places among its own."""
    own = songs % share.workers == share.rank
    return (
        torch.from_numpy(rows[own]).to(device),
        torch.from_numpy(songs[own].astype(np.int64) // share.workers).to(device),
    )


def _not_below(scores_Qn: Tensor, target_Q: Tensor) -> Tensor:
    """int64 (Q,): how many songs do not score below the right one."""
    return (~(scores_Qn < target_Q[:, None])).sum(dim=1)


def _heard(histories: Histories, queries: Queries) -> tuple[np.ndarray, np.ndarray]:
    """The songs that users had heard when they were asked for: rows of the queries, and songs."""
    counts = np.asarray(queries.seen)
    rows = np.repeat(np.arange(len(counts)), counts)
    begin = histories.offsets[queries.rows] - (np.cumsum(counts) - counts)
    return rows, histories.songs[np.repeat(begin, counts) + np.arange(len(rows))]
