"""The catalog of a release as requests use it: songs by id, by name, by attribute and by number of plays."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.catalog import Catalog, SongSearch, popularity_positions, with_folded
from rayrec.data.dataset import Dataset
from rayrec.data.spelling import spell_id
from rayrec.online.state_store import StoreUnavailableError
from rayrec.online.user_state import FIRST_ONLINE
from rayrec.recommend.answer import known_songs, model_play_counts, popular_order
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.filters import SongAttributes, SongMasks, SongSet
from rayrec.recommend.reranking import PopularOrder, network_of
from rayrec.recommend.stored_retrieval import NOT_PLAYED, read_first_days
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest, fingerprint
from rayrec.storage.object_storage import mapped_table
from rayrec.storage.workspace import SONGS_TABLE, Workspace

NAMES_KEPT = 1 << 16  # maximum number of songs in each cache: about 20 MB of names
# A request was in progress while a replica noticed that the store has lost songs.
LOST_SONG = "the store has lost songs that were added online, during this request; try again"
SongName = tuple[str, str | None, str | None]  # a song's id, title and artist


class CatalogRows:
    """Finds song rows by id: a binary search in memory-mapped hashes, with a cache of the rows that were found."""

    def __init__(self, song_ids: pa.StringArray, hashes: np.ndarray, rows: np.ndarray) -> None:
        """`hashes`, uint64 (N,) ascending, are the hashes of the ids; `rows`, int32 (N,), has the row of each hash."""
        self._ids, self._hashes, self._rows = song_ids, hashes, rows
        self._cache: dict[str, int] = {}

    def find(self, song_ids: Sequence[str]) -> list[int]:
        """Return the row of each id, -1 for an id that no song has."""
        cache = self._cache
        missing = [song_id for song_id in song_ids if song_id not in cache]
        rows_found = dict(zip(missing, self._search(missing), strict=True)) if missing else {}
        rows = [rows_found[song_id] if song_id in rows_found else cache[song_id] for song_id in song_ids]
        if len(cache) + len(rows_found) > NAMES_KEPT:
            self._cache = cache = {}  # a new dict, since another thread may read the old one
        cache.update((song_id, row) for song_id, row in rows_found.items() if row >= 0)
        return rows

    def _search(self, song_ids: list[str]) -> list[int]:
        hashes = id_hashes(song_ids)
        rows, positions = [-1] * len(song_ids), np.searchsorted(self._hashes, hashes)
        remaining = np.arange(len(song_ids))
        while len(remaining := remaining[positions[remaining] < len(self._hashes)]):
            remaining = remaining[self._hashes[positions[remaining]] == hashes[remaining]]
            candidate_rows = self._rows[positions[remaining]]
            ids = self._ids.take(pa.array(candidate_rows)).to_pylist()
            for index, row, song_id in zip(remaining.tolist(), candidate_rows.tolist(), ids, strict=True):
                if song_id == song_ids[index]:
                    rows[index] = row
            remaining = remaining[[rows[index] < 0 for index in remaining.tolist()]]  # two ids may share a hash
            positions[remaining] += 1
        return rows


def id_hashes(song_ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return a hash of each id, uint64 (n,)."""
    return np.asarray(pd.util.hash_array(np.asarray(song_ids, dtype=object), categorize=False))


class SongNames:
    """Looks up names of songs. Recently used names are cached, since Arrow is slow at reading single rows."""

    def __init__(self, catalog: Catalog) -> None:
        self._columns = [catalog.table.column(name) for name in (columns.SONG_ID, columns.TITLE, columns.ARTIST)]
        self.of = lru_cache(maxsize=NAMES_KEPT)(self._read_name)

    def _read_name(self, row: int) -> SongName:
        song_id, title, artist = (column[row].as_py() for column in self._columns)
        return song_id, title, artist


