"""The command `rayrec serve`: behind HAProxy, on loopback only, with keys, until it is stopped."""

import asyncio
import ipaddress
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest
from serve_command import ADMIN, READ, Served, run, started, with_key
from served import AT, write_release, write_world
from worlds import rename_songs

from rayrec.data.dataset import Dataset
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace

ODD_SONGS = ("AC/DC – Song 4, Part 4", "..", "a%2Fb")  # ids with characters that URLs must escape
BODY = {"history": ["song-3", "song-50"], "at": AT, "k": 5}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = Workspace(tmp_path_factory.mktemp("serve") / "workspace")
    write_world(workspace)
    rename_songs(workspace, dict(enumerate(ODD_SONGS, start=10)))
    write_release(workspace, "1", seed=1)
    write_release(workspace, "2", seed=2, activate=False)
    with started(workspace) as server:
        yield server


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that lets only few requests wait."""
    workspace = Workspace(tmp_path_factory.mktemp("busy") / "workspace")
    write_world(workspace)
    write_release(workspace)
    with started(workspace, "--max-waiting", "2") as server:
        yield server


def test_every_port_is_on_loopback(served: Served) -> None:
    httpx.post(f"{served.url}/v1/recommendations", json=BODY, headers=with_key(READ), timeout=60).raise_for_status()
    ray_processes = ("raylet", "gcs_server", "ProxyActor", "ServeController", "DashboardAgent")
    names = {"haproxy", *ray_processes, "ServeReplica:rayrec:recommendations"}
    for _ in range(60):  # Ray's agents may still be starting when the application answers
        commands = served.listening()
        missing_names = {name for name in names if not any(name in command for command in commands.values())}
        if not missing_names:
            break
        time.sleep(0.5)
    assert missing_names == set()
    public_ports = {endpoint: command for endpoint, command in commands.items() if not is_loopback(endpoint[0])}
    assert public_ports == {}


def test_replicas_run_at_normal_priority(served: Served) -> None:
    """By default Ray runs its workers at a niceness of 15."""
    assert [process.nice() for process in served.processes("ServeReplica")] == [psutil.Process().nice()]


@pytest.mark.slow
def test_requests_beyond_capacity_get_a_503_that_says_when_to_try_again(busy: Served) -> None:
    body = {"requests": [{**BODY, "history": ["song-3"] * 500}] * 20}

    async def send_requests() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=busy.url, headers=with_key(READ), timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/recommendations/batch", json=body) for _ in range(30)))

    answers = asyncio.run(send_requests())
    assert {answer.status_code for answer in answers} == {200, 503}
    assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"1"}


def test_the_work_for_a_client_that_goes_away_behind_haproxy_ends(served: Served) -> None:
    body = {"requests": [{**BODY, "history": ["song-3"] * 500}] * 100}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/recommendations/batch", json=body, headers=with_key(READ), timeout=0.05)
    expected = 'route="/v1/recommendations/batch",status="499"'
    for _ in range(100):
        metrics = httpx.get(f"{served.url}/metrics", headers=with_key(ADMIN), timeout=30).text
        if expected in metrics:
            break
        time.sleep(0.1)
    assert expected in metrics


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def test_behind_haproxy_requests_are_answered_and_errors_are_problems(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/recommendations", json=BODY, headers=with_key(READ), timeout=60)
    assert (answer.status_code, len(answer.json()["songs"])) == (200, 5)
    for response, status in (
        (httpx.post(f"{served.url}/v1/recommendations", content=b"{", headers=with_key(READ), timeout=60), 415),
        (
            httpx.post(
                f"{served.url}/v1/recommendations", content=b"x" * 5_000_000, headers=with_key(READ), timeout=60
            ),
            413,
        ),
        (httpx.get(f"{served.url}/v1/nothing", headers=with_key(READ), timeout=60), 404),
        (httpx.get(f"{served.url}/v1/release", timeout=60), 401),
    ):
        assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")


def test_behind_haproxy_songs_and_users_have_any_ids(served: Served) -> None:
    """HAProxy must pass %2F and %2E%2E on undecoded: decoded, they would lead to other paths."""
    with httpx.Client(base_url=served.url, headers=with_key(ADMIN), timeout=60) as client:
        for name in ODD_SONGS:
            escaped_name = quote(name, safe="").replace(".", "%2E")
            assert client.get(f"/v1/songs/{escaped_name}/similar").json()["song_id"] == name
            play = {"user_id": name, "song_id": name, "played_at": AT, "event_id": name}
            assert client.post("/v1/plays", json=play).json()["taken"] == 1
            assert client.get(f"/v1/users/{escaped_name}/taste").json()["user_id"] == name
            (stored_play,) = client.get(f"/v1/users/{escaped_name}/plays").json()["plays"]
            assert stored_play["song_id"] == name


def test_the_users_of_the_release_are_known_at_once(served: Served) -> None:
    histories = next(Dataset(served.workspace).read_all())
    for user, plays in zip(histories.user_ids.tolist()[:3], histories.lengths.tolist(), strict=False):
        answer = httpx.post(
            f"{served.url}/v1/recommendations", json={"user_id": user}, headers=with_key(READ), timeout=60
        ).json()
        assert answer["plays"] == plays


def test_the_port_of_a_replica_answers_nothing_without_a_key(served: Served) -> None:
    ports = [port for (_, port), command in served.listening().items() if "ServeReplica" in command]
    statuses = []
    for port in ports:
        try:
            response = httpx.get(f"http://127.0.0.1:{port}/v1/release", timeout=2)
        except httpx.HTTPError:
            continue  # a port of Ray's own, which does not speak HTTP
        statuses.append(response.status_code)
        assert httpx.post(f"http://127.0.0.1:{port}/v1/recommendations", json=BODY, timeout=60).status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/v1/release", headers=with_key(READ), timeout=60).status_code == 200
    assert statuses == [401]


def test_a_release_is_activated_and_rolled_back_while_the_server_runs(served: Served) -> None:
    first_id, second_id = (release.id for release in releases.list_releases(served.workspace))
    for arguments, live_id in ((("activate", second_id), second_id), (("rollback",), first_id)):
        process = run(served.workspace, "release", *arguments, "--wait", "--url", served.url, key=ADMIN)
        assert process.wait(120) == 0, process.stderr and process.stderr.read()
        answer = httpx.post(f"{served.url}/v1/recommendations", json=BODY, headers=with_key(READ), timeout=60).json()
        assert answer["release"] == live_id
    refused_process = run(
        served.workspace, "release", "activate", second_id, "--url", served.url, key="wrong-0123456789"
    )
    assert refused_process.wait(120) == 1
    assert refused_process.stderr is not None
    assert "RAYREC_API_KEY" in refused_process.stderr.read()
    assert releases.read_active(served.workspace)["active"] == first_id


@pytest.mark.slow
@pytest.mark.parametrize("by", ["SIGTERM", "SIGINT"])
def test_running_requests_are_answered_before_the_server_ends_cleanly(by: str, tmp_path: Path) -> None:
    """`docker stop` and systemd stop the server by a signal."""
    workspace = Workspace(tmp_path / "workspace")
    write_world(workspace)
    write_release(workspace)
    # Longer work than the time after which Serve replaces a stopping HAProxy.
    body = {"requests": [{**BODY, "history": ["song-3"] * 4_000}] * 100}
    with started(workspace) as server, httpx.Client(headers=with_key(READ), timeout=60) as client:  # stays connected
        client.post(f"{server.url}/v1/recommendations", json=BODY).raise_for_status()
        answers: list[httpx.Response] = []
        url = f"{server.url}/v1/recommendations/batch"
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json=body, headers=with_key(READ), timeout=60))
        )
        thread.start()
        time.sleep(1.5)  # even on a busy machine the server then has the whole request
        server.process.send_signal(getattr(signal, by))
        thread.join()
        answered_at = time.monotonic()
        output, errors = server.process.communicate(timeout=120)
        assert time.monotonic() - answered_at < 25
    assert [answer.status_code for answer in answers] == [200]
    assert server.process.returncode == 0
    assert output.strip() == "Stopped."
    assert "SIG" not in errors


@pytest.mark.parametrize(
    "process_name",
    [
        pytest.param("", id="loading states"),
        pytest.param("gcs_server", id="starting Ray"),
        pytest.param("ServeController", id="starting Serve", marks=pytest.mark.slow),
    ],
)
def test_sigterm_ends_the_server_cleanly_while_it_starts(process_name: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    write_world(workspace)
    write_release(workspace)
    process = run(workspace, "serve", "--port", "0")
    served = Served(workspace, process, "")
    assert process.stderr is not None
    assert "Loading the users' states" in process.stderr.readline()
    deadline = time.monotonic() + 120
    while process_name and not served.processes(process_name):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.strip() == "Stopped."
    assert errors.splitlines()[-1] == "Stopping"
    assert "Serving" not in errors
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_an_interrupt_ends_the_server_with_all_its_processes(served: Served) -> None:
    parent = psutil.Process(served.process.pid)
    processes = parent.children(recursive=True)
    served.process.send_signal(signal.SIGINT)
    output, errors = served.process.communicate(timeout=120)
    assert served.process.returncode == 0, errors
    assert (output.strip(), errors.strip()) == ("Stopped.", "Stopping")
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert served.workspace.files("serving/replicas") == []


@pytest.mark.slow  # waits for Serve to start and to die
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv: install Debian's package util-linux")
def test_a_killed_server_leaves_no_process_that_answers(served: Served) -> None:
    with started(served.workspace) as server:
        answering_processes = [child for name in ("haproxy", "ServeReplica") for child in server.processes(name)]
        assert len(answering_processes) >= 2
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(answering_processes, timeout=60)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
