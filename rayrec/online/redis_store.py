"""User states in Redis, a single server or Redis Cluster: for replicas on many nodes.

All keys of a user share one hash tag, and no key belongs to all users, so that a cluster spreads users over its nodes.
What survives a crash depends on the server's settings. With `appendonly yes` and `appendfsync always`, an acknowledged
put is on the server's disk. With `everysec`, the death of the server's machine may lose the last second, the death of
its process alone loses nothing. Without `appendonly`, all changes since the last snapshot are lost. Opening the store
logs a warning unless `always` is set, and another one if the server evicts keys when its memory is full. In a cluster,
a put returns after a replica has it too, so that a replica that takes over has all acknowledged puts. A node whose
replicas are down, or do not answer in time, continues alone.
"""

import logging
import os
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rayrec.errors import InputError, MissingDependencyError
from rayrec.online.state_store import (
    DAY_SECONDS,
    NO_VERSION,
    Change,
    FullUser,
    OnlineSong,
    StateStore,
    Stored,
    StoreUnavailableError,
    event_days,
    user_key,
)
from rayrec.storage.object_storage import without_secrets

PASSWORD_VARIABLE = "RAYREC_REDIS_PASSWORD"  # not in the address, because Ray shows the address on its dashboard
TIMEOUT_SECONDS = 5.0  # for connecting and for each answer
RETRIES = 4
PREFIX = "rayrec:2"  # the digit is the format's version
EVENT_SECONDS = 3 * DAY_SECONDS  # how long the events of a day are kept after the last of them
PIPELINE = 1_000  # users per pipeline
REPLICA_MS = 500  # how long a put waits for a replica, if its node has one
ROLE_SECONDS = 5.0  # how long the knowledge whether a node of a cluster has replicas is used
NEW_USERS_PER_CALL = 200  # users per call of a script; the server does nothing else meanwhile, for some milliseconds

# State, log, heard songs and events of a user change together or not at all.
# KEYS: user, log, today's events. ARGV: expected version, random id of the put, state, restart, heard, seconds to keep
# events, number of events, events, then plays and data of each piece. A stored piece begins with its number of plays,
# as 4 bytes.
PUT = """
local version = tonumber(redis.call('HGET', KEYS[1], 'v') or '0')
if version ~= tonumber(ARGV[1]) then
  return redis.call('HGET', KEYS[1], 'p') == ARGV[2] and 1 or 0  -- 1: this put, whose answer got lost
end
redis.call('HSET', KEYS[1], 'v', version + 1, 'p', ARGV[2], 's', ARGV[3])
-- A new user may have an old log, if the server has evicted the hash.
if ARGV[4] == '1' or version == 0 then redis.call('DEL', KEYS[2]) redis.call('HDEL', KEYS[1], 'h') end
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], 'h', ARGV[5]) end
local events = tonumber(ARGV[7])
for i = 8, 7 + events do redis.call('SADD', KEYS[3], ARGV[i]) end
if events > 0 then redis.call('EXPIRE', KEYS[3], ARGV[6]) end
for i = 8 + events, #ARGV, 2 do
  redis.call('RPUSH', KEYS[2], struct.pack('>I4', tonumber(ARGV[i])) .. ARGV[i + 1])
end
return 1
"""

# Adds new users with one piece each, several per call, because a call per user costs more than its work. Only for a
# single server. KEYS: all users, then their logs. ARGV: all states, then the pieces with their numbers of plays.
# Returns 1 for each added user, else 0.
PUT_NEW = """
local users, added = #ARGV / 2, {}
local any = redis.call('EXISTS', unpack(KEYS, 1, users)) > 0
for i = 1, users do
  if any and redis.call('EXISTS', KEYS[i]) == 1 then
    added[i] = 0
  else
    redis.call('HSET', KEYS[i], 'v', 1, 's', ARGV[i])
    redis.call('DEL', KEYS[users + i])
    redis.call('RPUSH', KEYS[users + i], ARGV[users + i])
    added[i] = 1
  end
end
return added
"""

# KEYS: user, events of three days. ARGV: events. Returns version and state, then 1 for each known event, else 0.
GET = """
local stored = redis.call('HMGET', KEYS[1], 'v', 's')
if not stored[1] then return {} end
for i = 1, #ARGV do
  stored[2 + i] = 0
  for day = 2, 4 do
    if redis.call('SISMEMBER', KEYS[day], ARGV[i]) == 1 then stored[2 + i] = 1 break end
  end
end
return stored
"""

