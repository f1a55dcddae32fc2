"""Model and index as deployments of their own, and the app's view of them.

Every call names its release. A part keeps the live release and the one before it, and loads any other when
it is asked for: whichever replica a call meets, the answer is of the release that the request began with.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ray import serve

from rayrec.recommend.base import Recommender
from rayrec.serving.engine import Parts, Pool
from rayrec.serving.holder import ReleaseHolder
from rayrec.serving.live import load_network, load_parts
from rayrec.serving.loopback import hold_to_host
from rayrec.serving.prometheus import Metrics
from rayrec.serving.replica import one_thread
from rayrec.serving.reports import Reports
from rayrec.storage.workspace import Workspace

Work = Literal["states", "vectors", "choose", "explain", "similar", "layout"]  # methods of `Parts`


@dataclass(frozen=True)
class PartOfRelease:
    """What a part holds of a release."""

    id: str
    parts: Parts


class Part:
    """One replica of the model or of the index."""

    def __init__(self, config: Any, role: Literal["model", "index"]) -> None:
        hold_to_host(config)
        one_thread()
        name = serve.get_replica_context().replica_id.unique_id
        self._workspace, self._role = Workspace(config.workspace), role
        self._pool, self._metrics = Pool(config.max_waiting), Metrics(name)
        self._held: dict[str, PartOfRelease] = {}
        self._holder = ReleaseHolder(
            workspace=self._workspace,
            load=self._load,
            reports=Reports(self._workspace),
            replica=name,
            role=role,
            watch_seconds=config.watch_seconds,
        )
        self._holder.start()

    async def call(self, release_id: str, work: Work, *arguments: Any) -> Any:
        """The outcome of a method of `Parts`, by a release."""
        return await self._pool.run(getattr(self._parts(release_id), work), *arguments)

    def __del__(self) -> None:
        """Serve ends the replica."""
        self._holder.stop()

    def _parts(self, release_id: str) -> Parts:
        held = self._held.get(release_id)
        return (held or self._load(release_id)).parts

    def _load(self, release_id: str) -> PartOfRelease:
        loaded = PartOfRelease(release_id, Parts(self._read(release_id), self._metrics))
        # The newest two: requests that began before a switch still ask for the one before it.
        self._held = {**dict(list(self._held.items())[-1:]), release_id: loaded}
        return loaded

    def _read(self, release_id: str) -> Recommender:
        return (load_parts if self._role == "index" else load_network)(self._workspace, release_id)[1]


def part_deployment(role: str) -> Any:
    """The deployment of a part."""
    return serve.deployment(name=role, health_check_period_s=5, graceful_shutdown_timeout_s=10)(Part)
