"""Compare our network with SASRec of RecTools: `make bench-peers`, or `python -m rayrec.bench.peers_bench`.

Both train on the same plays with one thread, taking turns after each epoch. After each epoch they answer the same
queries of the test range. RecTools runs in a separate Python environment, because it needs older libraries.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch

from rayrec.bench.rounds import ONE_THREAD
from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.ragged import offsets_of, ranges
from rayrec.data.split import Split, SplitConfig, choose_split, split_dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import MismatchError, RayrecError
from rayrec.jobs.embed import embed
from rayrec.jobs.generate import generate
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.trainer import model_config
from rayrec.model.checkpoint import export_song_vectors
from rayrec.model.epochs import FitData, Validation, rank_metrics, rank_plays, start_vectors, validation_tastes
from rayrec.model.network import TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.train_config import TrainConfig
from rayrec.model.training import StepReport, Training
from rayrec.model.training_windows import ShardReader, stream_batches, window_lengths
from rayrec.storage import artifacts
from rayrec.storage.workspace import Workspace

PEER = Path(__file__).with_name("sasrec_peer.py")
OURS, SASREC = "rayrec", "RecTools SASRec"


class Contestant(Protocol):
    """A network that is compared: it trains and answers when it is called."""

    def epoch(self) -> tuple[int, float]:
        """Train for one epoch; return the number of targets learned from, and the seconds."""
        ...

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return vectors of the queries, float32 (Q, D), and of songs, float32 (N, D); dot products are the scores."""
        ...


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """Speed of a network in an epoch, and recall@20 and MRR@20 after it."""

    model: str
    epoch: int  # from 1
    plays: int  # targets learned from in the epoch
    seconds: float  # of the epoch
    plays_per_second: float
    served_recall: float  # of songs new to the user, among songs new to the user
    served_mrr: float
    recall: float  # of all plays, among all songs
    mrr: float


