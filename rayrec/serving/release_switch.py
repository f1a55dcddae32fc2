"""Change the live release of a running application, and wait until all of its replicas answer with it.

Where a replica refuses the release, the earlier one is made live again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rayrec.client import KEY_VARIABLE, ApiError, ApiUnavailableError, Client, Retry
from rayrec.errors import RayrecError
from rayrec.serving.live_release import STALE_SECONDS, Report, Reports, ReportWatch
from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

POLL_SECONDS = 0.2
ANSWER_SECONDS = 5.0  # for one answer of the application


@dataclass(frozen=True, kw_only=True)
class SwitchWait:
    """How to wait for the replicas."""

    url: str | None = None  # of the application; None: read the replicas' reports from the workspace
    seconds: float | None = None  # at most; None: as long as live replicas load
    absent_seconds: float = STALE_SECONDS  # without any live replica, or any answer of the application
    tell: Callable[[str], None] = lambda text: None  # called with the progress whenever it changes


def switch(workspace: Workspace, change: Callable[[], Manifest], wait: SwitchWait) -> Manifest:
    """Run `change`, which makes another release live, and return it once all live replicas answer with it.

    Raises `RayrecError` where one refuses it, none is alive or the time is over, after the earlier release was
    restored; also where another change comes between, which is then left alone.
    """
    before = releases.read_active(workspace)
    release = change()
    mine = releases.read_active(workspace)["change"]
    try:
        _wait(workspace, release.id, mine, wait)
    except RayrecError as error:
        if releases.read_active(workspace)["change"] != mine:
            raise
        releases.write_active(workspace, before["active"], before["history"])
        raise RayrecError(f"{error}; release {before['active'] or 'none'} is the live one again") from error
    return release


def _wait(workspace: Workspace, release_id: str, change: str, wait: SwitchWait) -> None:
    began = present = time.monotonic()
    reports_of, watch = Reports(workspace), ReportWatch()
    problem = last = ""
    while True:
        if releases.read_active(workspace)["change"] != change:
            raise RayrecError(f"another change of the live release came before all replicas had {release_id}")
        try:
            alive = watch.alive(fetch_reports(wait.url)) if wait.url else reports_of.alive()
        except ApiUnavailableError as error:  # not there, or not yet
            problem = str(error)
        else:
            problem = _missing(alive, release_id, change)
            if not problem:
                return
            present = time.monotonic() if alive else present
        if problem != last:
            wait.tell(f"Waiting for release {release_id}: {problem}")
            last = problem
        now = time.monotonic()
        if now - present > wait.absent_seconds or (wait.seconds is not None and now - began > wait.seconds):
            raise RayrecError(
                f"the replicas did not all take release {release_id} within {now - began:.0f} seconds: {problem}"
            )
        time.sleep(POLL_SECONDS)


def _missing(alive: list[Report], release_id: str, change: str) -> str:
    """What is missing until all replicas answer with a release, empty: nothing. Raises `RayrecError` for a refusal."""
    if not alive:
        return "no application runs on this workspace"
    for report in alive:
        if report.change == change and report.release != release_id:
            reason = report.refused["reason"] if report.refused else f"it answers with {report.release}"
            raise RayrecError(f"replica {report.replica} refuses release {release_id}: {reason}")
    late = [report for report in alive if report.change != change]
    loading = sum(report.loading == release_id for report in late)
    return f"{len(alive) - len(late)} of {len(alive)} replicas answer with it, {loading} are loading it" if late else ""


def fetch_reports(url: str) -> list[Report]:
    """The reports of all replicas of an application at a URL; the key comes from the environment.

    Raises `ApiUnavailableError` where it does not answer, `RayrecError` where it refuses the key.
    """
    try:
        with Client(url, retry=Retry(retries=0, timeout=ANSWER_SECONDS)) as client:
            return [Report(**report) for report in client.release()["replicas"]]
    except ApiError as error:
        if error.status in (401, 403):
            raise RayrecError(f"{url} needs a key; set {KEY_VARIABLE} to one of role read or admin") from error
        raise ApiUnavailableError(str(error)) from error
