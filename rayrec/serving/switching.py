"""Change the live release of a running application, and wait until all of its replicas answer with it.

Where one refuses the release, or not all of them take it in time, the old release is made the live one again.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rayrec.errors import RayrecError
from rayrec.serving.auth import KEY_VARIABLE
from rayrec.serving.reports import Report, Reports
from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

POLL_SECONDS = 0.2
ASK_SECONDS = 5.0  # for an application's answer


@dataclass(frozen=True, kw_only=True)
class Wait:
    """How to wait for the replicas."""

    url: str | None = None  # of the application; None: read what the replicas report into the workspace
    seconds: float = 120.0  # until it is given up


def switch(workspace: Workspace, change: Callable[[], Manifest], wait: Wait) -> Manifest:
    """Run `change`, which makes another release live, and return it once all replicas answer with it.

    Raises `RayrecError` where they do not, after the earlier release was restored; also where another change
    comes between, which is then left alone.
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


def _wait(workspace: Workspace, release_id: str, change: str, wait: Wait) -> None:
    until = time.monotonic() + wait.seconds
    problem = "no answer yet"
    while time.monotonic() < until:
        if releases.read_active(workspace)["change"] != change:
            raise RayrecError(f"another change of the live release came before all replicas had {release_id}")
        try:
            reports = ask(wait.url) if wait.url else Reports(workspace).fresh()
        except OSError as error:  # also of urllib: not there, or not yet
            problem = f"{wait.url} does not answer: {error}"
        else:
            problem = _missing(reports, release_id, change)
            if not problem:
                return
        time.sleep(POLL_SECONDS)
    raise RayrecError(f"the replicas did not all take release {release_id} within {wait.seconds:g} seconds: {problem}")


def _missing(reports: list[Report], release_id: str, change: str) -> str:
    """What is missing until all answer with a release; nothing: they do. Raises `RayrecError` where one refuses it."""
    if not reports:
        return "no application runs on this workspace"
    acted = [report for report in reports if report.change == change]
    for report in acted:
        if report.release != release_id:
            reason = report.refused["reason"] if report.refused else f"it answers with {report.release}"
            raise RayrecError(f"replica {report.replica} refuses release {release_id}: {reason}")
    late = [report.replica for report in reports if report.change != change]
    return f"{len(late)} of {len(reports)} have not, such as {late[0]}" if late else ""


def ask(url: str) -> list[Report]:
    """What all replicas of an application at a URL stand at.

    Raises `OSError` where it does not answer, `RayrecError` where it says no: keys come from the environment.
    """
    headers = {}
    if os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/release", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as response:
            told: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise RayrecError(f"{url} wants a key; set {KEY_VARIABLE} to one of role read or admin") from error
        raise
    return [Report(**report) for report in told["replicas"]]