@dataclass(frozen=True, kw_only=True)
class OnlineCatalog:
    """The songs that were added online: rows from `first` on, and rows of the catalog that had no vector there."""

    first: int  # number of songs in the release's catalog
    catalog: Catalog  # of the rows from `first` on
    rows: dict[str, int]  # id -> row, for the rows from `first` on
    row_of_number: np.ndarray  # int32, for each number in the store, also of songs that a release contains; -1: no row
    number_of_row: dict[int, int]  # for songs that the release has no vector of
    known: np.ndarray  # int64 (any,), rows of the added songs that have a vector
    search: SongSearch  # in the rows from `first` on
    masks: SongMasks  # of all songs, including those before `first`

    @classmethod
    def of(
        cls,
        first: int,
        table: pa.Table,
        row_of_number: np.ndarray,
        open_numbers: Sequence[int],
        known_rows: np.ndarray,
        masks: SongMasks,
    ) -> "OnlineCatalog":
        """Make it from the table of the songs from row `first` on.

        `open_numbers` are the numbers of the songs that the release has no vector of; `masks` are those of the songs
        before row `first`.
        """
        catalog = Catalog(table)
        ids = catalog.song_ids(np.arange(len(catalog)))
        return cls(
            first=first,
            catalog=catalog,
            rows={song_id: first + index for index, song_id in enumerate(ids)},
            row_of_number=row_of_number,
            number_of_row={int(row_of_number[number]): number for number in open_numbers},
            known=known_rows,
            search=SongSearch(catalog),
            masks=SongMasks(catalog, masks),
        )

    def name(self, row: int) -> SongName:
        """Return id, title and artist of a row from `first` on. Raises `StoreUnavailableError` for a lost song."""
        if row - self.first >= len(self.catalog):
            raise StoreUnavailableError(LOST_SONG)
        names = self.catalog.names(np.array([row - self.first]))[0]
        return names[columns.SONG_ID], names[columns.TITLE], names[columns.ARTIST]


