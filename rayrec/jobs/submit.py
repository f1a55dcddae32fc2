"""Runs a command of rayrec as a job on a Ray cluster and follows it, through Ray's job submission API.

Only the port of the cluster's dashboard is needed, which an SSH tunnel or `kubectl port-forward` opens, not Ray's other
ports.
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
from rayrec.errors import InputError, NotFoundError, RayrecError, token_rejected
from rayrec.storage.object_storage import require_no_credentials

API_SERVER = "RAY_API_SERVER_ADDRESS"  # Ray's variable, which overrides the address passed to Ray
# The interpreter of the image that cluster/Dockerfile builds. The path is absolute, because `python` alone would be the
# interpreter of the shell that started the head node.
IMAGE_PYTHON = "/opt/rayrec/bin/python"
POLL_SECONDS = 0.5
MOST_BREAKS = 10  # interruptions of the log in a row, without new text, after which `follow` gives up
NOT_FOUND, STOPPED = 127, 130  # exit codes as in a shell: command not found, interrupted


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """The state of a job."""

    job: str  # submission id
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    exit_code: int | None  # exit code of the command; None while it runs
    message: str  # Ray's message about the job
    seconds: float  # from its start to its end, or to now while it runs

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class Cluster:
    """The job server of one Ray cluster, `http://HOST:8265`.

    `address` is by default that in RAY_API_SERVER_ADDRESS or RAY_ADDRESS. If the cluster needs a token, Ray reads it
    from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Raises `InputError` without an address, for one that is no http:// or https:// URL and with a wrong token, and
    `RayrecError` if no cluster answers.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get(API_SERVER) or os.environ.get("RAY_ADDRESS") or ""
        if not self.address:
            raise InputError(
                f"Missing cluster address; pass --address http://HOST:8265 or set {API_SERVER}. "
                "`ray dashboard cluster/aws.yaml` and `kubectl port-forward` forward that port"
            )
        if not self.address.startswith(("http://", "https://")):
            raise InputError(f"the cluster address is {self.address!r}; expected http://HOST:8265, its dashboard")
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        with _convert_errors(self.address), _set_address(self.address):
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        words: Sequence[str],
        *,
        workspace: str | None = None,
        python: str = IMAGE_PYTHON,
        files: str | None = None,
    ) -> str:
        """Start `rayrec WORDS...` on the head node; return the job's id.

        `workspace` must be visible to the whole cluster; it is None if `words` name it. `python` is the absolute path
        of the interpreter on the cluster that has rayrec. `files` is a local folder that is uploaded (at most 512 MiB,
        without the files that .gitignore names); the command runs in it.

        Raises `InputError` for a relative path `python` or `workspace`, and if `files` is not a folder.
        """
        if not Path(python).is_absolute():
            raise InputError(f"--python is {python!r}; expected the absolute path of the interpreter on the cluster")
        if files is not None and not Path(files).is_dir():
            raise InputError(f"--files {files!r} is not a folder; expected the folder that the command reads")
        workspace_options = [] if workspace is None else ["--workspace", shared_workspace(workspace)]
        environment: dict[str, Any] = {"env_vars": {LINES_VARIABLE: "1"}}
        if files is not None:
            environment["working_dir"] = files
        with _convert_errors(self.address):
            return str(
                self._client.submit_job(
                    entrypoint="exec " + shlex.join([python, "-m", "rayrec_cli.main", *workspace_options, *words]),
                    submission_id=f"rayrec-{words[0]}-{uuid.uuid4().hex[:8]}",
                    runtime_env=environment,
                    metadata={"command": shlex.join(["rayrec", *words])},
                )
            )

    def follow(self, job: str, write: Callable[[str], None]) -> JobEnd:
        """Pass the job's log to `write` from its beginning until the job ends; return the job's final state.

        After an interruption the log continues where it stopped. Raises `NotFoundError` for an unknown job, and
        `RayrecError` after more than `MOST_BREAKS` interruptions in a row without new text.
        """
        log, breaks = _Log(self._client, job, write), 0
        while True:
            shown_before = log.shown_characters
            try:
                end = self.job_state(job)
                if end.exit_code is not None and log.is_complete:
                    return end
                asyncio.run(log.copy())
            except InputError:
                raise
            except (RayrecError, OSError, RuntimeError, ClientError) as error:
                breaks = 1 if log.shown_characters > shown_before else breaks + 1
                if breaks > MOST_BREAKS:
                    raise RayrecError(
                        f"the log of {job} was interrupted {breaks} times: {error}; the job keeps running, "
                        f"follow it with `rayrec submit --attach {job}`"
                    ) from error
            time.sleep(POLL_SECONDS)

    def job_state(self, job: str) -> JobEnd:
        """Return the current state of a job. Raises `NotFoundError` for an unknown job."""
        with _convert_errors(self.address, job):
            info = self._client.get_job_info(job)
        has_ended = info.status.is_terminal()
        seconds = ((info.end_time or time.time() * 1000) - (info.start_time or 0)) / 1000 if info.start_time else 0.0
        return JobEnd(
            job=job,
            status=str(info.status),
            exit_code=_exit_code(info.status, info.driver_exit_code) if has_ended else None,
            message=str(info.message or "").split(", last available logs")[0],
            seconds=round(seconds, 1),
        )

    def stop(self, job: str) -> JobEnd:
        """Stop a job and return its final state. Raises `NotFoundError` for an unknown job."""
        with _convert_errors(self.address, job):
            self._client.stop_job(job)
        while (end := self.job_state(job)).exit_code is None:
            time.sleep(POLL_SECONDS)
        return end


