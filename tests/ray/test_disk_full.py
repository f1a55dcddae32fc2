"""A stage on a full disk reports it and exits with 1, leaves no partial result, and completes once there is space.

The disk is a file system in memory in its own mount namespace; the tests are skipped if they may not create one.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import NUM_SONGS, model_config, network
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.jobs.verify import verify_workspace
from rayrec.model.checkpoint import save_model
from rayrec.model.taste_table import tastes_file
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest, publish, sha256, write_dataset_manifest
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace

NAMESPACE = ("unshare", "--mount", "--map-root-user")
RAYREC = f"{sys.executable} -c 'import sys; from rayrec_cli.main import main; sys.exit(main())'"
# Runs the stage and `rayrec verify` on a small disk, then both again on a large one, and copies the workspace out.
# $1: mount point; $2: workspace to start from; $3: bytes of the small disk; $4: target of the copy; rest: the stage.
SCRIPT = f"""
disk=$1 before=$2 small=$3 after=$4
shift 4
mount -t tmpfs -o size=$small none $disk && cp -r $before $disk/place || exit 77
for size in $small 512m; do
    mount -o remount,size=$size none $disk
    {RAYREC} --workspace $disk/place "$@" >/dev/null 2>$after.told
    echo $? "$(tail -n 1 $after.told)"
    {RAYREC} --workspace $disk/place verify >/dev/null 2>&1
    echo $?
    (cd $disk/place && find . -type f) | sort >$after.$size
done
cp -r $disk/place $after
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SPARE = 300_000  # bytes that are free on the small disk when the stage begins


def can_mount() -> bool:
    """Return True if this machine permits a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def bytes_on_disk(folder: Path) -> int:
    """Return the bytes of all files in whole pages, as a file system in memory counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


class Runs:
    """Runs a stage on a small, then on a large disk; holds exit codes, last error line, files and final workspace."""

    def __init__(self, folder: Path, source: Path, *stage: str) -> None:
        (folder / "disk").mkdir()
        size, target = str(bytes_on_disk(source) + SPARE), folder / "after"
        command = [*NAMESPACE, "sh", "-c", SCRIPT, "sh", str(folder / "disk"), str(source), size, str(target), *stage]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=800)
        line_when_full, self.audit_when_full, line_after, self.audit_after = process.stdout.splitlines()
        self.exit_when_full, _, self.last_error_line = line_when_full.partition(" ")
        self.exit_after = line_after.partition(" ")[0]
        self.paths_when_full = Path(f"{target}.{size}").read_text().split()
        self.workspace = Workspace(target)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A temporary folder for one run; skips the test if no disk can be mounted."""
    if not can_mount():
        pytest.skip("no mounting in a namespace: run it where `unshare --mount --map-root-user` is permitted")
    return tmp_path


def check(runs: Runs, completed_path: str) -> None:
    assert runs.exit_when_full == "1"
    assert runs.last_error_line.startswith("rayrec: no space left to write ")
    assert "No space left on device" in runs.last_error_line
    assert runs.last_error_line.endswith("free some space and run the command again: completed work is kept")
    assert runs.audit_when_full == "0"
    assert any(completed_path in path for path in runs.paths_when_full), runs.paths_when_full
    assert (runs.exit_after, runs.audit_after) == ("0", "0")
    audit = verify_workspace(runs.workspace)
    assert (audit.problems, audit.notes) == ([], [])


def test_an_import_says_that_the_disk_is_full_and_goes_on_when_there_is_room(folder: Path) -> None:
    (folder / "before").mkdir()
    (folder / "plays").mkdir()
    for file in range(24):
        rows = range(file * 2_500, (file + 1) * 2_500)
        lines = [f"user-{row % 500},song-{row * 7919 % 3_000},{1_400_000_000 + row * 600}" for row in rows]
        (folder / "plays" / f"{file}.csv").write_text("\n".join(["user,song,played_at", *lines]) + "\n")
    runs = Runs(folder, folder / "before", "import", "csv", str(folder / "plays"), "--buckets", "4")
    check(runs, "/.staging/pieces/")
    assert not any(path.endswith(DATASET_MANIFEST) for path in runs.paths_when_full)
    manifest = Dataset(runs.workspace).manifest
    assert (manifest.read, manifest.plays, manifest.users) == (60_000, 60_000, 500)


def test_tastes_say_that_the_disk_is_full_and_go_on_with_the_missing_buckets(folder: Path) -> None:
    source = Workspace(folder / "before")
    histories = random_histories(6_000, NUM_SONGS, longest=6)
    manifest = write_dataset(source, histories.take(histories.lengths > 0), NUM_SONGS, buckets=16).manifest
    files = {path.removeprefix("dataset/"): sha256(source, path) for path in source.files("dataset")}
    files.pop("dataset.json")
    write_dataset_manifest(source, replace(manifest, files=files))
    names = save_model(source, "models/m", network(model_config()), np.ones(NUM_SONGS, dtype=bool))
    publish(source, Manifest(kind="models", id="m", inputs={"dataset": manifest.id}), names)
    runs = Runs(folder, Path(source.root), "taste")
    check(runs, "/tastes.parquet")
    assert not any("tastes/" in path and path.endswith("manifest.json") for path in runs.paths_when_full)
    (tastes,) = artifacts.listing(runs.workspace, "tastes")
    assert 0 < tastes.metrics["buckets_computed"] < 16
    rows = [runs.workspace.read_table(tastes_file(tastes.folder, bucket)).num_rows for bucket in range(16)]
    assert sum(rows) == manifest.users
