"""The live release of a replica: how it is loaded, watched, reported and switched; its model card; experiment arms.

A request takes its release once, at its start, and uses only that release, so no answer mixes the model of one release
with the index of another. Arms of an experiment may name other releases than the live one. Reports are small files in
the workspace, so anyone who can activate a release can read them, with or without Ray, inside or outside the cluster. A
switch changes the live release of a running application and waits until all replicas answer with the new one; if a
replica refuses it, the switch makes the earlier release live again.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import count
from typing import Any, TypeVar, cast

from rayrec.client import KEY_VARIABLE, ApiError, ApiUnavailableError, Client, Retry
from rayrec.data.dataset import Dataset
from rayrec.errors import DamagedArtifactError, NotFoundError, RayrecError, StorageError
from rayrec.evaluation.report import PAGE
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.base import BaseRecommender
from rayrec.serving.engine import Engine
from rayrec.serving.online_songs import OnlineSongs
from rayrec.serving.problems import NotReadyError
from rayrec.serving.schemas import DataSummary, ModelCard, RecommendationsRequest
from rayrec.serving.serve_config import REPORT_SECONDS, Experiment
from rayrec.serving.served_catalog import ServedCatalog
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest, read_dataset_manifest
from rayrec.storage.workspace import REPLICAS, Workspace

STALE_SECONDS = 6 * REPORT_SECONDS  # a replica counts as dead if its report has not changed for this time
FORGOTTEN_SECONDS = 3600.0  # a report that has not changed for this time is deleted
RETRY_SECONDS = 60.0  # before a refused release is tried again, in case it was repaired
READ_ATTEMPTS = 3  # if reading from storage fails
READ_PAUSE_SECONDS = 1.0  # between two of these attempts
POLL_SECONDS = 0.2  # between two checks of the replicas during a switch
ANSWER_SECONDS = 5.0  # timeout of one request to the application
EVALUATION_KIND = "reports"  # the artifact kind of evaluations
ORDERING_PARTS = ("models", "retrieval", "rankers")  # kinds of parts that determine the order of an answer
CARD_METRICS = ("served_recall@", "served_mrr@", "recall@", "mrr@")

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LiveRelease:
    """A loaded release that answers requests. It does not change, except that songs are added online."""

    release: Manifest
    catalog: ServedCatalog
    engine: Engine
    online: OnlineSongs  # songs that were added online, in addition to those of the release

    @property
    def id(self) -> str:
        """The release's id."""
        return self.release.id

    @property
    def model_id(self) -> str:
        """The id of its model. The network states of a model must not be used with any other model."""
        return self.release.inputs["models"]


def load_parts(workspace: Workspace, release_id: str) -> tuple[Manifest, BaseRecommender]:
    """Return a release and its recommender. The loaded files are compared with their checksums first.

    Raises the errors of `load_checked_release`, and `MismatchError` if the parts do not belong together.
    """
    release = load_checked_release(workspace, release_id, releases.ANSWERING_KINDS)
    parts = release.inputs
    return release, load_recommender(workspace, Dataset(workspace), parts)


