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
        self.seconds = self._began = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._began


class Peer:
    """A SASRec model that is trained on the plays in a folder and answers the queries in it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._clock = folder, EpochClock()
        plays, queries = np.load(folder / "plays.npz"), np.load(folder / "queries.npz")
        self._songs = int(plays["num_songs"])
        self._queries, self._ends = queries["songs"], queries["offsets"]
        self._dataset = Dataset.construct(_frame(plays["users"], plays["songs"]))
        self._model = SASRecModel(get_trainer_func=self._trainer, **settings)

    def _trainer(self) -> Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=[self._clock], **quiet)

    def epoch(self) -> dict[str, float]:
        """Train for one epoch."""
        self._model.fit_partial(self._dataset, min_epochs=1, max_epochs=1)
        clock = next(each for each in self._model.fit_trainer.callbacks if isinstance(each, EpochClock))
        frame = self._model.data_preparator.train_dataset.interactions.df
        plays = len(frame) - frame[Columns.User].nunique()  # the first play of a user is not a target
        parameters = sum(value.numel() for value in self._model.lightning_model.parameters())
        return {"seconds": clock.seconds, "plays": plays, "parameters": parameters}

    def answer(self) -> dict[str, float]:
        """Write `song_vectors.npy`, float32 (N, D), and `tastes.npy`, float32 (Q, D).

        Songs and queries that the model does not know get zeros.
        """
        preparator, network = self._model.data_preparator, self._model.lightning_model
        count = len(self._ends) - 1
        tastes: np.ndarray = np.zeros((0, 0), dtype=np.float32)
        vectors = tastes
        for begin in range(0, count, QUERIES_AT_ONCE):
            ends = self._ends[begin : begin + QUERIES_AT_ONCE + 1]
            users = np.repeat(np.arange(begin, begin + len(ends) - 1), np.diff(ends))
            histories = Dataset.construct(_frame(users, self._queries[ends[0] : ends[-1]]))
            known = preparator.transform_dataset_u2i(histories, np.unique(users))
            loader = preparator.get_dataloader_recommend(known, 256)
            of_queries, of_songs = network._get_user_item_embeddings(loader, "cpu")
            if not begin:
                tastes = np.zeros((count, of_queries.shape[1]), dtype=np.float32)
                vectors = np.zeros((self._songs, of_queries.shape[1]), dtype=np.float32)
                rows = preparator.get_known_items_sorted_internal_ids()
                vectors[preparator.get_known_item_ids().astype(np.int64)] = of_songs.numpy()[rows]
            tastes[known.user_id_map.get_external_sorted_by_internal().astype(np.int64)] = of_queries.numpy()
        np.save(self._folder / "song_vectors.npy", vectors)
        np.save(self._folder / "tastes.npy", tastes)
        return {"queries": count}


def _frame(users: np.ndarray, songs: np.ndarray) -> pd.DataFrame:
    """Return plays as a data frame of RecTools, in the given order."""
    moments = pd.to_datetime(np.arange(len(songs), dtype=np.int64) * SECOND)
    return pd.DataFrame({Columns.User: users, Columns.Item: songs, Columns.Weight: 1.0, Columns.Datetime: moments})


def main() -> None:
    """Process the words on standard input until it ends."""
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    peer = Peer(folder, settings)
    for line in sys.stdin:
        figures = {"epoch": peer.epoch, "answer": peer.answer}[line.strip()]()
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