@dataclass(kw_only=True)
class ServedCatalog:
    """The catalog of a release, with fast look-ups by id and by row, and with the songs that were added online."""

    catalog: Catalog
    rows: CatalogRows
    contexts: dict[str, int]  # name -> bit
    skip_below: float  # share of a song below which a play of it counts as skipped
    plays: np.ndarray  # int64 (N,), plays of each song in the fit range of the model
    by_plays: np.ndarray  # int32 (any,), rows of songs with a vector by descending plays
    starting: PopularOrder  # songs for users without plays
    first_days: np.ndarray | None  # int32 (N,), day of each song's first play as days since 1970 UTC, or NOT_PLAYED
    by_age: np.ndarray  # int32 (any,), rows of songs with a vector that have a first play or were added, newest first
    lineage: str  # of the data set: song rows mean the same songs in all data sets of one lineage
    known: np.ndarray  # bool (N,), songs that the network has a vector of
    dim: int  # length of such a vector
    search: SongSearch
    masks: SongMasks
    names: SongNames
    online: OnlineCatalog | None = None

    def with_online(self, online: OnlineCatalog) -> None:
        """Use `online` as the songs that were added online, in place of the earlier ones."""
        added_count = max(0, online.first + len(online.catalog) - len(self.known))
        earlier_rows = np.zeros(0, dtype=np.int64) if self.online is None else self.online.known
        lost_rows = np.setdiff1d(earlier_rows, online.known)  # of songs that the store has lost
        is_known = np.pad(self.known, (0, added_count))
        is_known[lost_rows] = False
        is_known[online.known] = True
        self.plays = np.pad(self.plays, (0, added_count))
        starting = replace(
            self.starting,
            plays=self.plays,
            discounted_plays=np.pad(self.starting.discounted_plays, (0, added_count)),
            is_known=is_known,
        )
        if len(lost_rows):
            self.by_plays, self.by_age, starting_order = (
                order[~np.isin(order, lost_rows)] for order in (self.by_plays, self.by_age, starting.order)
            )
            starting = replace(starting, order=starting_order)
        self.starting = starting
        if self.first_days is not None:
            self.first_days = np.pad(self.first_days, (0, added_count), constant_values=NOT_PLAYED)
        self.known, self.online = is_known, online  # after the arrays above: requests are in progress
        new_rows = np.setdiff1d(online.known, earlier_rows).astype(np.int32)
        if len(new_rows):
            self.by_plays = _insert_by(self.plays, self.by_plays, new_rows)
            starting_order = _insert_by(starting.discounted_plays, starting.order, new_rows)
            self.starting = replace(starting, order=starting_order)
            if self.first_days is not None:
                self.by_age = np.concatenate([new_rows[::-1], self.by_age])

    @property
    def num_rows(self) -> int:
        """Number of songs in the catalog, including those added online."""
        return len(self.known)

    def find(self, song_ids: list[str]) -> np.ndarray:
        """Return the row of each id, int32 (n,); -1 for an unknown id."""
        rows = np.array(self.rows.find(song_ids), dtype=np.int32)
        # Nearly all ids are sent in the catalog's spelling, so only the others are converted to it.
        unknown_indices = np.flatnonzero(rows < 0)
        if len(unknown_indices):
            spelled_ids = [spell_id(song_ids[index]) or "" for index in unknown_indices.tolist()]
            added_rows = {} if self.online is None else self.online.rows
            rows_found = self.rows.find(spelled_ids)
            rows[unknown_indices] = [
                row if row >= 0 else added_rows.get(song_id, -1)
                for song_id, row in zip(spelled_ids, rows_found, strict=True)
            ]
        return rows

    def stored_rows(self, rows: np.ndarray) -> np.ndarray:
        """Convert song rows, int32, to stored rows, which are the same in every replica and release of the data set.

        Raises `StoreUnavailableError` for a lost song.
        """
        online = self.online
        if online is None or not (rows >= online.first).any():
            return rows
        online_indices = np.flatnonzero(rows >= online.first)
        if not all(row in online.number_of_row for row in rows[online_indices].tolist()):
            raise StoreUnavailableError(LOST_SONG)
        stored_rows = rows.copy()
        stored_rows[online_indices] = [
            FIRST_ONLINE + online.number_of_row[row] for row in rows[online_indices].tolist()
        ]
        return stored_rows

    def rows_of_stored(self, stored_rows: np.ndarray) -> np.ndarray:
        """Convert stored rows, int32, of any replica to song rows; FIRST_ONLINE for songs that are not known here.

        Unknown songs were added online on another replica, or belong to a newer release.
        """
        # `catalog` is the release's, without the songs added online.
        later_indices = np.flatnonzero(stored_rows >= len(self.catalog))
        if not len(later_indices):
            return stored_rows
        online = self.online
        row_of_number = np.zeros(0, np.int32) if online is None else online.row_of_number
        numbers = stored_rows[later_indices] - FIRST_ONLINE  # negative for songs of a newer release
        is_known = (numbers >= 0) & (numbers < len(row_of_number))
        current_rows = np.append(row_of_number, -1)[np.where(is_known, numbers, -1)]
        rows = stored_rows.copy()
        rows[later_indices] = np.where(current_rows >= 0, current_rows, FIRST_ONLINE)
        return rows

    def fitting(self, attributes: SongAttributes) -> SongSet:
        """Return the songs that have the attributes. Raises `FieldError` as `SongMasks` does, for values of no song."""
        return (self.masks if self.online is None else self.online.masks).fitting(attributes)

    def mask_lookups(self, outcome: str) -> int:
        """Return how many look-ups in the cache of filtered songs were `hits` or `misses`, depending on `outcome`."""
        return (self.masks if self.online is None else self.online.masks).lookups(outcome)

    def search_names(self, query: str, limit: int) -> tuple[np.ndarray, int]:
        """As `SongSearch.find`. Among songs that match equally well, those added online come last."""
        online = self.online
        rows, count = self.search.find(query, limit)
        if online is None:
            return rows, count
        online_rows, online_count = online.search.find(query, limit)
        fits = np.concatenate([self.search.fits(query, rows), online.search.fits(query, online_rows)])
        all_rows = np.concatenate([rows, (online_rows + online.first).astype(np.int32)])
        return all_rows[np.argsort(-fits, kind="stable")][:limit], count + online_count

    def embedded(self, rows: np.ndarray) -> np.ndarray:
        """Return bool (n,): True for song rows, int (n,), that the network has a vector of; False for row -1."""
        is_embedded: np.ndarray = (rows >= 0) & self.known[np.maximum(rows, 0)]
        return is_embedded

    def describe(self, rows: np.ndarray) -> list[SongName]:
        """Return id, title and artist of each song row. Raises `StoreUnavailableError` for a lost song."""
        online = self.online
        if online is None or not (rows >= online.first).any():
            return [self.names.of(row) for row in rows.tolist()]
        return [self.names.of(row) if row < online.first else online.name(row) for row in rows.tolist()]


