"""The application on Ray Serve: `rayrec.serving.deployments:build` is what `serve deploy` and `rayrec serve` run.

One deployment hosts the network, the index and the rankers of the live release together with the HTTP app, in each of
its replicas; what is large they map from one copy of the node. docs/design.md says why it is one. The routes know
nothing of Ray.
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

# One thread for numeric work, none that spins while it waits for more, and freed memory given back.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
WAITING_BEYOND = 2  # times the requests that a replica admits are sent to it: it refuses the others at once


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
    application: Application = RecommendationServer.options(**bounds).bind(config)  # type: ignore[attr-defined]
    return application


@serve.deployment(name="recommendations", health_check_period_s=5, graceful_shutdown_timeout_s=10)
@serve.ingress()
class RecommendationServer:
    """One replica: network, index and rankers of the live release behind the HTTP application."""

    def __init__(self, config: DeploymentConfig) -> None:
        if is_loopback(config.host):
            bind_replica_port_to_loopback()
        replica = serve.get_replica_context().replica_id.unique_id
        self._service = open_service(Workspace(config.workspace), config, replica=replica)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app that Serve runs in this replica: `serve.ingress()` documents this name for it."""
        return create_app(self._service)

    def __del__(self) -> None:
        """Close the service when Serve ends the replica."""
        self._service.close()
