"""A driver, a head and a node as processes with their own addresses and ports, which share a token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from heads import Head, ray_head, ray_node

DRIVER = """
import json, sys, time
import ray
from rayrec.data.synthetic import GenerateConfig
from rayrec.jobs.runtime import run_buckets
from rayrec.jobs.runtime import cluster_cpus, ray_cluster
from rayrec.jobs.generate import generate
from rayrec.storage.workspace import Workspace


class Place:
    def __call__(self, unit):
        time.sleep(1.0)
        return ray.util.get_node_ip_address()


with ray_cluster():
    for _ in range(600):  # until the node has joined
        if cluster_cpus() == 2:
            break
        time.sleep(0.2)
    places = list(run_buckets(Place, range(8), arguments={}))
    manifest = generate(
        Workspace(sys.argv[1]), GenerateConfig(users=300, songs=100, artists=20, genres=4, plays=10.0, buckets=6)
    )
print(json.dumps({"places": sorted(set(places)), "id": manifest.id, "users": manifest.users}))
"""


def run_driver(head: Head, workspace: Path, token: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    command = [sys.executable, "-c", DRIVER, str(workspace)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_job_runs_on_the_nodes_of_a_cluster_that_asks_for_a_token(tmp_path: Path) -> None:
    with ray_head(cpus=1) as head, ray_node(head):
        process = run_driver(head, tmp_path / "workspace", head.token)
        assert process.returncode == 0, process.stderr
        output = json.loads(process.stdout.splitlines()[-1])
        assert len(output["places"]) == 2
        assert "127.0.0.2" in output["places"]
        assert output["users"] == 300
        wrong_token = tmp_path / "token"
        wrong_token.write_text("f" * 64)
        refused_process = run_driver(head, tmp_path / "other", wrong_token)
        assert refused_process.returncode != 0
        assert "rejects the token; set RAY_AUTH_MODE=token" in refused_process.stderr
        assert not (tmp_path / "other").exists()
