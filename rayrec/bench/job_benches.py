"""The jobs taste, embed and train against plain loops over the same files."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from rayrec.bench import loops
from rayrec.bench.bench_config import EmbedBenchConfig, TasteBenchConfig, TrainBenchConfig
from rayrec.bench.bench_data import bench_dataset, plain_process, train_task, untrained_model
from rayrec.bench.loops import TrainTask, timed_steps, timed_windows
from rayrec.bench.rounds import Measured, PlainProcess, measure
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.embeddings import word2vec
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.embeddings.word2vec import TOKENS_PER_WORKER, Corpus, Word2Vec, write_corpus
from rayrec.errors import RayrecError
from rayrec.jobs.embed import embed
from rayrec.jobs.runtime import node_cpus, quiet_data, ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train_worker import window_stream
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.model.training_windows import ShardReader, window_lengths
from rayrec.model.workers import Share
from rayrec.storage.workspace import Workspace

PLAIN_TASTES = "plain-tastes"  # folder that the plain loop writes to
ORDER_TRAIN, ORDER_DATA, ORDER_END = "train", "data", "end"
SECONDS_BETWEEN_LOOKS = 1.0


def bench_taste(place: Workspace, config: TasteBenchConfig) -> dict[str, Any]:
    """Plays a second of the taste job with one worker; the worker's start and the artifact's checksums count."""
    with ray_cluster():
        dataset = bench_dataset(place, users=config.users, songs=config.songs, plays=config.plays, seed=config.seed)
        workspace, model = dataset.workspace, untrained_model(dataset, config.seed)
        settings = TasteConfig(concurrency=1)

        def ours() -> Measured:
            began = time.perf_counter()
            artifact = compute_tastes(workspace, settings, model_id=model.id, repeat=True)
            seconds = time.perf_counter() - began
            workspace.delete(artifact.folder)
            return Measured(artifact.metrics["plays"], seconds)

        arguments = (workspace, model, PLAIN_TASTES, dataset.manifest.last_play, settings.users)
        with plain_process() as plain:
            plays = partial(plain.run, loops.taste_loop, *arguments)
            result = measure("taste", "plays", ours, plays, rounds=config.rounds, users=config.users)
        workspace.delete(PLAIN_TASTES)
    return result.to_json()


def bench_embed(place: Workspace, config: EmbedBenchConfig) -> dict[str, Any]:
    """Tokens a second of the embed job, making the corpus and the health check included, against gensim alone."""
    with ray_cluster(), tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        dataset = bench_dataset(place, users=config.users, songs=config.songs, plays=config.plays, seed=config.seed)
        settings = EmbedConfig(source="histories", epochs=config.epochs, seed=config.seed)
        sentences = word2vec.from_histories(dataset.read_all(), FitRange(), settings.session_gap_minutes)
        corpus = write_corpus(sentences, Path(folder) / "corpus", dataset.num_songs)
        workers = max(1, min(node_cpus(), corpus.tokens // TOKENS_PER_WORKER))
        settings = settings.replace(workers=workers)

        def ours() -> Measured:
            began = time.perf_counter()
            artifact = embed(dataset.workspace, settings, repeat=True)
            seconds = time.perf_counter() - began
            dataset.workspace.delete(artifact.folder)
            return Measured(artifact.metrics["tokens"] * settings.epochs, seconds)

        with plain_process() as plain:
            tokens = partial(plain.run, loops.embed_loop, corpus.path, settings, workers, corpus.tokens)
            result = measure(
                "embed",
                "tokens",
                ours,
                tokens,
                rounds=config.rounds,
                workers=workers,
                corpus_tokens=corpus.tokens,
            )
    return result.to_json()


def word2vec_scaling(dataset: Dataset, threads_list: list[int], *, epochs: int, seed: int) -> dict[str, Any]:
    """Tokens a second of word2vec by number of threads, without making the corpus and whatever comes after."""
    settings = EmbedConfig(source="histories", epochs=epochs, seed=seed)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        sentences = word2vec.from_histories(dataset.read_all(), FitRange(), settings.session_gap_minutes)
        corpus = write_corpus(sentences, Path(folder) / "corpus", dataset.num_songs)
        rates = {}
        for threads in threads_list:
            with PlainProcess(0) as plain:
                rates[str(threads)] = plain.run(timed_epochs, corpus, settings, threads).per_second
    first = rates[str(threads_list[0])]
    return {
        "corpus_tokens": corpus.tokens,
        "tokens_per_second": rates,
        "speedup": {threads: rate / first for threads, rate in rates.items()},
    }


def timed_epochs(corpus: Corpus, config: EmbedConfig, threads: int) -> Measured:
    """The epochs alone. A corpus too small for so many threads is trained with fewer."""
    run = Word2Vec(corpus, config, threads)
    began = time.perf_counter()
    epochs = sum(1 for _ in run.train())
    return Measured(corpus.tokens * epochs, time.perf_counter() - began)


def bench_train(place: Workspace, config: TrainBenchConfig) -> dict[str, Any]:
    """Steady plays a second of Ray Data and Ray Train with one worker.

    `feed` is what the data path alone delivers, as a multiple of what the network eats.
    """
    with ray_cluster():
        dataset = bench_dataset(place, users=config.users, songs=config.songs, plays=config.plays, seed=config.seed)
        task = train_task(dataset, config.seed)
        epochs = iter(range(config.rounds))
        with rounds_of_training(task, config.seconds) as ray_side, plain_process() as plain:
            feed = ray_side.data_path()
            result = measure(
                "train",
                "plays",
                ray_side.train,
                lambda: plain.run(loops.train_loop, task, next(epochs), config.seconds),
                rounds=config.rounds,
                users=config.users,
                data_per_second=feed.per_second,
            )
    return {**result.to_json(), "feed": feed.per_second / result.per_second}


class TrainingRounds:
    """The driver's end: gives orders to the worker and waits for what it measured."""

    def __init__(self, task: TrainTask, seconds: float) -> None:
        self._orders, self._answers = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
        arguments = {"task": task, "seconds": seconds, "orders": self._orders, "answers": self._answers}
        self._trainer = TorchTrainer(
            run_rounds,
            train_loop_config=arguments,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                name="run",
                storage_path=task.workspace.full("train-rounds"),
                storage_filesystem=task.workspace.filesystem,
            ),
        )
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def train(self) -> Measured:
        """Plays learned from, in steady state."""
        return self._ask(ORDER_TRAIN)

    def data_path(self) -> Measured:
        """Plays that arrive with no network to eat them."""
        return self._ask(ORDER_DATA)

    def end(self) -> None:
        """Let the worker go."""
        if self._thread.is_alive():
            self._orders.put(ORDER_END)
            self._thread.join()
        for queue in (self._orders, self._answers):
            queue.shutdown()

    def _fit(self) -> None:
        try:
            self._error = self._trainer.fit().error
        except Exception as error:  # told to whoever waits for an answer
            self._error = error

    def _ask(self, order: str) -> Measured:
        self._orders.put(order)
        while True:
            try:
                answer: Measured = self._answers.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                if not self._thread.is_alive():
                    raise RayrecError(f"Ray Train ended before its round was done: {self._error}") from self._error
            else:
                return answer


