"""Songs that are added while a release is live. Every replica has them within a second, until a release contains them.

The store holds, per song, its metadata, the number of its plays and the sums of the mean vectors around these plays. A
replica reads the changes since its last read, computes vectors of the songs as `rayrec songs add` does, and uses the
songs in addition to those of its release.

D numbers per song vector.
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

LOOK_SECONDS = 0.25  # between two reads of the store
MAX_ONLINE_SONGS = 10_000  # added songs that no release contains; each search scores all of them
# A replica closes songs that its release contains this long after loading it, since it may be switched back before.
CLOSE_SECONDS = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SongToAdd:
    """A song that a client adds."""

    song_id: str
    title: str | None = None
    artist: str | None = None
    album: str | None = None
    released: str | None = None  # YYYY-MM-DD
    markets: list[str] | None = None
    vector: list[float] | None = None  # content vector

    def to_bytes(self) -> bytes:
        """Return the fields as a store holds them, without the id, which the store holds separately."""
        fields = {name: value for name, value in vars(self).items() if value is not None and name != "song_id"}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def of(cls, song: OnlineSong) -> "SongToAdd":
        """Make the song from the entry of a store."""
        return cls(song_id=song.song_id, **json.loads(song.data))

    def later(self, row: int) -> LaterSong:
        """Return the song with its row, as `SongPlacer` takes it."""
        content = None if self.vector is None else np.array(self.vector, dtype=np.float32)
        return LaterSong(row=row, artist=self.artist, album=self.album, content=content)


@dataclass
class _OnlineState:
    """The added songs that a replica has read. `row_of_number` has an entry for each number, even of closed songs."""

    songs: dict[int, SongToAdd] = field(default_factory=dict)  # by number: songs without a vector in the release
    row_of_number: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # -1: no row
    plays: dict[int, np.ndarray] = field(default_factory=dict)  # by number: float64 (1 + 2 D,), plays and vector sums
    beyond: list[int] = field(default_factory=list)  # numbers of the songs after the catalog's last row, in row order
    placed: AddedSongs | None = None  # vectors of `songs` before their plays move them


class OnlineSongs:
    """The songs that were added online, as one replica uses them with one release."""

    def __init__(
        self,
        workspace: Workspace,
        release: Manifest,
        catalog: ServedCatalog,
        engine: Engine,
        store: Callable[[], StateStore | None],
    ) -> None:
        """`store` returns the store, or None if it does not exist, so that no song can have been added."""
        self._workspace, self._catalog, self._engine, self._store = workspace, catalog, engine, store
        self._model = release.inputs["models"]
        folder = artifacts.load_manifest(workspace, "models", self._model).folder
        self._outputs = workspace.read_array(f"{folder}/{SONG_VECTORS}")
        inputs = f"{folder}/{INPUT_VECTORS}"
        self._inputs = workspace.read_array(inputs) if workspace.exists(inputs) else self._outputs
        self._of_release = network_of(engine.parts.recommender).added
        self._first, self._known = len(catalog.known), catalog.known  # of the release, without added songs
        self._placer: SongPlacer | None = None
        self._version, self._state = 0, _OnlineState()
        self._contained: list[int] = []  # numbers of open songs that the release contains
        self._lock = threading.Lock()
        self._began = time.monotonic()

    @property
    def content_dim(self) -> int:
        """Length of a content vector; 0 if the catalog has none."""
        with self._lock:
            return self._made_placer().content_dim

    @property
    def count(self) -> int:
        """Number of added songs in use, without those that the release contains."""
        return len(self._state.songs)

    def add(self, songs: Sequence[SongToAdd]) -> list[bool] | None:
        """Add songs for every replica; return for each song whether it was added. Known songs stay unchanged.

        Returns None and adds no song if there would be more than MAX_ONLINE_SONGS. When this returns, the songs are
        stored and in use here. Raises `StoreUnavailableError` if the store does not answer.
        """
        self.refresh()
        store = self._store()
        assert store is not None  # the caller has created it
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
        """Apply the changes since the last read. Raises `StoreUnavailableError` if the store does not answer."""
        with self._lock:
            store = self._store()
            if store is None:
                return
            version, changed = store.songs_since(self._version)
            if version < self._version:  # the store was emptied
                version, changed = store.songs_since(0)
                self._state = _OnlineState()
            if changed:
                self._take(changed)
            self._version = version
            if self._contained and time.monotonic() - self._began > CLOSE_SECONDS:
                store.close_songs(self._contained)
                self._contained = []

    def missing(self, stored: np.ndarray) -> bool:
        """Return True if stored rows, int32, contain songs that were added after the last read."""
        late = stored[stored >= FIRST_ONLINE]
        return bool(len(late)) and int(late.max()) - FIRST_ONLINE >= len(self._state.row_of_number)

    def first_plays(self, steps: Sequence[Step]) -> dict[int, bytes]:
        """Return what the plays of `steps` add to the sums of added songs, by number, as bytes of float64 (1 + 2 D,).

        They are the number of plays, and the sums of the mean vectors around these plays: what `FirstPlays` reads from
        each window with the new plays, minus what it reads from the window before. The log is not read, so a play that
        is inserted among the oldest of a window may lack neighbors.
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
        """Return float64 (n, 1 + 2 D): the plays of each song, and the sums of outputs and of inputs around them."""
        histories = join_plays(users)
        histories = replace(histories, songs=self._catalog.rows_of_stored(histories.songs))
        read = FirstPlays.read([histories], rows, self._outputs, self._inputs)
        return np.concatenate([read.plays[:, None], read.outputs, read.inputs], axis=1)

    def count_plays(self, sums: Mapping[int, bytes]) -> None:
        """Add the result of `first_plays` to the sums in the store."""
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
        else:  # both at once, since an answer may contain the songs from then on
            self._engine.add_songs(songs if self._of_release is None else self._of_release.joined(songs), name_songs)

    def _made_placer(self) -> SongPlacer:
        """Return the placer. It is made for the first song only, since this reads all vectors and may fit a map."""
        if self._placer is None:
            catalog = self._catalog.catalog
            ids = columns.one_array(catalog.table.column(columns.SONG_ID))
            content = Content.load(self._workspace, Dataset(self._workspace).descriptions(), ids)
            self._placer = SongPlacer(self._outputs, self._inputs, catalog, content, self._of_release)
        return self._placer

    @staticmethod
    def _with_plays(online: _OnlineState, placed: AddedSongs) -> AddedSongs:
        """Return the placed songs with a vector, after their first plays have moved their output vectors.

        The input vectors, which the network reads, stay as they were before any play, so that network states do not
        depend on when they are computed.
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
    """Return songs as a table with the columns of a catalog."""
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
    """Reads songs that were added online every `LOOK_SECONDS`, in its own thread."""

    def __init__(self, online: Callable[[], Sequence[OnlineSongs]]) -> None:
        """`online` returns the added songs of each release that answers now."""
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
            except Exception as error:  # a store that cannot be reached for a while must not end the watch
                if not self._failed:
                    log.warning("cannot read the songs that were added online: %s", error)
                self._failed = True
