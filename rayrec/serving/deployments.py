"""The application on Ray Serve: `rayrec.serving.deployments:build` is what `serve deploy` and `rayrec serve` run.

Colocated, one deployment holds the HTTP app, model and index. Split, the app calls two others, for models or indexes
that need more memory or other machines. The routes know nothing of Ray. Every call between deployments names its
release: whichever replica it meets, the answer is of the release that the request began with.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from rayrec.config import from_mapping
from rayrec.data.histories import Histories
from rayrec.errors import RayrecError
from rayrec.model.inference import States
from rayrec.recommend.base import BaseRecommender, Horizon
from rayrec.recommend.selection import Chosen, Known, Wish
from rayrec.serving.compat import bind_replica_port_to_loopback
from rayrec.serving.engine import Engine, Parts, Pool, Vectors
from rayrec.serving.live_release import LiveRelease, ReleaseHolder, Reports, load_network, load_parts
from rayrec.serving.middleware import load_keys
from rayrec.serving.problems import RETRY_AFTER_S, OverloadedError
from rayrec.serving.prometheus import Metrics
from rayrec.serving.routes import create_app
from rayrec.serving.serve_config import ServeConfig, is_loopback
from rayrec.serving.served_catalog import load_served_catalog
from rayrec.serving.service import Service, make_service, open_service, use_one_thread
from rayrec.serving.users import StoredUsers
from rayrec.storage.workspace import Workspace

# One thread for numeric work, none that spins while it waits for more, and freed memory given back.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
WAITING_BEYOND = 2  # times the requests that a replica admits are sent to it: it refuses the others at once
PART_SECONDS = 60.0  # that the app waits for model and index to load a release before it switches to it

Work = Literal["states", "vectors", "choose", "similar", "layout"]  # methods of `Parts`


class DeploymentConfig(ServeConfig):
    """The arguments of `build`, in a Serve config file under `args`."""

    workspace: str = Field(description="Folder, s3:// or gs:// prefix of the workspace")


def build(args: Mapping[str, Any]) -> Application:
    """The application to run. Raises `InputError` for arguments that `DeploymentConfig` does not know."""
    config = from_mapping(DeploymentConfig, args, "args of rayrec.serving.deployments:build")
    bounds: dict[str, Any] = {
        "max_ongoing_requests": WAITING_BEYOND * config.max_waiting,
        "max_queued_requests": config.max_waiting,
        "backpressure_config": {"retry_after_s": RETRY_AFTER_S},  # with the 503 that Serve gives beyond all of these
        "ray_actor_options": {"num_cpus": config.cpus, "runtime_env": {"env_vars": ENVIRONMENT}},
    }
    if config.max_replicas > config.replicas:
        bounds["num_replicas"] = "auto"
        bounds["autoscaling_config"] = {
            "min_replicas": config.replicas,
            "initial_replicas": config.replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing,
            "upscale_delay_s": config.scale_up_seconds,
            "downscale_delay_s": config.scale_down_seconds,
        }
    else:
        bounds["num_replicas"] = config.replicas
    parts: dict[str, Application] = {}
    if config.topology == "split":
        parts = {role: _part_deployment(role).options(**bounds).bind(config, role) for role in ("model", "index")}
    application: Application = HttpApp.options(**bounds).bind(config, **parts)  # type: ignore[attr-defined]
    return application


@serve.deployment(name="http", health_check_period_s=5, graceful_shutdown_timeout_s=10)
@serve.ingress()
class HttpApp:
    """One replica of the HTTP application; with model and index in it, unless they are deployments of their own."""

    def __init__(
        self, config: DeploymentConfig, model: DeploymentHandle | None = None, index: DeploymentHandle | None = None
    ) -> None:
        if is_loopback(config.host):
            bind_replica_port_to_loopback()
        name, workspace = serve.get_replica_context().replica_id.unique_id, Workspace(config.workspace)
        if model is None or index is None:
            self._service = open_service(workspace, config, replica=name)
        else:
            self._service = _open_split_service(workspace, config, RemoteParts(model, index), replica=name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app that Serve runs in this replica."""
        return create_app(self._service)

    def __del__(self) -> None:
        """Close the service when Serve ends the replica."""
        self._service.close()


@dataclass(frozen=True)
class PartOfRelease:
    """What a model or index deployment holds of a release."""

    id: str
    parts: Parts


