"""The application on Ray Serve: `serve deploy` and `rayrec serve` run `rayrec.serving.deployments:build`.

There is only one deployment; docs/design.md gives the reasons. Each of its replicas hosts the HTTP app together with
the network, index and rankers of the live release. Large arrays are memory-mapped from one copy per node. The routes do
not depend on Ray.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application

from rayrec.config import from_mapping
from rayrec.serving.problems import RETRY_AFTER_S
from rayrec.serving.routes import create_app
from rayrec.serving.serve_compat import bind_replica_port_to_loopback
from rayrec.serving.serve_config import ServeConfig, is_loopback
from rayrec.serving.service import open_service
from rayrec.storage.workspace import Workspace

# One thread for numeric work, no threads that spin while they wait, and freed memory returned to the system.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
ONGOING_PER_WAITING = (
    2  # Serve sends a replica up to 2 · max_waiting requests; it refuses those over max_waiting at once
)


class DeploymentConfig(ServeConfig):
    """The arguments of `build`: the section `args` of a Serve config file."""

    workspace: str = Field(description="Folder, s3:// or gs:// prefix of the workspace")


def build(args: Mapping[str, Any]) -> Application:
    """Return the application for Serve to run. Raises `InputError` if `args` are not a valid `DeploymentConfig`."""
    config = from_mapping(DeploymentConfig, args, "args of rayrec.serving.deployments:build")
    options: dict[str, Any] = {
        "max_ongoing_requests": ONGOING_PER_WAITING * config.max_waiting,
        "max_queued_requests": config.max_waiting,
        "backpressure_config": {"retry_after_s": RETRY_AFTER_S},  # sent with Serve's 503 for more requests
        "ray_actor_options": {"num_cpus": config.cpus, "runtime_env": {"env_vars": ENVIRONMENT}},
    }
    if config.max_replicas > config.replicas:
        options["num_replicas"] = "auto"
        options["autoscaling_config"] = {
            "min_replicas": config.replicas,
            "initial_replicas": config.replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing,
            "upscale_delay_s": config.scale_up_seconds,
            "downscale_delay_s": config.scale_down_seconds,
        }
    else:
        options["num_replicas"] = config.replicas
    application: Application = RecommendationServer.options(**options).bind(config)  # type: ignore[attr-defined]
    return application


@serve.deployment(name="recommendations", health_check_period_s=5, graceful_shutdown_timeout_s=10)
@serve.ingress()
class RecommendationServer:
    """One replica: the HTTP application with the network, index and rankers of the live release."""

    def __init__(self, config: DeploymentConfig) -> None:
        if is_loopback(config.host):
            bind_replica_port_to_loopback()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._service = open_service(Workspace(config.workspace), config, replica=replica_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app that Serve runs in this replica; `serve.ingress()` documents this method name."""
        return create_app(self._service)

    def __del__(self) -> None:
        """Close the service when Serve ends the replica."""
        self._service.close()
