"""Trains SASRec of RecTools one epoch at a time. `peers_bench` runs it in an environment with RecTools, without rayrec.

Its arguments are a folder and settings as JSON. It reads one word per line from standard input: `epoch` trains for one
epoch, `answer` writes the vectors of songs and of queries into the folder. For each word it prints one line, a JSON
object.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

QUERIES_AT_ONCE = 5_000
SECOND = 10**9  # ns between two plays, of which only the order matters


class EpochClock(Callback):  # type: ignore[misc]
    """Measures the seconds of the last epoch: its batches and steps, without the preparation of the data."""

    def __init__(self) -> None:
        self.seconds = self._started = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._started


class Peer:
    """A SASRec model that is trained on the plays in a folder and answers the queries in it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._clock = folder, EpochClock()
        plays, queries = np.load(folder / "plays.npz"), np.load(folder / "queries.npz")
        self._song_count = int(plays["num_songs"])
        self._queries, self._offsets = queries["songs"], queries["offsets"]
        self._dataset = Dataset.construct(_plays_frame(plays["users"], plays["songs"]))
        self._model = SASRecModel(get_trainer_func=self._create_trainer, **settings)

    def _create_trainer(self) -> Trainer:
        quiet_options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return Trainer(
            accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=[self._clock], **quiet_options
        )

    def epoch(self) -> dict[str, float]:
        """Train for one epoch."""
        self._model.fit_partial(self._dataset, min_epochs=1, max_epochs=1)
        clock = next(callback for callback in self._model.fit_trainer.callbacks if isinstance(callback, EpochClock))
        interactions = self._model.data_preparator.train_dataset.interactions.df
        plays = len(interactions) - interactions[Columns.User].nunique()  # the first play of a user is not a target
        parameter_count = sum(weights.numel() for weights in self._model.lightning_model.parameters())
        return {"seconds": clock.seconds, "plays": plays, "parameters": parameter_count}

    def answer(self) -> dict[str, float]:
        """Write `song_vectors.npy`, float32 (N, D), and `tastes.npy`, float32 (Q, D).

        Songs and queries that the model does not know get zeros.
        """
        preparator, network = self._model.data_preparator, self._model.lightning_model
        query_count = len(self._offsets) - 1
        taste_vectors: np.ndarray = np.zeros((0, 0), dtype=np.float32)
        song_vectors = taste_vectors
        for start in range(0, query_count, QUERIES_AT_ONCE):
            offsets = self._offsets[start : start + QUERIES_AT_ONCE + 1]
            users = np.repeat(np.arange(start, start + len(offsets) - 1), np.diff(offsets))
            histories = Dataset.construct(_plays_frame(users, self._queries[offsets[0] : offsets[-1]]))
            known_dataset = preparator.transform_dataset_u2i(histories, np.unique(users))
            loader = preparator.get_dataloader_recommend(known_dataset, 256)
            query_vectors, known_song_vectors = network._get_user_item_embeddings(loader, "cpu")
            if not start:
                taste_vectors = np.zeros((query_count, query_vectors.shape[1]), dtype=np.float32)
                song_vectors = np.zeros((self._song_count, query_vectors.shape[1]), dtype=np.float32)
                known_rows = preparator.get_known_items_sorted_internal_ids()
                song_vectors[preparator.get_known_item_ids().astype(np.int64)] = known_song_vectors.numpy()[known_rows]
            taste_vectors[known_dataset.user_id_map.get_external_sorted_by_internal().astype(np.int64)] = (
                query_vectors.numpy()
            )
        np.save(self._folder / "song_vectors.npy", song_vectors)
        np.save(self._folder / "tastes.npy", taste_vectors)
        return {"queries": query_count}


def _plays_frame(users: np.ndarray, songs: np.ndarray) -> pd.DataFrame:
    """Return plays as a data frame of RecTools, in the given order."""
    timestamps = pd.to_datetime(np.arange(len(songs), dtype=np.int64) * SECOND)
    return pd.DataFrame({Columns.User: users, Columns.Item: songs, Columns.Weight: 1.0, Columns.Datetime: timestamps})


def main() -> None:
    """Process the words on standard input until it ends."""
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    peer = Peer(folder, settings)
    for line in sys.stdin:
        reply = {"epoch": peer.epoch, "answer": peer.answer}[line.strip()]()
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
