"""Follow which release is live: load it beside the one that answers, swap them whole, refuse what is broken."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from rayrec.errors import RayrecError
from rayrec.serving.problems import NotReadyError
from rayrec.serving.reports import Report, Reports, Role
from rayrec.serving.serve_config import REPORT_SECONDS
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace

RETRY_SECONDS = 60.0  # before a refused release is tried again, should it have been repaired

log = logging.getLogger(__name__)


class Held(Protocol):
    """What a replica holds of a release."""

    @property
    def id(self) -> str:
        """The release's id."""


H = TypeVar("H", bound=Held)


@dataclass
class ReleaseHolder(Generic[H]):
    """Holds the live release of one replica, and moves it after `releases/active`.

    A new release is loaded beside the live one, which answers meanwhile; one that cannot be trusted is
    refused, and the old one stays. `report` tells the other replicas, and whoever waits for a switch.
    """

    workspace: Workspace
    load: Callable[[str], H]  # by the id of the release
    reports: Reports
    replica: str
    watch_seconds: float
    role: Role = "app"
    on_switch: Callable[[H], None] = lambda live: None
    _live: H | None = None
    _change: str | None = None  # the activation that was acted on last
    _refused: dict[str, str] | None = None  # id and reason
    _refused_at: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def live(self) -> H:
        """The release to answer with. Raises `NotReadyError` where none is loaded yet."""
        live = self._live
        if live is None:
            why = f": {self._refused['reason']}" if self._refused else ""
            raise NotReadyError(f"no release is loaded{why or '; make one live with `rayrec release activate ID`'}")
        return live

    def report(self) -> Report:
        """What this replica stands at."""
        return Report(
            replica=self.replica,
            role=self.role,
            release=None if self._live is None else self._live.id,
            change=self._change,
            refused=self._refused,
            at=time.time(),
        )

    def look(self) -> None:
        """Compare with `releases/active`, once; load and swap, or refuse, where it names another release."""
        wanted = releases.read_active(self.workspace)
        change, release_id = wanted["change"], wanted["active"]
        waited = time.monotonic() - self._refused_at > RETRY_SECONDS
        if release_id is None or (change == self._change and not (self._refused and waited)):
            return
        if self._live is None or self._live.id != release_id:
            self._switch(release_id)
            if self._live is None:  # a fresh replica has no old release to stay with: go back to what was live before
                self._go_back(wanted["history"])
        else:
            self._refused = None
        self._change = change
        self.reports.write(self.report())

    def start(self) -> None:
        """Look now, then watch and report from threads of their own until `stop`."""
        self._look_safely()
        for work, seconds in ((self._look_safely, self.watch_seconds), (self._report_safely, REPORT_SECONDS)):
            thread = threading.Thread(target=self._repeat, args=(work, seconds), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End the threads and take the report back."""
        self._stop.set()
        self.reports.remove(self.replica)

    def _switch(self, release_id: str) -> None:
        try:
            live = self.load(release_id)
        except Exception as error:  # whatever is wrong with it, the old one stays
            reason = str(error) if isinstance(error, RayrecError) else f"{type(error).__name__}: {error}"
            self._refused, self._refused_at = {"id": release_id, "reason": reason}, time.monotonic()
            log.error("release %s is refused: %s", release_id, reason)
            return
        self._refused = None
        self.on_switch(live)
        self._live = live  # one reference, swapped at once

    def _go_back(self, history: list[str]) -> None:
        refused, refused_at = self._refused, self._refused_at
        for release_id in reversed(history):
            self._switch(release_id)
            if self._live is not None:
                break
        self._refused, self._refused_at = refused, refused_at

    def _repeat(self, work: Callable[[], None], seconds: float) -> None:
        while not self._stop.wait(seconds):
            work()

    def _look_safely(self) -> None:
        try:
            self.look()
        except Exception as error:  # a workspace out of reach for a while ends no watch
            log.warning("cannot look for the live release: %s", error)

    def _report_safely(self) -> None:
        try:
            self.reports.write(self.report())
        except Exception as error:
            log.warning("cannot report: %s", error)


def status_of(holder: ReleaseHolder[Any]) -> dict[str, Any]:
    """What /v1/release says: this replica, the release that is wanted, and the reports of all replicas."""
    wanted = releases.read_active(holder.workspace)
    own = holder.report()
    others = [report for report in holder.reports.fresh() if report.replica != own.replica]
    replicas = sorted((own, *others), key=lambda report: report.replica)
    return {
        "replica": own.replica,
        "release": own.release,
        "refused": own.refused,
        "wanted": wanted["active"],
        "change": wanted["change"],
        "agreed": all(report.release == wanted["active"] for report in replicas),
        "replicas": [report.to_mapping() for report in replicas],
    }
