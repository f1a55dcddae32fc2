"""The network as a recommender: the songs nearest to the taste vector at the moment of the request."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import ClassVar

import numpy as np
import torch

from rayrec.data.histories import Histories, Queries
from rayrec.errors import MismatchError
from rayrec.model.added_songs import AddedSongs
from rayrec.model.checkpoint import load_model
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.train_config import SONG_VECTORS, DaysHorizon
from rayrec.recommend.base import HorizonName, Kind, VectorRecommender
from rayrec.recommend.index import SongIndex
from rayrec.storage import artifacts
from rayrec.storage.workspace import Workspace


class TasteRecommender(VectorRecommender):
    """Recommends with the taste network: compares its taste vectors with the song vectors that it was trained with."""

    name = "taste"
    kind: ClassVar[Kind] = "network"
    horizons: tuple[HorizonName, ...] = ("short", "long")

    def __init__(self, model: TasteModel, song_vectors: np.ndarray, index: SongIndex | None = None) -> None:
        """`song_vectors`, float32 (N, D), are compared with taste vectors; rows of zeros are unknown songs."""
        super().__init__(song_vectors, index)
        self.encoder = TasteEncoder(model)
        long_horizon = model.config.horizons.get("long")
        self.long_days = long_horizon if isinstance(long_horizon, DaysHorizon) else None
        self.added: AddedSongs | None = None  # songs that were added after the training

    def add_songs(self, added: AddedSongs, *, room: int = 0) -> None:
        """Recommend songs that the training has not seen, and read their plays. They replace songs added before.

        The index is not rebuilt. At the first call, or if the table of vectors has too few rows, the table is copied
        and gets `room` spare rows; otherwise the vectors are written into the existing table.
        """
        vectors, previous_rows = self.song_vectors, self.added_songs
        num_rows = max(len(vectors), int(added.rows.max(initial=-1)) + 1)
        if self.added is None or num_rows > len(vectors):
            grown_vectors = np.zeros((num_rows + room, vectors.shape[1]), dtype=np.float32)
            grown_vectors[: len(vectors)] = vectors
            vectors = grown_vectors
        vectors[previous_rows] = 0
        vectors[added.rows] = added.outputs
        rows_without_vector = [self.rows_without_vector, previous_rows, np.arange(len(self.song_vectors), len(vectors))]
        self.rows_without_vector = np.setdiff1d(np.concatenate(rows_without_vector), added.rows)
        self.index = None if self.index is None else self.index.with_added(added.rows, vectors)
        self.song_vectors, self.num_songs = vectors, len(vectors)
        self.encoder.model.add_songs(*map(torch.from_numpy, (added.rows, added.averaged, added.inputs)))
        self.added, self.added_songs = added, added.rows

    def scale(self, horizon: HorizonName) -> float:
        """Return the factor that turns cosines into logits: the inverse of the temperature of the training."""
        return self.encoder.model.config.logit_scales[self.head(horizon)]

    @classmethod
    def load(
        cls, workspace: Workspace, model_id: str, index_id: str | None = None, added_id: str | None = None
    ) -> "TasteRecommender":
        """Load a network from the workspace, with its index and added songs if their ids are given.

        Raises `MismatchError` for an index or added songs of another model.
        """
        network = cls.from_folder(workspace, artifacts.load_manifest(workspace, "models", model_id).folder)
        if index_id is not None:
            index_manifest = artifacts.load_manifest(workspace, "indexes", index_id)
            index_model_id = index_manifest.inputs.get("models")
            if index_model_id != model_id:
                raise MismatchError(
                    f"index {index_id} was built from model {index_model_id}, not from {model_id}; "
                    f"run `rayrec index --model {model_id}` first"
                )
            network.index = SongIndex.load(workspace, index_manifest, network.song_vectors)
        if added_id is not None:
            manifest = artifacts.load_manifest(workspace, "added_songs", added_id)
            if manifest.inputs.get("models") != model_id:
                raise MismatchError(
                    f"added songs {added_id} were made for model {manifest.inputs.get('models')}, not for {model_id}; "
                    f"run `rayrec songs add --model {model_id}` first"
                )
            network.add_songs(AddedSongs.load(workspace, manifest.folder))
        return network

    @classmethod
    def from_folder(cls, workspace: Workspace, folder: str) -> "TasteRecommender":
        """Load a network from the files in `folder`, a finished artifact or not; its vectors are memory-mapped."""
        return cls(load_model(workspace, folder), workspace.read_array(f"{folder}/{SONG_VECTORS}"))

    def with_index(self, index: SongIndex) -> "TasteRecommender":
        """Return the same network with another index over its song vectors."""
        recommender = copy(self)
        recommender.index = index
        return recommender

    def short_only(self) -> "TasteRecommender":
        """Return the same network that answers every horizon with its short one."""
        recommender = copy(self)
        recommender.name, recommender.horizons, recommender.long_days = f"{self.name}-short", ("short",), None
        return recommender

    def vectors(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, D): the taste vectors; plays that no query needs are not read.

        A network with one horizon uses it for both.
        """
        return self.vectors_of(histories, queries, (horizon,))[horizon]

    def vectors_of(
        self, histories: Histories, queries: Queries, horizons: Sequence[HorizonName]
    ) -> dict[HorizonName, np.ndarray]:
        """As `vectors`, for several horizons in one pass over the plays."""
        rows, inverse = np.unique(queries.rows, return_inverse=True)
        needed_counts = np.zeros(len(rows), dtype=np.int64)
        np.maximum.at(needed_counts, inverse, queries.plays_before)
        query_histories = histories.take(rows)
        positions = np.arange(query_histories.num_plays) - query_histories.offsets[query_histories.rows]
        query_histories = query_histories.keep(positions < needed_counts[query_histories.rows])
        user_queries = Queries(rows=inverse, plays_before=queries.plays_before, at=queries.at)
        heads = {horizon: self.head(horizon) for horizon in horizons}
        vectors = self.encoder.vectors_of(query_histories, user_queries, list(dict.fromkeys(heads.values())))
        return {horizon: vectors[head] for horizon, head in heads.items()}

    def explain(
        self,
        history: Histories,
        at: int,
        songs: np.ndarray,
        *,
        long_weight: float = 0.0,
        vectors: Mapping[HorizonName, np.ndarray] | None = None,
    ) -> list[dict[str, float]]:
        """Return the same features for each song: it is near the taste vectors used. See `BaseRecommender.explain`."""
        features = {"taste_short_rank": float(long_weight < 1), "taste_long_rank": float(long_weight > 0)}
        return [features] * len(songs)

    def head(self, horizon: HorizonName) -> str:
        """Return the name of the network's head that answers for a horizon."""
        heads = list(self.encoder.model.config.horizons)
        return horizon if horizon in heads and horizon in self.horizons else heads[0]
