"""One request for recommendations: which plays count, at which moment, and what the answer says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from networks import model_config, network
from served import write_release, write_world

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import ASSUMED_GAP_MS
from rayrec.errors import InputError, MismatchError, NotFoundError
from rayrec.model.train_config import PLAY_COUNTS
from rayrec.recommend.answer import (
    Answer,
    RecommendConfig,
    answer,
    history_of_songs,
    load_recommender,
    reasons,
)
from rayrec.recommend.base import HorizonName
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage.artifacts import DatasetManifest, Manifest, publish, write_dataset_manifest
from rayrec.storage.workspace import SONGS_TABLE, Workspace, histories_file

NOW = 1_000_000


NUM_SONGS = 6
PARTS = {"releases": "live1", "models": "model1"}


class NextSongsRecommender(TasteRecommender):
    """Recommends the songs that follow the last one played in the catalog, whose last song is followed by its first.

    Each song has its own dimension; the later a song comes, the smaller the taste vector is in its dimension.
    """

    def __init__(self) -> None:
        super().__init__(network(model_config(num_songs=NUM_SONGS)), np.eye(NUM_SONGS, dtype=np.float32))

    def vectors_of(
        self, histories: Histories, queries: Queries, horizons: Sequence[HorizonName]
    ) -> dict[HorizonName, np.ndarray]:
        last_songs = histories.songs[histories.offsets[queries.rows] + queries.plays_before - 1]
        return dict.fromkeys(
            horizons, 1 - ((np.arange(NUM_SONGS) - last_songs[:, None] - 1) % NUM_SONGS).astype(np.float32) / NUM_SONGS
        )


def ask(dataset: Dataset, config: RecommendConfig | None = None, **request: Any) -> Answer:
    return answer(
        dataset, NextSongsRecommender(), config or RecommendConfig(), **{"parts": PARTS, "at": NOW, **request}
    )


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    """Six songs s0 to s5, only s0 has a title; user ann played 0, 1, 2 at 100, 200, 300. Song 5 has the most plays."""
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
    model = Manifest(kind="models", id="model1", inputs={"dataset": "data1"})
    workspace.write_array(model.path(PLAY_COUNTS), np.array([4, 3, 2, 1, 0, 9]))
    publish(workspace, model, [PLAY_COUNTS])
    return Dataset(workspace)


def test_songs_already_heard_are_left_out_unless_asked_for(dataset: Dataset) -> None:
    config = RecommendConfig(k=6)
    assert ask(dataset, config, user="ann").song_ids == ["s3", "s4", "s5"]
    result = ask(dataset, config.replace(exclude_heard=False), user="ann")
    assert result.song_ids == ["s3", "s4", "s5", "s0", "s1", "s2"]
    assert result.titles[3:5] == ["Ann – Hey", "s1"]
    assert result.scores == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert (result.source, result.release) == ("taste", "live1")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"artists": ["ANN"]}, ["s0"]),
        ({"exclude": ["s4", "s0"]}, ["s3", "s5", "s1", "s2"]),
        ({"allow": ["s5", "s2", "s4"], "exclude": ["s5"]}, ["s4", "s2"]),
    ],
)
def test_songs_satisfy_the_filters(dataset: Dataset, filters: dict[str, Any], expected: list[str]) -> None:
    assert ask(dataset, RecommendConfig(k=6, exclude_heard=False), user="ann", **filters).song_ids == expected


def test_filters_that_fit_no_song_are_named(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="artists: the catalog has no song by 'Abba'"):
        ask(dataset, user="ann", artists=["Ann", "Abba"])
    with pytest.raises(InputError, match="market: the catalog has no markets"):
        ask(dataset, RecommendConfig(market="SE"), user="ann")
    with pytest.raises(InputError, match="released_from: 'spring' is not a valid date"):
        ask(dataset, RecommendConfig(released_from="spring"), user="ann")


def test_json_holds_the_moment_in_iso_8601(dataset: Dataset) -> None:
    mapping = ask(dataset, RecommendConfig(k=1), at=300, user="ann").to_mapping()
    assert mapping["at"] == "1970-01-01T00:00:00.300Z"


def test_only_plays_before_the_moment_of_the_request_count(dataset: Dataset) -> None:
    result = ask(dataset, RecommendConfig(k=1), at=300, user="ann")
    assert (result.song_ids, result.plays, [song.name for song in result.last_plays]) == (
        ["s2"],
        2,
        ["Ann – Hey", "s1"],
    )


def test_songs_answer_like_a_user_who_played_them(dataset: Dataset) -> None:
    user_answer = ask(dataset, RecommendConfig(k=3), user="ann")
    songs_answer = ask(dataset, RecommendConfig(k=3), songs=["s0", "s1", "s2"])
    assert songs_answer == user_answer


def test_songs_are_taken_as_played_three_minutes_apart_as_prefixes_are_evaluated(dataset: Dataset) -> None:
    history = history_of_songs(dataset.catalog(), ["s5", "s0", "x9", "s4"], NOW)
    assert history.songs.tolist() == [5, 0, 4]
    # Pauses of zero do not occur in training; a short one means that the last song was skipped.
    assert history.played_at.tolist() == [NOW - gaps * ASSUMED_GAP_MS for gaps in (4, 3, 1)]


@pytest.mark.parametrize(
    "query", [{"user": "bob"}, {"user": "ann", "at": 100}, {"songs": []}, {"songs": ["x9"]}], ids=str
)
def test_without_known_plays_the_most_played_songs_are_recommended(dataset: Dataset, query: dict[str, Any]) -> None:
    result = ask(dataset, RecommendConfig(k=3, explain=True), exclude=["s1"], **query)
    assert result.song_ids == ["s5", "s0", "s2"]
    assert result.scores == [9, 4, 2]
    assert (result.source, result.path, result.plays, result.last_plays) == ("popular", "popular", 0, [])
    assert result.songs[0].reasons == ["it is among the most played songs"]


HEY_JUDE = "Hey Jude"
REASONS: dict[str, tuple[dict[str, float], str | None, list[str]]] = {
    "nothing": ({}, None, ["similar to your plays"]),
    "liked": ({"user_liked": 1}, None, ["you liked it"]),
    "own rule": ({"user_rules_score": 0.5}, HEY_JUDE, ["you played it after Hey Jude before"]),
    "own rule, no title": ({"user_rules_score": 0.5}, None, ["you played it after your last play before"]),
    "own play": (
        {"user_plays": 1, "user_hours_since": 1.2},
        None,
        ["you played it once, last 1 hour ago"],
    ),
    "own plays": (
        {"user_plays": 5, "user_hours_since": 72},
        None,
        ["you played it 5 times, last 3 days ago"],
    ),
    "own plays in hours": (
        {"user_plays": 2, "user_hours_since": 47},
        None,
        ["you played it 2 times, last 47 hours ago"],
    ),
    "own plays of late": (
        {"user_plays": 2, "user_hours_since": 0.5},
        None,
        ["you played it 2 times, last within the hour"],
    ),
    "own plays without times": (
        {"user_plays": 2, "user_plays_since": 6},
        None,
        ["you played it 2 times, last 7 plays ago"],
    ),
    "own play just now": ({"user_plays": 1}, None, ["you played it once, last just now"]),
    "album": (
        {"album_of_last_song": 1, "artist_of_last_song": 1, "artist_user_plays": 9},
        None,
        ["same album as your last play"],
    ),
    "artist": ({"artist_of_last_song": 1, "artist_user_plays": 9}, None, ["same artist as your last play"]),
    "artist played before": ({"artist_user_plays": 9}, None, ["you played its artist 9 times"]),
    "artist played once": ({"artist_user_plays": 1}, None, ["you played its artist once"]),
    "next rule": (
        {"next_rules_rank": 1 / 3, "next_rules_score": 12, "rules_rank": 1, "recent_rules_rank": 1},
        HEY_JUDE,
        ["it was played right after Hey Jude 12 times"],
    ),
    "next rule of one play": (
        {"next_rules_rank": 1, "next_rules_score": 1},
        None,
        ["it was played right after your last play once"],
    ),
    "rule": (
        {"next_rules_rank": 1 / 11, "next_rules_score": 1, "rules_rank": 0.1, "recent_rules_rank": 1},
        HEY_JUDE,
        ["one of the songs played most often soon after Hey Jude"],
    ),
    "recent rule": (
        {"rules_rank": 1 / 11, "recent_rules_rank": 0.1},
        HEY_JUDE,
        ["one of the songs played most often soon after your last songs"],
    ),
    "session": ({"sessions_rank": 0.1, "history_sessions_rank": 1}, None, ["users with similar sessions played it"]),
    "similar users": (
        {"sessions_rank": 1 / 11, "history_sessions_rank": 0.1},
        None,
        ["users with similar taste play it"],
    ),
    "short taste": ({"taste_short_rank": 0.1}, None, ["similar to your recent plays"]),
    "long taste": ({"taste_long_rank": 1}, None, ["similar to your plays over time"]),
    "popular": ({"popular_score": 0.01, "taste_long_rank": 1 / 11}, None, ["it is popular this week"]),
    "at most three, the strongest kind first": (
        {
            "popular_score": 1,
            "taste_short_rank": 1,
            "sessions_rank": 1,
            "next_rules_rank": 1,
            "next_rules_score": 3,
            "album_of_last_song": 1,
        },
        HEY_JUDE,
        [
            "same album as your last play",
            "it was played right after Hey Jude 3 times",
            "users with similar sessions played it",
        ],
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons_say_what_the_features_hold(case: str) -> None:
    features, last_title, expected = REASONS[case]
    assert reasons(features, last_title) == expected


def test_unknown_songs_are_counted_named_and_left_out(dataset: Dataset) -> None:
    result = ask(
        dataset,
        RecommendConfig(k=6),
        songs=["x9", "s0", "s1", "x9"],
        exclude=["s4", "x8"],
        allow=["s2", "s3", "s4", "x7"],
    )
    assert result.song_ids == ["s2", "s3"]
    assert (result.plays, result.unknown_songs, result.unknown_song_ids) == (2, 4, ["x9", "x8", "x7"])
    assert ask(dataset, RecommendConfig(k=6), user="ann", exclude=["x8"]).song_ids == ["s3", "s4", "s5"]


@pytest.mark.parametrize("query", [{}, {"user": "ann", "songs": ["s1"]}])
def test_a_request_is_for_a_user_or_for_songs(dataset: Dataset, query: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give exactly one of --user ID and --songs ID,ID"):
        ask(dataset, **query)


def test_fewer_than_one_song_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        RecommendConfig(k=0)


def test_a_model_of_another_data_set_is_refused_by_both_names(dataset: Dataset) -> None:
    publish(dataset.workspace, Manifest(kind="models", id="old", inputs={"dataset": "data0"}), [])
    with pytest.raises(MismatchError, match=r"data0.*data1"):
        load_recommender(dataset.workspace, dataset, {"models": "old"})
    with pytest.raises(NotFoundError, match="none-such"):
        load_recommender(dataset.workspace, dataset, {"models": "none-such"})


def test_a_recommender_is_loaded_with_one_read_of_the_manifest_of_its_rankers(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(workspace)
    parts, paths, read_json = write_release(workspace).inputs, list[str](), Workspace.read_json

    def counted_read(self: Workspace, path: str) -> Any:
        paths.append(path)
        return read_json(self, path)

    monkeypatch.setattr(Workspace, "read_json", counted_read)
    load_recommender(workspace, Dataset(workspace), parts)
    assert paths.count(f"rankers/{parts['rankers']}/manifest.json") == 1