class PartReplica:
    """One replica of the model or of the index. It keeps the live release and the one before it."""

    def __init__(self, config: DeploymentConfig, role: Literal["model", "index"]) -> None:
        if is_loopback(config.host):
            bind_replica_port_to_loopback()
        use_one_thread()
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
        """The result of a method of `Parts`, by a release."""
        return await self._pool.run(getattr(self._parts(release_id), work), *arguments)

    def __del__(self) -> None:
        """Stop the watch when Serve ends the replica."""
        self._holder.stop()

    def _parts(self, release_id: str) -> Parts:
        held = self._held.get(release_id)
        return (held or self._load(release_id)).parts

    def _load(self, release_id: str) -> PartOfRelease:
        loaded = PartOfRelease(release_id, Parts(self._read(release_id), self._metrics))
        # The newest two: requests that began before a switch still need the one before it.
        self._held = {**dict(list(self._held.items())[-1:]), release_id: loaded}
        return loaded

    def _read(self, release_id: str) -> BaseRecommender:
        return (load_parts if self._role == "index" else load_network)(self._workspace, release_id)[1]


def _part_deployment(role: str) -> Any:
    return serve.deployment(name=role, health_check_period_s=5, graceful_shutdown_timeout_s=10)(PartReplica)


@dataclass(frozen=True)
class RemoteParts:
    """Handles to the deployments of model and index."""

    model: DeploymentHandle
    index: DeploymentHandle


class RemoteEngine(Engine):
    """Model and index of one release, in other processes."""

    def __init__(self, release_id: str, parts: RemoteParts, metrics: Metrics) -> None:
        self._id, self._remote, self._metrics = release_id, parts, metrics

    async def states(self, plays: Histories, start: States | None = None) -> States:
        """As in `Engine`."""
        with self._metrics.stage("encode"):
            states: States = await self._call(self._remote.model, "states", plays, start)
        return states

    async def vectors(self, states: States, at: np.ndarray, horizons: Sequence[Horizon]) -> Vectors:
        """As in `Engine`."""
        with self._metrics.stage("project"):
            vectors: Vectors = await self._call(self._remote.model, "vectors", states, at, horizons)
        return vectors

    async def choose(self, known: Sequence[Known], wishes: Sequence[Wish]) -> list[Chosen]:
        """As in `Engine`."""
        with self._metrics.stage("choose"):
            chosen: list[Chosen] = await self._call(self._remote.index, "choose", known, wishes)
        return chosen

    async def similar(self, song: int, k: int) -> Chosen:
        """As in `Engine`."""
        with self._metrics.stage("choose"):
            chosen: Chosen = await self._call(self._remote.index, "similar", song, k)
        return chosen

    async def layout(self, songs: np.ndarray) -> np.ndarray:
        """As in `Engine`."""
        places: np.ndarray = await self._call(self._remote.model, "layout", songs)
        return places

    async def _call(self, part: DeploymentHandle, work: Work, *arguments: Any) -> Any:
        try:
            return await part.call.remote(self._id, work, *arguments)
        except BackPressureError as error:
            raise OverloadedError("too many requests are waiting already; try again in a second") from error


def _open_split_service(workspace: Workspace, config: ServeConfig, parts: RemoteParts, *, replica: str) -> Service:
    """A service that holds the catalog and calls model and index."""
    metrics, reports = Metrics(replica), Reports(workspace)

    def load(release_id: str) -> LiveRelease:
        release, network = load_network(workspace, release_id)
        _wait_for_parts(reports, release_id)
        catalog = load_served_catalog(workspace, release, network)
        return LiveRelease(release=release, catalog=catalog, engine=RemoteEngine(release_id, parts, metrics))

    users = StoredUsers(workspace, config.store, metrics)
    return make_service(workspace, config, load_keys(config), metrics, users, load)


def _wait_for_parts(reports: Reports, release_id: str) -> None:
    """Wait until model and index hold a release, so that no request waits for it.

    Raises `RayrecError` where one refuses it, or where none of them has been loading it for `PART_SECONDS`.
    """
    until = time.monotonic() + PART_SECONDS
    while time.monotonic() < until:
        parts = [report for report in reports.alive() if report.role != "app"]
        for report in parts:
            if report.refused and report.refused["id"] == release_id:
                raise RayrecError(f"{report.role} {report.replica} refuses it: {report.refused['reason']}")
        if {report.role for report in parts if report.release == release_id} == {"model", "index"} and all(
            report.release == release_id for report in parts
        ):
            return
        if any(report.loading == release_id for report in parts):
            until = time.monotonic() + PART_SECONDS
        time.sleep(0.1)
    raise RayrecError(f"model and index did not load release {release_id} within {PART_SECONDS:g} seconds")