def _insert_by(play_counts: np.ndarray, order: np.ndarray, new_rows: np.ndarray) -> np.ndarray:
    """Return `order`, song rows by descending `play_counts` (N,), with further rows after those of equal counts."""
    # A search for each new row, since `play_counts[order]` would be as long as the catalog.
    places = [bisect_right(order, -play_counts[row], key=lambda other: -play_counts[other]) for row in new_rows]
    inserted: np.ndarray = np.insert(order, places, new_rows)
    return inserted


def load_served_catalog(workspace: Workspace, release: Manifest, recommender: BaseRecommender) -> ServedCatalog:
    """Load the catalog of a release and its popular songs, in memory that the replicas of a node share."""
    dataset = Dataset(workspace)
    version = catalog_version(workspace, release)
    table = mapped_table(version, lambda: _make_catalog_table(workspace, dataset, release, recommender))
    first_days = _column_array(table, FIRST_DAY) if FIRST_DAY in table.column_names else None
    catalog = Catalog(table)
    plays, is_known = _column_array(table, PLAYS), _column_array(table, IS_KNOWN).view(np.bool_)
    ids = columns.one_array(table.column(columns.SONG_ID))
    return ServedCatalog(
        catalog=catalog,
        rows=CatalogRows(ids, _column_array(table, ID_HASH), _column_array(table, ID_ROW)),
        contexts={name: bit for bit, name in enumerate(dataset.manifest.contexts)},
        skip_below=dataset.manifest.skip_below,
        plays=plays,
        by_plays=_column_order(table, BY_PLAYS),
        starting=PopularOrder(
            plays=plays,
            discounted_plays=_column_array(table, DISCOUNTED_PLAYS),
            is_known=is_known,
            order=_column_order(table, STARTING),
        ),
        first_days=first_days,
        by_age=np.zeros(0, np.int32) if first_days is None else _column_order(table, BY_AGE),
        lineage=dataset.lineage,
        known=is_known,
        dim=network_of(recommender).song_vectors.shape[1],
        search=SongSearch(catalog, _column_array(table, POPULARITY_RANK)),
        masks=SongMasks(catalog),
        names=SongNames(catalog),
    )


def catalog_version(workspace: Workspace, release: Manifest) -> str:
    """Return a digest of everything that the shared table of a release's catalog is made from."""
    dataset = Dataset(workspace)
    part_ids = {kind: release.inputs.get(kind, "") for kind in ("models", "retrieval", "added_songs")}
    description_ids = [description.id for description in dataset.descriptions()]
    file_info = workspace.filesystem.get_file_info(workspace.full(SONGS_TABLE))
    songs_file = {"uri": workspace.uri, "root": workspace.root, "bytes": file_info.size, "written": file_info.mtime_ns}
    return fingerprint(
        "served catalog",
        {**songs_file, "described": description_ids, "format": FORMAT},
        {**part_ids, "dataset": dataset.manifest.id},
    )


