"""Acknowledged plays survive `kill -9` of a replica and of the store's server, in real processes over HTTP."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sent_plays import require_each_play_once, send_all
from stores import needs_redis

from rayrec.bench.redis_servers import RedisServer, free_port
from rayrec.storage.workspace import Workspace

KILL_AT_PLAY = 50

REPLICA = """
import sys, uvicorn
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.service import open_service
from rayrec.serving.routes import create_app
from rayrec.storage.workspace import Workspace
service = open_service(Workspace(sys.argv[1]), ServeConfig(store=sys.argv[2]))
uvicorn.run(create_app(service), host="127.0.0.1", port=int(sys.argv[3]), log_level="error")
"""


class Replica:
    """A replica of the application in a process of its own."""

    def __init__(self, world: Workspace, store: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.process = subprocess.Popen([sys.executable, "-c", REPLICA, world.root, store, str(port)])

    def wait(self) -> None:
        """Wait until the replica is ready."""
        deadline = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=60).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill the process as `kill -9` does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def replicas(world: Workspace, store: str, count: int) -> Iterator[list[Replica]]:
    started_replicas = [Replica(world, store) for _ in range(count)]
    try:
        for replica in started_replicas:
            replica.wait()
        yield started_replicas
    finally:
        for replica in started_replicas:
            replica.kill()


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=needs_redis)])
def test_plays_survive_the_kill_of_a_replica(world: Workspace, tmp_path: Path, kind: str) -> None:
    server = RedisServer(tmp_path)
    if kind == "redis":
        server.start()
    store = server.uri if kind == "redis" else f"sqlite:///{tmp_path}/states.sqlite"
    try:
        with replicas(world, store, 2) as running_replicas:
            send_all(
                [replica.url for replica in running_replicas],
                lambda play_number: running_replicas[0].kill() if play_number == KILL_AT_PLAY else None,
            )
            require_each_play_once(world, store)
    finally:
        server.kill()


@needs_redis
def test_plays_survive_the_kill_of_the_store(world: Workspace, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()

    restart = threading.Timer(1.0, server.start)  # until then the replica answers 503

    def kill_store(play_number: int) -> None:
        if play_number == KILL_AT_PLAY:
            server.kill()
            restart.start()

    try:
        with replicas(world, server.uri, 1) as running_replicas:
            send_all([running_replicas[0].url], kill_store)
            restart.join()
            require_each_play_once(world, server.uri)
    finally:
        server.kill()


def test_an_added_song_and_its_plays_survive_the_kill_of_a_replica(world: Workspace, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/songs.sqlite"
    with replicas(world, store, 1) as (first,):
        response = httpx.post(f"{first.url}/v1/songs", json={"song_id": "new-1", "artist": "Artist 3"}, timeout=60)
        assert response.json()["outcomes"] == ["added"]
        plays = [
            {"event_id": str(number), "user_id": "ann", "song_id": f"{name}-1"}
            for number, name in enumerate(("song", "new"))
        ]
        assert httpx.post(f"{first.url}/v1/plays", json={"plays": plays}, timeout=60).json()["taken"] == 2
        first.kill()
    with replicas(world, store, 1) as (second,):
        stored_plays = httpx.get(f"{second.url}/v1/users/ann/plays", timeout=60).json()["plays"]
        assert [play["song_id"] for play in stored_plays] == ["song-1", "new-1"]
        assert httpx.post(f"{second.url}/v1/songs", json={"song_id": "new-1"}, timeout=60).json()["outcomes"] == [
            "known"
        ]
        body = {"history": ["song-3"], "allow": ["new-1"]}
        songs = httpx.post(f"{second.url}/v1/recommendations", json=body, timeout=60).json()["songs"]
        assert [song["song_id"] for song in songs] == ["new-1"]
