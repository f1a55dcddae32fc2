"""`rayrec run` killed at planted moments: nothing half-written is read, and the result is that of one whole run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from rayrec.data.dataset import Dataset
from rayrec.evaluation.report import read_results
from rayrec.jobs.pipeline import run
from rayrec.model.taste_table import tastes_file
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import sha256
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace

KINDS = ("songs", "models", "tastes", "indexes", "reports")
BUCKETS = 4
COMMAND = [sys.executable, "-c", "import sys; from rayrec_cli.main import main; sys.exit(main())"]
PIPELINE = f"""
[import]
format = "csv"
paths = ["plays"]
buckets = {BUCKETS}
[split]
test_days = 10
validation_days = 5
[embed]
dim = 8
epochs = 2
workers = 1
session_gap_minutes = 2000
[train]
hidden_dim = 8
epochs = 2
negatives = 16
workers = 0
[evaluate]
bootstrap_samples = 20
max_curve_users = 20
models = ["taste", "popularity"]
"""
# Stage -> patterns of files: the run is killed when it has written a file of one pattern, drawn by the seed.
MOMENTS = {
    "read": ("dataset/.staging/pieces/*", "dataset/.staging/pieces/*/result.json"),
    "merge": ("dataset/.staging/*/buckets/*.json", "dataset/dataset.json"),
    "embed": ("songs/*/vectors.npy",),
    "train": ("models/*/run/*_counts.npy", "models/*/model.safetensors"),
    "taste": ("tastes/*/bucket=*/tastes.parquet", "tastes/*/manifest.json"),
    "end": ("indexes/*/*", "reports/*/*", "releases/*/manifest.json"),
}
SEED = int(os.environ.get("RAYREC_TEST_SEED", "1"))


def write_plays(folder: Path) -> None:
    folder.mkdir()
    for file in range(4):
        lines = ["user,song,played_at"]
        for user in range(20):
            start = 1_420_000_000 + 86_400 * (user % 40)
            lines += [f"u{file}-{user},s{(user * 7 + step * step) % 60},{start + step * 90_000}" for step in range(30)]
        (folder / f"plays-{file}.csv").write_text("\n".join(lines) + "\n")


def start_run(workspace: Path, file: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("RAY_ADDRESS", None)
    command = [*COMMAND, "--workspace", str(workspace), "run", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_at(workspace: Path, file: Path, moment: str) -> bool:
    """Start the run and kill it when a new file matches `moment`; return False if the run ended before."""
    paths_before = set(workspace.glob(moment))
    with start_run(workspace, file) as driver:
        while driver.poll() is None:
            if set(workspace.glob(moment)) - paths_before:
                children = psutil.Process(driver.pid).children(recursive=True)
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                _, alive = psutil.wait_procs(children, timeout=90)
                assert not alive, "Ray's processes outlive a killed driver"
                return True
            time.sleep(0.002)
    assert driver.returncode == 0
    return False


def check_sound(workspace: Workspace) -> None:
    """Fail unless every artifact and the data set, if any, are complete and undamaged."""
    for kind in (*KINDS, "releases"):
        for manifest in artifacts.listing(workspace, kind):
            artifacts.verify(workspace, manifest)
    if workspace.exists(DATASET_MANIFEST):
        dataset = Dataset(workspace)
        for name, digest in dataset.manifest.files.items():
            assert sha256(workspace, f"dataset/{name}") == digest
        assert sum(batch.num_plays for batch in dataset.read_all()) == dataset.manifest.plays


def artifact_ids(workspace: Workspace) -> dict[str, list[str]]:
    return {kind: [manifest.id for manifest in artifacts.listing(workspace, kind)] for kind in KINDS}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("cluster")
def test_a_run_killed_in_every_stage_ends_like_an_undisturbed_run(tmp_path: Path) -> None:
    write_plays(tmp_path / "plays")
    file = tmp_path / "pipeline.toml"
    file.write_text(PIPELINE)
    undisturbed, folder = Workspace(tmp_path / "whole"), tmp_path / "killed"
    run(undisturbed, file)
    resumed = Workspace(folder)
    random_generator, killed_stages = random.Random(SEED), []
    for stage, moments in MOMENTS.items():
        if kill_at(folder, file, random_generator.choice(moments)):
            killed_stages.append(stage)
        check_sound(resumed)
    assert set(MOMENTS) - set(killed_stages) <= {"end"}  # a run may end before it can be killed at its last files
    with start_run(folder, file) as driver:
        _, errors = driver.communicate(timeout=600)
    assert driver.returncode == 0, errors.decode()
    check_sound(resumed)
    assert artifact_ids(resumed) == artifact_ids(undisturbed)
    (actual_release,), (expected_release,) = (releases.list_releases(workspace) for workspace in (resumed, undisturbed))
    assert actual_release.inputs == expected_release.inputs  # ids differ: they depend on when the parts were made
    assert Dataset(resumed).manifest.id == Dataset(undisturbed).manifest.id
    for name in ("model.safetensors", "song_vectors.npy"):
        (model,) = artifact_ids(undisturbed)["models"]
        assert resumed.read_bytes(f"models/{model}/{name}") == undisturbed.read_bytes(f"models/{model}/{name}")
    (tastes,) = artifact_ids(undisturbed)["tastes"]
    actual_tastes, expected_tastes = (
        pa.concat_tables([workspace.read_table(tastes_file(f"tastes/{tastes}", bucket)) for bucket in range(BUCKETS)])
        for workspace in (resumed, undisturbed)
    )
    assert actual_tastes.equals(expected_tastes)
    (report,), (expected_report,) = (artifacts.listing(workspace, "reports") for workspace in (resumed, undisturbed))
    assert read_results(resumed, report)["results"] == read_results(undisturbed, expected_report)["results"]
    live_release = releases.active_release(resumed)
    assert live_release is not None
    releases.verify_release(resumed, live_release)
