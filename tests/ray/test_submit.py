"""Commands as jobs on a real Ray head with a dashboard, a job server and a token."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import Head, free_ports, ray_head

WORLD = "users = 300\nsongs = 100\nartists = 20\ngenres = 4\nplays = 10.0\nbuckets = 2\n"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with two CPUs that requires a token."""
    with ray_head() as started:
        yield started


def submit(head: Head, *words: str, token: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `rayrec --json submit` in its own process, because Ray reads a token only once per process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token or head.token)}
    command = [sys.executable, "-m", "rayrec_cli.main", "--json", "submit", "--address", head.url, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_detached_job_reads_the_files_sent_along_and_is_followed_later(head: Head, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "world.toml").write_text(WORLD)
    where = ("--python", sys.executable, "--workspace", str(tmp_path / "workspace"), "--files", str(files))
    started = submit(head, *where, "--detach", "generate", "--config", "world.toml")
    assert started.returncode == 0, started.stderr
    job = json.loads(started.stdout)
    assert job["job"].startswith("rayrec-generate-")
    followed = submit(head, "--attach", job["job"])
    assert followed.returncode == 0, followed.stderr
    assert json.loads(followed.stdout)["status"] == "SUCCEEDED"
    assert "Data set" in followed.stderr
    made = json.loads((tmp_path / "workspace" / "dataset" / "dataset.json").read_text())
    assert (made["users"], made["buckets"]) == (300, 2)
    failed = submit(head, *where[:4], "recommend", "--user", "nobody")
    told = json.loads(failed.stdout)
    assert (failed.returncode, told["exit_code"], told["status"]) == (2, 2, "FAILED")
    assert "run `rayrec train` first" in failed.stderr


@pytest.mark.slow  # starts a cluster
def test_a_stopped_job_ends_and_says_so(head: Head, tmp_path: Path) -> None:
    endless = ("generate", "--users", "100000000", "--plays", "1000", "--days", "9000")
    where = ("--python", sys.executable, "--workspace", str(tmp_path / "workspace"))
    started = submit(head, *where, "--detach", *endless)
    job = json.loads(started.stdout)["job"]
    stopped = submit(head, "--stop", job)
    assert (stopped.returncode, json.loads(stopped.stdout)["status"]) == (0, "STOPPED")
    assert submit(head, "--attach", job).returncode == 130


def test_a_cluster_lets_nobody_in_without_its_token(head: Head, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("0" * 64)
    refused = submit(head, "--attach", "some-job", token=other)
    assert refused.returncode == 2
    assert "rejects the token" in refused.stderr
    unknown = submit(head, "--attach", "some-job")
    assert unknown.returncode == 2
    assert "Job 'some-job' not found" in unknown.stderr


def test_an_image_without_rayrec_is_a_hint_and_no_riddle(head: Head, tmp_path: Path) -> None:
    missing = submit(head, "--workspace", str(tmp_path), "status")
    assert missing.returncode == 127
    assert "The cluster has no /opt/rayrec/bin/python; pass the path of its interpreter with --python" in " ".join(
        missing.stderr.split()
    )


def test_where_no_cluster_answers_the_address_is_named(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    token = tmp_path / "token"
    token.write_text("0" * 64)
    gone = submit(Head(url=url, token=token, address=""), "--workspace", str(tmp_path), "status")
    assert gone.returncode == 1
    assert f"No Ray cluster answers at {url}" in gone.stderr
