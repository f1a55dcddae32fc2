"""Every stage on a local S3 server whose requests fail now and then: everything comes out whole."""

from collections.abc import Iterator

import pytest
from s3 import S3Server, s3_server

from rayrec import releases
from rayrec.jobs.pipeline import run
from rayrec.verifying.verify import verify_workspace
from rayrec.workspace import Workspace

pytest.importorskip("moto.server")

TINY = {
    "generate": {"users": 80, "songs": 60, "artists": 12, "genres": 4, "plays": 30.0, "buckets": 2, "playlists": 30},
    "split": {"test_days": 30.0, "validation_days": 10.0},
    "embed": {"dim": 8, "epochs": 1},
    "train": {"hidden_dim": 8, "epochs": 1, "negatives": 16, "workers": 0},
    "evaluate": {"bootstrap_samples": 10, "max_curve_users": 10, "models": ["taste", "popularity"]},
}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_on_storage_that_fails_now_and_then_is_whole(server: S3Server) -> None:
    workspace = Workspace(server.uri("run"))
    server.fail(0.02)
    outcomes = run(workspace, TINY)
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert server.counts()["failed"] > 0
    server.fail(0.0)
    audit = verify_workspace(workspace)
    assert (audit.problems, audit.notes) == ([], [])
    live = releases.active_release(workspace)
    assert live is not None
    releases.verify_release(workspace, live)
    assert {outcome.status for outcome in run(workspace, TINY)} == {"skipped"}
