"""Settings of the serving application and the limits of its requests. Loads nothing heavy."""

import ipaddress
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayrec.config import Settings
from rayrec.online.state_store import absolute_uri

Topology = Literal["colocated", "split"]

# What one request may hold. They stand in the OpenAPI document, so they are fixed.
MAX_K = 1_000  # songs of an answer
MAX_HISTORY = 10_000  # plays of a history
MAX_BATCH = 256  # users of a call
MAX_PLAYS = 1_000  # new plays of a call
MAX_NEW_SONGS = 1_000  # songs to add of a call
MAX_LISTED = 10_000  # songs of a list to leave out

LOOPBACK = "127.0.0.1"
REPORT_SECONDS = 5.0  # between two reports of a replica that has nothing new to say


class ServeConfig(Settings):
    """How the application runs."""

    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback requires API keys")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0: any free port")
    replicas: int = Field(1, ge=1, description="Number of replicas, the minimum where max_replicas is larger")
    max_replicas: int = Field(0, ge=0, description="Maximum of replicas, added and removed by load; 0: as replicas")
    target_ongoing: int = Field(4, ge=1, description="Requests in progress per replica that autoscaling aims at")
    scale_up_seconds: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="Seconds that load must be above the target before replicas are added",
    )
    scale_down_seconds: float = Field(
        600.0, ge=0, le=86_400, description="Seconds that load must be below the target before replicas are removed"
    )
    topology: Topology = Field(
        "colocated", description="colocated: model and index in every replica; split: as separate deployments"
    )
    store: str | None = Field(
        None,
        description="Store of user states: sqlite:///PATH, for one node, or redis://HOST:PORT/0; "
        "default: an SQLite file in the workspace",
    )
    cpus: float = Field(1.0, ge=0, lt=1e6, description="CPUs reserved per replica")
    keys_file: str | None = Field(
        None, description="File of API keys, one role:key per line, in addition to RAYREC_API_KEYS"
    )
    open_health: bool = Field(True, description="Answer /healthz and /readyz without a key")
    open_metrics: bool = Field(False, description="Answer /metrics without a key")
    max_body: int = Field(4 << 20, ge=1, description="Maximum size of a request body, in bytes")
    max_waiting: int = Field(64, ge=1, description="Maximum requests in progress or queued per replica; more get 503")
    watch_seconds: float = Field(
        1.0, gt=0, le=3600, description="Interval of checks for a new live release, in seconds"
    )

    @field_validator("store")
    @classmethod
    def _absolute_store(cls, value: str | None) -> str | None:
        return None if value is None else absolute_uri(value)  # replicas run in other folders

    @model_validator(mode="after")
    def _replica_range(self) -> "ServeConfig":
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; give at least replicas, {self.replicas}, or 0")
        return self


def is_loopback(host: str) -> bool:
    """True for addresses that no other machine reaches."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"
