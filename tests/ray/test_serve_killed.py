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

        def kill_processes(play_number: int) -> None:
            if play_number in KILLED_AT:
                processes = served.processes(KILLED_AT[play_number])
                assert processes, KILLED_AT[play_number]
                for process in processes:
                    process.kill()

        send_all([served.url], kill_processes, with_key(ADMIN))
        for user in USERS:
            taste = httpx.get(
                f"{served.url}/v1/users/{user}/taste", params={"at": AT}, headers=with_key(ADMIN), timeout=60
            ).json()
            assert (taste["plays"], taste["rejected"]) == (PLAYS // len(USERS), 0)
    require_each_play_once(world, store)