class _Log:
    """Passes a job's log to `write`; text from before an interruption is not passed on again."""

    def __init__(self, client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
        self._client, self._job, self._write = client, job, write
        self.shown_characters = 0  # characters passed to `write`
        self.is_complete = False  # True if the server has closed the stream after the whole log

    async def copy(self) -> None:
        """Pass on new text until the stream ends. Each stream begins with the job's first line."""
        stream_length = 0
        async for text in self._client.tail_job_logs(self._job):
            new_text = text[max(0, self.shown_characters - stream_length) :]
            stream_length += len(text)
            self.shown_characters = max(self.shown_characters, stream_length)
            if new_text:
                self._write(new_text)
        self.is_complete = True


def shared_workspace(uri: str) -> str:
    """Return `uri` if all nodes of a cluster can use it as a workspace.

    Raises `InputError` for a relative path, and for a URI with a key or password, which Ray's dashboard would show.
    """
    require_no_credentials(uri, "workspace")
    if "://" in uri or Path(uri).is_absolute():
        return uri
    raise InputError(
        f"workspace {uri!r} is a folder on this machine; expected s3://bucket/prefix, gs://bucket/prefix or the "
        "absolute path of a disk that all nodes share"
    )


def _exit_code(status: JobStatus, command_exit_code: int | None) -> int:
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return STOPPED
    return command_exit_code or 1  # None if the command never ran or its node was lost


@contextmanager
def _set_address(address: str) -> Iterator[None]:
    """Set `RAY_API_SERVER_ADDRESS` to `address` in a block, because Ray prefers it to the address passed to it."""
    previous_address = os.environ.get(API_SERVER)
    os.environ[API_SERVER] = address
    try:
        yield
    finally:
        if previous_address is None:
            del os.environ[API_SERVER]
        else:
            os.environ[API_SERVER] = previous_address


@contextmanager
def _convert_errors(address: str, job: str | None = None) -> Iterator[None]:
    """Convert Ray's errors in a block to rayrec's errors with one-line messages."""
    try:
        yield
    except AuthenticationError as error:
        raise token_rejected(address) from error
    except OSError as error:
        raise RayrecError(
            f"no Ray cluster answers at {address}; check the address and the port forwarding to its dashboard"
        ) from error
    except RuntimeError as error:
        if job is not None and "404" in str(error):
            raise NotFoundError(f"Job {job!r} not found on the cluster at {address}; see `ray job list`") from error
        raise RayrecError(f"the cluster at {address} rejected the request: {str(error).splitlines()[0]}") from error
