"""The card of a release: what it was made from, and the figures of its own last report."""

from pathlib import Path

import pytest
from planted_reports import plant_report
from served import Client, service, write_release, write_world

from rayrec.data.dataset import Dataset
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace


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
    named = {"model_id": parts["models"], "tastes_id": parts["tastes"], "index_id": parts["indexes"]}
    validation = {"verdict": "two-step finds 7 of 100.", "queries": 12, "figures": {"served_recall@20": 0.07}}
    releases.create_release(workspace, **named, metrics={releases.VALIDATION: validation})
    with service(workspace) as opened:
        card = Client(opened).get("/v1/release/card").json()
    assert (card["report"], card["verdict"], card["queries"]) == (None, "two-step finds 7 of 100.", 12)
    assert card["metrics"] == {"served_recall@20": 0.07}


def test_a_card_tells_the_data_and_the_figures_of_its_own_release_alone(world: Workspace, tmp_path: Path) -> None:
    other = write_release(world, "2", seed=5, activate=False)
    release = write_release(world, "1")
    data = Dataset(world).manifest
    with service(world) as opened:
        app = Client(opened)
        plant_report(world, other.inputs, recall=0.9, report_id="other")
        card = app.get("/v1/release/card").json()
        assert (card["release"], card["parts"]) == (release.id, release.inputs)
        told = {name: card["data"][name] for name in ("id", "users", "plays", "songs")}
        assert told == {"id": data.id, "users": data.users, "plays": data.plays, "songs": data.songs}
        assert (card["report"], card["verdict"], card["metrics"], card["warning"]) == (None, None, {}, None)
        missing = app.get("/v1/release/report")
        assert missing.status_code == 404
        assert "rayrec evaluate" in missing.json()["detail"]
        plant_report(world, release.inputs, recall=0.42, report_id="own")
        card = app.get("/v1/release/card").json()
        assert (card["report"], card["queries"], card["warning"]) == ("own", 9, "the test range leaked")
        assert card["metrics"] == {"served_recall@20": 0.42, "served_mrr@20": 0.2}
        assert card["verdict"] == "two-step finds 42 of 100 next new songs in its first 20."
        report = app.get("/v1/release/report")
        assert "finds 42 of 100" in report.text
        assert report.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")
