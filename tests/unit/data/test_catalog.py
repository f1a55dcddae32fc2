"""Songs are found by every id that an import can make."""

import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.errors import InputError

IDS = ["12", "7", "Earth, Wind & Fire – Song 2, Part 2", "AC/DC – T.N.T.", "Earth"]


@pytest.fixture
def catalog() -> Catalog:
    rows = {columns.SONG: range(len(IDS)), columns.SONG_ID: IDS, columns.TITLE: [None] * 5, columns.ARTIST: [None] * 5}
    return Catalog(pa.table(rows, columns.SONGS_TABLE))


@pytest.mark.parametrize("song_id", IDS)
def test_a_song_is_found_by_its_id_whatever_it_holds(catalog: Catalog, song_id: str) -> None:
    assert catalog.listed(song_id) == [song_id]
    assert catalog.rows(catalog.listed(f" {song_id} ")).tolist() == [IDS.index(song_id)]


def test_ids_without_commas_can_be_listed_in_one_text(catalog: Catalog) -> None:
    assert catalog.rows(catalog.listed("12, 7,")).tolist() == [0, 1]


def test_a_query_spells_whole_numbers_as_an_import_does(catalog: Catalog) -> None:
    assert catalog.rows(["12.0", " 7"]).tolist() == [0, 1]
    with pytest.raises(InputError, match="1 of 2 songs are not in the catalog: 8"):
        catalog.rows(["12", "8"])
