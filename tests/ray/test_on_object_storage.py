"""Stages on a local S3 server give complete results even if some requests fail, or if the run is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import S3Server, s3_server

from rayrec.data.dataset import Dataset
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.pipeline import run
from rayrec.jobs.verify import verify_workspace
from rayrec.storage import locking, releases
from rayrec.storage.workspace import Workspace

pytest.importorskip("moto.server", reason="no moto: pip install 'rayrec[dev]'")

TINY = {
    "generate": {"users": 80, "songs": 60, "artists": 12, "genres": 4, "plays": 30.0, "buckets": 2, "playlists": 30},
    "split": {"test_days": 30.0, "validation_days": 10.0},
    "embed": {"dim": 8, "epochs": 1},
    "train": {"hidden_dim": 8, "epochs": 1, "negatives": 16, "workers": 0},
    "evaluate": {"bootstrap_samples": 10, "max_curve_users": 10, "models": ["taste", "popularity"]},
}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_on_storage_that_sometimes_fails_gives_complete_results(server: S3Server) -> None:
    workspace = Workspace(server.uri("run"))
    server.fail(0.02)
    outcomes = run(workspace, TINY)
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert server.counts()["failed"] > 0
    server.fail(0.0)
    audit = verify_workspace(workspace)
    assert (audit.problems, audit.notes) == ([], [])
    live_release = releases.active_release(workspace)
    assert live_release is not None
    releases.verify_release(workspace, live_release)
    assert {outcome.status for outcome in run(workspace, TINY)} == {"skipped"}


# Runs `rayrec` with a lock that names another machine, `elsewhere`.
DRIVER = """
import sys
from types import SimpleNamespace
from rayrec.storage import locking
from rayrec_cli.main import main
locking.socket = SimpleNamespace(gethostname=lambda: "elsewhere")
sys.exit(main(sys.argv[1:]))
"""


def write_plays(folder: Path, first_user: int, files: int = 6) -> ImportConfig:
    folder.mkdir()
    for file in range(files):
        rows = [f"u{first_user + row % 20},s{row % 30},{1_400_000_000 + file * 7_000 + row * 60}" for row in range(100)]
        (folder / f"{file}.csv").write_text("\n".join(["user,song,played_at", *rows]) + "\n")
    return ImportConfig(format="csv", paths=(str(folder),), buckets=2)


def content(workspace: Workspace) -> dict[str, list[tuple[int, str]]]:
    """Return user -> (ms, song id) of every play; fail if a user occurs twice."""
    dataset = Dataset(workspace)
    song_ids = dataset.catalog().table.column("song_id").to_pylist()
    result: dict[str, list[tuple[int, str]]] = {}
    for batch in dataset.read_all():
        for row, user in enumerate(batch.user_ids.tolist()):
            assert user not in result
            span = slice(batch.offsets[row], batch.offsets[row + 1])
            songs = [song_ids[song] for song in batch.songs[span]]
            result[user] = list(zip(batch.played_at[span].tolist(), songs, strict=True))
    return result


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_append_killed_on_another_machine_is_resumed_once_its_lock_was_watched(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(server.uri("killed"))
    base = import_data(workspace, write_plays(tmp_path / "base", 0))
    more_config = write_plays(tmp_path / "more", 10)  # users 10 to 19 are in the data set already
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("RAY_ADDRESS", None)
    command = ["--workspace", workspace.uri, "import", "csv", str(tmp_path / "more"), "--append", "--buckets", "2"]
    with subprocess.Popen([sys.executable, "-c", DRIVER, *command], env=environment) as driver:
        while driver.poll() is None and not workspace.files("dataset/.staging/pieces"):
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL, "it was over before it could be killed"
    holder = locking.lock_holder(workspace)
    assert holder is not None
    assert holder.host == "elsewhere"
    assert Dataset(workspace).manifest == base

    monkeypatch.setattr(locking, "RENEW_SECONDS", 0.3)
    monkeypatch.setattr(locking, "WATCH_SECONDS", 2.0)
    result = append_plays(workspace, more_config)
    assert locking.lock_holder(workspace) is None
    expected_workspace = Workspace(tmp_path / "together")
    import_data(expected_workspace, more_config.replace(paths=(str(tmp_path / "base"), *more_config.paths)))
    assert content(workspace) == content(expected_workspace)
    assert result.dataset.parts == base.parts + 1
    audit = verify_workspace(workspace)
    assert audit.problems == []
    assert [note.path for note in audit.notes] == ["dataset"]  # replaced files are kept until `rayrec clean`