# KEYS: user, log. ARGV: minimum number of plays to read, -1 for all.
# Returns version, state, heard songs, then pieces, newest first.
READ = """
local stored = redis.call('HMGET', KEYS[1], 'v', 's', 'h')
if not stored[1] then return {} end
local wanted, plays, place = tonumber(ARGV[1]), 0, -1
while wanted < 0 or plays < wanted do
  local piece = redis.call('LINDEX', KEYS[2], place)
  if not piece then break end
  plays = plays + struct.unpack('>I4', piece)
  stored[3 - place] = string.sub(piece, 5)
  place = place - 1
end
return stored
"""

# KEYS: user, log. ARGV: state.
FORGET = """
local version = tonumber(redis.call('HGET', KEYS[1], 'v') or '0')
redis.call('DEL', unpack(KEYS))
redis.call('HSET', KEYS[1], 'v', version + 1, 's', ARGV[1])
return 1
"""

# Songs that were added online. KEYS of all these scripts: counters, versions, ids by number, data, sums, numbers by id.
# A song is open while it has data. Sums are stored after the id of their model and a zero byte.
# ARGV: maximum number of open songs, lowest number of a new song, then id and data of each song. Returns -1 if they are
# too many, otherwise 1 for each added song, else 0.
ADD_SONGS = """
local added, fresh = {}, 0
for i = 3, #ARGV, 2 do
  local number = redis.call('HGET', KEYS[6], ARGV[i])
  local is_open = number and redis.call('HEXISTS', KEYS[4], number) == 1
  added[#added + 1] = is_open and 0 or 1
  fresh = fresh + added[#added]
end
if fresh > 0 and redis.call('HLEN', KEYS[4]) + fresh > tonumber(ARGV[1]) then return -1 end
if fresh == 0 then return added end
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
local next_number = tonumber(redis.call('HGET', KEYS[1], 'numbers') or '0')
if next_number < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], 'numbers', ARGV[2]) end
for i = 3, #ARGV, 2 do
  if added[(i - 1) / 2] == 1 then
    local number = redis.call('HGET', KEYS[6], ARGV[i])
    if not number then
      number = redis.call('HINCRBY', KEYS[1], 'numbers', 1) - 1
      redis.call('HSET', KEYS[6], ARGV[i], number)
      redis.call('HSET', KEYS[3], number, ARGV[i])
    end
    redis.call('HSET', KEYS[4], number, ARGV[i + 1])
    redis.call('ZADD', KEYS[2], version, number)
  end
end
return added
"""

# ARGV: version. Returns the current version, then number, id, data and sums of each song that changed since.
SONGS_SINCE = """
local version = redis.call('HGET', KEYS[1], 'version') or '0'
local changed = {version}
if version == ARGV[1] then return changed end
for _, number in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[1], '+inf')) do
  changed[#changed + 1] = number
  changed[#changed + 1] = redis.call('HGET', KEYS[3], number)
  changed[#changed + 1] = redis.call('HGET', KEYS[4], number) or ''
  changed[#changed + 1] = redis.call('HGET', KEYS[5], number) or ''
end
return changed
"""

# ARGV: model, then the number of each song and the values to add to its sums.
COUNT_SONG_PLAYS = """
local version
local head = ARGV[1] .. string.char(0)
for i = 2, #ARGV, 2 do
  local number, total = ARGV[i], ARGV[i + 1]
  if redis.call('HEXISTS', KEYS[4], number) == 1 then
    local sums = redis.call('HGET', KEYS[5], number)
    if sums and string.sub(sums, 1, #head) == head and #sums == #head + #total then
      local parts = {}
      for place = 1, #total, 8 do
        local sum = struct.unpack('<d', sums, #head + place) + struct.unpack('<d', total, place)
        parts[#parts + 1] = struct.pack('<d', sum)
      end
      total = table.concat(parts)
    end
    version = version or redis.call('HINCRBY', KEYS[1], 'version', 1)
    redis.call('HSET', KEYS[5], number, head .. total)
    redis.call('ZADD', KEYS[2], version, number)
  end
end
return 1
"""

# ARGV: numbers of songs.
CLOSE_SONGS = """
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
for _, number in ipairs(ARGV) do
  redis.call('HDEL', KEYS[4], number)
  redis.call('HDEL', KEYS[5], number)
  redis.call('ZADD', KEYS[2], version, number)
end
return 1
"""

READING = ("get", "read", "songs_since")  # scripts that change nothing
ONCE = ("count_song_plays",)  # scripts without retries: after a lost answer, a retry would count plays twice

