"""Songs that are added while a release is live, until every release in use contains them.

Every replica has them within a second. The store holds, per song, its metadata, the number of its plays and the sums of
the mean vectors around these plays. A replica reads the changes since its last read, computes vectors of the songs as
`rayrec songs add` does, and uses the songs in addition to those of its release.

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
from rayrec.errors import MismatchError, NotFoundError
from rayrec.model.added_songs import AddedSongs, FirstPlays, LaterSong, SongPlacer, drawn
from rayrec.model.checkpoint import INPUT_VECTORS
from rayrec.model.train_config import SONG_VECTORS
from rayrec.online.state_store import OnlineSong, StateStore
from rayrec.online.user_state import FIRST_ONLINE, Plays, Step, join_plays
from rayrec.recommend.reranking import network_of
from rayrec.serving.engine import Engine
from rayrec.serving.served_catalog import OnlineCatalog, ServedCatalog
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

REFRESH_SECONDS = 0.25  # between two reads of the store
MAX_ONLINE_SONGS = 10_000  # added songs that some release in use lacks; each search scores all of them
# Between two checks for songs to close, and from loading a release to the first one: it may be switched back before.
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

    # By number: songs without a vector in the release. Their content vectors are left out once they are placed.
    songs: dict[int, SongToAdd] = field(default_factory=dict)
    row_of_number: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # -1: no row
    plays: dict[int, np.ndarray] = field(default_factory=dict)  # by number: float64 (1 + 2 D,), plays and vector sums
    # Numbers of the songs after the catalog's last row, in row order.
    numbers_after_catalog: list[int] = field(default_factory=list)
    placed_songs: AddedSongs | None = None  # vectors of `songs` before their plays move them

    def emptied(self) -> "_OnlineState":
        """Return a state without songs. It keeps that songs had vectors, which the engine must be told to drop."""
        no_songs = None if self.placed_songs is None else self.placed_songs.take(np.zeros(0, dtype=np.int64))
        return _OnlineState(placed_songs=no_songs)


class OnlineSongs:
    """The songs that were added online, as one replica uses them with one release."""

    def __init__(
        self,
        workspace: Workspace,
        release: Manifest,
        catalog: ServedCatalog,
        engine: Engine,
        store: Callable[[], StateStore | None],
        next_number: Callable[[int], int],
    ) -> None:
        """`store` returns the store, or None if it does not exist, so that no song can have been added.

        `next_number` raises the number of the next song, which all releases share, to a given one, and returns it.
        """
        self._workspace, self._catalog, self._engine, self._store = workspace, catalog, engine, store
        self._raise_next_number = next_number
        self._model = release.inputs["models"]
        folder = artifacts.load_manifest(workspace, "models", self._model).folder
        self._outputs = workspace.read_array(f"{folder}/{SONG_VECTORS}")
        inputs = f"{folder}/{INPUT_VECTORS}"
        self._inputs = workspace.read_array(inputs) if workspace.exists(inputs) else self._outputs
        self._added_in_release = network_of(engine.parts.recommender).added
        self._first_row, self._is_known = len(catalog.known), catalog.known  # of the release, without added songs
        self._placer: SongPlacer | None = None
        self._version, self._state = 0, _OnlineState()
        self._contained: dict[int, int] = {}  # number -> row, of open songs that the release contains
        self._lock = threading.Lock()

    @property
    def content_dim(self) -> int:
        """Length of a content vector; 0 if the catalog has none."""
        with self._lock:
            return self._get_placer().content_dim

    @property
    def count(self) -> int:
        """Number of added songs in use, without those that the release contains."""
        return len(self._state.songs)

    @property
    def contained(self) -> dict[int, int]:
        """Number -> row of the open songs that the release contains."""
        with self._lock:
            return dict(self._contained)

    def add(self, songs: Sequence[SongToAdd]) -> list[bool] | None:
        """Add songs for every replica; return for each song whether it was added. Known songs stay unchanged.

        Returns None and adds no song if there would be more than MAX_ONLINE_SONGS. When this returns, the songs are
        stored and in use here. Of several entries of a song the first counts. Raises `StoreUnavailableError` if the
        store does not answer.
        """
        self.refresh()
        store = self._store()
        assert store is not None  # the caller has created it
        rows, number_of_row = self._catalog.find([song.song_id for song in songs]), self._number_of_row(self._state)
        new_songs: dict[str, bytes] = {}
        for song, row in zip(songs, rows.tolist(), strict=True):
            if row not in number_of_row and (row < 0 or not self._is_known[row]):
                new_songs.setdefault(song.song_id, song.to_bytes())  # the first entry of a song that is sent twice
        is_added = store.add_songs(new_songs, MAX_ONLINE_SONGS, self._raise_next_number(0)) if new_songs else []
        if is_added is None:
            return None
        self.refresh()
        is_added_by_id = dict(zip(new_songs, is_added, strict=True))
        return [is_added_by_id.pop(song.song_id, False) for song in songs]

    @staticmethod
    def _number_of_row(state: _OnlineState) -> dict[int, int]:
        return {int(state.row_of_number[number]): number for number in state.songs}

    def refresh(self) -> None:
        """Apply the changes since the last read. Raises `StoreUnavailableError` if the store does not answer."""
        with self._lock:
            store = self._store()
            if store is None:
                return
            version, changed_songs = store.songs_since(self._version)
            has_lost_songs = version < self._version  # the store was emptied, or is an older copy
            if has_lost_songs:
                log.warning("the store has lost songs that were added online; those that it still has are read again")
                version, changed_songs = store.songs_since(0)
                # The lost songs' rows and numbers go to other songs.
                self._contained, self._placer = {}, None
            self._raise_next_number(max((song.number + 1 for song in changed_songs), default=0))
            if changed_songs or has_lost_songs:
                self._apply_changes(changed_songs, self._state.emptied() if has_lost_songs else self._state)
            self._version = version

    def close(self, numbers: Sequence[int]) -> None:
        """Delete the metadata and the sums of songs from the store, by number."""
        store = self._store()
        if store is not None:
            store.close_songs(numbers)

    def missing(self, stored_rows: np.ndarray) -> bool:
        """Return True if stored rows, int32, contain songs that were added after the last read.

        No new song gets the number of a stored row: the store may have lost that song before this process read it.
        """
        number_count = int(stored_rows.max(initial=-1)) - FIRST_ONLINE + 1
        if number_count <= 0:
            return False
        self._raise_next_number(number_count)
        return number_count > len(self._state.row_of_number)

    def first_plays(self, steps: Sequence[Step]) -> dict[int, bytes]:
        """Return what the plays of `steps` add to the sums of added songs, by number, as bytes of float64 (1 + 2 D,).

        They are the number of plays, and the sums of the mean vectors around these plays: what `FirstPlays` reads from
        each window with the new plays, minus what it reads from the window before. The log is not read, so a play that
        is inserted among the oldest of a window may lack neighbors.
        """
        number_of_row = self._number_of_row(self._state)
        rows = np.array(sorted(number_of_row), dtype=np.int64)
        window_pairs = [(step.window, step.state.window) for step in steps]
        window_pairs = [
            pair for pair in window_pairs if np.isin(self._catalog.rows_of_stored(pair[0].songs), rows).any()
        ]
        if not window_pairs:
            return {}
        sums_after, sums_before = (self._sum_first_plays(plays, rows) for plays in zip(*window_pairs, strict=True))
        added_sums = sums_after - sums_before
        return {
            number_of_row[row]: song_sums.astype("<f8").tobytes()
            for row, song_sums in zip(rows.tolist(), added_sums, strict=True)
            if song_sums.any()
        }

    def _sum_first_plays(self, users: Sequence[Plays], rows: np.ndarray) -> np.ndarray:
        """Return float64 (n, 1 + 2 D): the plays of each song, and the sums of outputs and of inputs around them."""
        histories = join_plays(users)
        histories = replace(histories, songs=self._catalog.rows_of_stored(histories.songs))
        first_plays = FirstPlays.read([histories], rows, self._outputs, self._inputs)
        return np.concatenate([first_plays.plays[:, None], first_plays.outputs, first_plays.inputs], axis=1)

    def count_plays(self, song_sums: Mapping[int, bytes]) -> None:
        """Add the result of `first_plays` to the sums in the store."""
        store = self._store()
        if store is not None:
            store.count_song_plays(self._model, song_sums)

    def _apply_changes(self, changed_songs: Sequence[OnlineSong], previous: _OnlineState) -> None:
        """Use `changed_songs` in addition to those of `previous`, or in their place."""
        updated = _OnlineState(
            dict(previous.songs),
            previous.row_of_number,
            dict(previous.plays),
            list(previous.numbers_after_catalog),
            previous.placed_songs,
        )
        number_count = max((song.number for song in changed_songs), default=-1) + 1
        updated.row_of_number = np.pad(
            previous.row_of_number, (0, max(0, number_count - len(previous.row_of_number))), constant_values=-1
        )
        new_numbers: list[int] = []
        for song in changed_songs:
            if song.number not in updated.songs:
                (row,) = self._catalog.rows.find([song.song_id])
                updated.row_of_number[song.number] = row
                self._contained.pop(song.number, None)
                if not song.data:
                    continue
                if row >= 0 and self._is_known[row]:
                    self._contained[song.number] = row
                    continue
                if row < 0:
                    updated.row_of_number[song.number] = self._first_row + len(updated.numbers_after_catalog)
                    updated.numbers_after_catalog.append(song.number)
                updated.songs[song.number] = SongToAdd.of(song)
                new_numbers.append(song.number)
            if song.sums and song.model == self._model:
                updated.plays[song.number] = np.frombuffer(song.sums, dtype="<f8")
        if new_numbers:
            later_songs = [updated.songs[number].later(int(updated.row_of_number[number])) for number in new_numbers]
            new_placed_songs = self._get_placer().estimate(later_songs)
            updated.placed_songs = (
                new_placed_songs if previous.placed_songs is None else previous.placed_songs.union(new_placed_songs)
            )
            for number in new_numbers:  # not read again, and a list takes 32 bytes per number
                updated.songs[number] = replace(updated.songs[number], vector=None)
        songs_with_vectors = (
            None if updated.placed_songs is None else self._move_songs_by_plays(updated, updated.placed_songs)
        )
        online_catalog = OnlineCatalog.of(
            self._first_row,
            _catalog_table([updated.songs[number] for number in updated.numbers_after_catalog]),
            updated.row_of_number,
            list(updated.songs),
            np.zeros(0, dtype=np.int64) if songs_with_vectors is None else songs_with_vectors.rows,
            self._catalog.masks,
        )

        def apply_update() -> None:
            self._state = updated
            self._catalog.with_online(online_catalog)

        if songs_with_vectors is None:
            apply_update()
        else:  # both at once, since an answer may contain the songs from then on
            self._engine.add_songs(
                songs_with_vectors
                if self._added_in_release is None
                else self._added_in_release.union(songs_with_vectors),
                apply_update,
            )

    def _get_placer(self) -> SongPlacer:
        """Return the placer. It is made for the first song only, since this reads all vectors and may fit a map."""
        if self._placer is None:
            catalog = self._catalog.catalog
            ids = columns.one_array(catalog.table.column(columns.SONG_ID))
            content = Content.load(self._workspace, Dataset(self._workspace).descriptions(), ids)
            self._placer = SongPlacer(self._outputs, self._inputs, catalog, content, self._added_in_release)
        return self._placer

    @staticmethod
    def _move_songs_by_plays(state: _OnlineState, placed_songs: AddedSongs) -> AddedSongs:
        """Return the placed songs with a vector, after their first plays have moved their output vectors.

        The input vectors, which the network reads, stay as they were before any play, so that network states do not
        depend on when they are computed.
        """
        number_of_row = OnlineSongs._number_of_row(state)
        dim = placed_songs.outputs.shape[1]
        song_sums = np.zeros((len(placed_songs), 1 + 2 * dim))
        for index, row in enumerate(placed_songs.rows.tolist()):
            plays = state.plays.get(number_of_row[row])
            if plays is not None and len(plays) == song_sums.shape[1]:
                song_sums[index] = plays
        outputs = drawn(placed_songs.outputs, song_sums[:, 0], song_sums[:, 1 : 1 + dim]).astype(np.float32)
        return replace(placed_songs, outputs=outputs).take(np.flatnonzero(outputs.any(axis=1)))


def _catalog_table(songs: Sequence[SongToAdd]) -> pa.Table:
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


def _has_vectors(workspace: Workspace, release_id: str, rows: np.ndarray) -> np.ndarray:
    """Return bool (n,): True for song rows that a stored release has a vector of, which is not loaded for this.

    True for all rows if the release cannot become live, because it was deleted or its data set was replaced.
    """
    try:
        release = artifacts.load_manifest(workspace, releases.KIND, release_id)
        releases.require_dataset_of(workspace, release)
    except (NotFoundError, MismatchError):
        return np.ones(len(rows), dtype=bool)
    folder = artifacts.load_manifest(workspace, "models", release.inputs["models"]).folder
    outputs = workspace.read_array(f"{folder}/{SONG_VECTORS}")
    has_vector = np.zeros(len(rows), dtype=bool)
    is_in_model = rows < len(outputs)
    has_vector[is_in_model] = outputs[rows[is_in_model]].any(axis=1)
    if "added_songs" in release.inputs:
        folder = artifacts.load_manifest(workspace, "added_songs", release.inputs["added_songs"]).folder
        has_vector |= np.isin(rows, AddedSongs.load(workspace, folder).rows)
    return has_vector


class OnlineWatch:
    """Reads songs that were added online every `REFRESH_SECONDS`, in its own thread, and closes those in all releases.

    Another thread closes songs, since this may read a whole model from object storage, while more songs are added. A
    song is closed when every release in use contains it: those that answer here, the live one, and the one that a
    rollback makes live.
    """

    def __init__(self, workspace: Workspace, get_online_songs: Callable[[], Sequence[OnlineSongs]]) -> None:
        """`get_online_songs` returns the added songs of each release that answers now."""
        self._workspace, self._get_online_songs = workspace, get_online_songs
        self._stop, self._has_failed = threading.Event(), False
        self._in_use: Sequence[OnlineSongs] = []  # as last returned
        self._close_at = 0.0  # time.monotonic() of the next check for songs to close
        self._checked: tuple[list[int], str] | None = None  # numbers and id of the activation in the last such check
        self._closing: threading.Thread | None = None  # the last such check, which may read models for minutes
        self._thread = threading.Thread(target=self._refresh_until_stop, daemon=True)

    def start(self) -> None:
        """Read and close songs until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End the reading, and do not wait for a check for songs to close, which then closes none."""
        self._stop.set()
        self._thread.join()

    def _refresh_until_stop(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                in_use = self._get_online_songs()
                for online_songs in in_use:
                    online_songs.refresh()
                if in_use != self._in_use:
                    self._in_use, self._close_at = in_use, time.monotonic() + CLOSE_SECONDS
                elif in_use and time.monotonic() >= self._close_at and not (self._closing and self._closing.is_alive()):
                    self._close_at = time.monotonic() + CLOSE_SECONDS
                    self._closing = threading.Thread(target=self._try_to_close, args=(in_use,), daemon=True)
                    self._closing.start()
                self._has_failed = False
            except Exception as error:  # a store that cannot be reached for a while must not end the watch
                if not self._has_failed:
                    log.warning("cannot read the songs that were added online: %s", error)
                self._has_failed = True

    def _try_to_close(self, in_use: Sequence[OnlineSongs]) -> None:
        try:
            self._close_songs(in_use)
        except Exception as error:  # the next check tries again
            log.warning("cannot close songs that were added online: %s", error)

    def _close_songs(self, in_use: Sequence[OnlineSongs]) -> None:
        """Close the songs that every release in use contains. Does nothing if neither they nor the releases changed."""
        contained_songs = [online_songs.contained for online_songs in in_use]
        row_of_number = {
            number: row
            for number, row in contained_songs[0].items()
            if all(number in contained for contained in contained_songs)
        }
        if not row_of_number:
            return
        activation = releases.read_active(self._workspace)
        if self._checked == (list(row_of_number), activation["change"]):
            return
        numbers, rows = (np.array(list(values)) for values in (row_of_number, row_of_number.values()))
        is_contained = np.ones(len(rows), dtype=bool)
        for release_id in filter(None, (activation["active"], *activation["history"][-1:])):
            is_contained &= _has_vectors(self._workspace, release_id, rows)
        if self._stop.is_set():
            return
        if is_contained.any():
            in_use[0].close(numbers[is_contained].tolist())
        self._checked = list(row_of_number), activation["change"]
