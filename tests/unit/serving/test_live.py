"""Replicas follow the live release: they load it, switch to it or refuse it; and the release's card."""

import errno
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path

import pytest
from counted_reads import CountedWorkspace
from planted_reports import plant_report
from s3 import s3_server
from served import Client, damage, service, write_release, write_world

from rayrec.data.dataset import Dataset
from rayrec.data.lineage import CleanConfig, find_garbage
from rayrec.errors import RayrecError, StorageError
from rayrec.model.taste_table import tastes_file
from rayrec.serving import live_release
from rayrec.serving import service as service_module
from rayrec.serving.live_release import (
    FORGOTTEN_SECONDS,
    STALE_SECONDS,
    LiveRelease,
    Report,
    Reports,
    ReportWatch,
    SwitchWait,
    switch,
)
from rayrec.serving.problems import NotReadyError
from rayrec.serving.service import Service
from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import REPLICAS, Workspace

LONG_WAIT = SwitchWait(seconds=60)  # far longer than a switch takes


@pytest.fixture
def two(workspace: Workspace) -> tuple[Workspace, str, str]:
    """A workspace with two releases, the first of them live."""
    write_world(workspace)
    first = write_release(workspace, "1", seed=1)
    second = write_release(workspace, "2", seed=2, activate=False)
    return workspace, first.id, second.id


@pytest.fixture
def replica(two: tuple[Workspace, str, str]) -> Iterator[Service]:
    with service(two[0], watch_seconds=0.05) as replica:
        yield replica


def test_waiting_ends_once_the_replica_answers_with_the_new_release(
    two: tuple[Workspace, str, str], replica: Service
) -> None:
    workspace, first, second = two
    assert replica.live.id == first
    old_release = replica.live
    release = switch(workspace, lambda: releases.activate_release(workspace, second), LONG_WAIT)
    assert (release.id, replica.live.id, old_release.id) == (second, second, first)
    switch(workspace, lambda: releases.rollback(workspace), LONG_WAIT)
    assert replica.live.id == first
    assert releases.read_active(workspace)["history"] == []