T = TypeVar("T")

log = logging.getLogger(__name__)


class RedisStore(StateStore):
    """A store in Redis. Each user has a hash, a list, and one set per day."""

    one_writer = False

    def __init__(self, client: Any, no_retry_client: Any, namespace: str, uri: str) -> None:
        """`client` is a redis.Redis or redis.RedisCluster at the address `uri` that returns bytes.

        `no_retry_client` is a redis.Redis of the same server without retries; it is not used with a cluster.
        """
        self._client = client
        self._no_retry_client = no_retry_client
        self._namespace = namespace
        self._uri = uri
        self._shown_uri = without_secrets(uri)
        self._nodes = getattr(client, "nodes_manager", None)  # None for a single server
        self._replica_checks: dict[str, tuple[float, bool]] = {}  # by node: time of the check, whether it has replicas
        self._scripts = {name: client.register_script(text) for name, text in _SCRIPTS.items()}
        self._call(client.ping)
        self._warn_of_losses()

    @classmethod
    def from_uri(cls, uri: str, namespace: str) -> "RedisStore":
        """Open the store at redis://host:port/number, the address of a server or of any node of a cluster.

        The password comes from RAYREC_REDIS_PASSWORD if the address has none. Raises `InputError` for an address that
        is not valid, such as one whose password is not percent-encoded.
        """
        try:
            import redis
        except ImportError as error:
            raise MissingDependencyError("redis is not installed; run `pip install rayrec[redis]`") from error
        options: dict[str, Any] = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}
        shown_uri = without_secrets(uri)
        credentials, _, _ = uri.partition("://")[2].rpartition("@")
        try:
            if not set("/?#").isdisjoint(credentials):
                raise ValueError("the address would end there")
            password = os.environ.get(PASSWORD_VARIABLE) if urlsplit(uri).password is None else None
            options |= {} if password is None else {"password": password}
            client, no_retry_client = (
                redis.Redis.from_url(uri, retry=_retry_policy(retries), **options) for retries in (RETRIES, 0)
            )
        except ValueError:  # its text may contain a part of the password
            raise InputError(
                f"store {shown_uri} is not a valid address of a Redis server; give redis://HOST:PORT/0, and the "
                f"password in {PASSWORD_VARIABLE}, or percent-encoded in the address"
            ) from None
        if _call_server(shown_uri, lambda: client.info("cluster")).get("cluster_enabled"):
            client.close()
            client = _call_server(shown_uri, lambda: redis.RedisCluster.from_url(uri, **options))
        return cls(client, no_retry_client, namespace, uri)

    def __reduce__(self) -> tuple[Callable[[str, str], "RedisStore"], tuple[str, str]]:
        return RedisStore.from_uri, (self._uri, self._namespace)

    def get(self, users: Mapping[str, Sequence[int]]) -> list[Stored | None]:
        """As in `StateStore`."""
        days = event_days()
        calls = [(self._keys(user_id, days, log=False), list(events)) for user_id, events in users.items()]
        replies = self._run("get", calls)
        return [
            _to_stored(reply, frozenset(event for event, is_known in zip(events, reply[2:], strict=True) if is_known))
            if reply
            else None
            for (_, events), reply in zip(calls, replies, strict=True)
        ]

    def read(self, user_ids: Sequence[str], *, plays: int | None = None) -> list[FullUser | None]:
        """As in `StateStore`."""
        min_plays = -1 if plays is None else plays
        replies = self._run("read", [(self._keys(user_id), [min_plays]) for user_id in user_ids])
        return [
            FullUser(stored=_to_stored(reply), heard=reply[2], log=reply[:2:-1]) if reply else None for reply in replies
        ]

    def put(self, changes: Sequence[Change], *, loading: bool = False) -> list[bool]:
        """As in `StateStore`; each user is changed separately, and `loading` has no effect."""
        new_indices: list[int] = []
        if self._nodes is None and len({change.user_id for change in changes}) == len(changes) > 1:
            new_indices = [index for index, change in enumerate(changes) if _is_short(change)]
        is_applied = dict.fromkeys(range(len(changes)), False)
        calls = [
            _put_new_arguments([changes[index] for index in chunk], self._keys)
            for chunk in _chunks(new_indices, NEW_USERS_PER_CALL)
        ]
        is_added = [bool(flag) for reply in self._run("put_new", calls) for flag in reply]
        is_applied.update(zip(new_indices, is_added, strict=True))
        other_indices, today = sorted(is_applied.keys() - set(new_indices)), event_days()[:1]
        calls = [(self._keys(changes[index].user_id, today), _put_arguments(changes[index])) for index in other_indices]
        is_applied.update(zip(other_indices, map(bool, self._run("put", calls)), strict=True))
        return list(is_applied.values())

    def forget(self, user_ids: Sequence[str], state: bytes, namespaces: Collection[str] = ()) -> None:
        """As in `StateStore`; the append-only file holds the deleted bytes until `rewrite` or Redis rewrites it."""
        keys = [_user_keys(name, user_id) for user_id in user_ids for name in {self._namespace, *namespaces}]
        self._run("forget", [(user_keys, [state]) for user_keys in keys])

    def rewrite(self) -> None:
        """As in `StateStore`; rewrites the append-only file and the snapshot of the server or of all cluster nodes.

        Needs the permission for BGREWRITEAOF, BGSAVE, CONFIG GET and INFO.
        """
        self._call(self._rewrite_all)

    def loaded(self, load: str) -> dict[int, str]:
        """As in `StateStore`."""
        texts = self._call(lambda: self._client.hgetall(self._load_key(load)))
        return {int(bucket): text.decode() for bucket, text in texts.items()}

    def mark_loaded(self, load: str, bucket: int, text: str) -> None:
        """As in `StateStore`."""
        self._call(lambda: self._client.hset(self._load_key(load), str(bucket), text))

    def add_songs(self, songs: Mapping[str, bytes], most: int, first_number: int) -> list[bool] | None:
        """As in `StateStore`."""
        fields = (field for song in songs.items() for field in song)
        reply = self._run_song_script("add_songs", [most, first_number, *fields])
        return None if reply == -1 else [bool(is_added) for is_added in reply]

    def songs_since(self, version: int) -> tuple[int, list[OnlineSong]]:
        """As in `StateStore`."""
        current_version, *fields = self._run_song_script("songs_since", [version])
        songs = []
        for number, song_id, data, model_sums in zip(*(fields[index::4] for index in range(4)), strict=True):
            model, _, sums = model_sums.partition(b"\0")
            songs.append(
                OnlineSong(number=int(number), song_id=song_id.decode(), data=data, model=model.decode(), sums=sums)
            )
        return int(current_version), sorted(songs, key=lambda song: song.number)

    def count_song_plays(self, model: str, sums: Mapping[int, bytes]) -> None:
        """As in `StateStore`."""
        self._run_song_script("count_song_plays", [model, *(field for song in sums.items() for field in song)])

    def close_songs(self, numbers: Sequence[int]) -> None:
        """As in `StateStore`."""
        self._run_song_script("close_songs", list(numbers))

    def close(self) -> None:
        """As in `StateStore`."""
        for client in (self._client, self._no_retry_client):
            client.close()

    def _run_song_script(self, name: str, arguments: list[Any]) -> Any:
        """Return the answer of a script for songs that were added online; their keys share one hash tag."""
        key_names = ("counters", "versions", "ids", "data", "sums", "numbers")
        keys = [f"{PREFIX}:songs:{{{self._namespace}}}:{key_name}" for key_name in key_names]
        return self._run(name, [(keys, arguments)])[0]

    def _servers(self) -> list[Any]:
        """Return a client for each server that holds users, including replicas."""
        if self._nodes is None:
            return [self._client]
        return [self._client.get_redis_connection(node) for node in self._client.get_nodes()]

    def _rewrite_all(self) -> None:
        for server in self._servers():
            self._rewrite(server)

    def _rewrite(self, server: Any) -> None:
        """Rewrite the files that one server keeps, and wait until it has finished."""
        for keeps_file, start_rewrite, running_field, status_field in _FILES:
            if keeps_file(server):
                _wait_while(server, running_field)  # an earlier rewrite may still write data that was deleted meanwhile
                start_rewrite(server)
                info = _wait_while(server, running_field)
                if info[status_field] != "ok":
                    raise StoreUnavailableError(
                        f"store {self._shown_uri} could not rewrite its files; see the server's log"
                    )

    def _keys(self, user_id: str, days: Sequence[int] = (), *, log: bool = True) -> list[str]:
        user, user_log = _user_keys(self._namespace, user_id)
        return [user, *([user_log] if log else []), *(f"{user}:{day}" for day in days)]

    def _load_key(self, load: str) -> str:
        return f"{PREFIX}:load:{self._namespace}:{load}"

    def _run(self, name: str, calls: Sequence[tuple[list[str], list[Any]]]) -> list[Any]:
        """Return the answer of a script to each call; several calls are sent in pipelines."""
        script, retries = self._scripts[name], 0 if name in ONCE else RETRIES
        if self._nodes is not None and name not in READING:
            return [
                reply
                for chunk in _chunks(calls)
                for reply in self._call(partial(self._write_to_nodes, script.script, chunk), retries)
            ]
        if len(calls) == 1:  # a single call sends the hash of the script instead of its text
            client = self._client if retries else self._no_retry_client
            return [self._call(lambda: script(keys=calls[0][0], args=calls[0][1], client=client))]
        replies: list[Any] = []
        for chunk in _chunks(calls):

            def send(chunk: Sequence[tuple[list[str], list[Any]]] = chunk) -> list[Any]:
                pipeline = self._client.pipeline(transaction=False)  # new for each try: a failed one loses its calls
                for keys, arguments in chunk:
                    # Send the text, because a cluster node that has just taken over does not have the script yet.
                    pipeline.execute_command("EVAL", script.script, len(keys), *keys, *arguments)
                return list(pipeline.execute())

            replies += self._call(send)
        return replies

    def _write_to_nodes(self, text: str, calls: Sequence[tuple[list[str], list[Any]]]) -> list[Any]:
        """Return the answer of a script to each call, after a replica of each written node has the changes too."""
        from redis.exceptions import AskError, ClusterDownError, RedisError, TryAgainError

        commands = [["EVAL", text, len(keys), *keys, *arguments] for keys, arguments in calls]
        rows_by_node: dict[str, list[int]] = {}
        nodes: dict[str, Any] = {}
        for row, (keys, _) in enumerate(calls):
            node = self._client.get_node_from_key(keys[0])
            nodes[node.name] = node
            rows_by_node.setdefault(node.name, []).append(row)
        replies: list[Any] = [None] * len(calls)
        for name, rows in rows_by_node.items():
            server = self._client.get_redis_connection(nodes[name])
            has_replica = self._has_replica(name, server)
            pipeline = server.pipeline(transaction=False)  # one connection, because WAIT covers only its own writes
            for row in rows:
                pipeline.execute_command(*commands[row])
            if has_replica:
                pipeline.execute_command("WAIT", 1, REPLICA_MS)
            results = pipeline.execute(raise_on_error=False)
            if has_replica and results.pop() == 0:
                self._replica_checks[name] = (time.monotonic(), False)
                log.warning(
                    "store %s: no replica of %s confirmed a write within %d ms", self._shown_uri, name, REPLICA_MS
                )
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, (AskError, TryAgainError, ClusterDownError)):  # slots are moving to another node
                    result = self._client.execute_command(*commands[row])
                if isinstance(result, RedisError):
                    raise result
                replies[row] = result
        return replies

    def _has_replica(self, name: str, server: Any) -> bool:
        """Return whether a node of a cluster has a replica; checked every `ROLE_SECONDS` at most."""
        checked_at, has_replica = self._replica_checks.get(name, (0.0, False))
        if time.monotonic() - checked_at > ROLE_SECONDS:
            role = server.role()
            has_replica = role[0] == b"master" and bool(role[2])
            self._replica_checks[name] = (time.monotonic(), has_replica)
        return has_replica

    def _call(self, call: Callable[[], T], retries: int = RETRIES) -> T:
        """Return the answer of a call; `retries` are for a cluster, since the client of a single server has its own."""
        if self._nodes is None:
            return _call_server(self._shown_uri, call)
        # The client itself would only retry on the node that is down; find the node that has taken over.
        nodes = self._nodes

        def call_cluster() -> T:
            result: T = _retry_policy(retries).call_with_retry(call, lambda _: nodes.initialize())
            return result

        return _call_server(self._shown_uri, call_cluster)

    def _warn_of_losses(self) -> None:
        texts = [text for server in self._servers() for text in _possible_losses(server)]
        for text in dict.fromkeys(texts):  # the nodes of a cluster usually have the same settings
            log.warning("store %s runs with %s", self._shown_uri, text)