def load_checked_release(workspace: Workspace, release_id: str, kinds: Sequence[str]) -> Manifest:
    """Return a release after its songs and its parts of `kinds` were compared with their checksums, once per node.

    Plays are not compared, and tastes only if `kinds` names them: a replica loads neither, and reading those of all
    users would keep it from starting. Raises `NotFoundError` or `DamagedArtifactError` for a release that is unknown,
    incomplete or damaged.
    """
    release = artifacts.load_manifest(workspace, releases.KIND, release_id)
    releases.verify_release(workspace, release, kinds, plays=False, once_per_node=True)
    return release


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one replica does, for other processes to read."""

    replica: str
    release: str | None  # the release that it answers with
    change: str | None  # id of the last activation that it has handled
    loading: str | None  # the release that it is loading now
    refused: dict[str, str] | None  # the release that it could not load, with the reason
    beat: int  # counter of this replica's reports: the replica is alive as long as this changes
    arms: list[str] = field(default_factory=list)  # ids of the releases that arms of its experiment name

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return asdict(self)


class ReportWatch:
    """Distinguishes live replicas from dead ones by whether their reports change, without using their clocks."""

    def __init__(self) -> None:
        # report -> its last beat, and the time.monotonic() at which this process first saw that beat
        self._beats: dict[str, tuple[object, float]] = {}

    def alive(self, beats: Mapping[str, object]) -> list[str]:
        """Return the names of the reports that are new, or changed in the last `STALE_SECONDS` by this process's clock.

        `beats` holds by the name of each report a value that differs from that of its previous version.
        """
        now = time.monotonic()
        for name, beat in beats.items():
            if self._beats.get(name, (None,))[0] != beat:
                self._beats[name] = (beat, now)
        return [name for name in beats if self.silence(name) <= STALE_SECONDS]

    def silence(self, name: str) -> float:
        """Return the seconds since a report last changed. `alive` must have received the report before."""
        return time.monotonic() - self._beats[name][1]


class Reports:
    """Reads and writes the reports of replicas in a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._watch = ReportWatch()

    def write(self, report: Report) -> None:
        """Replace a replica's report."""
        self._workspace.write_json(_report_path(report.replica), report.to_mapping())

    def remove(self, replica: str) -> None:
        """Delete the report of a replica that ends."""
        self._workspace.delete(_report_path(replica))

    def watch(self) -> list[str]:
        """Return the paths of the reports of live replicas, in order, without reading the reports.

        All replicas call this for all reports all the time, so it costs one listing. A dead replica counts as alive
        until it was watched for `STALE_SECONDS`. Reports that have not changed for `FORGOTTEN_SECONDS` are deleted.
        """
        versions = self._workspace.versions(REPLICAS)
        alive = self._watch.alive(versions)
        for path in versions:
            if self._watch.silence(path) > FORGOTTEN_SECONDS:
                self._workspace.delete(path)
        return sorted(alive)

    def alive(self) -> list[Report]:
        """Return the reports of live replicas, which are those of `watch`.

        Raises `StorageError` or `OSError` if a report cannot be read, since the list would look complete without it.
        """
        reports = []
        for path in self.watch():
            try:
                reports.append(Report(**self._workspace.read_json(path)))
            except (NotFoundError, DamagedArtifactError, TypeError):  # deleted meanwhile, or not a report
                continue
        return reports


def _report_path(replica: str) -> str:
    return f"{REPLICAS}/{re.sub(r'[^A-Za-z0-9_-]', '-', replica)}.json"


