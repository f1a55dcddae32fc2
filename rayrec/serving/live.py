"""The live release: its parts loaded as one object, and the holder that swaps it whole.

A request takes the object once, at its start, and uses nothing else to its end: no answer comes of
the model of one release and the index of another.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rayrec import artifacts, releases
from rayrec.artifacts import Manifest
from rayrec.data import columns
from rayrec.data.dataset import Catalog, Dataset
from rayrec.data.search import SongSearch
from rayrec.errors import RayrecError
from rayrec.recommend.answering import load_recommender
from rayrec.recommend.attributes import SongMasks
from rayrec.recommend.choosing import network_of
from rayrec.recommend.recommender import Recommender
from rayrec.serving.config import REPORT_SECONDS
from rayrec.serving.engine import Engine
from rayrec.serving.problems import NotReadyError
from rayrec.serving.reports import Report, Reports
from rayrec.taste.config import PLAY_COUNTS
from rayrec.workspace import Workspace

RETRY_SECONDS = 60.0  # before a refused release is tried again, should it have been repaired

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Songs:
    """The catalog of a release, looked up by id as fast as by row."""

    catalog: Catalog
    rows: dict[str, int]  # id -> row
    contexts: dict[str, int]  # name -> bit
    plays: np.ndarray  # int64 (N,), plays of each song that the model knows, in its fit range
    by_plays: np.ndarray  # int32 (N,), rows by descending plays
    lineage: str  # of the data set: rows of songs mean the same wherever it is the same
    known: np.ndarray  # bool (N,), songs that the network has a vector of
    search: SongSearch
    masks: SongMasks

    def find(self, song_ids: list[str]) -> np.ndarray:
        """int32: the row of each id, -1 for unknown ones."""
        return np.fromiter((self.rows.get(song, -1) for song in song_ids), dtype=np.int32, count=len(song_ids))

    def describe(self, rows: np.ndarray) -> list[tuple[str, str | None, str | None]]:
        """Id, title and artist of song rows."""
        taken = self.catalog.table.take(pa.array(rows))
        names = (columns.SONG_ID, columns.TITLE, columns.ARTIST)
        return list(zip(*(taken.column(name).to_pylist() for name in names), strict=True))


@dataclass(frozen=True, kw_only=True)
class LiveRelease:
    """A release as requests use it; nothing in it changes."""

    release: Manifest
    songs: Songs
    engine: Engine  # model and index, in this process or behind deployments of their own

    @property
    def id(self) -> str:
        """The release's id."""
        return self.release.id

    @property
    def model_id(self) -> str:
        """The id of its model, whose states no other model may be fed."""
        return self.release.inputs["models"]


def load_parts(workspace: Workspace, release_id: str) -> tuple[Manifest, Recommender]:
    """A release, its files compared with their checksums, and its recommender.

    Raises `NotFoundError`, `DamagedArtifactError` or `MismatchError` for a release that cannot be trusted.
    """
    release = artifacts.load(workspace, releases.KIND, release_id)
    releases.verify_release(workspace, release)
    parts = release.inputs
    recommender = load_recommender(
        workspace, Dataset(workspace), model_id=parts["models"], index_id=parts.get("indexes")
    )
    return release, recommender


def load_songs(workspace: Workspace, release: Manifest, recommender: Recommender) -> Songs:
    """The catalog of a release and its popular songs."""
    dataset = Dataset(workspace)
    catalog = dataset.catalog()
    plays = play_counts(workspace, dataset, release.inputs["models"], recommender.num_songs)
    silent = network_of(recommender).without_vector  # never recommended, however popular
    by_plays = np.argsort(-plays, kind="stable").astype(np.int32)
    return Songs(
        catalog=catalog,
        rows={song: row for row, song in enumerate(catalog.song_ids(np.arange(len(catalog))))},
        contexts={name: bit for bit, name in enumerate(dataset.manifest.contexts)},
        plays=plays,
        by_plays=by_plays[~np.isin(by_plays, silent)],
        lineage=dataset.lineage,
        known=_known(recommender, len(catalog)),
        search=SongSearch(catalog, np.pad(plays, (0, len(catalog) - len(plays)))),  # new songs are found too
        masks=SongMasks(catalog),
    )


def _known(recommender: Recommender, songs: int) -> np.ndarray:
    """bool (songs,): songs that the network has a vector of; those that came after it are none."""
    known: np.ndarray = np.arange(songs) < recommender.num_songs
    known[network_of(recommender).without_vector] = False
    return known


def play_counts(workspace: Workspace, dataset: Dataset, model_id: str, num_songs: int) -> np.ndarray:
    """int64 (N,): plays of each song in the fit range of a model.

    Models made before they kept these counts are given those of the whole data set.
    """
    manifest = artifacts.load(workspace, "models", model_id)
    if PLAY_COUNTS in manifest.files:
        return np.asarray(workspace.read_array(manifest.path(PLAY_COUNTS)))
    plays = np.zeros(num_songs, dtype=np.int64)
    for histories in dataset.read_all():
        plays += np.bincount(histories.songs, minlength=num_songs)[:num_songs]
    return plays


@dataclass
class ReleaseHolder:
    """Holds the live release of one replica, and moves it after `releases/active`.

    A new release is loaded beside the live one, which answers meanwhile; one that cannot be trusted is
    refused, and the old one stays. `report` tells the other replicas, and whoever waits for a switch.
    """

    workspace: Workspace
    load: Callable[[str], LiveRelease]  # by the id of the release
    reports: Reports
    replica: str
    watch_seconds: float
    on_switch: Callable[[LiveRelease], None] = lambda live: None
    _live: LiveRelease | None = None
    _change: str | None = None  # the activation that was acted on last
    _refused: dict[str, str] | None = None  # id and reason
    _refused_at: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def live(self) -> LiveRelease:
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


def status_of(holder: ReleaseHolder) -> dict[str, Any]:
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
