"""Replicas of a node that load together: each byte is read once, and large arrays take no private memory."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rayrec.errors import DamagedArtifactError
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.object_storage import CACHE_VARIABLE
from rayrec.storage.workspace import Workspace

NUM_REPLICAS = 4
REPLICA_PROGRAM = """
import sys
from rayrec.storage import artifacts
from rayrec.storage.workspace import Workspace

def read():
    return int(open("/proc/self/io").read().split()[1])

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

workspace = Workspace(sys.argv[1])
manifest = artifacts.load_manifest(workspace, "models", "large")
read_before, private_before = read(), private()
artifacts.verify(workspace, manifest, once_per_node=True)
vectors = workspace.read_array(manifest.path("vectors.npy"))
assert vectors[len(vectors) // 2] == 0
print(read() - read_before, private() - private_before)
"""


def write_sparse_model(workspace: Workspace, size: int) -> Manifest:
    """A model whose vectors are `size` bytes of zeros that take no space on disk."""
    manifest = Manifest(kind="models", id="large", inputs={})
    workspace.write_array(manifest.path("vectors.npy"), np.zeros(1, np.float32))
    path = Path(workspace.full(manifest.path("vectors.npy")))
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size // 4,))
    return artifacts.publish(workspace, manifest, ["vectors.npy"])


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/io: run it on Linux")
@pytest.mark.parametrize("size", [1 << 26, pytest.param(10 * 1_000_000_000, marks=pytest.mark.slow)])
def test_replicas_of_a_node_read_each_byte_once(
    workspace: Workspace, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    write_sparse_model(workspace, size)

    def load(_: int) -> list[int]:
        command = [sys.executable, "-c", REPLICA_PROGRAM, workspace.root]
        return [int(word) for word in subprocess.run(command, capture_output=True, check=True).stdout.split()]

    with ThreadPoolExecutor(NUM_REPLICAS) as pool:
        measurements = list(pool.map(load, range(NUM_REPLICAS)))
    read_bytes = sum(replica_bytes for replica_bytes, _ in measurements)
    assert size <= read_bytes < size + NUM_REPLICAS * 1_000_000
    assert max(private_kb for _, private_kb in measurements) < 40_000  # kB


def test_a_file_that_changed_is_read_again_and_refused(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    manifest = write_sparse_model(workspace, 4_000_000)
    artifacts.verify(workspace, manifest, once_per_node=True)
    workspace.write_array(manifest.path("vectors.npy"), np.ones(1_000_000, np.float32))
    with pytest.raises(DamagedArtifactError, match="does not match the checksum"):
        artifacts.verify(workspace, manifest, once_per_node=True)