class OurNetwork:
    """The network of `rayrec train`, trained in this process."""

    def __init__(self, dataset: Dataset, split: Split, config: TrainConfig, queries: Validation) -> None:
        embeddings = artifacts.newest(dataset.workspace, "songs")
        if embeddings.inputs.get("split") != split.id:
            raise MismatchError(
                f"song embeddings {embeddings.id} were not trained on split {split.id}; run `rayrec embed` first"
            )
        self.embed_seconds = float(embeddings.metrics["seconds"])
        vectors = np.asarray(dataset.workspace.read_array(embeddings.path("vectors.npy")))
        play_counts = np.zeros(dataset.num_songs, dtype=np.int64)
        for histories in dataset.read_all():
            play_counts += np.bincount(split.final.select(histories).songs, minlength=len(play_counts))
        self._dataset, self._fit_range, self._config, self._queries = dataset, split.final, config, queries
        self._window_lengths = window_lengths(dataset, split.final, config)
        self._is_known = FitData(vectors=vectors, counts=play_counts).known(Share())
        torch.manual_seed(config.seed)
        initial_vectors = start_vectors(vectors, config.seed, num_songs=len(play_counts))
        model = TasteModel(model_config(dataset, config, initial_vectors.shape[1]), torch.from_numpy(initial_vectors))
        self._training = Training(model, config, play_counts, device="cpu", share=Share())
        self._epochs_done = 0

    def epoch(self) -> tuple[int, float]:
        """See `Contestant.epoch`; the seconds include reading plays and cutting windows."""
        reports: list[StepReport] = []
        started = time.perf_counter()
        reader = ShardReader(self._dataset, self._fit_range, self._config, self._window_lengths, Share())
        self._training.epoch(stream_batches(reader, self._epochs_done), self._epochs_done, on_step=reports.append)
        seconds = time.perf_counter() - started
        self._epochs_done += 1
        return sum(report.plays for report in reports), seconds

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Contestant.answer`."""
        model = self._training.averaged()
        song_vectors = export_song_vectors(model, self._is_known)
        return validation_tastes(model, song_vectors, self._training.exchange, self._queries, Share()), song_vectors


class SasRec:
    """SASRec in a process of the environment with RecTools; the process is killed at the end of the with block."""

    def __init__(self, python: str, dataset: Dataset, split: Split, settings: dict[str, Any], queries: Validation):
        self._folder = tempfile.TemporaryDirectory(prefix="rayrec-")
        folder = Path(self._folder.name)
        plays = concatenate([split.final.select(histories) for histories in dataset.read_all()])
        np.savez(folder / "plays.npz", users=plays.rows, songs=plays.songs, num_songs=dataset.num_songs)
        max_length = int(settings.get("session_max_len", 100))
        recent_songs = songs_before(queries, max_length)
        np.savez(folder / "queries.npz", songs=recent_songs["songs"], offsets=recent_songs["offsets"])
        self._process = subprocess.Popen(
            [python, str(PEER), str(folder), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD, "PYTHONWARNINGS": "ignore"},
        )
        self.parameters = 0

    def __enter__(self) -> "SasRec":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def epoch(self) -> tuple[int, float]:
        """See `Contestant.epoch`; the seconds do not include that RecTools prepares the data set before each epoch."""
        reply = self._run_command("epoch")
        self.parameters = int(reply["parameters"])
        return int(reply["plays"]), float(reply["seconds"])

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Contestant.answer`."""
        self._run_command("answer")
        folder = Path(self._folder.name)
        taste_vectors, song_vectors = (np.load(folder / name) for name in ("tastes.npy", "song_vectors.npy"))
        return torch.from_numpy(taste_vectors), torch.from_numpy(song_vectors)

    def _run_command(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RayrecError(f"the process of RecTools ended with exit code {self._process.wait()}; see its errors above")


def queries_of_test_range(dataset: Dataset, split: Split, count: int, seed: int = 0) -> Validation:
    """Draw at most `count` random plays of the test range that have an earlier play by the same user."""
    test_histories: list[Histories] = []
    for histories in dataset.read_all():
        rows = np.unique(histories.rows[split.is_test(histories)])
        test_histories.append(histories.take(rows))
    histories = concatenate(test_histories)
    is_first = np.zeros(histories.num_plays, dtype=bool)
    is_first[histories.offsets[:-1]] = True
    play_positions = np.flatnonzero(split.is_test(histories) & ~is_first)
    sample = np.random.default_rng(seed).permutation(len(play_positions))[:count]
    return Validation(histories=histories, plays=play_positions[np.sort(sample)])


def songs_before(queries: Validation, max_length: int) -> dict[str, np.ndarray]:
    """Return the last songs before each query, at most `max_length`: int64 `songs`, flat, and `offsets` per query."""
    test_queries = queries.queries
    lengths = np.minimum(test_queries.plays_before, max_length)
    offsets = offsets_of(lengths)
    positions = ranges(queries.plays - lengths, lengths)
    return {"songs": queries.histories.songs[positions].astype(np.int64), "offsets": offsets}


def compare_epochs(contestants: dict[str, Contestant], queries: Validation, epochs: int) -> list[EpochResult]:
    """Train each network for one epoch in turn, and measure it after each epoch. Every epoch reverses the order."""
    results = []
    for epoch in range(epochs):
        names = [*contestants] if epoch % 2 == 0 else [*contestants][::-1]
        for name in names:
            plays, seconds = contestants[name].epoch()
            ranks = rank_plays(*contestants[name].answer(), queries, Share())
            served_recall, served_mrr, _ = rank_metrics(ranks.among_unheard[ranks.is_new])
            recall, mrr, _ = rank_metrics(ranks.among_all)
            results.append(
                EpochResult(
                    model=name,
                    epoch=epoch + 1,
                    plays=plays,
                    seconds=seconds,
                    plays_per_second=plays / max(seconds, 1e-9),
                    served_recall=served_recall,
                    served_mrr=served_mrr,
                    recall=recall,
                    mrr=mrr,
                )
            )
    return results


def as_markdown(results: Sequence[EpochResult]) -> str:
    """Return a Markdown table with one row per network and epoch."""
    lines = [
        "| model | epoch | total seconds | plays/s | served recall@20 | MRR@20 | all recall@20 | MRR@20 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(result.model for result in results):
        seconds = 0.0
        for result in results:
            if result.model == name:
                seconds += result.seconds
                values = (result.served_recall, result.served_mrr, result.recall, result.mrr)
                lines.append(
                    f"| {name} | {result.epoch} | {seconds:.0f} | {result.plays_per_second:,.0f} | "
                    f"{' | '.join(f'{value:.3f}' for value in values)} |"
                )
    return "\n".join(lines)


def generated_data(folder: str, quick: bool) -> Workspace:
    """Return a new workspace in `folder` with generated plays, a split and song embeddings."""
    workspace = Workspace(folder)
    users, songs, plays = (300, 200, 25) if quick else (10_000, 5_000, 60)
    artists = max(GenerateConfig().genres, songs // 8)
    with ray_cluster():
        generate(workspace, GenerateConfig(users=users, songs=songs, artists=artists, plays=plays))
        split = split_dataset(workspace, SplitConfig())
        embed(workspace, EmbedConfig(epochs=2 if quick else EmbedConfig().epochs), split=split)
    return workspace


def main(argv: list[str] | None = None) -> None:
    """Run the command line, which prints one table or JSON object."""
    parser = argparse.ArgumentParser(prog="python -m rayrec.bench.peers_bench", description=__doc__)
    parser.add_argument(
        "--python", default=".venv-peers/bin/python", help="Python interpreter of an environment with RecTools"
    )
    parser.add_argument("--workspace", help="workspace with song embeddings of a split; default: generated plays")
    parser.add_argument("--split", help="split of the data set; default: the newest")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per model; default: 5")
    parser.add_argument("--queries", type=int, default=8_000, help="plays of the test range to predict; default: 8000")
    parser.add_argument("--ours", type=json.loads, default={}, help="settings of `rayrec train` as JSON")
    parser.add_argument("--theirs", type=json.loads, default={}, help="arguments of SASRecModel as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a smoke test")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        workspace = Workspace(arguments.workspace) if arguments.workspace else generated_data(folder, arguments.quick)
        split = choose_split(workspace, arguments.split)
        assert split is not None
        dataset, config = Dataset(workspace), TrainConfig(**{**arguments.ours, "workers": 0})
        queries = queries_of_test_range(dataset, split, 200 if arguments.quick else arguments.queries)
        our_network = OurNetwork(dataset, split, config, queries)
        with SasRec(arguments.python, dataset, split, arguments.theirs, queries) as sasrec:
            contestants: dict[str, Contestant] = {OURS: our_network, SASREC: sasrec}
            results = compare_epochs(contestants, queries, 2 if arguments.quick else arguments.epochs)
    report = {
        "queries": len(queries.plays),
        "embed_seconds": our_network.embed_seconds,
        "ours": to_mapping(config),
        "theirs": arguments.theirs,
        "parameters": sasrec.parameters,
        "epochs": [asdict(result) for result in results],
    }
    if arguments.json:
        json.dump(report, sys.stdout)
        sys.stdout.write("\n")
        return
    sys.stdout.write(
        f"{as_markdown(results)}\n\nsong embeddings, from which {OURS} starts: {our_network.embed_seconds:.0f} s\n"
    )


if __name__ == "__main__":
    main()
