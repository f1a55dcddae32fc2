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
    with ray_head() as head:
        yield head


def submit(head: Head, *arguments: str, token: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `rayrec --json submit` in its own process, because Ray reads a token only once per process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token or head.token)}
    command = [sys.executable, "-m", "rayrec_cli.main", "--json", "submit", "--address", head.url, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_detached_job_reads_the_files_sent_along_and_is_followed_later(head: Head, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "world.toml").write_text(WORLD)
    options = ("--python", sys.executable, "--workspace", str(tmp_path / "workspace"), "--files", str(files))
    submit_run = submit(head, *options, "--detach", "generate", "--config", "world.toml")
    assert submit_run.returncode == 0, submit_run.stderr
    submit_report = json.loads(submit_run.stdout)
    assert submit_report["job"].startswith("rayrec-generate-")
    attach_run = submit(head, "--attach", submit_report["job"])
    assert attach_run.returncode == 0, attach_run.stderr
    assert json.loads(attach_run.stdout)["status"] == "SUCCEEDED"
    assert "Data set" in attach_run.stderr
    manifest = json.loads((tmp_path / "workspace" / "dataset" / "dataset.json").read_text())
    assert (manifest["users"], manifest["buckets"]) == (300, 2)
    failed_run = submit(head, *options[:4], "recommend", "--user", "nobody")
    failed_report = json.loads(failed_run.stdout)
    assert (failed_run.returncode, failed_report["exit_code"], failed_report["status"]) == (2, 2, "FAILED")
    assert "run `rayrec train` first" in failed_run.stderr


@pytest.mark.slow  # starts a cluster
def test_a_stopped_job_ends_and_says_so(head: Head, tmp_path: Path) -> None:
    endless_job = ("generate", "--users", "100000000", "--plays", "1000", "--days", "9000")
    options = ("--python", sys.executable, "--workspace", str(tmp_path / "workspace"))
    submit_run = submit(head, *options, "--detach", *endless_job)
    job_id = json.loads(submit_run.stdout)["job"]
    stop_run = submit(head, "--stop", job_id)
    assert (stop_run.returncode, json.loads(stop_run.stdout)["status"]) == (0, "STOPPED")
    assert submit(head, "--attach", job_id).returncode == 130


def test_a_cluster_refuses_a_wrong_token(head: Head, tmp_path: Path) -> None:
    other_token = tmp_path / "other"
    other_token.write_text("0" * 64)
    refused_run = submit(head, "--attach", "some-job", token=other_token)
    assert refused_run.returncode == 2
    assert "rejects the token" in refused_run.stderr
    unknown_job_run = submit(head, "--attach", "some-job")
    assert unknown_job_run.returncode == 2
    assert "Job 'some-job' not found" in unknown_job_run.stderr


def test_an_image_without_rayrec_gives_a_hint(head: Head, tmp_path: Path) -> None:
    result = submit(head, "--workspace", str(tmp_path), "status")
    assert result.returncode == 127
    assert "The cluster has no /opt/rayrec/bin/python; pass the path of its interpreter with --python" in " ".join(
        result.stderr.split()
    )


def test_where_no_cluster_answers_the_address_is_named(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    token = tmp_path / "token"
    token.write_text("0" * 64)
    result = submit(Head(url=url, token=token, address=""), "--workspace", str(tmp_path), "status")
    assert result.returncode == 1
    assert f"no Ray cluster answers at {url}" in result.stderr