def test_a_replica_says_that_it_has_switched_only_once_its_report_for_the_others_says_so(
    two: tuple[Workspace, str, str], replica: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, second_id = two
    write_report, changes = Reports.write, []

    def write(reports: Reports, new_report: Report) -> None:
        changes.append((new_report.change, replica.holder.report().change))
        write_report(reports, new_report)

    monkeypatch.setattr(Reports, "write", write)
    switch(workspace, lambda: releases.activate_release(workspace, second_id), LONG_WAIT)
    change_id = releases.read_active(workspace)["change"]
    own_changes = [own_change for change, own_change in changes if change == change_id]
    assert own_changes[0] != change_id
    while replica.holder.report().change != change_id:  # `switch` may return between the write and this
        time.sleep(0.01)


def test_an_older_report_does_not_replace_that_of_a_switch(
    two: tuple[Workspace, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, first_id, second_id = two
    monkeypatch.setattr(live_release, "REPORT_SECONDS", 0.05)
    write_report, written_ids, written_changes = Reports.write, [], set()
    is_writing, may_write, has_switched = threading.Event(), threading.Event(), threading.Event()

    def write(reports: Reports, new_report: Report) -> None:
        # The second report since the replica has the old release, or a later one, meets slow storage.
        if new_report.release == first_id and new_report.change in written_changes:
            is_writing.set()
            may_write.wait(60)
        write_report(reports, new_report)
        written_ids.append(new_report.release)
        if new_report.change:
            written_changes.add(new_report.change)
        if new_report.release == second_id:
            has_switched.set()

    monkeypatch.setattr(Reports, "write", write)
    with service(workspace, watch_seconds=0.05):
        assert is_writing.wait(60)
        releases.activate_release(workspace, second_id)
        has_switched.wait(1)  # True if the switch does not wait for the other report
        may_write.set()
        assert has_switched.wait(60)
    assert first_id not in written_ids[written_ids.index(second_id) :]


def test_a_report_on_slow_storage_does_not_outlive_its_replica(
    two: tuple[Workspace, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, second_id = two
    monkeypatch.setattr(live_release, "REPORT_SECONDS", 0.05)
    write_report, remove_report = Reports.write, Reports.remove
    has_reported, is_writing, may_write, is_removed = (threading.Event() for _ in range(4))

    def write(reports: Reports, new_report: Report) -> None:
        if has_reported.is_set() and not is_writing.is_set():
            is_writing.set()
            may_write.wait(60)
        write_report(reports, new_report)
        has_reported.set()

    def remove(reports: Reports, replica_name: str) -> None:
        remove_report(reports, replica_name)
        is_removed.set()

    monkeypatch.setattr(Reports, "write", write)
    monkeypatch.setattr(Reports, "remove", remove)
    with service(workspace, watch_seconds=3600) as replica:
        assert is_writing.wait(60)
        closing = threading.Thread(target=replica.holder.stop)
        closing.start()
        is_removed.wait(1)  # True if the deletion does not wait for the report
        may_write.set()
        closing.join(60)
        releases.activate_release(workspace, second_id)
        replica.holder.check_active()  # as a watch that loads a release while the replica ends
        assert workspace.files(REPLICAS) == []


def test_a_replica_that_cannot_start_leaves_no_report_and_no_watch(
    two: tuple[Workspace, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(service_module, "ImpressionLog", fail)
    earlier_threads = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="new thread"), service(two[0], log_impressions=True):
        pass
    assert two[0].files(REPLICAS) == []
    assert set(threading.enumerate()) <= earlier_threads


def test_a_broken_release_is_refused_and_the_old_one_restored(
    two: tuple[Workspace, str, str], replica: Service
) -> None:
    workspace, first, second = two
    damage(workspace, second)
    with pytest.raises(RayrecError, match=rf"refuses release {second}: .*checksum.*release {first} is live again"):
        switch(workspace, lambda: releases.activate_release(workspace, second), LONG_WAIT)
    assert releases.read_active(workspace)["active"] == first
    assert replica.live.id == first


def test_the_status_tells_what_was_refused_and_why(two: tuple[Workspace, str, str]) -> None:
    workspace, first, second = two
    with service(workspace, watch_seconds=1000) as replica:
        damage(workspace, second)
        releases.activate_release(workspace, second)
        replica.holder.check_active()
        status = Client(replica).get("/v1/release").json()
        assert (status["release"], status["activated"], status["agreed"]) == (first, second, False)
        assert status["refused"]["id"] == second
        assert "checksum" in status["refused"]["reason"]
        assert Client(replica).post("/v1/recommendations", {"history": ["song-1"]}).json()["release"] == first
        damage(workspace, second)  # changes the same bit again, which repairs the file
        releases.activate_release(workspace, second)
        replica.holder.check_active()
        assert Client(replica).get("/v1/release").json()["refused"] is None
        assert replica.live.id == second


@pytest.mark.parametrize(
    ("path", "refused"), [("indexes/index2/index.faiss", True), (tastes_file("tastes/tastes2", 1), False)]
)
def test_a_replica_compares_what_it_loads_and_not_the_tastes_of_all_users(
    two: tuple[Workspace, str, str], path: str, refused: bool
) -> None:
    workspace, first, second = two
    workspace.write_bytes(path, workspace.read_bytes(path) + b" ")
    releases.activate_release(workspace, second)
    with service(workspace) as replica:
        assert replica.live.id == (first if refused else second)
        assert (replica.holder.report().refused is not None) is refused


def test_without_a_running_application_waiting_fails_and_restores(two: tuple[Workspace, str, str]) -> None:
    workspace, first, second = two
    with pytest.raises(RayrecError, match="no application runs on this workspace"):
        switch(workspace, lambda: releases.activate_release(workspace, second), SwitchWait(absent_seconds=0.3))
    assert releases.read_active(workspace)["active"] == first
    with pytest.raises(RayrecError, match="does not answer"):
        switch(
            workspace,
            lambda: releases.activate_release(workspace, second),
            SwitchWait(url="http://127.0.0.1:9", absent_seconds=0.3),
        )
    assert releases.read_active(workspace)["active"] == first


def test_waiting_is_for_all_replicas(two: tuple[Workspace, str, str]) -> None:
    workspace, first, second = two
    reports, messages = Reports(workspace), list[str]()
    reports.write(report("lagging", release=first))

    def activate_and_report() -> Manifest:
        release = releases.activate_release(workspace, second)
        reports.write(report("ready", release=second, change=releases.read_active(workspace)["change"]))
        return release

    with pytest.raises(RayrecError, match="1 of 2 replicas answer with it, 0 are loading it"):
        switch(workspace, activate_and_report, SwitchWait(seconds=0, tell=messages.append))
    assert messages == [f"Waiting for release {second}: 1 of 2 replicas answer with it, 0 are loading it"]
    assert releases.read_active(workspace)["active"] == first


class FailingWorkspace(Workspace):
    """A workspace where some reads of paths that begin with `path` fail: those numbered in `failing_reads`, from 1."""

    def __init__(self, workspace: Workspace, path: str, failing_reads: Container[int]) -> None:
        super().__init__(workspace.root)
        self._path, self._failing_reads, self._reads = path, failing_reads, 0

    def read_bytes(self, path: str) -> bytes:
        """Return a file's content, or raise `OSError` for a failing read."""
        if path.startswith(self._path):
            self._reads += 1
            if self._reads in self._failing_reads:
                raise OSError(errno.ECONNRESET, "connection reset")
        return super().read_bytes(path)


@pytest.mark.parametrize("read", [2, 3])  # the read right after the change, and one while the replica loads
def test_a_read_that_fails_once_rolls_nothing_back(
    two: tuple[Workspace, str, str], replica: Service, read: int
) -> None:
    workspace, _, second = two
    failing_workspace = FailingWorkspace(workspace, releases.ACTIVE, {read})
    assert switch(failing_workspace, lambda: releases.activate_release(workspace, second), LONG_WAIT).id == second
    assert (releases.read_active(workspace)["active"], replica.live.id) == (second, second)


def test_a_replica_whose_report_cannot_be_read_is_waited_for(two: tuple[Workspace, str, str], replica: Service) -> None:
    workspace, first, second = two
    Reports(workspace).write(report("lagging", release=first))
    failing_workspace = FailingWorkspace(workspace, "serving/replicas/lagging", range(1, 1_000))
    with pytest.raises(RayrecError, match=rf"the workspace cannot be read: .*reset; release {first} is live again"):
        switch(failing_workspace, lambda: releases.activate_release(workspace, second), SwitchWait(seconds=1))
    assert releases.read_active(workspace)["active"] == first


def test_where_the_earlier_release_cannot_be_restored_the_error_says_which_one_is_live(
    two: tuple[Workspace, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, second = two
    monkeypatch.setattr(live_release, "READ_PAUSE_SECONDS", 0.0)
    failing_workspace = FailingWorkspace(workspace, releases.ACTIVE, range(3, 1_000))
    with pytest.raises(RayrecError, match=f"release {second} is still live, .*connection reset.*rollback --wait"):
        switch(failing_workspace, lambda: releases.activate_release(workspace, second), SwitchWait(absent_seconds=0.3))


def test_a_replica_reads_again_what_storage_failed_to_give_once(
    two: tuple[Workspace, str, str], replica: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, second = two
    failures = iter([OSError(errno.ECONNRESET, "connection reset"), StorageError("no answer")])
    load = replica.holder.load

    def load_after_failures(release_id: str) -> LiveRelease:
        for error in failures:
            raise error
        return load(release_id)

    monkeypatch.setattr(live_release, "READ_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(replica.holder, "load", load_after_failures)
    switch(workspace, lambda: releases.activate_release(workspace, second), LONG_WAIT)
    assert replica.live.id == second


def test_another_change_in_between_is_left_alone(two: tuple[Workspace, str, str]) -> None:
    workspace, first, second = two
    wait = SwitchWait(seconds=60, tell=lambda _: releases.write_active(workspace, first, ["by another"], []))
    with pytest.raises(RayrecError, match="the live release was changed again"):
        switch(workspace, lambda: releases.activate_release(workspace, second), wait)
    assert releases.read_active(workspace)["history"] == ["by another"]


def test_a_replica_reports_the_releases_that_its_arms_name(two: tuple[Workspace, str, str]) -> None:
    workspace, first, second = two
    experiment = {"name": "e", "arms": {"a": {"share": 0.5}, "b": {"share": 0.5, "release": second}}}
    with service(workspace, experiment=experiment, watch_seconds=0.05):
        (replica_report,) = Reports(workspace).alive()
        assert (replica_report.release, replica_report.arms) == (first, [second])
        config = CleanConfig(keep=1, hours=0)
        write_release(workspace, "3", seed=3)
        assert f"releases/{second}" not in {item.path for item in find_garbage(workspace, config)}
    assert f"releases/{second}" in {item.path for item in find_garbage(workspace, config)}


def report(replica: str, *, release: str = "r", change: str = "", beat: int = 1) -> Report:
    return Report(replica=replica, release=release, change=change, loading=None, refused=None, beat=beat)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `time.monotonic` returns; only the test changes them."""
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_replica_is_alive_as_long_as_its_report_changes(workspace: Workspace, clock: list[float]) -> None:
    reports, writer = Reports(workspace), Reports(workspace)
    for name in ("alive", "dead"):
        writer.write(report(name))
    workspace.write_bytes("serving/replicas/junk.json", b"{")
    assert {entry.replica for entry in reports.alive()} == {"alive", "dead"}  # no earlier look to compare with
    clock[0] += STALE_SECONDS
    assert {entry.replica for entry in reports.alive()} == {"alive", "dead"}
    clock[0] += 1
    writer.write(report("alive", beat=2))
    assert [entry.replica for entry in reports.alive()] == ["alive"]
    clock[0] += FORGOTTEN_SECONDS - STALE_SECONDS
    writer.write(report("alive", beat=3))
    assert [entry.replica for entry in reports.alive()] == ["alive"]
    assert workspace.files("serving/replicas") == ["serving/replicas/alive.json"]
    reports.remove("alive")
    assert workspace.files("serving/replicas") == []


def test_watching_the_reports_of_all_replicas_reads_none_of_them_and_is_one_request_to_object_storage(
    tmp_path: Path,
) -> None:
    """Each replica watches all reports every few seconds: reads would grow with the square of the replicas."""
    local = CountedWorkspace(tmp_path / "workspace", tmp_path / "reads.log")
    for number in range(6):
        Reports(local).write(report(f"replica-{number}"))
    reports = Reports(local)
    assert len(reports.watch()) == 6
    assert local.reads() == []
    assert len(reports.alive()) == len(local.reads()) == 6
    with s3_server() as server:
        workspace = Workspace(server.uri("watched"))
        for number in range(6):
            Reports(workspace).write(report(f"replica-{number}"))
        reports, before = Reports(workspace), server.counts()["asked"]
        assert len(reports.watch()) == 6
        assert server.counts()["asked"] - before == 1


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_no_clock_of_another_machine_matters(
    two: tuple[Workspace, str, str], replica: Service, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`switch` waits for the replica although the wall clock (`time.time`) is an hour off."""
    workspace, _, second = two
    true_time, switching_thread = time.time, threading.current_thread()
    # The replica reports from other threads, by the true clock.
    monkeypatch.setattr(time, "time", lambda: true_time() + ahead * (threading.current_thread() is switching_thread))
    switch(workspace, lambda: releases.activate_release(workspace, second), LONG_WAIT)
    assert replica.live.id == second


def test_a_replica_that_is_still_loading_says_so_and_is_waited_for(
    two: tuple[Workspace, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading ends only after `switch` has seen the replica load, while a second replica has switched."""
    workspace, _, second = two
    monkeypatch.setattr(live_release, "REPORT_SECONDS", 0.1)
    may_load, messages = threading.Event(), list[str]()

    def tell(text: str) -> None:
        messages.append(text)
        if text.endswith("1 of 2 replicas answer with it, 1 are loading it"):
            may_load.set()

    with service(workspace, watch_seconds=0.05) as replica, service(workspace, watch_seconds=0.05):
        load = replica.holder.load

        def load_later(release_id: str) -> LiveRelease:
            assert may_load.wait(60)
            return load(release_id)

        monkeypatch.setattr(replica.holder, "load", load_later)
        switch(workspace, lambda: releases.activate_release(workspace, second), SwitchWait(tell=tell))
        assert may_load.is_set(), messages
        assert replica.live.id == second


def test_a_watch_tells_replicas_apart(clock: list[float]) -> None:
    watch = ReportWatch()
    assert watch.alive({"a": 1}) == ["a"]
    clock[0] += 5
    assert watch.alive({"a": 1, "b": 1}) == ["a", "b"]
    assert (watch.silence("a"), watch.silence("b")) == (5, 0)


def test_a_replica_that_starts_on_a_broken_release_goes_back_to_the_one_before(
    two: tuple[Workspace, str, str],
) -> None:
    workspace, first, second = two
    releases.activate_release(workspace, second)
    damage(workspace, second)
    with service(workspace) as replica:
        assert replica.live.id == first
        assert replica.holder.report().refused is not None


def test_without_a_release_the_replica_is_alive_and_not_ready(workspace: Workspace) -> None:
    write_world(workspace)
    with service(workspace, watch_seconds=0.05) as replica:
        with pytest.raises(NotReadyError, match="rayrec release activate"):
            _ = replica.live
        app = Client(replica)
        assert app.get("/healthz").status_code == 200
        for response in (app.get("/readyz"), app.post("/v1/recommendations", {"history": []})):
            assert (response.status_code, response.json()["status"]) == (503, 503)
            assert int(response.headers["retry-after"]) > 0
        release = write_release(workspace)
        switch(workspace, lambda: releases.activate_release(workspace, release.id), LONG_WAIT)
        assert app.get("/readyz").json()["release"] == release.id


def test_a_workspace_out_of_reach_ends_no_watch(
    two: tuple[Workspace, str, str], replica: Service, caplog: pytest.LogCaptureFixture
) -> None:
    workspace, _, second = two
    state = workspace.read_bytes(releases.ACTIVE)
    workspace.write_bytes(releases.ACTIVE, b"{ half")
    while "cannot check for a new live release" not in caplog.text:
        time.sleep(0.01)
    workspace.write_bytes(releases.ACTIVE, state)
    switch(workspace, lambda: releases.activate_release(workspace, second), LONG_WAIT)
    assert replica.live.id == second


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("card") / "workspace")
    write_world(workspace)
    return workspace


def test_a_release_that_was_fitted_on_all_plays_shows_the_validation_before(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    write_world(workspace)
    parts = write_release(workspace, activate=False).inputs
    workspace.delete("releases")
    part_ids = {"model_id": parts["models"], "tastes_id": parts["tastes"], "index_id": parts["indexes"]}
    validation = {"verdict": "two-step finds 7 of 100.", "queries": 12, "figures": {"served_recall@20": 0.07}}
    releases.create_release(workspace, **part_ids, metrics={releases.VALIDATION: validation})
    with service(workspace) as replica:
        card = Client(replica).get("/v1/release/card").json()
    assert (card["report"], card["verdict"], card["queries"]) == (None, "two-step finds 7 of 100.", 12)
    assert card["metrics"] == {"served_recall@20": 0.07}


def test_a_card_tells_the_data_and_the_figures_of_its_own_release_alone(world: Workspace, tmp_path: Path) -> None:
    other = write_release(world, "2", seed=5, activate=False)
    release = write_release(world, "1")
    data = Dataset(world).manifest
    with service(world) as replica:
        app = Client(replica)
        plant_report(world, other.inputs, recall=0.9, report_id="other")
        card = app.get("/v1/release/card").json()
        assert (card["release"], card["parts"]) == (release.id, release.inputs)
        card_data = {name: card["data"][name] for name in ("id", "users", "plays", "songs")}
        assert card_data == {"id": data.id, "users": data.users, "plays": data.plays, "songs": data.songs}
        assert (card["report"], card["verdict"], card["metrics"], card["warning"]) == (None, None, {}, None)
        missing_report = app.get("/v1/release/report")
        assert missing_report.status_code == 404
        assert "rayrec evaluate" in missing_report.json()["detail"]
        plant_report(world, release.inputs, recall=0.42, report_id="own")
        card = app.get("/v1/release/card").json()
        assert (card["report"], card["queries"], card["warning"]) == ("own", 9, "the test range leaked")
        assert card["metrics"] == {"served_recall@20": 0.42, "served_mrr@20": 0.2}
        assert card["verdict"] == "two-step finds 42 of 100 next new songs in its first 20."
        report = app.get("/v1/release/report")
        assert "finds 42 of 100" in report.text
        assert report.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")
