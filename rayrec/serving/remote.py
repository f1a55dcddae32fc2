"""The engine whose model and index are deployments of their own: `parts`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from rayrec.data.histories import Histories
from rayrec.model.inference import States
from rayrec.recommend.base import Horizon
from rayrec.recommend.choosing import Chosen, Known, Wish
from rayrec.recommend.explain import Explanation
from rayrec.serving.engine import Engine, Vectors
from rayrec.serving.part_deployments import Work
from rayrec.serving.problems import OverloadedError
from rayrec.serving.prometheus import Metrics


@dataclass(frozen=True)
class RemoteParts:
    """Handles to the deployments of the parts."""

    model: DeploymentHandle
    index: DeploymentHandle


class RemoteEngine(Engine):
    """Model and index of one release, in other processes."""

    def __init__(self, release_id: str, parts: RemoteParts, metrics: Metrics) -> None:
        self._id, self._remote, self._metrics = release_id, parts, metrics

    async def states(self, plays: Histories, start: States | None = None) -> States:
        """As in `Engine`."""
        with self._metrics.stage("encode"):
            found: States = await self._call(self._remote.model, "states", plays, start)
        return found

    async def vectors(self, states: States, at: np.ndarray, horizons: Sequence[Horizon]) -> Vectors:
        """As in `Engine`."""
        with self._metrics.stage("project"):
            found: Vectors = await self._call(self._remote.model, "vectors", states, at, horizons)
        return found

    async def choose(self, known: Sequence[Known], wishes: Sequence[Wish]) -> list[Chosen]:
        """As in `Engine`."""
        with self._metrics.stage("choose"):
            found: list[Chosen] = await self._call(self._remote.index, "choose", known, wishes)
        return found

    async def explain(
        self, plays: Histories, at: int, songs: np.ndarray, horizon: Horizon, start: States | None = None
    ) -> Explanation:
        """As in `Engine`."""
        with self._metrics.stage("explain"):
            found: Explanation = await self._call(self._remote.model, "explain", plays, at, songs, horizon, start)
        return found

    async def similar(self, song: int, k: int) -> Chosen:
        """As in `Engine`."""
        with self._metrics.stage("choose"):
            found: Chosen = await self._call(self._remote.index, "similar", song, k)
        return found

    async def layout(self, songs: np.ndarray) -> np.ndarray:
        """As in `Engine`."""
        found: np.ndarray = await self._call(self._remote.model, "layout", songs)
        return found

    async def _call(self, part: DeploymentHandle, work: Work, *arguments: Any) -> Any:
        try:
            return await part.call.remote(self._id, work, *arguments)
        except BackPressureError as error:
            raise OverloadedError("too many requests are waiting already; try again in a second") from error
