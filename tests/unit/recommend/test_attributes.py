"""Masks of songs by artist, release day and market."""

from datetime import date

import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.errors import FieldError
from rayrec.recommend.filters import SongAttributes, SongMasks, max_masks


def catalog(described: bool = True) -> Catalog:
    data = {
        columns.SONG: pa.array(range(5), pa.int32()),
        columns.SONG_ID: [f"s{row}" for row in range(5)],
        columns.TITLE: pa.array([None] * 5, pa.string()),
        columns.ARTIST: ["Björk", "Abba", None, "ABBA", "Cher"],
    }
    if described:
        data[columns.RELEASED] = pa.array(
            [date(1999, 1, 1), date(2001, 5, 7), None, date(2020, 1, 1), date(2020, 6, 1)]
        )
        data[columns.MARKETS] = pa.array([["SE", "NO"], ["DE"], None, [], ["SE", "SE"]], pa.list_(pa.string()))
    return Catalog(pa.table(data))


def songs_that_fit(**attributes: object) -> list[int]:
    return SongMasks(catalog()).fitting(SongAttributes(**attributes)).between(0, 5).tolist()  # type: ignore[arg-type]


def test_artists_fit_whatever_case_and_accents() -> None:
    assert songs_that_fit(artists=("abba",)) == [1, 3]
    assert songs_that_fit(artists=("BJORK", "Cher")) == [0, 4]


@pytest.mark.parametrize("name", ["nobody", "abb", " "])
def test_an_artist_without_songs_is_named_in_the_error(name: str) -> None:
    with pytest.raises(FieldError, match=f"artists: the catalog has no song by '{name}'"):
        songs_that_fit(artists=("abba", name))


def test_release_days_are_bounded_on_both_sides_inclusively() -> None:
    assert songs_that_fit(released_from=date(2001, 5, 7)) == [1, 3, 4]
    assert songs_that_fit(released_to=date(2001, 5, 7)) == [0, 1]
    assert songs_that_fit(released_from=date(2000, 1, 1), released_to=date(2020, 1, 1)) == [1, 3]


def test_a_song_fits_a_market_that_it_names() -> None:
    assert songs_that_fit(market="SE") == [0, 4]
    with pytest.raises(FieldError, match="market: no song is available in market 'FR'; available markets: DE, NO, SE"):
        songs_that_fit(market="FR")


def test_a_song_must_fit_all_attributes_and_a_filter_without_attributes_fits_every_song() -> None:
    assert songs_that_fit(artists=("Björk", "Abba"), market="SE") == [0]
    assert songs_that_fit() == [0, 1, 2, 3, 4]
    assert not SongAttributes()
    assert SongAttributes(market="SE")


def test_masks_are_kept_and_cannot_be_changed() -> None:
    masks = SongMasks(catalog())
    first = masks.fitting(SongAttributes(market="SE"))
    assert masks.fitting(SongAttributes(market="SE")) is first
    assert first.rows is not None
    with pytest.raises(ValueError, match="read-only"):
        first.rows[0] = 1


def test_songs_that_came_later_are_kept_together_with_those_before_them() -> None:
    earlier = SongMasks(catalog())
    masks = SongMasks(catalog(described=False), earlier)
    abba = SongAttributes(artists=("abba",))
    assert masks.fitting(abba).between(0, 99).tolist() == [1, 3, 6, 8]
    assert masks.fitting(abba) is masks.fitting(abba)
    assert earlier.fitting(abba).between(0, 99).tolist() == [1, 3]
    assert masks.fitting(SongAttributes(market="SE")).between(0, 99).tolist() == [0, 4]  # later songs have no markets
    with pytest.raises(FieldError, match="the catalog has no song by 'nobody'"):
        masks.fitting(SongAttributes(artists=("nobody",)))


@pytest.mark.parametrize(
    ("songs", "mask_count"), [(0, 64), (100_000, 64), (1_000_000, 32), (10_000_000, 3), (100_000_000, 1)]
)
def test_masks_take_no_more_than_32_mb_however_large_the_catalog(songs: int, mask_count: int) -> None:
    assert max_masks(songs) == mask_count


@pytest.mark.parametrize(
    ("attributes", "missing_data"),
    [(SongAttributes(released_to=date(2000, 1, 1)), "release days"), (SongAttributes(market="SE"), "markets")],
)
def test_a_filter_by_an_attribute_that_the_catalog_lacks_is_refused(
    attributes: SongAttributes, missing_data: str
) -> None:
    with pytest.raises(FieldError, match=f"{missing_data}.*rayrec describe"):
        SongMasks(catalog(described=False)).fitting(attributes)
    songs_by_cher = SongMasks(catalog(described=False)).fitting(SongAttributes(artists=("cher",)))
    assert songs_by_cher.between(0, 5).tolist() == [4]
