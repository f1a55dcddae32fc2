"""Songs that are added while a release is live: taken in by every replica within a second, until a release has them.

The store holds their metadata and the sums of what was played around their plays. A replica reads what changed since it
looked last, places the songs as `rayrec songs add` does, and puts them beside those of its release.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.catalog import Content
from rayrec.data.dataset import Dataset
from rayrec.model.added_songs import AddedSongs, FirstPlays, LaterSong, SongPlacer, drawn
from rayrec.model.checkpoint import INPUT_VECTORS, SONG_VECTORS
from rayrec.online.state_store import OnlineSong, StateStore
from rayrec.online.user_state import FIRST_ONLINE, Plays, Step, join_plays
from rayrec.recommend.reranking import network_of
from rayrec.serving.engine import Engine
from rayrec.serving.served_catalog import OnlineCatalog, ServedCatalog
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

LOOK_SECONDS = 0.25  # between two looks into the store
MAX_ONLINE_SONGS = 10_000  # that no release has; each search scores all of them
CLOSE_SECONDS = 60.0  # that a release is live before songs that it has are closed: it may be switched back until then

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SongToAdd:
    """A song as a client adds it."""

    song_id: str
    title: str | None = None
    artist: str | None = None
    album: str | None = None
    released: str | None = None  # YYYY-MM-DD
    markets: list[str] | None = None
    vector: list[float] | None = None  # content

    def to_bytes(self) -> bytes:
        """As a store holds it beside the id."""
        fields = {name: value for name, value in vars(self).items() if value is not None and name != "song_id"}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def of(cls, song: OnlineSong) -> "SongToAdd":
        """From what a store holds."""
        return cls(song_id=song.song_id, **json.loads(song.data))

    def later(self, row: int) -> LaterSong:
        """As it is placed, at a row."""
        content = None if self.vector is None else np.array(self.vector, dtype=np.float32)
        return LaterSong(row=row, artist=self.artist, album=self.album, content=content)


@dataclass
class _OnlineState:
    """The songs that a replica has taken in; arrays have an entry for each number, open or not."""

    songs: dict[int, SongToAdd] = field(default_factory=dict)  # by number, those that the release has no vector of
    row_of_number: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    plays: dict[int, np.ndarray] = field(default_factory=dict)  # by number: float64 (1 + 2 D,), plays and sums
    beyond: list[int] = field(default_factory=list)  # numbers of the songs beyond the catalog, by row
    placed: AddedSongs | None = None  # without plays


class OnlineSongs:
    """The songs that were added online, in one replica's release."""

    def __init__(
        self,
        workspace: Workspace,
        release: Manifest,
        catalog: ServedCatalog,
        engine: Engine,
        store: Callable[[], StateStore | None],
    ) -> None:
        """`store` gives the store where there is one; without any no songs were added."""
        self._workspace, self._catalog, self._engine, self._store = workspace, catalog, engine, store
        self._model = release.inputs["models"]
        folder = artifacts.load_manifest(workspace, "models", self._model).folder
        self._outputs = workspace.read_array(f"{folder}/{SONG_VECTORS}")
        inputs = f"{folder}/{INPUT_VECTORS}"
        self._inputs = workspace.read_array(inputs) if workspace.exists(inputs) else self._outputs
        self._of_release = network_of(engine.parts.recommender).added
        self._first, self._known = len(catalog.known), catalog.known  # of the release alone
        self._placer: SongPlacer | None = None
        self._version, self._state = 0, _OnlineState()
        self._contained: list[int] = []  # numbers of open songs that the release has
        self._lock = threading.Lock()
        self._began = time.monotonic()

    @property
    def content_dim(self) -> int:
        """Numbers of a content vector; 0 where the catalog has none."""
        with self._lock:
            return self._made_placer().content_dim

    @property
    def count(self) -> int:
        """Songs that were taken in."""
        return len(self._state.songs)

    def add(self, songs: Sequence[SongToAdd]) -> list[bool] | None:
        """Add songs for every replica; which ones were added: those that are known already stay as they are.

        None, and none is added, where there would be more than MAX_ONLINE_SONGS. When this returns they are stored and
        taken in here. Raises `StoreUnavailableError` where the store does not answer.
        """
        self.refresh()
        store = self._store()
        assert store is not None  # who adds songs has it made
        rows, online = self._catalog.find([song.song_id for song in songs]), self._number_of_row(self._state)
        new = {
            song.song_id: song.to_bytes()
            for song, row in zip(songs, rows.tolist(), strict=True)
            if row not in online and (row < 0 or not self._known[row])
        }
        added = store.add_songs(new, MAX_ONLINE_SONGS) if new else []
        if added is None:
            return None
        self.refresh()
        outcome = dict(zip(new, added, strict=True))
        return [outcome.pop(song.song_id, False) for song in songs]

    @staticmethod
    def _number_of_row(state: _OnlineState) -> dict[int, int]:
        return {int(state.row_of_number[number]): number for number in state.songs}

    def refresh(self) -> None:
        """Take in what changed. Raises `StoreUnavailableError` where the store does not answer."""
        with self._lock:
            store = self._store()
            if store is None:
                return
            version, changed = store.songs_since(self._version)
            if version < self._version:  # of a store that was emptied
                version, changed = store.songs_since(0)
                self._state = _OnlineState()
            if changed:
                self._take(changed)
            self._version = version
            if self._contained and time.monotonic() - self._began > CLOSE_SECONDS:
                store.close_songs(self._contained)
                self._contained = []

    def missing(self, stored: np.ndarray) -> bool:
        """Whether stored rows, int32, name songs that were added after the last look."""
        late = stored[stored >= FIRST_ONLINE]
        return bool(len(late)) and int(late.max()) - FIRST_ONLINE >= len(self._state.row_of_number)

    def first_plays(self, steps: Sequence[Step]) -> dict[int, bytes]:
        """What the plays of steps add to the sums of songs, by number: plays, and what was played around them.

        It is what `FirstPlays` reads of each window with them, less that of the window before. Nothing of the log is
        read, so a play that is put among the oldest of a window may lack neighbors.
        """
        number_of_row = self._number_of_row(self._state)
        rows = np.array(sorted(number_of_row), dtype=np.int64)
        windows = [(step.window, step.state.window) for step in steps]
        windows = [each for each in windows if np.isin(self._catalog.rows_of_stored(each[0].songs), rows).any()]
        if not windows:
            return {}
        after, before = (self._read_plays(plays, rows) for plays in zip(*windows, strict=True))
        added = after - before
        return {
            number_of_row[row]: sums.astype("<f8").tobytes()
            for row, sums in zip(rows.tolist(), added, strict=True)
            if sums.any()
        }

    def _read_plays(self, users: Sequence[Plays], rows: np.ndarray) -> np.ndarray:
        """float64 (n, 1 + 2 D): plays of each song, with the sums of outputs and of inputs around them."""
        histories = join_plays(users)
        histories = replace(histories, songs=self._catalog.rows_of_stored(histories.songs))
        read = FirstPlays.read([histories], rows, self._outputs, self._inputs)
        return np.concatenate([read.plays[:, None], read.outputs, read.inputs], axis=1)

    def count_plays(self, sums: Mapping[int, bytes]) -> None:
        """Add what `first_plays` gave to the sums in the store."""
        store = self._store()
        if store is not None:
            store.count_song_plays(self._model, sums)

    def _take(self, changed: Sequence[OnlineSong]) -> None:
        before = self._state
        updated = _OnlineState(
            dict(before.songs), before.row_of_number, dict(before.plays), list(before.beyond), before.placed
        )
        numbers = max(song.number for song in changed) + 1
        updated.row_of_number = np.pad(
            before.row_of_number, (0, max(0, numbers - len(before.row_of_number))), constant_values=-1
        )
        fresh: list[int] = []
        for song in changed:
            if song.number not in updated.songs:
                (row,) = self._catalog.rows.find([song.song_id])
                updated.row_of_number[song.number] = row
                if not song.data:
                    continue
                if row >= 0 and self._known[row]:
                    self._contained.append(song.number)
                    continue
                if row < 0:
                    updated.row_of_number[song.number] = self._first + len(updated.beyond)
                    updated.beyond.append(song.number)
                updated.songs[song.number] = SongToAdd.of(song)
                fresh.append(song.number)
            if song.sums and song.model == self._model:
                updated.plays[song.number] = np.frombuffer(song.sums, dtype="<f8")
        if fresh:
            later = [updated.songs[number].later(int(updated.row_of_number[number])) for number in fresh]
            placed = self._made_placer().place(later)
            updated.placed = placed if before.placed is None else before.placed.joined(placed)
        songs = None if updated.placed is None else self._with_plays(updated, updated.placed)
        online = OnlineCatalog.of(
            self._first,
            _table([updated.songs[number] for number in updated.beyond]),
            updated.row_of_number,
            list(updated.songs),
            np.zeros(0, dtype=np.int64) if songs is None else songs.rows,
            self._catalog.masks,
        )

        def name_songs() -> None:
            self._state = updated
            self._catalog.with_online(online)

        if songs is None:
            name_songs()
        else:  # at once: an answer may hold them from then on
            self._engine.add_songs(songs if self._of_release is None else self._of_release.joined(songs), name_songs)

    def _made_placer(self) -> SongPlacer:
        """Made for the first song: it passes over all vectors, and may have to learn the map from content to them."""
        if self._placer is None:
            catalog = self._catalog.catalog
            ids = columns.one_array(catalog.table.column(columns.SONG_ID))
            content = Content.load(self._workspace, Dataset(self._workspace).descriptions(), ids)
            self._placer = SongPlacer(self._outputs, self._inputs, catalog, content, self._of_release)
        return self._placer

    @staticmethod
    def _with_plays(online: _OnlineState, placed: AddedSongs) -> AddedSongs:
        """The placed songs with a vector, drawn to what was played around their first plays.

        What the network reads of a song stays as it was before its plays, so that states are the same whenever they
        are computed.
        """
        number_of_row = OnlineSongs._number_of_row(online)
        dim = placed.outputs.shape[1]
        sums = np.zeros((len(placed), 1 + 2 * dim))
        for place, row in enumerate(placed.rows.tolist()):
            plays = online.plays.get(number_of_row[row])
            if plays is not None and len(plays) == sums.shape[1]:
                sums[place] = plays
        outputs = drawn(placed.outputs, sums[:, 0], sums[:, 1 : 1 + dim]).astype(np.float32)
        return replace(placed, outputs=outputs).take(np.flatnonzero(outputs.any(axis=1)))


def _table(songs: Sequence[SongToAdd]) -> pa.Table:
    """Columns of a catalog."""
    values: dict[str, list[Any]] = {
        columns.SONG_ID: [song.song_id for song in songs],
        columns.TITLE: [song.title for song in songs],
        columns.ARTIST: [song.artist for song in songs],
        columns.ALBUM: [song.album for song in songs],
        columns.RELEASED: [None if song.released is None else date.fromisoformat(song.released) for song in songs],
        columns.MARKETS: [song.markets for song in songs],
    }
    return pa.table(values, schema=columns.DESCRIPTIONS)


class OnlineWatch:
    """Looks for songs that were added online, again and again, in a thread of its own."""

    def __init__(self, online: Callable[[], Sequence[OnlineSongs]]) -> None:
        """`online` gives those of the releases that answer now."""
        self._online, self._stop, self._failed = online, threading.Event(), False
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            try:
                for online in self._online():
                    online.refresh()
                self._failed = False
            except Exception as error:  # a store out of reach for a while ends no watch
                if not self._failed:
                    log.warning("cannot look for songs that were added online: %s", error)
                self._failed = True
