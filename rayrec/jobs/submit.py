"""Run a command of rayrec as a job on a Ray cluster and follow it, over the job submission API.

Only the cluster's dashboard port is needed, not Ray's own ports: that is what an SSH tunnel or
`kubectl port-forward` opens.
"""

import asyncio
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from rayrec.display import LINES_VARIABLE
from rayrec.errors import InputError, NotFoundError, RayrecError

API_SERVER = "RAY_API_SERVER_ADDRESS"  # Ray's variable, which it puts above the address it is given
# The interpreter of the image that cluster/Dockerfile builds. Absolute, since a bare `python` is that
# of the shell which started the head.
IMAGE_PYTHON = "/opt/rayrec/bin/python"
POLL_SECONDS = 0.5
MOST_BREAKS = 10  # of the log in a row, with nothing new between them, before following is given up
NOT_FOUND, STOPPED = 127, 130  # exit codes as a shell has them: no such program, interrupted


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """What became of a job."""

    job: str  # submission id
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    exit_code: int | None  # of the command; None while it runs
    message: str  # what Ray says of it
    seconds: float  # since its start

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class Cluster:
    """The job server of one Ray cluster, `http://HOST:8265`.

    `address` None takes RAY_API_SERVER_ADDRESS or RAY_ADDRESS. The token of a cluster that asks for one
    comes from where Ray reads it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Raises `InputError` without an address or with a wrong token, `RayrecError` where no cluster answers.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get(API_SERVER) or os.environ.get("RAY_ADDRESS") or ""
        if not self.address:
            raise InputError(
                f"Missing cluster address; pass --address http://HOST:8265 or set {API_SERVER}. "
                "`ray dashboard cluster/aws.yaml` and `kubectl port-forward` forward that port"
            )
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        with _refusals(self.address), _only_address(self.address):
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        words: Sequence[str],
        *,
        workspace: str | None = None,
        python: str = IMAGE_PYTHON,
        files: str | None = None,
    ) -> str:
        """Start `rayrec WORDS...` on the head node; the job's id.

        `workspace` is one that the whole cluster sees; None where the words name it. `python` is the
        interpreter on the cluster that has rayrec. `files` is a local folder that is uploaded (512 MiB
        at most, what .gitignore names left out) and that the command runs in.

        Raises `InputError` for a workspace or folder that cannot be meant.
        """
        if not Path(python).is_absolute():
            raise InputError(f"python {python!r} is not absolute; expected the path of the interpreter on the cluster")
        if files is not None and not Path(files).is_dir():
            raise InputError(f"files {files!r} is not a folder; expected the folder that the command reads")
        named = [] if workspace is None else ["--workspace", shared_workspace(workspace)]
        environment: dict[str, Any] = {"env_vars": {LINES_VARIABLE: "1"}}
        if files is not None:
            environment["working_dir"] = files
        with _refusals(self.address):
            return str(
                self._client.submit_job(
                    entrypoint="exec " + shlex.join([python, "-m", "rayrec_cli.main", *named, *words]),
                    submission_id=f"rayrec-{words[0]}-{uuid.uuid4().hex[:8]}",
                    runtime_env=environment,
                    metadata={"command": shlex.join(["rayrec", *words])},
                )
            )

    def follow(self, job: str, write: Callable[[str], None]) -> JobEnd:
        """Hand the job's log on from its beginning until it ends; what became of it.

        A stream that breaks is taken up where it broke. Raises `NotFoundError` for an unknown job.
        """
        log, breaks = _Log(self._client, job, write), 0
        while True:
            shown = log.shown
            try:
                end = self.look(job)
                if end.exit_code is not None and log.whole:
                    return end
                asyncio.run(log.copy())
            except InputError:
                raise
            except (RayrecError, OSError, RuntimeError, ClientError) as error:
                breaks = 1 if log.shown > shown else breaks + 1
                if breaks > MOST_BREAKS:
                    raise RayrecError(
                        f"the log of {job} was interrupted {breaks} times: {error}; the job keeps running, "
                        f"follow it with `rayrec submit --attach {job}`"
                    ) from error
            time.sleep(POLL_SECONDS)

    def look(self, job: str) -> JobEnd:
        """Where the job stands now. Raises `NotFoundError` for an unknown job."""
        with _refusals(self.address, job):
            info = self._client.get_job_info(job)
        ended = info.status.is_terminal()
        seconds = ((info.end_time or time.time() * 1000) - (info.start_time or 0)) / 1000 if info.start_time else 0.0
        return JobEnd(
            job=job,
            status=str(info.status),
            exit_code=_exit_code(info.status, info.driver_exit_code) if ended else None,
            message=str(info.message or "").split(", last available logs")[0],
            seconds=round(seconds, 1),
        )

    def stop(self, job: str) -> JobEnd:
        """End a job; where it stands after that. Raises `NotFoundError` for an unknown job."""
        with _refusals(self.address, job):
            self._client.stop_job(job)
        while (end := self.look(job)).exit_code is None:
            time.sleep(POLL_SECONDS)
        return end


class _Log:
    """Hands a job's log on, and after a break nothing that was handed on before it."""

    def __init__(self, client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
        self._client, self._job, self._write = client, job, write
        self.shown = 0  # characters handed on
        self.whole = False  # the server has closed the stream at its end

    async def copy(self) -> None:
        """Until the stream ends; it begins with the job's first line each time."""
        length = 0
        async for text in self._client.tail_job_logs(self._job):
            fresh = text[max(0, self.shown - length) :]
            length += len(text)
            self.shown = max(self.shown, length)
            if fresh:
                self._write(fresh)
        self.whole = True


def shared_workspace(uri: str) -> str:
    """The workspace, where the nodes of a cluster can see it. Raises `InputError` for a relative path."""
    if "://" in uri or Path(uri).is_absolute():
        return uri
    raise InputError(
        f"workspace {uri!r} is a folder of this machine; expected s3://bucket/prefix, gs://bucket/prefix or the "
        "absolute path of a disk that all nodes share"
    )


def _exit_code(status: JobStatus, of_command: int | None) -> int:
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return STOPPED
    return of_command or 1  # none where the command never ran, or its node was lost


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """What the environment says of the address set aside: Ray would put it above the one it is given."""
    before = os.environ.get(API_SERVER)
    os.environ[API_SERVER] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[API_SERVER]
        else:
            os.environ[API_SERVER] = before


@contextmanager
def _refusals(address: str, job: str | None = None) -> Iterator[None]:
    """Ray's errors as ours, in one line."""
    try:
        yield
    except AuthenticationError as error:
        raise InputError(
            f"the cluster at {address} rejects the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's "
            "token, or RAY_AUTH_TOKEN_PATH to its file"
        ) from error
    except OSError as error:
        raise RayrecError(
            f"no Ray cluster answers at {address}; check the address and the port forwarding to its dashboard"
        ) from error
    except RuntimeError as error:
        if job is not None and "404" in str(error):
            raise NotFoundError(f"Job {job!r} not found on the cluster at {address}; see `ray job list`") from error
        raise RayrecError(f"the cluster at {address} rejected the request: {str(error).splitlines()[0]}") from error
