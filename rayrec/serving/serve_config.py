"""Settings of the serving application and the limits of its requests. Loads nothing heavy."""

import ipaddress
from dataclasses import dataclass
from typing import Literal

from rayrec.config import setting
from rayrec.errors import InputError
from rayrec.online.state_store import absolute_uri

Topology = Literal["colocated", "split"]

# What one request may hold. They stand in the OpenAPI document, so they are fixed.
MAX_K = 1_000  # songs of an answer
MAX_HISTORY = 10_000  # plays of a history
MAX_BATCH = 256  # users of a call
MAX_PLAYS = 1_000  # new plays of a call
MAX_LISTED = 10_000  # songs of a list to leave out
MAX_ID = 512  # characters of an id

LOOPBACK = "127.0.0.1"
REPORT_SECONDS = 5.0  # between two reports of a replica that has nothing new to say


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the application runs."""

    host: str = setting("127.0.0.1", help="address to listen on; any but loopback needs API keys")
    port: int = setting(8000, help="port to listen on; 0: any free one")
    replicas: int = setting(1, help="replicas of the application, the fewest where max_replicas is larger")
    max_replicas: int = setting(0, help="replicas at most, added and removed by load; 0: as many as replicas")
    target_ongoing: int = setting(4, help="requests at work in each replica, on average, that autoscaling aims at")
    topology: Topology = setting(
        "colocated", help="colocated: model and index in each replica; split: deployments of their own"
    )
    store: str | None = setting(
        None,
        help="where the states of users are: sqlite:///PATH, for one node, or redis://HOST:PORT/0; "
        "default: an SQLite file in the workspace",
    )
    cpus: float = setting(1.0, help="CPUs that each replica reserves of the cluster")
    keys_file: str | None = setting(None, help="file of API keys, role:key a line; in addition to RAYREC_API_KEYS")
    open_health: bool = setting(True, help="answer /healthz and /readyz without a key")
    open_metrics: bool = setting(False, help="answer /metrics without a key")
    max_body: int = setting(4 << 20, help="bytes of a request's body")
    max_waiting: int = setting(64, help="requests that a replica works on or holds waiting; more get 503")
    watch_seconds: float = setting(1.0, help="seconds between two looks at which release is live")

    def __post_init__(self) -> None:
        if self.store is not None:  # replicas run in other folders than this process
            object.__setattr__(self, "store", absolute_uri(self.store))
        for name in ("replicas", "target_ongoing", "max_body", "max_waiting"):
            if getattr(self, name) < 1:
                raise InputError(f"serve {name} is {getattr(self, name)}; give at least 1")
        if self.max_replicas and self.max_replicas < self.replicas:
            raise InputError(
                f"serve max_replicas is {self.max_replicas}; give at least replicas, {self.replicas}, or 0"
            )
        if not 0 <= self.cpus < 1e6:
            raise InputError(f"serve cpus is {self.cpus}; give 0 or more")
        if not 0 <= self.port <= 65_535:
            raise InputError(f"serve port is {self.port}; give 1 to 65535, or 0 for any free one")
        if self.topology not in ("colocated", "split"):
            raise InputError(f"serve topology is {self.topology!r}; expected colocated or split")
        if not 0 < self.watch_seconds <= 3600:
            raise InputError(f"serve watch_seconds is {self.watch_seconds}; give a number in (0, 3600]")


def is_loopback(host: str) -> bool:
    """True for addresses that no other machine reaches."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"