def _possible_losses(server: Any) -> Iterator[str]:
    """Return the settings with which a server may lose data, each with what it loses and what to set instead."""
    from redis.exceptions import RedisError

    try:
        memory = server.info("memory")
        limit, policy = memory.get("maxmemory"), str(memory.get("maxmemory_policy"))
        if limit and policy != "noeviction":
            # Only event IDs expire, and volatile policies delete only keys that expire.
            lost_data = (
                "event IDs when its memory is full, so that plays sent again count twice"
                if policy.startswith("volatile-")
                else "users' plays when its memory is full"
            )
            yield (
                f"maxmemory {limit}, maxmemory-policy {policy}: it deletes {lost_data}; set maxmemory-policy noeviction"
            )
        settings = server.config_get("append*")
    except RedisError:  # a hosted server may hide its settings, and a node of a cluster may be down
        return
    appendonly, appendfsync = settings.get("appendonly"), settings.get("appendfsync")
    if appendonly != "yes" or appendfsync != "always":
        yield (
            f"appendonly {appendonly}, appendfsync {appendfsync}: acknowledged plays may be lost if its machine fails; "
            "set appendonly yes and appendfsync always"
        )


# For the append-only file and the snapshot: whether a server keeps it, the command that rewrites it, and the fields of
# INFO that tell whether a rewrite is running and how the last one ended.
_FILES: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any], str, str], ...] = (
    (
        lambda server: server.config_get("appendonly").get("appendonly") == "yes",
        lambda server: server.bgrewriteaof(),
        "aof_rewrite_in_progress",
        "aof_last_bgrewrite_status",
    ),
    (
        lambda server: (
            bool(server.config_get("save").get("save")) or server.info("persistence").get("rdb_saves", 0) > 0
        ),
        lambda server: server.bgsave(),
        "rdb_bgsave_in_progress",
        "rdb_last_bgsave_status",
    ),
)
_SCRIPTS = {
    "put": PUT,
    "put_new": PUT_NEW,
    "get": GET,
    "read": READ,
    "forget": FORGET,
    "add_songs": ADD_SONGS,
    "songs_since": SONGS_SINCE,
    "count_song_plays": COUNT_SONG_PLAYS,
    "close_songs": CLOSE_SONGS,
}


