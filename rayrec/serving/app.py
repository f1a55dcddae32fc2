"""The application on Ray Serve: `rayrec.serving.app:build` is what `serve deploy` and `rayrec serve` run.

Colocated, one deployment holds the HTTP app, model and index. The routes know nothing of Ray.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from rayrec.config import from_mapping, setting
from rayrec.serving.config import ServeConfig
from rayrec.serving.replica import open_service
from rayrec.serving.routes import create_app
from rayrec.workspace import Workspace

# One thread for numeric work, none that spins while it waits for more, and freed memory given back.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
WAITING_BEYOND = 2  # requests that a replica is sent, over those that it admits: it refuses these itself, at once


@dataclass(frozen=True, kw_only=True)
class AppConfig(ServeConfig):
    """The arguments of `build`, in a Serve config file under `args`."""

    workspace: str = setting(help="folder, s3:// or gs:// prefix that holds the releases")


def build(args: Mapping[str, Any]) -> Application:
    """The application to run. Raises `InputError` for arguments that `AppConfig` does not know."""
    config = from_mapping(AppConfig, args, "args of rayrec.serving.app:build")
    http = HttpApp.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        max_ongoing_requests=WAITING_BEYOND * config.max_waiting,
        max_queued_requests=config.max_waiting,
    )
    application: Application = http.bind(config)
    return application


@serve.deployment(
    name="http",
    ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": ENVIRONMENT}},
    health_check_period_s=5,
    graceful_shutdown_timeout_s=10,
)
@serve.ingress()
class HttpApp:
    """One replica of the HTTP application, with model and index in it."""

    def __init__(self, config: AppConfig) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        self._service = open_service(Workspace(config.workspace), config, replica=name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app that Serve runs in this replica."""
        return create_app(self._service)

    def __del__(self) -> None:
        """Serve ends the replica."""
        self._service.close()
