"""User states in Redis: for replicas on many nodes.

What survives is up to the server's settings. With `appendonly yes` and `appendfsync always` an acknowledged put is
on the server's disk; with `everysec` the death of the server's machine may cost the last second, the death of its
process alone nothing that it had written to its file; without appendonly all since the last snapshot is
lost. Opening the store logs a warning for anything but `always`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rayrec.errors import InputError, MissingDependencyError
from rayrec.online.stores.state_store import Change, StateStore, Stored, StoreUnavailableError, Whole

PASSWORD_VARIABLE = "RAYREC_REDIS_PASSWORD"  # rather than in the address, which Ray shows on its dashboard
TIMEOUT_SECONDS = 5.0  # of connecting and of each answer
RETRIES = 4
PREFIX = "rayrec:1"  # the digit is the format's version

# One user's version and state, the log and the count of users change together or not at all.
PUT = """
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
if version ~= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'version', version + 1, 'state', ARGV[2])
if ARGV[4] == '1' then redis.call('DEL', KEYS[2]) end
if ARGV[3] ~= '' then redis.call('RPUSH', KEYS[2], ARGV[3]) end
if version == 0 then redis.call('INCR', KEYS[3]) end
return 1
"""

T = TypeVar("T")

log = logging.getLogger(__name__)


class RedisStore(StateStore):
    """A hash and a list for each user."""

    def __init__(self, client: Any, namespace: str, shown: str) -> None:
        """`client` is a redis.Redis that returns bytes; `shown` names the server without its password."""
        self._client, self._prefix, self._shown = client, f"{PREFIX}:{namespace}", shown
        self._put = client.register_script(PUT)
        self._answer(client.ping)
        self._warn_of_losses()

    @classmethod
    def from_uri(cls, uri: str, namespace: str) -> "RedisStore":
        """From redis://host:port/number; the password from RAYREC_REDIS_PASSWORD where the address has none."""
        try:
            import redis
            from redis.backoff import ExponentialBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingDependencyError("redis is not installed; run `pip install rayrec[redis]`") from error
        parts = urlsplit(uri)
        password = os.environ.get(PASSWORD_VARIABLE) if parts.password is None else None
        options: dict[str, Any] = {} if password is None else {"password": password}
        # Tried again a few times, for a second at most: a put that went through already is then told as a
        # conflict, and whoever looks finds the plays there.
        options["retry"] = Retry(ExponentialBackoff(cap=0.4, base=0.05), RETRIES)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        try:
            client = redis.Redis.from_url(
                uri, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS, **options
            )
        except ValueError as error:
            raise InputError(f"store {shown} is no address of a Redis server: {error}") from error
        return cls(client, namespace, shown)

    def get(self, user_id: str) -> Stored | None:
        """As in `StateStore`."""
        return _stored(self._answer(lambda: self._client.hmget(self._state_key(user_id), "version", "state")))

    def read(self, user_id: str) -> Whole | None:
        """As in `StateStore`."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hmget(self._state_key(user_id), "version", "state")
        pipeline.lrange(self._log_key(user_id), 0, -1)
        fields, pieces = self._answer(pipeline.execute)
        stored = _stored(fields)
        return None if stored is None else Whole(stored=stored, log=pieces)

    def put(self, changes: Sequence[Change]) -> list[bool]:
        """As in `StateStore`; each user by itself."""
        if len(changes) == 1:  # a pipeline asks first whether the server has the script
            return [bool(self._answer(lambda: self._run_put(changes[0], self._client)))]
        pipeline = self._client.pipeline(transaction=False)
        for change in changes:
            self._run_put(change, pipeline)
        return [bool(put) for put in self._answer(pipeline.execute)]

    def count(self) -> int:
        """As in `StateStore`."""
        return int(self._answer(lambda: self._client.get(self._count_key)) or 0)

    def note(self, name: str) -> str | None:
        """As in `StateStore`."""
        found = self._answer(lambda: self._client.hget(self._notes_key, name))
        return None if found is None else found.decode()

    def write_note(self, name: str, text: str) -> None:
        """As in `StateStore`."""
        self._answer(lambda: self._client.hset(self._notes_key, name, text))

    def close(self) -> None:
        """As in `StateStore`."""
        self._client.close()

    def _run_put(self, change: Change, client: Any) -> Any:
        arguments = [change.expected, change.state, change.append or b"", int(change.restart)]
        return self._put(keys=self._keys(change.user_id), args=arguments, client=client)

    @property
    def _count_key(self) -> str:
        return f"{self._prefix}:users"

    @property
    def _notes_key(self) -> str:
        return f"{self._prefix}:notes"

    def _state_key(self, user_id: str) -> str:
        return f"{self._prefix}:state:{user_id}"

    def _log_key(self, user_id: str) -> str:
        return f"{self._prefix}:log:{user_id}"

    def _keys(self, user_id: str) -> list[str]:
        return [self._state_key(user_id), self._log_key(user_id), self._count_key]

    def _answer(self, call: Callable[[], T]) -> T:
        from redis.exceptions import RedisError

        try:
            return call()
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(f"store {self._shown} does not answer: {error}; try again") from error

    def _warn_of_losses(self) -> None:
        from redis.exceptions import RedisError

        try:
            settings = self._client.config_get("append*")
        except RedisError:  # a hosted server may hide its settings
            return
        if settings.get("appendonly") != "yes" or settings.get("appendfsync") != "always":
            log.warning(
                "store %s runs with appendonly %s, appendfsync %s: acknowledged plays may be lost with its machine; "
                "set appendonly yes and appendfsync always",
                self._shown,
                settings.get("appendonly"),
                settings.get("appendfsync"),
            )


def _stored(fields: Sequence[bytes | None]) -> Stored | None:
    version, state = fields
    return None if version is None or state is None else Stored(version=int(version), state=state)
