"""The lookup of a release's songs by id, in memory that the replicas of a node share."""

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from served import write_release, write_world

from rayrec.data.dataset import Dataset
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.reranking import PopularOrder
from rayrec.serving import served_catalog
from rayrec.serving.served_catalog import CatalogRows, ServedCatalog, id_hashes, load_served_catalog
from rayrec.storage import releases
from rayrec.storage.object_storage import CACHE_VARIABLE
from rayrec.storage.workspace import Workspace

IDS = [f"song-{row}" for row in range(1_000)]


def song_rows() -> CatalogRows:
    hashes = served_catalog.id_hashes(IDS)
    order = np.argsort(hashes, kind="stable")
    return CatalogRows(pa.array(IDS), hashes[order], order.astype(np.int32))


@pytest.mark.parametrize("collide", [False, True])
def test_every_id_has_its_row_and_others_have_none(collide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if collide:
        monkeypatch.setattr(served_catalog, "id_hashes", lambda ids: id_hashes(ids) % np.uint64(7))
    rows = song_rows()
    for _ in range(2):  # the second time from the cache
        assert rows.find([*IDS, "nothing", "song-3"]) == [*range(1_000), -1, 3]
    assert rows.find([]) == []


def test_the_cache_of_ids_is_bounded_and_answers_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_catalog, "NAMES_KEPT", 10)
    rows = song_rows()
    for start in range(0, 100, 7):
        assert rows.find(IDS[start : start + 7]) == list(range(start, start + 7))


def test_two_replicas_map_one_file_and_a_changed_song_table_is_another(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    write_world(workspace)
    write_release(workspace)
    release = releases.active_release(workspace)
    assert release is not None
    recommender = load_recommender(workspace, Dataset(workspace), release.inputs)
    catalogs = [load_served_catalog(workspace, release, recommender) for _ in range(2)]
    (path,) = (tmp_path / "cache").glob("*-table.arrow")
    assert [area.path for area in psutil.Process().memory_maps(grouped=False)].count(str(path)) == 2
    first, second = catalogs
    ids = first.catalog.song_ids(np.arange(first.num_rows))
    assert first.find(ids).tolist() == second.find(ids).tolist() == list(range(first.num_rows))
    np.testing.assert_array_equal(first.by_plays, second.by_plays)
    songs = Path(workspace.full("dataset/songs.parquet"))
    songs.write_bytes(songs.read_bytes())  # same content, new modification time
    load_served_catalog(workspace, release, recommender)
    assert len(list((tmp_path / "cache").glob("*-table.arrow"))) == 2


def test_songs_added_online_get_their_places_by_plays_without_a_copy_of_all_play_counts() -> None:
    song_count, row_without_vector = 100_000, 5
    plays = np.arange(song_count, 0, -1)
    order = np.delete(np.arange(song_count, dtype=np.int32), row_without_vector)
    is_known = np.arange(song_count) != row_without_vector
    unused: Any = None
    catalog = ServedCatalog(
        catalog=unused,
        rows=unused,
        contexts={},
        skip_below=0.5,
        plays=plays,
        by_plays=order,
        starting=PopularOrder(plays=plays, discounted_plays=plays.astype(np.float64), is_known=is_known, order=order),
        first_days=None,
        by_age=np.zeros(0, np.int32),
        lineage="n",
        known=is_known,
        dim=8,
        search=unused,
        masks=unused,
        names=unused,
    )
    online: Any = SimpleNamespace(first=song_count, catalog=["added"], known=np.array([row_without_vector, song_count]))
    tracemalloc.start()
    catalog.with_online(online)
    kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert catalog.by_plays.tolist() == catalog.starting.order.tolist() == list(range(song_count + 1))
    assert peak_bytes - kept_bytes < 2 * song_count