@contextmanager
def rounds_of_training(task: TrainTask, seconds: float) -> Iterator[TrainingRounds]:
    """A Ray Train worker for the length of the block; each of its rounds is timed for `seconds`."""
    rounds = TrainingRounds(task, seconds)
    try:
        yield rounds
    finally:
        rounds.end()
        task.workspace.delete("train-rounds")


def run_rounds(arguments: dict[str, Any]) -> None:
    """What the worker runs: a fresh network and a fresh stream for every round."""
    quiet_data()
    task: TrainTask = arguments["task"]
    orders, answers, seconds = arguments["orders"], arguments["answers"], arguments["seconds"]
    dataset = Dataset(task.workspace)
    lengths = window_lengths(dataset, FitRange(), task.config)
    for epoch, order in enumerate(iter(orders.get, ORDER_END)):
        stream = window_stream(ShardReader(dataset, FitRange(), task.config, lengths, Share(), epoch))
        if order == ORDER_DATA:
            answers.put(timed_windows(stream, seconds))
        else:
            answers.put(timed_steps(task.training(), stream, epoch, seconds))
        del stream  # left half-read, it would go on reading ahead
    ray.train.report({})


def count_window_plays(dataset: Dataset, config: TrainConfig) -> int:
    """Plays of an epoch of the training data path, which nothing learns from."""
    reader = ShardReader(dataset, FitRange(), config, window_lengths(dataset, FitRange(), config), Share(), 0)
    return sum(int(windows.inputs.sum()) for windows in window_stream(reader))
