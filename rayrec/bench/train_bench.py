"""Ray Data and Ray Train against plain PyTorch: one worker that stays up and does a round when asked.

Starting a trainer takes half a minute; a round, a few seconds. So the worker waits for its orders
between rounds, while the plain loop has the machine.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from rayrec.bench import loops
from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.bench_data import bench_dataset, plain_process, train_task
from rayrec.bench.loops import TrainTask, timed_steps, timed_windows
from rayrec.bench.rounds import Measured, measure
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.errors import RayrecError
from rayrec.jobs.runtime import quiet_data, ray_cluster
from rayrec.jobs.train_worker import window_stream
from rayrec.model.train_config import TrainConfig
from rayrec.model.workers import Share
from rayrec.storage.workspace import Workspace

ORDER_TRAIN, ORDER_DATA, ORDER_END = "train", "data", "end"
SECONDS_BETWEEN_LOOKS = 1.0


def bench_train(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Steady plays a second of Ray Data and Ray Train with one worker.

    `feed` is what the data path alone delivers, as a multiple of what the network eats.
    """
    with ray_cluster():
        dataset = bench_dataset(place, config, users=config.train_users)
        task = train_task(dataset, config.seed)
        epochs = iter(range(config.rounds))
        with rounds_of_training(task, config.train_seconds) as ray_side, plain_process() as plain:
            feed = ray_side.data_path()
            result = measure(
                "train",
                "plays",
                ray_side.train,
                lambda: plain.run(loops.train_loop, task, next(epochs), config.train_seconds),
                config,
                users=config.train_users,
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
    for epoch, order in enumerate(iter(orders.get, ORDER_END)):
        stream = window_stream(Dataset(task.workspace), FitRange(), task.config, Share(), epoch)
        if order == ORDER_DATA:
            answers.put(timed_windows(stream, seconds))
        else:
            answers.put(timed_steps(task.training(), stream, epoch, seconds))
        del stream  # left half-read, it would go on reading ahead
    ray.train.report({})


def read_windows(dataset: Dataset, config: TrainConfig) -> int:
    """Plays of an epoch of the training data path, which nothing learns from."""
    return sum(int(windows.inputs.sum()) for windows in window_stream(dataset, FitRange(), config, Share(), 0))
