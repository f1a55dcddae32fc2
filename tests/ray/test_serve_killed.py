"""Acknowledged plays survive kill -9 of any process between the client and the store of `rayrec serve`."""

from pathlib import Path

import httpx
import pytest
from sent_plays import PLAYS, USERS, require_each_play_once, send_all
from serve_command import ADMIN, started, with_key
from served import AT, write_release, write_world

from rayrec.storage.workspace import Workspace

# Number of a play -> the process killed before it: the replica, the proxy, the process that restarts the proxy.
KILLED_AT = {30: "ServeReplica", 60: "haproxy -db", 90: "HAProxyManager"}


@pytest.mark.slow
def test_plays_survive_the_kill_of_a_replica_and_of_the_proxy(tmp_path: Path) -> None:
    world, store = Workspace(tmp_path / "workspace"), f"sqlite:///{tmp_path}/states.sqlite"
    write_world(world)
    write_release(world)
    with started(world, "--store", store) as served:

        def killed(place: int) -> None:
            if place in KILLED_AT:
                found = served.processes(KILLED_AT[place])
                assert found, KILLED_AT[place]
                for process in found:
                    process.kill()

        send_all([served.url], killed, with_key(ADMIN))
        for user in USERS:
            told = httpx.get(f"{served.url}/v1/users/{user}/taste", params={"at": AT}, headers=with_key(ADMIN)).json()
            assert (told["plays"], told["rejected"]) == (PLAYS // len(USERS), 0)
    require_each_play_once(world, store)
