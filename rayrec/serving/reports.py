"""What the replicas say of themselves: one small file each in the workspace.

Files, and no actor or endpoint: whoever can activate a release can read them, with Ray or without, from
inside the cluster or outside; a replica that dies just stops renewing its own.
"""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rayrec.errors import RayrecError
from rayrec.serving.serve_config import REPORT_SECONDS
from rayrec.storage.workspace import Workspace

FOLDER = "serving/replicas"
STALE_SECONDS = 4 * REPORT_SECONDS  # a report older than this is of a replica that is gone
FORGOTTEN_SECONDS = 3600.0

Role = Literal["app", "model", "index"]  # model and index where they are deployments of their own


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where one replica stands."""

    replica: str
    role: Role
    release: str | None  # that it answers with
    change: str | None  # the activation that it acted on last
    refused: dict[str, str] | None  # the release that it could not load, with the reason
    at: float  # seconds since 1970

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class Reports:
    """Reads and writes the reports of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def write(self, report: Report) -> None:
        """Renew a replica's report."""
        self._workspace.write_json(_path(report.replica), report.to_mapping())

    def remove(self, replica: str) -> None:
        """A replica ends."""
        self._workspace.delete(_path(replica))

    def fresh(self) -> list[Report]:
        """The reports of the replicas that are alive; those of long ago are cleared away."""
        found, now = [], time.time()
        for path in self._workspace.files(FOLDER):
            try:
                report = Report(**self._workspace.read_json(path))
            except (RayrecError, OSError, ValueError, TypeError):  # gone in between, or not ours
                continue
            if now - report.at <= STALE_SECONDS:
                found.append(report)
            elif now - report.at > FORGOTTEN_SECONDS:
                self._workspace.delete(path)
        return found


def _path(replica: str) -> str:
    return f"{FOLDER}/{re.sub(r'[^A-Za-z0-9_-]', '-', replica)}.json"
