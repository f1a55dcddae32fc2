"""One request for recommendations: whose plays count, at which moment, and in whose words it is answered."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.errors import InputError, MismatchError, NotFoundError
from rayrec.recommend.answer import (
    ASSUMED_GAP_MS,
    RecommendConfig,
    answer,
    history_of_songs,
    load_recommender,
)
from rayrec.recommend.base import BaseRecommender, HorizonName
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, Manifest, publish, write_dataset_manifest
from rayrec.storage.workspace import SONGS_TABLE, Workspace, histories_file

NOW = 1_000_000


class Following(BaseRecommender):
    """Recommends the song after the last one played, then the ones after that, round the catalog."""

    name = "following"

    def __init__(self, num_songs: int) -> None:
        self.num_songs = num_songs

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        last = histories.songs[histories.offsets[queries.rows] + queries.seen - 1]
        return -((np.arange(self.num_songs) - last[:, None] - 1) % self.num_songs).astype(np.float32)


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    """Six songs s0 to s5, the first titled; user ann played 0, 1, 2 at 100, 200, 300."""
    songs = {
        columns.SONG: np.arange(6, dtype=np.int32),
        columns.SONG_ID: [f"s{row}" for row in range(6)],
        columns.TITLE: ["Hey", None, None, None, None, None],
        columns.ARTIST: ["Ann", None, None, None, None, None],
    }
    workspace.write_table(SONGS_TABLE, pa.table(songs, schema=columns.SONGS_TABLE))
    histories = Histories.from_lists([[0, 1, 2]], [[100, 200, 300]], ["ann"])
    workspace.write_table(histories_file(0, 0), histories.to_arrow())
    write_dataset_manifest(
        workspace, DatasetManifest(id="data1", source="csv", buckets=1, parts=1, users=1, plays=3, songs=6)
    )
    return Dataset(workspace)


def test_songs_already_heard_are_left_out_unless_asked_for(dataset: Dataset) -> None:
    config = RecommendConfig(k=6)
    assert answer(dataset, Following(6), config, at=NOW, user="ann").song_ids == ["s3", "s4", "s5"]
    told = answer(dataset, Following(6), config.replace(exclude_heard=False), at=NOW, user="ann")
    assert told.song_ids == ["s3", "s4", "s5", "s0", "s1", "s2"]
    assert told.titles[3:5] == ["Ann – Hey", "s1"]
    assert told.scores == [0, -1, -2, -3, -4, -5]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"artists": ["ANN"]}, ["s0"]),
        ({"exclude": ["s4", "s0"]}, ["s3", "s5", "s1", "s2"]),
        ({"allow": ["s5", "s2", "s4"], "exclude": ["s5"]}, ["s4", "s2"]),
    ],
)
def test_songs_keep_to_filters(dataset: Dataset, filters: dict[str, Any], expected: list[str]) -> None:
    config = RecommendConfig(k=6, exclude_heard=False)
    assert answer(dataset, Following(6), config, at=NOW, user="ann", **filters).song_ids == expected


def test_filters_that_fit_no_song_are_named(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="artists: no song of the catalog is by 'Abba'"):
        answer(dataset, Following(6), RecommendConfig(), at=NOW, user="ann", artists=["Ann", "Abba"])
    with pytest.raises(InputError, match="market: no song of the catalog has markets"):
        answer(dataset, Following(6), RecommendConfig(market="SE"), at=NOW, user="ann")
    with pytest.raises(InputError, match="released_from: day 'spring'"):
        answer(dataset, Following(6), RecommendConfig(released_from="spring"), at=NOW, user="ann")


def test_json_holds_the_moment_in_iso_8601(dataset: Dataset) -> None:
    told = answer(dataset, Following(6), RecommendConfig(k=1), at=300, user="ann").to_mapping()
    assert told["at"] == "1970-01-01T00:00:00.300Z"


def test_only_plays_before_the_moment_of_the_request_count(dataset: Dataset) -> None:
    told = answer(dataset, Following(6), RecommendConfig(k=1), at=300, user="ann")
    assert (told.song_ids, told.plays, [song.name for song in told.last_plays]) == (["s2"], 2, ["Ann – Hey", "s1"])


def test_a_moment_before_all_plays_is_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match=r"'ann' has no plays before.*1970-01-01T00:00:00.1"):
        answer(dataset, Following(6), RecommendConfig(), at=100, user="ann")


def test_songs_answer_like_a_user_who_played_them(dataset: Dataset) -> None:
    by_user = answer(dataset, Following(6), RecommendConfig(k=3), at=NOW, user="ann")
    by_songs = answer(dataset, Following(6), RecommendConfig(k=3), at=NOW, songs=["s0", "s1", "s2"])
    assert by_songs == by_user


def test_songs_are_taken_as_played_three_minutes_apart_until_now(dataset: Dataset) -> None:
    history = history_of_songs(dataset.catalog(), ["s5", "s0", "s4"], NOW)
    assert history.songs.tolist() == [5, 0, 4]
    assert history.played_at.tolist() == [NOW - 2 * ASSUMED_GAP_MS, NOW - ASSUMED_GAP_MS, NOW]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"user": "bob"}, "User 'bob' not found"),
        ({"songs": ["s1", "x9"]}, "x9"),
        ({"songs": []}, "no songs"),
        ({}, "one of them"),
        ({"user": "ann", "songs": ["s1"]}, "one of them"),
    ],
)
def test_who_or_what_is_unknown_is_named(dataset: Dataset, asked: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        answer(dataset, Following(6), RecommendConfig(), at=NOW, **asked)


def test_fewer_than_one_song_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        RecommendConfig(k=0)


def test_a_model_of_another_data_set_is_refused_by_both_names(dataset: Dataset) -> None:
    publish(dataset.workspace, Manifest(kind="models", id="old", inputs={"dataset": "data0"}), [])
    with pytest.raises(MismatchError, match=r"data0.*data1"):
        load_recommender(dataset.workspace, dataset, {"models": "old"})
    with pytest.raises(NotFoundError, match="none-such"):
        load_recommender(dataset.workspace, dataset, {"models": "none-such"})
    assert artifacts.listing(dataset.workspace, "models")
