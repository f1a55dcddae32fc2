"""The application on Ray Serve: `rayrec.serving.app:build` is what `serve deploy` and `rayrec serve` run.

Colocated, one deployment holds the HTTP app, model and index. Split, the app asks two others, which need
more memory or other machines: `parts`. The routes know nothing of Ray.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from rayrec.config import from_mapping
from rayrec.serving.loopback import hold_to_host
from rayrec.serving.part_deployments import part_deployment
from rayrec.serving.problems import RETRY_AFTER_S
from rayrec.serving.remote import RemoteParts
from rayrec.serving.replica import open_service
from rayrec.serving.routes import create_app
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.split_replica import open_split_service
from rayrec.storage.workspace import Workspace

# One thread for numeric work, none that spins while it waits for more, and freed memory given back.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
WAITING_BEYOND = 2  # times the requests that a replica admits are sent to it: it refuses the others at once


class AppConfig(ServeConfig):
    """The arguments of `build`, in a Serve config file under `args`."""

    workspace: str = Field(description="Folder, s3:// or gs:// prefix of the workspace")


def build(args: Mapping[str, Any]) -> Application:
    """The application to run. Raises `InputError` for arguments that `AppConfig` does not know."""
    config = from_mapping(AppConfig, args, "args of rayrec.serving.app:build")
    bounds = {
        "num_replicas": config.replicas,
        "max_ongoing_requests": WAITING_BEYOND * config.max_waiting,
        "max_queued_requests": config.max_waiting,
        "backpressure_config": {"retry_after_s": RETRY_AFTER_S},  # with the 503 that Serve gives beyond all of these
        "ray_actor_options": {"num_cpus": config.cpus, "runtime_env": {"env_vars": ENVIRONMENT}},
    }
    parts: dict[str, Application] = {}
    if config.topology == "split":
        parts = {role: part_deployment(role).options(**bounds).bind(config, role) for role in ("model", "index")}
    application: Application = HttpApp.options(**bounds).bind(config, **parts)  # type: ignore[attr-defined]
    return application


@serve.deployment(name="http", health_check_period_s=5, graceful_shutdown_timeout_s=10)
@serve.ingress()
class HttpApp:
    """One replica of the HTTP application; with model and index in it, unless they are handed over."""

    def __init__(
        self, config: AppConfig, model: DeploymentHandle | None = None, index: DeploymentHandle | None = None
    ) -> None:
        hold_to_host(config)
        name, workspace = serve.get_replica_context().replica_id.unique_id, Workspace(config.workspace)
        if model is None or index is None:
            self._service = open_service(workspace, config, replica=name)
        else:
            self._service = open_split_service(workspace, config, RemoteParts(model, index), replica=name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app that Serve runs in this replica."""
        return create_app(self._service)

    def __del__(self) -> None:
        """Serve ends the replica."""
        self._service.close()
