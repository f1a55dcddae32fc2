"""The engine: network, index and rankers of a release, and the thread that runs them with a limit on waiting calls.

U users, D numbers per vector.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import numpy as np

from rayrec.data.histories import Histories
from rayrec.embeddings.vectors import layout
from rayrec.model.added_songs import AddedSongs
from rayrec.model.taste_table import States
from rayrec.recommend.base import BaseRecommender, HorizonName
from rayrec.recommend.reranking import AnswerOptions, SelectedSongs, choose, network_of, similar
from rayrec.recommend.two_step import HORIZONS, TwoStepRecommender
from rayrec.serving.problems import OverloadedError
from rayrec.serving.telemetry import Metrics

SPARE_ROWS = 1_024  # extra rows that tables of song vectors get when they grow for songs that are added online

P = ParamSpec("P")
T = TypeVar("T")

Vectors = Mapping[HorizonName, np.ndarray]  # float32 (U, D) each


class Pool:
    """One thread for the numeric work of a process, with a limit on the calls that wait for it.

    There is only one thread, because one thread of BLAS and torch fills a core, and more threads on that core slow down
    every request. It is not the thread of the event loop, so that health checks and refusals are answered meanwhile.
    """

    def __init__(self, max_calls: int) -> None:
        """At most `max_calls` calls may run or wait."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayrec-work")
        self._max_calls = max_calls
        self._lock = threading.Lock()
        self.waiting = 0  # calls that run or wait

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` on the pool's thread and return its result. Raises `OverloadedError` if too many calls wait.

        If the caller is cancelled, a waiting call is dropped at once; a running call keeps its place until it ends.
        """
        with self._lock:
            if self.waiting >= self._max_calls:
                raise OverloadedError(f"{self.waiting} requests are already waiting; try again in a second")
            self.waiting += 1
        context = copy_context()  # so that `request_stages` of this request are set on the thread
        future = self._executor.submit(lambda: context.run(work, *args, **kwargs))
        future.add_done_callback(self._decrement_waiting)
        return await asyncio.wrap_future(future)

    def wait_for(self, work: Callable[[], None]) -> None:
        """Run `work` on the pool's thread between two calls, and wait until it ends. Call this from another thread."""
        self._executor.submit(work).result()

    def _decrement_waiting(self, _: "Future[T]") -> None:
        with self._lock:
            self.waiting -= 1


@dataclass(frozen=True)
class Parts:
    """Network, index and rankers of one release. Its methods run in the thread of the caller."""

    recommender: BaseRecommender
    metrics: Metrics

    def states(self, plays: Histories, start: States | None = None) -> States:
        """Return the network's states after plays, starting from `start`, or from the empty state."""
        with self.metrics.stage("encode"):
            return network_of(self.recommender).encoder.run(plays, start=start)[1]

    def vectors(self, states: States, at: np.ndarray, horizons: Sequence[HorizonName]) -> Vectors:
        """Return the taste vectors of each horizon, float32 (U, D), at the moments `at`, int64 (U,) ms UTC."""
        network = network_of(self.recommender)
        with self.metrics.stage("project"):
            heads = {name: network.head(name) for name in horizons}
            taste_vectors = network.encoder.taste_vectors_by_horizon(states, at, list(set(heads.values())))
            return {name: taste_vectors[head] for name, head in heads.items()}

    def answer(
        self, plays: Histories, at: np.ndarray, all_options: Sequence[AnswerOptions], states: States | None = None
    ) -> list[SelectedSongs]:
        """Choose songs for each user at the moments `at`, int64 (U,) ms UTC, as the options of each user say.

        Retrievers and features read `plays`. `states` are the network's states after all plays of each user; without
        them the network runs over `plays`, which must hold all plays.
        """
        vectors = self.vectors(self.states(plays) if states is None else states, at, HORIZONS)
        with self.metrics.stage("choose"):
            return choose(self.recommender, vectors, plays, at, all_options)

    def similar(self, song: int, k: int) -> SelectedSongs:
        """Return the k songs nearest to a song of the network."""
        with self.metrics.stage("choose"):
            return similar(self.recommender, song, k)

    def with_added_songs(self, added_songs: AddedSongs) -> "Parts":
        """Return parts that recommend `added_songs` instead of the songs added before. The network itself changes."""
        if isinstance(self.recommender, TwoStepRecommender):
            return replace(self, recommender=self.recommender.with_added_songs(added_songs, room=SPARE_ROWS))
        network_of(self.recommender).add_songs(added_songs, room=SPARE_ROWS)
        return self

    def layout(self, songs: np.ndarray) -> np.ndarray:
        """Return the positions of songs of the network, int (n,) rows, on a plane: float32 (n, 2)."""
        return layout(network_of(self.recommender).song_vectors[songs])


class Engine:
    """The parts of one release and the pool that runs them: `await engine.pool.run(engine.parts.answer, ...)`."""

    def __init__(self, parts: Parts, pool: Pool) -> None:
        self.parts, self.pool = parts, pool

    def add_songs(self, added_songs: AddedSongs, on_added: Callable[[], None]) -> None:
        """Recommend `added_songs` in place of the songs added before. Returns when this is done.

        `on_added` is called before the next answer is computed.
        """

        def add() -> None:
            self.parts = self.parts.with_added_songs(added_songs)
            on_added()

        self.pool.wait_for(add)
