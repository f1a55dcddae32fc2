"""`rayrec serve` on all addresses, with replicas that come and go with the load."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from serve_command import READ, started, with_key
from served import AT, write_release, write_world

from rayrec.storage.workspace import Workspace

BODY = {"history": ["song-3", "song-50"], "at": AT, "k": 5}
LARGE_BODY = {"requests": [{**BODY, "history": ["song-3"] * 500}] * 20}
OPTIONS = ("--replicas", "1", "--max-replicas", "3", "--target-ongoing", "1", "--cpus", "0")


@pytest.mark.slow
def test_replicas_are_added_under_load_and_removed_after_it_without_a_failed_request(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    write_world(workspace)
    write_release(workspace)
    scaling = ("--scale-up-seconds", "2", "--scale-down-seconds", "2")
    with started(workspace, *OPTIONS, *scaling, "--host", "0.0.0.0") as served:
        url = f"http://{_address()}:{urlsplit(served.url).port}"
        statuses: list[int] = []
        stop = threading.Event()

        def send_requests(pause: float) -> None:
            with httpx.Client(base_url=url, headers=with_key(READ), timeout=60) as client:
                while not stop.is_set():
                    statuses.append(client.post("/v1/recommendations/batch", json=LARGE_BODY).status_code)
                    time.sleep(pause)

        def replicas() -> int:
            return len(served.processes("ServeReplica"))

        def load(clients: int, pause: float, is_done: Callable[[], bool], seconds: float) -> bool:
            stop.clear()
            threads = [threading.Thread(target=send_requests, args=(pause,)) for _ in range(clients)]
            for thread in threads:
                thread.start()
            try:
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline and not is_done():
                    time.sleep(0.5)
                return is_done()
            finally:
                stop.set()
                for thread in threads:
                    thread.join()

        assert replicas() == 1
        assert load(8, 0, lambda: replicas() == 3, 180), replicas()
        assert load(1, 2, lambda: replicas() == 1, 180), replicas()
        assert len(statuses) > 10
        assert set(statuses) == {200}


def _address() -> str:
    """Return an address of this machine that other machines can reach; skip the test if there is none."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    pytest.skip("no address but loopback: run it on a machine with a network interface")