def _wait_while(server: Any, running_field: str) -> Mapping[str, Any]:
    """Wait until no rewrite is running or scheduled, and return the server's INFO about its files."""
    while True:
        info: Mapping[str, Any] = server.info("persistence")
        if not info[running_field] and not info.get("aof_rewrite_scheduled"):
            return info
        time.sleep(0.05)


def _retry_policy(retries: int) -> Any:
    """Return the retries of a client, with pauses of about a second in total.

    A retried put that the server had already applied is recognized by its id. If another put came after it, it looks
    like a conflict: the caller reads the user again and sees that the plays are stored.
    """
    from redis.backoff import ExponentialBackoff
    from redis.retry import Retry

    return Retry(ExponentialBackoff(cap=0.4, base=0.05), retries)


def _call_server(shown_uri: str, call: Callable[[], T]) -> T:
    from redis.exceptions import RedisError

    try:
        return call()
    except (RedisError, OSError) as error:
        raise StoreUnavailableError(f"store {shown_uri} does not answer: {error}; try again") from error


def _user_keys(namespace: str, user_id: str) -> list[str]:
    """Return the keys of a user's hash and log."""
    tag = urlsafe_b64encode(user_key(namespace, user_id))[:22].decode()
    return [f"{PREFIX}:{{{tag}}}", f"{PREFIX}:{{{tag}}}:log"]


def _put_arguments(change: Change) -> list[Any]:
    put_id = secrets.token_bytes(8)
    arguments = [change.expected, put_id, change.state, int(change.restart), change.heard or b"", EVENT_SECONDS]
    arguments += [len(change.events), *change.events]
    for piece in change.append:
        arguments += [piece.plays, piece.data]
    return arguments


def _is_short(change: Change) -> bool:
    """Return whether a change adds a new user with one piece of plays, as most changes of a load do."""
    return change.expected == NO_VERSION and len(change.append) == 1 and change.heard is None and not change.events


def _put_new_arguments(changes: Sequence[Change], keys_of: Callable[[str], list[str]]) -> tuple[list[str], list[Any]]:
    """Return the keys and arguments of PUT_NEW."""
    users, logs = zip(*(keys_of(change.user_id) for change in changes), strict=True)
    pieces = [piece.plays.to_bytes(4, "big") + piece.data for change in changes for piece in change.append]
    return [*users, *logs], [*(change.state for change in changes), *pieces]


def _to_stored(reply: Sequence[Any], events: frozenset[int] = frozenset()) -> Stored:
    return Stored(version=int(reply[0]), state=reply[1], events=events)


def _chunks(items: Sequence[T], size: int = PIPELINE) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
