"""An experiment, from `rayrec serve` to the report."""

import json
import time
from pathlib import Path

import httpx
import pytest
from serve_command import ADMIN, run, started, with_key
from served import AT, write_release, write_world

from rayrec.data.impressions import read_impressions
from rayrec.storage.workspace import Workspace

CONFIG = """
[serve]
log_impressions = true
log_seconds = 1.0
[serve.experiment]
name = "diverse"
arms.control.share = 0.5
arms.diverse = { share = 0.5, diversity = 0.9 }
"""


@pytest.mark.slow
def test_arms_are_named_and_logged_and_a_killed_replica_loses_no_row_that_was_due(tmp_path: Path) -> None:
    """The log has the rows from more than a second before the kill, and all rows of the replica that ends cleanly."""
    world, file = Workspace(tmp_path / "workspace"), tmp_path / "serve.toml"
    write_world(world)
    write_release(world)
    file.write_text(CONFIG)
    arms: dict[str, str] = {}  # by user id
    answered_at: dict[str, float] = {}  # seconds, by recommendation id
    with (
        started(world, "--config", str(file)) as served,
        httpx.Client(base_url=served.url, headers=with_key(ADMIN), timeout=30) as client,
    ):

        def recommend(user: str) -> None:
            answer = client.post("/v1/recommendations", json={"user_id": user, "at": AT}).raise_for_status().json()
            answered_at[answer["recommendation_id"]] = time.monotonic()
            assert arms.setdefault(user, answer["arm"]) == answer["arm"]

        users = [f"user-{row}" for row in range(10)] * 2
        for user in users:
            recommend(user)
        time.sleep(2)
        recommend("user-0")
        killed_at = time.monotonic()
        (replica,) = served.processes("ServeReplica")
        replica.kill()
        due_ids = {answer_id for answer_id, at in answered_at.items() if at < killed_at - 1.5}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                recommend("user-1")
                break
            except (httpx.HTTPStatusError, httpx.TransportError):
                time.sleep(0.5)
        later_ids = {answer_id for answer_id, at in answered_at.items() if at > killed_at}
        assert later_ids
    assert {*arms.values()} == {"control", "diverse"}
    rows = [row for table in read_impressions(world, "answers") for row in table.to_pylist()]
    assert len(due_ids) == 20
    assert due_ids | later_ids <= {row["recommendation_id"] for row in rows} <= set(answered_at)
    assert all(row["arm"] == arms[row["user_id"]] for row in rows)
    process = run(world, "experiment", "report", "--json")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert [arm["arm"] for arm in json.loads(output)["arms"]] == ["control", "diverse"]
    assert sum(arm["answers"] for arm in json.loads(output)["arms"]) == len(rows)
