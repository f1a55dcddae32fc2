"""The impression log: added rows can be read, its size is bounded, and adding a row never raises an error."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrec.data import impressions
from rayrec.data.dataset import mark_forgotten
from rayrec.data.impressions import (
    ImpressionLog,
    LogBounds,
    compact_impressions,
    erase_impressions,
    log_files,
    read_impressions,
)
from rayrec.data.moments import now_ms
from rayrec.errors import StorageError
from rayrec.storage.workspace import Workspace

NOW = 1_780_000_000_000  # ms UTC, before today
HOURS = 3_600_000


def answer(number: int, user: str = "ann", **fields: Any) -> dict[str, Any]:
    row = {
        "recommendation_id": f"r{number}",
        "user_id": user,
        "moment": NOW + number,
        "at": NOW,
        "release": "one",
        "first": 0,
        "song_ids": [f"song-{number}", "song-x"],
    }
    return {**row, **fields}


def event(number: int, user: str = "ann") -> dict[str, Any]:
    return {
        "event_id": f"e{number}",
        "user_id": user,
        "song_id": "song-x",
        "type": "play",
        "moment": NOW + number,
        "played_at": NOW,
        "skipped": False,
    }


class CountedLog:
    """A log that is written only when the test flushes or closes it, and the outcomes that it counted."""

    def __init__(self, workspace: Workspace, *, rows: int = 100, disk_bytes: int = 1 << 30, writer: str = "a") -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        bounds = LogBounds(seconds=3600, rows=rows, disk_bytes=disk_bytes)
        self.log = ImpressionLog(workspace, writer, bounds, self._count)

    def _count(self, kind: str, outcome: str, rows: int) -> None:
        self.outcomes[kind, outcome] += rows


@pytest.fixture
def counted_log(workspace: Workspace) -> Iterator[CountedLog]:
    counted_log = CountedLog(workspace)
    yield counted_log
    counted_log.log.close()


def answer_ids(workspace: Workspace) -> list[str]:
    tables = read_impressions(workspace, "answers", ["recommendation_id"])
    return [answer_id for table in tables for answer_id in table.column("recommendation_id").to_pylist()]


def test_rows_come_back_as_they_were_added(workspace: Workspace, counted_log: CountedLog) -> None:
    counted_log.log.add("answers", answer(1, arm="b", explored=[True, False], probability=[0.1, 0.9]))
    counted_log.log.add("answers", answer(2, None))  # type: ignore[arg-type]
    counted_log.log.add("events", event(1))
    counted_log.log.flush()
    (table,) = read_impressions(workspace, "answers")
    first, second = table.to_pylist()
    assert (first["arm"], first["song_ids"], first["explored"]) == ("b", ["song-1", "song-x"], [True, False])
    assert (second["user_id"], second["arm"], second["probability"]) == (None, None, None)
    assert round(first["moment"].timestamp() * 1000) == NOW + 1
    (events,) = read_impressions(workspace, "events", ["event_id", "type"])
    assert events.to_pylist() == [{"event_id": "e1", "type": "play"}]
    assert +counted_log.outcomes == {("answers", "written"): 2, ("events", "written"): 1}
    assert counted_log.log.waiting == 0


def test_two_replicas_write_beside_each_other(workspace: Workspace, counted_log: CountedLog) -> None:
    other_log = CountedLog(workspace, writer="b")
    for number, log in enumerate((counted_log.log, other_log.log)):
        log.add("answers", answer(number, moment=NOW))
        log.flush()
    other_log.log.close()
    assert sorted(answer_ids(workspace)) == ["r0", "r1"]


def test_rows_are_written_after_the_interval_and_at_the_end_without_a_call(workspace: Workspace) -> None:
    log = ImpressionLog(workspace, "a", LogBounds(seconds=0.05, rows=100, disk_bytes=1 << 30))
    log.add("answers", answer(1))
    deadline = time.monotonic() + 300
    while not answer_ids(workspace) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert answer_ids(workspace) == ["r1"]
    log.add("answers", answer(2))
    log.close()
    assert answer_ids(workspace) == ["r1", "r2"]


def test_over_the_bound_on_rows_the_new_ones_are_dropped_and_counted(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted_log = CountedLog(workspace, rows=2)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_table", lambda *_, **__: 1 / 0)
        results = [counted_log.log.add("answers", answer(number)) for number in range(5)]
    assert results == [True, True, False, False, False]
    counted_log.log.close()
    assert +counted_log.outcomes == {("answers", "written"): 2, ("answers", "dropped"): 3}
    assert answer_ids(workspace) == ["r0", "r1"]


def test_over_the_bound_on_memory_rows_are_dropped(
    workspace: Workspace, counted_log: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impressions, "MEMORY_BYTES", 10 * impressions.ROW_BYTES)
    long_answer = answer(1, song_ids=["song"] * 100)
    assert [counted_log.log.add("answers", long_answer), counted_log.log.add("answers", long_answer)] == [True, False]
    counted_log.log.flush()
    assert counted_log.log.add("answers", long_answer)


def test_where_storage_fails_nothing_is_raised_and_the_rows_are_written_later(
    workspace: Workspace, counted_log: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_no_space(*_: Any, **__: Any) -> str:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_table", raise_no_space)
        assert counted_log.log.add("answers", answer(1))
        with pytest.raises(StorageError):
            counted_log.log.flush()
        assert counted_log.log.add("events", event(1))
    counted_log.log.flush()
    assert answer_ids(workspace) == ["r1"]
    assert counted_log.log.waiting == 0


def test_rows_that_cannot_be_written_by_the_end_are_counted_as_dropped(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted_log = CountedLog(workspace)
    counted_log.log.add("answers", answer(1))
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_table", lambda *_, **__: 1 / 0)
        counted_log.log.close()
    assert counted_log.outcomes["answers", "dropped"] == 1


def test_over_the_bound_on_disk_the_oldest_files_are_deleted_and_counted(workspace: Workspace) -> None:
    first_log = CountedLog(workspace)
    for number in range(10):
        first_log.log.add("answers", answer(number, moment=NOW + number * 24 * HOURS))
        first_log.log.flush()
    first_log.log.close()
    file_bytes = max(log_files(workspace).values())
    bounded_log = CountedLog(workspace, disk_bytes=4 * file_bytes, writer="b")
    bounded_log.log.add("answers", answer(10, moment=NOW + 10 * 24 * HOURS))
    bounded_log.log.flush()
    bounded_log.log.close()
    remaining_ids = answer_ids(workspace)
    assert remaining_ids == [f"r{number}" for number in range(11 - len(remaining_ids), 11)]
    assert 3 <= len(remaining_ids) <= 4
    assert sum(log_files(workspace).values()) <= 4 * file_bytes
    assert bounded_log.outcomes["answers", "expired"] == 11 - len(remaining_ids)


def test_a_compaction_joins_the_files_of_each_day_before_today_and_keeps_every_row(
    workspace: Workspace, counted_log: CountedLog
) -> None:
    today = now_ms()
    for number, moment in enumerate((NOW, NOW + 1, NOW + 48 * HOURS, NOW + 48 * HOURS + 1, today, today)):
        counted_log.log.add("answers", answer(number, moment=moment))
        counted_log.log.add("events", event(number) | {"moment": moment})
        counted_log.log.flush()
    ids_before = answer_ids(workspace)
    compact_impressions(workspace)
    assert answer_ids(workspace) == ids_before == [f"r{number}" for number in range(6)]
    files = log_files(workspace)
    assert len(files) == 2 * (1 + 1 + 2)
    compact_impressions(workspace)
    assert log_files(workspace) == files


def test_files_that_a_compaction_joins_stay_below_a_bound(
    workspace: Workspace, counted_log: CountedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        counted_log.log.add("answers", answer(number))
        counted_log.log.flush()
    monkeypatch.setattr(impressions, "JOINED_BYTES", 2 * max(log_files(workspace).values()))
    compact_impressions(workspace)
    assert len(log_files(workspace)) == 3
    assert sorted(answer_ids(workspace)) == [f"r{number}" for number in range(6)]


def test_a_deleted_user_is_hidden_at_once_and_then_in_no_file(workspace: Workspace, counted_log: CountedLog) -> None:
    for number, user in enumerate(("ann", "secret-user", None)):
        counted_log.log.add("answers", answer(number, user))  # type: ignore[arg-type]
    counted_log.log.add("events", event(1, "secret-user"))
    counted_log.log.flush()
    counted_log.log.add("answers", answer(3, "secret-user"))  # still in memory when the user is deleted
    mark_forgotten(workspace, ["secret-user"], NOW + 100)
    assert answer_ids(workspace) == ["r0", "r2"]
    counted_log.log.flush()
    assert erase_impressions(workspace) == 2
    assert answer_ids(workspace) == ["r0", "r2"]
    assert not list(read_impressions(workspace, "events"))
    paths = [path for path in Path(workspace.root).rglob("*") if path.is_file()]
    for path in paths:
        assert b"secret-user" not in path.read_bytes()
        assert "secret-user" not in path.name
    counted_log.log.add("answers", answer(200, "secret-user"))  # the user came back after the deletion
    counted_log.log.flush()
    assert answer_ids(workspace) == ["r0", "r2", "r200"]
