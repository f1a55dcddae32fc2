"""Settings of the serving application and limits of its requests. Quick to import."""

import ipaddress
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from rayrec.config import Settings, from_mapping
from rayrec.errors import InputError
from rayrec.online.state_store import absolute_uri
from rayrec.recommend.base import weight_of_long

# Limits of one request. They are constants, since the OpenAPI document contains them.
MAX_K = 1_000  # songs per answer
MAX_HISTORY = 10_000  # plays per history
MAX_BATCH = 256  # users per request
MAX_PLAYS = 1_000  # new plays per request
MAX_NEW_SONGS = 1_000  # songs to add per request
MAX_LISTED = 10_000  # songs per list to exclude or to allow

MAX_ARM_RELEASES = 2  # releases that arms may name: a replica holds them in addition to the live one

LOOPBACK = "127.0.0.1"
REPORT_SECONDS = 5.0  # between two reports of a replica if nothing changes


class Arm(Settings):
    """Settings of one arm of an experiment. Without a value, a setting is the same as for all other users."""

    share: float = Field(gt=0, le=1, description="Share of the users")
    release: str | None = Field(None, min_length=1, description="Release that answers; default: the live one")
    horizon: float | None = Field(None, ge=0, le=1, description="short, long, or the weight of long")
    exclude_heard: bool | None = Field(None, description="Leave out the songs that the user has played")
    diversity: float | None = Field(
        None, ge=0, le=1, description="0: the best songs; towards 1: songs that differ more from each other"
    )

    explore: float | None = Field(
        None, ge=0, le=1, description="Share of the answer drawn at random from songs with few plays"
    )

    REQUEST: ClassVar[tuple[str, ...]] = ("horizon", "exclude_heard", "diversity", "explore")

    @field_validator("horizon", mode="before")
    @classmethod
    def _weight(cls, value: Any) -> Any:
        return value if value is None else weight_of_long(value)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a request that the arm sets, with their values."""
        return {name: getattr(self, name) for name in self.REQUEST if getattr(self, name) is not None}


class Experiment(Settings):
    """An experiment: each user of the application is in one of its arms, or in none."""

    name: str = Field(
        min_length=1, max_length=100, description="Name of the experiment; a new name assigns users to arms again"
    )
    arms: dict[str, Arm] = Field({}, validate_default=True, description="Name and settings of each arm")

    @field_validator("arms", mode="before")
    @classmethod
    def _named_arms(cls, arms: Any) -> Any:
        if not isinstance(arms, dict) or not arms:
            raise ValueError("expected arms.NAME.share = SHARE for each arm")
        return {name: _parse_section(Arm, value, f"arm {name}") for name, value in arms.items()}

    @model_validator(mode="after")
    def _fit_together(self) -> "Experiment":
        total = sum(arm.share for arm in self.arms.values())
        if total > 1 + 1e-9:
            raise ValueError(f"the shares of the arms add up to {total:g}; expected at most 1")
        if len(self.releases) > MAX_ARM_RELEASES:
            raise ValueError(
                f"the arms use {len(self.releases)} releases; expected at most {MAX_ARM_RELEASES}, since each replica "
                "holds all of them"
            )
        return self

    @property
    def releases(self) -> tuple[str, ...]:
        """The releases that arms name."""
        return tuple(dict.fromkeys(arm.release for arm in self.arms.values() if arm.release))

    def arm_of(self, user_id: str) -> str | None:
        """Return the arm of a user; None for a user in no arm.

        The arm stays the same as long as the name of the experiment and the order and shares of its arms do.
        """
        digest = blake2b(f"{self.name}\0{user_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        position = int.from_bytes(digest, "little") / 2**64
        for name, arm in self.arms.items():
            if position < arm.share:
                return name
            position -= arm.share
        return None

    @property
    def varied(self) -> frozenset[str]:
        """The fields of a request that any arm sets."""
        return frozenset(name for arm in self.arms.values() for name in arm.settings)


def _parse_section(cls: type[Settings], values: Any, source: str) -> Any:
    """Make settings of a section of a config file; `values` that are settings already are returned unchanged."""
    if isinstance(values, cls):
        return values
    if not isinstance(values, dict):
        raise InputError(f"{source} is {values!r}; expected a section of settings")
    return from_mapping(cls, values, source)


class ServeConfig(Settings):
    """Settings of the serving application."""

    host: str = Field(
        "127.0.0.1", description="Address to listen on; any address other than loopback requires API keys"
    )
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0: any free port")
    replicas: int = Field(1, ge=1, description="Number of replicas; the minimum when autoscaling")
    max_replicas: int = Field(0, ge=0, description="Maximum number of replicas when autoscaling; 0: no autoscaling")
    target_ongoing: int = Field(4, ge=1, description="Target for autoscaling: requests in progress per replica")
    scale_up_seconds: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="Seconds that load must be above the target before replicas are added",
    )
    scale_down_seconds: float = Field(
        600.0, ge=0, le=86_400, description="Seconds that load must be below the target before replicas are removed"
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
        1.0, gt=0, le=3600, description="Interval between checks for a new live release, in seconds"
    )

    log_impressions: bool = Field(
        False, description="Write answers and events to serving/impressions in the workspace, in Parquet files"
    )
    log_seconds: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Interval between files of the impression log, in seconds; a killed replica loses the rows of one "
        "interval",
    )
    log_rows: int = Field(
        50_000,
        ge=2,
        description="Maximum rows of the impression log in memory per replica, which hold at most 64 MB; further rows "
        "are dropped",
    )
    log_megabytes: int = Field(
        1024, ge=1, description="Maximum size of the impression log, in MB; the oldest files are deleted"
    )
    access_log: str | None = Field(
        None, description="File for one JSON line per request; -: the standard error of the replica"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Other origins whose web pages may call the API, such as https://example.com; *: all origins"
    )
    experiment: Experiment | None = Field(None, description="Experiment, as a section of the config file")

    @field_validator("experiment", mode="before")
    @classmethod
    def _experiment_section(cls, value: Any) -> Any:
        return None if value is None else _parse_section(Experiment, value, "experiment")

    @field_validator("access_log")
    @classmethod
    def _absolute_log(cls, value: str | None) -> str | None:
        return value if value in (None, "-") else str(Path(value).absolute())

    @field_validator("store")
    @classmethod
    def _absolute_store(cls, value: str | None) -> str | None:
        return None if value is None else absolute_uri(value)  # replicas have other working directories

    @model_validator(mode="after")
    def _replica_range(self) -> "ServeConfig":
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; give at least {self.replicas}, the value of replicas, or 0"
            )
        return self


class SwitchConfig(Settings):
    """How to wait for a running server to change to another release."""

    wait: bool = Field(
        False, description="Wait until all replicas use the release; if one refuses it, restore the old one"
    )
    url: str | None = Field(
        None, description="Address of the server to wait for; its API key is read from RAYREC_API_KEY"
    )
    timeout: float | None = Field(
        None, gt=0, description="Maximum wait, in seconds; default: no limit while replicas load"
    )


def is_loopback(host: str) -> bool:
    """True if only this machine can reach an address."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"
