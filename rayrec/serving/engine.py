"""Network, index and rankers as requests use them, and the bound on work in this process.

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
from rayrec.recommend.reranking import AnswerOptions, Chosen, choose, network_of, similar
from rayrec.recommend.two_step import HORIZONS, TwoStepRecommender
from rayrec.serving.problems import OverloadedError
from rayrec.serving.telemetry import Metrics

ROOM = 1_024  # rows by which tables of song vectors grow where songs are added online

P = ParamSpec("P")
T = TypeVar("T")

Vectors = Mapping[HorizonName, np.ndarray]  # float32 (U, D) each


class Pool:
    """One thread that does the numeric work of a process, and a bound on what waits for it.

    One thread because one BLAS and torch thread fills a core, and more of them on it make every request
    slow; its own, so that health checks and refusals are answered while it works.
    """

    def __init__(self, most: int) -> None:
        """`most` calls may run or wait."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayrec-work")
        self._most = most
        self._lock = threading.Lock()
        self.waiting = 0  # calls that run or wait

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call on the pool's thread. Raises `OverloadedError` where too many wait.

        A call whose caller is cancelled gives its place back at once, or as soon as its work has ended.
        """
        with self._lock:
            if self.waiting >= self._most:
                raise OverloadedError(f"{self.waiting} requests are waiting here already; try again in a second")
            self.waiting += 1
        context = copy_context()  # the stages are of this request
        future = self._executor.submit(lambda: context.run(work, *args, **kwargs))
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def wait_for(self, work: Callable[[], None]) -> None:
        """Have the thread do something between two calls, from another thread."""
        self._executor.submit(work).result()

    def _leave(self, _: "Future[T]") -> None:
        with self._lock:
            self.waiting -= 1


@dataclass(frozen=True)
class Parts:
    """Network, index and rankers of one release, without a thread around them."""

    recommender: BaseRecommender
    metrics: Metrics

    def states(self, plays: Histories, start: States | None = None) -> States:
        """The network's states after plays, from no state or from `start`."""
        with self.metrics.stage("encode"):
            return network_of(self.recommender).encoder.run(plays, start=start)[1]

    def vectors(self, states: States, at: np.ndarray, horizons: Sequence[HorizonName]) -> Vectors:
        """The taste vectors, float32 (U, D), at the moments `at`, int64 (U,) ms UTC."""
        network = network_of(self.recommender)
        with self.metrics.stage("project"):
            heads = {name: network.head(name) for name in horizons}
            tastes = network.encoder.tastes_of(states, at, list(set(heads.values())))
            return {name: tastes[head] for name, head in heads.items()}

    def answer_states(
        self, states: States, plays: Histories, at: np.ndarray, all_options: Sequence[AnswerOptions]
    ) -> list[Chosen]:
        """The songs of each user from states, and the plays that retrievers and features look at."""
        vectors = self.vectors(states, at, HORIZONS)
        with self.metrics.stage("choose"):
            return choose(self.recommender, vectors, plays, at, all_options)

    def answer(self, plays: Histories, at: np.ndarray, all_options: Sequence[AnswerOptions]) -> list[Chosen]:
        """The songs of each user from all their plays."""
        return self.answer_states(self.states(plays), plays, at, all_options)

    def similar(self, song: int, k: int) -> Chosen:
        """The k songs nearest to a song of the network."""
        with self.metrics.stage("choose"):
            return similar(self.recommender, song, k)

    def with_added_songs(self, added: AddedSongs) -> "Parts":
        """The same with songs that came later, in place of those before; the network changes with it."""
        if isinstance(self.recommender, TwoStepRecommender):
            return replace(self, recommender=self.recommender.with_added_songs(added, room=ROOM))
        network_of(self.recommender).add_songs(added, room=ROOM)
        return self

    def layout(self, songs: np.ndarray) -> np.ndarray:
        """float32 (n, 2): places on a plane of the network's songs, int (n,) rows."""
        return layout(network_of(self.recommender).song_vectors[songs])


class Engine:
    """The parts of one release as requests use them: each request is one call on the pool's thread."""

    def __init__(self, parts: Parts, pool: Pool) -> None:
        self.parts, self._pool = parts, pool

    def add_songs(self, added: AddedSongs, on_added: Callable[[], None]) -> None:
        """Recommend songs that came later, in place of those before; returns once that is done.

        `on_added` is called before the next answer is computed.
        """

        def add() -> None:
            self.parts = self.parts.with_added_songs(added)
            on_added()

        self._pool.wait_for(add)

    async def states(self, plays: Histories, start: States | None = None) -> States:
        """As `Parts.states`."""
        return await self._pool.run(self.parts.states, plays, start)

    async def vectors(self, states: States, at: np.ndarray, horizons: Sequence[HorizonName]) -> Vectors:
        """As `Parts.vectors`."""
        return await self._pool.run(self.parts.vectors, states, at, horizons)

    async def similar(self, song: int, k: int) -> Chosen:
        """As `Parts.similar`."""
        return await self._pool.run(self.parts.similar, song, k)

    async def layout(self, songs: np.ndarray) -> np.ndarray:
        """As `Parts.layout`."""
        return await self._pool.run(self.parts.layout, songs)

    async def answer(self, plays: Histories, at: np.ndarray, all_options: Sequence[AnswerOptions]) -> list[Chosen]:
        """As `Parts.answer`."""
        return await self._pool.run(self.parts.answer, plays, at, all_options)

    async def answer_states(
        self, states: States, plays: Histories, at: np.ndarray, all_options: Sequence[AnswerOptions]
    ) -> list[Chosen]:
        """As `Parts.answer_states`."""
        return await self._pool.run(self.parts.answer_states, states, plays, at, all_options)