@dataclass
class ReleaseHolder:
    """Holds the live release of one replica, and follows `releases/active`.

    While a new release is loaded, the old one answers. A release that cannot be loaded is refused, and the old one
    stays. `report` informs the other replicas and processes that wait for a switch.
    """

    workspace: Workspace
    load: Callable[[str], LiveRelease]  # takes the id of a release
    reports: Reports
    replica: str
    watch_seconds: float
    on_switch: Callable[[LiveRelease], None] = lambda live: None
    arms: Sequence[str] = ()  # ids of the releases that arms of an experiment name
    _live: LiveRelease | None = None
    _change: str | None = None  # id of the last activation that was handled
    _loading: str | None = None
    _beats: Iterator[int] = field(default_factory=lambda: count(1))
    _refused: dict[str, str] | None = None  # id and reason
    _refused_at: float = 0.0
    # Reentrant, since the garbage collector may call `stop` in a thread that holds it.
    _report_lock: threading.RLock = field(default_factory=threading.RLock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def live(self) -> LiveRelease:
        """The release to answer with. Raises `NotReadyError` if none is loaded yet."""
        live = self._live
        if live is None:
            reason = f": {self._refused['reason']}" if self._refused else ""
            raise NotReadyError(f"No release is loaded{reason or '; make one live with `rayrec release activate ID`'}")
        return live

    @property
    def loaded(self) -> LiveRelease | None:
        """The release to answer with; None if none is loaded."""
        return self._live

    def report(self) -> Report:
        """Return a new report of this replica."""
        return Report(
            replica=self.replica,
            release=None if self._live is None else self._live.id,
            change=self._change,
            loading=self._loading,
            refused=self._refused,
            beat=next(self._beats),
            arms=list(self.arms),
        )

    def check_active(self) -> None:
        """Read `releases/active` once. If it names another release, load it and switch to it, or refuse it."""
        activation = releases.read_active(self.workspace)
        change_id, release_id = activation["change"], activation["active"]
        may_retry = time.monotonic() - self._refused_at > RETRY_SECONDS
        if release_id is None or (change_id == self._change and not (self._refused and may_retry)):
            return
        if self._live is None or self._live.id != release_id:
            self._switch(release_id)
            if self._live is None:  # a new replica has no old release to keep: use one that was live before
                self._restore_earlier_release(activation["history"])
        else:
            self._refused = None
        with self._report_lock:
            # Written first: this replica must not say that it has switched while others read its old report.
            self._write_report(replace(self.report(), change=change_id))
            self._change = change_id

    def start(self) -> None:
        """Call `check_active` now, then repeatedly until `stop`. Another thread writes reports all the time."""
        self._repeat_in_thread(self._report_safely, REPORT_SECONDS)
        self._check_active_safely()
        self._repeat_in_thread(self._check_active_safely, self.watch_seconds)

    def stop(self) -> None:
        """Delete the report and end the threads."""
        self._stop.set()
        with self._report_lock:  # a report that is still being written would come after the deletion
            self.reports.remove(self.replica)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(REPORT_SECONDS)

    def _write_report(self, report: Report) -> None:
        """Write a report, unless the replica has ended. The caller holds the lock."""
        if not self._stop.is_set():
            self.reports.write(report)

    def _switch(self, release_id: str) -> None:
        self._loading = release_id
        try:
            live = _read_with_retries(lambda: self.load(release_id))
        except Exception as error:  # the old release stays, whatever the error is
            reason = str(error) if isinstance(error, RayrecError) else f"{type(error).__name__}: {error}"
            self._refused, self._refused_at = {"id": release_id, "reason": reason}, time.monotonic()
            log.error("release %s is refused: %s", release_id, reason)
            return
        finally:
            self._loading = None
        self._refused = None
        self.on_switch(live)
        self._live = live  # a single assignment, so other threads see either the old or the new release

    def _restore_earlier_release(self, history: list[str]) -> None:
        refused, refused_at = self._refused, self._refused_at
        for release_id in reversed(history):
            self._switch(release_id)
            if self._live is not None:
                break
        self._refused, self._refused_at = refused, refused_at

    def _repeat_in_thread(self, work: Callable[[], None], interval_seconds: float) -> None:
        def run_until_stop() -> None:
            while not self._stop.wait(interval_seconds):
                work()

        self._threads.append(threading.Thread(target=run_until_stop, daemon=True))
        self._threads[-1].start()

    def _check_active_safely(self) -> None:
        try:
            self.check_active()
        except Exception as error:  # a workspace that cannot be reached for a while must not end the watch
            log.warning("cannot check for a new live release: %s", error)

    def _report_safely(self) -> None:
        try:
            with self._report_lock:  # or this report could replace a newer one
                self._write_report(self.report())
            self.reports.watch()  # so that dead replicas are known when a client asks
        except Exception as error:
            log.warning("cannot write the report of this replica: %s", error)


def release_status(holder: ReleaseHolder) -> dict[str, Any]:
    """Return the answer of /v1/release: this replica, the activated release, and the reports of all replicas."""
    activation = releases.read_active(holder.workspace)
    own_report = holder.report()
    other_reports = [report for report in holder.reports.alive() if report.replica != own_report.replica]
    reports = sorted((own_report, *other_reports), key=lambda report: report.replica)
    return {
        "replica": own_report.replica,
        "release": own_report.release,
        "refused": own_report.refused,
        "activated": activation["active"],
        "change": activation["change"],
        "agreed": all(report.release == activation["active"] for report in reports),
        "replicas": [report.to_mapping() for report in reports],
    }


def model_card(workspace: Workspace, release: Manifest) -> ModelCard:
    """Return the model card of a release.

    The metrics are those of the release's last report, or without a report, of the validation before its last fit.
    """
    dataset = read_dataset_manifest(workspace)
    has_times = dataset.times == "real" and dataset.plays > 0
    report = last_evaluation(workspace, release)
    validation = release.metrics.get(releases.VALIDATION, {})
    metrics = report.metrics if report else validation.get("figures", {})
    return ModelCard(
        release=release.id,
        created_at=release.created_at,
        version=version("rayrec"),
        parts=release.inputs,
        data=DataSummary(
            id=dataset.id,
            source=dataset.source,
            users=dataset.users,
            plays=dataset.plays,
            songs=dataset.songs,
            first_play=dataset.first_play if has_times else None,
            last_play=dataset.last_play if has_times else None,
        ),
        report=report.id if report else None,
        verdict=report.metrics["verdict"] if report else validation.get("verdict"),
        metrics={name: value for name, value in metrics.items() if name.startswith(CARD_METRICS)},
        queries=metrics.get("plays", metrics.get("pairs", validation.get("queries"))),
        warning=metrics.get("warning"),
    )


def report_page(workspace: Workspace, release: Manifest) -> bytes:
    """Return the HTML page of a release's last report. Raises `NotFoundError` if it has none."""
    report = last_evaluation(workspace, release)
    if report is None:
        raise NotFoundError(f"Release {release.id} was not evaluated; run `rayrec evaluate`")
    return workspace.read_bytes(report.path(PAGE))


def last_evaluation(workspace: Workspace, release: Manifest) -> Manifest | None:
    """Return the last evaluation of the parts that a release answers with; None if they were not evaluated."""

    def is_about(report: Manifest) -> bool:
        return all(report.inputs.get(kind) == release.inputs.get(kind) for kind in ORDERING_PARTS)

    return artifacts.latest(workspace, EVALUATION_KIND, is_about)


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A request with the settings of its arm."""

    sent: RecommendationsRequest  # as the client sent it
    request: RecommendationsRequest  # with the settings of the arm
    release: LiveRelease  # the release that answers
    experiment: str | None = None
    arm: str | None = None


class Arms:
    """The arms of an application's experiment. Without one, the live release answers all requests unchanged."""

    def __init__(self, experiment: Experiment | None, releases: Mapping[str, LiveRelease]) -> None:
        """`releases` are the releases that arms name, by id."""
        self._experiment, self._releases = experiment, releases

    @property
    def releases(self) -> list[LiveRelease]:
        """The releases that arms name."""
        return list(self._releases.values())

    def assign(self, request: RecommendationsRequest, live: LiveRelease) -> Assigned:
        """Return a request with the settings and the release of its user's arm.

        The live release answers the unchanged request if the request has a history, if the user is in no arm, or if the
        request itself sets a field that any arm sets. The id alone decides the arm, in the store or not: the release
        must be known before a user's state of its model can be read.
        """
        experiment = self._experiment
        if experiment is None or request.user_id is None or request.model_fields_set & experiment.varied:
            return Assigned(sent=request, request=request, release=live)
        arm_name = experiment.arm_of(request.user_id)
        if arm_name is None:
            return Assigned(sent=request, request=request, release=live)
        arm = experiment.arms[arm_name]
        return Assigned(
            sent=request,
            request=request.model_copy(update=arm.settings),
            release=self._releases[arm.release] if arm.release else live,
            experiment=experiment.name,
            arm=arm_name,
        )


@dataclass(frozen=True, kw_only=True)
class SwitchWait:
    """How to wait for the replicas."""

    url: str | None = None  # address of the application; None: read the replicas' reports from the workspace
    seconds: float | None = None  # maximum wait; None: no limit while live replicas load
    absent_seconds: float = STALE_SECONDS  # maximum time without a live replica or an answer of the application
    tell: Callable[[str], None] = lambda text: None  # called with the progress whenever it changes


def switch(workspace: Workspace, change: Callable[[], Manifest], wait: SwitchWait) -> Manifest:
    """Run `change`, which makes another release live, and return that release once all live replicas answer with it.

    Raises `RayrecError` if a replica refuses the release, if for `wait.absent_seconds` no replica is alive or the
    workspace cannot be read, or if `wait.seconds` are over; then it makes the earlier release live again first. It also
    raises `RayrecError` if another process changes the live release meanwhile, and leaves that change in place.
    """
    previous_activation = releases.read_active(workspace)
    release = change()
    change_id = _read_with_retries(lambda: releases.read_active(workspace))["change"]
    try:
        _wait(workspace, release.id, change_id, wait)
    except RayrecError as error:
        try:
            is_still_active = _read_with_retries(lambda: releases.read_active(workspace))["change"] == change_id
            if is_still_active:
                releases.write_active(
                    workspace,
                    previous_activation["active"],
                    previous_activation["history"],
                    previous_activation["rolled_back"],
                )
        except (StorageError, OSError) as restore_error:
            raise RayrecError(
                f"{error}; release {release.id} is still live, since the workspace cannot be changed: {restore_error}; "
                "run `rayrec release rollback --wait` when it can be changed again"
            ) from error
        if not is_still_active:
            raise
        outcome = (
            f"release {previous_activation['active']} is live again"
            if previous_activation["active"]
            else "no release is live"
        )
        raise RayrecError(f"{error}; {outcome}") from error
    return release


def _read_with_retries(read: Callable[[], T]) -> T:
    """Return the result of `read`, which is called up to `READ_ATTEMPTS` times if storage fails."""
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read()
        except (StorageError, OSError) as error:
            log.warning("cannot read the workspace, trying again: %s", error)
            time.sleep(READ_PAUSE_SECONDS)
    return read()


def _wait(workspace: Workspace, release_id: str, change_id: str, wait: SwitchWait) -> None:
    started = last_seen = time.monotonic()
    reports, report_watch = Reports(workspace), ReportWatch()
    problem = last_problem = ""
    while True:
        try:
            if releases.read_active(workspace)["change"] != change_id:
                raise RayrecError(f"the live release was changed again before all replicas answered with {release_id}")
            live_reports = _fetch_live_reports(wait.url, report_watch) if wait.url else reports.alive()
        except ApiUnavailableError as error:  # the application does not run, or not yet
            problem = str(error)
        except (StorageError, OSError) as error:
            problem = f"the workspace cannot be read: {error}"
        else:
            problem = _describe_waiting_replicas(live_reports, release_id, change_id)
            if not problem:
                return
            last_seen = time.monotonic() if live_reports else last_seen
        if problem != last_problem:
            wait.tell(f"Waiting for release {release_id}: {problem}")
            last_problem = problem
        now = time.monotonic()
        if now - last_seen > wait.absent_seconds or (wait.seconds is not None and now - started > wait.seconds):
            raise RayrecError(
                f"not all replicas switched to release {release_id} within {now - started:.0f} seconds: {problem}"
            )
        time.sleep(POLL_SECONDS)


def _describe_waiting_replicas(reports: list[Report], release_id: str, change_id: str) -> str:
    """Describe which replicas do not answer with a release yet; empty if all do. Raises `RayrecError` for a refusal."""
    if not reports:
        return "no application runs on this workspace"
    for report in reports:
        if report.change == change_id and report.release != release_id:
            reason = report.refused["reason"] if report.refused else f"it answers with {report.release}"
            raise RayrecError(f"replica {report.replica} refuses release {release_id}: {reason}")
    pending = [report for report in reports if report.change != change_id]
    loading_count = sum(report.loading == release_id for report in pending)
    return (
        f"{len(reports) - len(pending)} of {len(reports)} replicas answer with it, {loading_count} are loading it"
        if pending
        else ""
    )


def _fetch_live_reports(url: str, watch: ReportWatch) -> list[Report]:
    """Return the reports of live replicas of the application at `url`. Raises the errors of `fetch_reports`."""
    reports = fetch_reports(url)
    alive = watch.alive({report.replica: report.beat for report in reports})
    return [report for report in reports if report.replica in alive]


def fetch_reports(url: str) -> list[Report]:
    """Return the reports of all replicas of the application at `url`. The API key comes from the environment.

    Raises `ApiUnavailableError` if the application does not answer, `RayrecError` if it refuses the key.
    """
    try:
        with Client(url, retry=Retry(retries=0, timeout=ANSWER_SECONDS)) as client:
            return [Report(**cast(dict[str, Any], report)) for report in client.release()["replicas"]]
    except ApiError as error:
        if error.status in (401, 403):
            raise RayrecError(f"{url} needs a key; set {KEY_VARIABLE} to a key with the role read or admin") from error
        raise ApiUnavailableError(str(error)) from error
