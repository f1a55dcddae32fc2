"""Put one replica of the app together, where model and index are deployments of their own."""

import time

from rayrec.errors import RayrecError
from rayrec.serving.auth import load_keys
from rayrec.serving.catalog import load_songs
from rayrec.serving.live import LiveRelease, load_network
from rayrec.serving.prometheus import Metrics
from rayrec.serving.remote import RemoteEngine, RemoteParts
from rayrec.serving.replica import make_service
from rayrec.serving.reports import Reports
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.service import Service
from rayrec.storage.workspace import Workspace

PATIENCE_SECONDS = 60.0  # that the app waits for the parts to have a release before it switches to it


def open_split_service(workspace: Workspace, config: ServeConfig, parts: RemoteParts, *, replica: str) -> Service:
    """A service that holds the songs and asks the parts for the rest."""
    metrics, reports = Metrics(replica), Reports(workspace)

    def load(release_id: str) -> LiveRelease:
        release, network = load_network(workspace, release_id)
        _wait_for_parts(reports, release_id)
        songs = load_songs(workspace, release, network)
        return LiveRelease(release=release, songs=songs, engine=RemoteEngine(release_id, parts, metrics))

    return make_service(workspace, config, load_keys(config), metrics, load)


def _wait_for_parts(reports: Reports, release_id: str) -> None:
    """Wait until all parts hold a release, so that no request waits for it. Raises `RayrecError` where one refuses."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        parts = [report for report in reports.fresh() if report.role != "app"]
        for report in parts:
            if report.refused and report.refused["id"] == release_id:
                raise RayrecError(f"{report.role} {report.replica} refuses it: {report.refused['reason']}")
        if {report.role for report in parts if report.release == release_id} == {"model", "index"} and all(
            report.release == release_id for report in parts
        ):
            return
        time.sleep(0.1)
