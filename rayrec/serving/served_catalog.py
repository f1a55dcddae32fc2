"""The catalog of a release as requests use it: songs by id, by name, by attribute and by number of plays."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rayrec.data import columns
from rayrec.data.catalog import Catalog, SongSearch
from rayrec.data.dataset import Dataset
from rayrec.data.spelling import spell_id
from rayrec.model.train_config import PLAY_COUNTS
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.filters import SongMasks
from rayrec.recommend.retrieval.play_counts import NOT_PLAYED
from rayrec.recommend.retrieval.stored_retrieval import read_first_days
from rayrec.recommend.selection import network_of
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

NAMES_KEPT = 1 << 16  # of the songs that were described last: some 20 MB
SongName = tuple[str, str | None, str | None]  # a song's id, title and artist


class SongNames:
    """Names of songs; those of frequent songs are cached, since Arrow is slow at single rows."""

    def __init__(self, catalog: Catalog) -> None:
        self._columns = [catalog.table.column(name) for name in (columns.SONG_ID, columns.TITLE, columns.ARTIST)]
        self.of = lru_cache(maxsize=NAMES_KEPT)(self._of)

    def _of(self, row: int) -> SongName:
        song, title, artist = (column[row].as_py() for column in self._columns)
        return song, title, artist


@dataclass(frozen=True, kw_only=True)
class ServedCatalog:
    """The catalog of a release, looked up by id as fast as by row."""

    catalog: Catalog
    rows: dict[str, int]  # id -> row
    contexts: dict[str, int]  # name -> bit
    plays: np.ndarray  # int64 (N,), plays of each song in the fit range of the model
    by_plays: np.ndarray  # int32 (any,), rows of songs with a vector by descending plays
    first_days: np.ndarray | None  # int32 (N,), day of each song's first play as days since 1970 UTC, or NOT_PLAYED
    by_age: np.ndarray  # int32 (any,), rows of songs that were played first or added, the newest first
    lineage: str  # of the data set: rows of songs mean the same wherever it is the same
    known: np.ndarray  # bool (N,), songs that the network has a vector of
    dim: int  # numbers of such a vector
    search: SongSearch
    masks: SongMasks
    names: SongNames

    def find(self, song_ids: list[str]) -> np.ndarray:
        """int32: the row of each id, -1 for unknown ones."""
        get = self.rows.get
        # Nearly all ids come as they are spelled: only the others are spelled anew.
        rows = (row if (row := get(song, -1)) >= 0 else get(spell_id(song) or "", -1) for song in song_ids)
        return np.fromiter(rows, dtype=np.int32, count=len(song_ids))

    def embedded(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): which of the song rows, int (n,), the network has a vector of; row -1 is no song."""
        embedded: np.ndarray = (rows >= 0) & self.known[np.maximum(rows, 0)]
        return embedded

    def describe(self, rows: np.ndarray) -> list[SongName]:
        """Id, title and artist of song rows."""
        return [self.names.of(row) for row in rows.tolist()]


def load_served_catalog(workspace: Workspace, release: Manifest, recommender: BaseRecommender) -> ServedCatalog:
    """The catalog of a release and its popular songs."""
    dataset = Dataset(workspace)
    catalog = dataset.catalog()
    plays = model_play_counts(workspace, dataset, release.inputs["models"], recommender.num_songs)
    plays = np.pad(plays, (0, len(catalog) - len(plays)))  # nobody has played later songs there
    by_plays = np.argsort(-plays, kind="stable").astype(np.int32)
    known = _known(recommender, len(catalog))
    first_days = _first_days(workspace, release, len(catalog))
    return ServedCatalog(
        catalog=catalog,
        rows={song: row for row, song in enumerate(catalog.song_ids(np.arange(len(catalog))))},
        contexts={name: bit for bit, name in enumerate(dataset.manifest.contexts)},
        plays=plays,
        by_plays=by_plays[known[by_plays]],  # others are never recommended, however popular
        first_days=first_days,
        by_age=_by_age(first_days, network_of(recommender).added_songs, known),
        lineage=dataset.lineage,
        known=known,
        dim=network_of(recommender).song_vectors.shape[1],
        search=SongSearch(catalog, plays),
        masks=SongMasks(catalog),
        names=SongNames(catalog),
    )


def _known(recommender: BaseRecommender, songs: int) -> np.ndarray:
    """bool (songs,): songs that the network has a vector of; those that came after it are none."""
    known: np.ndarray = np.arange(songs) < recommender.num_songs
    known[network_of(recommender).without_vector] = False
    return known


def _first_days(workspace: Workspace, release: Manifest, songs: int) -> np.ndarray | None:
    """int32 (songs,): the day of each song's first play; None for a release without a retrieval, which knows them."""
    if "retrieval" not in release.inputs:
        return None
    counted = read_first_days(workspace, artifacts.load(workspace, "retrieval", release.inputs["retrieval"]).folder)
    first_days = np.full(songs, NOT_PLAYED, dtype=np.int32)
    first_days[: len(counted)] = counted[:songs]
    return first_days


def _by_age(first_days: np.ndarray | None, added: np.ndarray, known: np.ndarray) -> np.ndarray:
    """int32: rows of songs with a vector, added ones without plays first, then by first day; later rows first."""
    if first_days is None:
        return np.zeros(0, np.int32)
    comes = first_days < NOT_PLAYED
    comes[added] = True
    rows = np.flatnonzero(comes & known)[::-1]
    return rows[np.argsort(-first_days[rows].astype(np.int64), kind="stable")].astype(np.int32)


def model_play_counts(workspace: Workspace, dataset: Dataset, model_id: str, num_songs: int) -> np.ndarray:
    """int64 (N,): plays of each song in the fit range of a model.

    For a model without these counts, those of the whole data set.
    """
    manifest = artifacts.load(workspace, "models", model_id)
    if PLAY_COUNTS in manifest.files:
        return np.asarray(workspace.read_array(manifest.path(PLAY_COUNTS)))
    plays = np.zeros(num_songs, dtype=np.int64)
    for histories in dataset.read_all():
        plays += np.bincount(histories.songs, minlength=num_songs)[:num_songs]
    return plays
