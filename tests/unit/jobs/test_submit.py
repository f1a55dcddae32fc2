"""Following a job's log, and wrong use that is refused without contacting a cluster."""

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from rayrec.errors import InputError, RayrecError
from rayrec.jobs import submit
from rayrec.jobs.submit import Cluster, shared_workspace
from rayrec_cli.main import main

LOG = ["read 1\n", "read 2\nread 3\n", "done\n"]


class BreakingServer:
    """Replaces Ray's client: the i-th time that the log stream is opened, it breaks after `breaks[i]` pieces."""

    def __init__(self, breaks: list[int]) -> None:
        self.breaks = breaks

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        """The log from its first line on."""
        piece_count = self.breaks.pop(0) if self.breaks else None
        for text in LOG[:piece_count]:
            yield text
        if piece_count is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job: str) -> SimpleNamespace:
        """The job, which ends (as failed) once no more breaks are left."""
        status = JobStatus.RUNNING if self.breaks else JobStatus.FAILED
        return SimpleNamespace(status=status, driver_exit_code=3, message="", start_time=1_000, end_time=4_500)


def follow_job(breaks: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[str, submit.JobEnd]:
    """Follow a job; return the log text that was read, and how the job ended."""
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: BreakingServer(breaks))
    cluster = Cluster("http://here:8265")
    pieces: list[str] = []
    end = cluster.follow("job", pieces.append)
    return "".join(pieces), end


@pytest.mark.parametrize("breaks", [[], [1], [0, 2, 2], [1, 1, 2]])
def test_a_broken_log_is_taken_up_where_it_broke(breaks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    log, end = follow_job(breaks, monkeypatch)
    assert log == "".join(LOG)
    assert (end.status, end.exit_code, end.seconds) == ("FAILED", 3, 3.5)


def test_following_ends_with_an_error_if_the_log_keeps_breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RayrecError, match="the job keeps running, follow it with `rayrec submit --attach job`"):
        follow_job([1] * 50, monkeypatch)


@pytest.mark.parametrize("uri", ["s3://music/rayrec", "gs://music/rayrec", "/mnt/shared/rayrec"])
def test_a_workspace_that_nodes_share_is_passed_on(uri: str) -> None:
    assert shared_workspace(uri) == uri


def test_a_folder_of_this_machine_is_no_workspace_of_a_cluster() -> None:
    with pytest.raises(InputError, match="is a folder on this machine"):
        shared_workspace("./workspace")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "pass exactly one of COMMAND, --attach ID and --stop ID"),
        (["--attach", "a", "train"], "pass exactly one of COMMAND, --attach ID and --stop ID"),
        (["--attach", "a", "--stop", "b"], "pass exactly one of COMMAND, --attach ID and --stop ID"),
        (["trian"], "Command 'trian' cannot be submitted"),
        (["submit", "train"], "Command 'submit' cannot be submitted"),
        (["train"], "Missing cluster address; pass --address"),
        (["--address", "x", "status"], "the cluster address is 'x'; expected http://HOST:8265"),
        (["--address", "localhost:8265", "status"], "the cluster address is 'localhost:8265'; expected http://"),
    ],
)
def test_wrong_use_is_refused_before_a_cluster_is_contacted(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["submit", *words]) == 2
    assert message in capsys.readouterr().err