FORMAT = 3  # version of the shared table; to be changed when its texts or columns are computed differently
# Columns of the shared table, in addition to those of the catalog. A column that orders some songs is padded with -1.
ID_HASH, ID_ROW, PLAYS, BY_PLAYS = "id_hash", "id_row", "plays", "by_plays"
POPULARITY_RANK, IS_KNOWN, FIRST_DAY, BY_AGE = "popularity_rank", "is_known", "first_day", "by_age"
DISCOUNTED_PLAYS, STARTING = "discounted_plays", "starting"


def _make_catalog_table(
    workspace: Workspace, dataset: Dataset, release: Manifest, recommender: BaseRecommender
) -> pa.Table:
    """Make the shared table: all data of a served catalog that grows with the songs, one row per song."""
    table = with_folded(dataset.catalog().table)
    song_count = table.num_rows
    plays = model_play_counts(workspace, release.inputs["models"])
    plays = np.pad(plays, (0, song_count - len(plays)))  # later songs have no plays there
    by_plays = np.argsort(-plays, kind="stable").astype(np.int32)
    is_known = known_songs(recommender, song_count)
    starting = popular_order(workspace, release.inputs, plays, is_known)
    first_days = _read_first_days(workspace, release, song_count)
    ids = table.column(columns.SONG_ID)
    hashes = np.concatenate([id_hashes(chunk.to_numpy(zero_copy_only=False)) for chunk in _slices(ids)])
    by_hash = np.argsort(hashes, kind="stable")
    arrays = {
        ID_HASH: hashes[by_hash],
        ID_ROW: by_hash.astype(np.int32),
        PLAYS: plays,
        BY_PLAYS: by_plays[is_known[by_plays]],  # songs without a vector are never recommended
        POPULARITY_RANK: popularity_positions(plays),
        IS_KNOWN: is_known.view(np.uint8),  # one byte per song can be read without a copy
        DISCOUNTED_PLAYS: starting.discounted_plays,
        STARTING: starting.order,
    }
    if first_days is not None:
        arrays |= {
            FIRST_DAY: first_days,
            BY_AGE: _rows_by_age(first_days, network_of(recommender).added_songs, is_known),
        }
    for name, values in arrays.items():
        padded = (
            np.pad(values, (0, song_count - len(values)), constant_values=-1) if len(values) < song_count else values
        )
        table = table.append_column(name, pa.array(padded))
    return table


def _slices(values: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Return a column in slices of at most 100,000 values."""
    size = 100_000
    return (columns.one_array(values.slice(start, size)) for start in range(0, max(1, len(values)), size))


def _column_array(table: pa.Table, name: str) -> np.ndarray:
    """Return a column without nulls as a read-only array, without copying it."""
    values: np.ndarray = columns.one_array(table.column(name)).to_numpy()
    return values


def _column_order(table: pa.Table, name: str) -> np.ndarray:
    """Return the song rows of a column that orders some songs, int32 (any,), without its padding."""
    rows = _column_array(table, name)
    return rows[: np.count_nonzero(rows >= 0)]


def _read_first_days(workspace: Workspace, release: Manifest, song_count: int) -> np.ndarray | None:
    """Return the day of each song's first play, int32 (song_count,); None for a release without a retrieval."""
    if "retrieval" not in release.inputs:
        return None
    stored_days = read_first_days(
        workspace, artifacts.load_manifest(workspace, "retrieval", release.inputs["retrieval"]).folder
    )
    first_days = np.full(song_count, NOT_PLAYED, dtype=np.int32)
    first_days[: len(stored_days)] = stored_days[:song_count]
    return first_days


def _rows_by_age(first_days: np.ndarray, added_rows: np.ndarray, is_known: np.ndarray) -> np.ndarray:
    """Return the rows of songs with a vector, int32, newest first: added songs without plays, then by first day.

    Songs of the same day are in descending order of rows.
    """
    is_listed = first_days < NOT_PLAYED
    is_listed[added_rows] = True
    rows = np.flatnonzero(is_listed & is_known)[::-1]
    return rows[np.argsort(-first_days[rows].astype(np.int64), kind="stable")].astype(np.int32)
