"""Songs over HTTP: search, filters, diversity, explanations, similar songs, and the map."""

from collections.abc import Iterator
from datetime import date
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pytest
from served import NUM_SONGS, SONGS, WITHOUT_VECTOR, Client, ask, service, write_release, write_world
from worlds import rename_songs

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.importing.descriptions import store_descriptions
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.serving.middleware import load_keys
from rayrec.serving.serve_config import ServeConfig
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace

KEY = "r" * 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Song N is released N days after 2000-01-01. Every third song is available in Sweden, the others in Germany."""
    workspace = Workspace(tmp_path_factory.mktemp("songs") / "workspace")
    write_world(workspace)
    first_day = date(2000, 1, 1).toordinal()
    descriptions = {
        columns.SONG_ID: [f"song-{row}" for row in range(NUM_SONGS)],
        columns.TITLE: pa.nulls(NUM_SONGS, pa.string()),
        columns.ARTIST: pa.nulls(NUM_SONGS, pa.string()),
        columns.ALBUM: pa.nulls(NUM_SONGS, pa.string()),
        columns.RELEASED: [date.fromordinal(first_day + row) for row in range(NUM_SONGS)],
        columns.MARKETS: [["SE"] if row % 3 == 0 else ["DE"] for row in range(NUM_SONGS)],
    }
    store_descriptions(Dataset(workspace), pa.table(descriptions, schema=columns.DESCRIPTIONS), {})
    write_release(workspace, ranked=False)
    return workspace


@pytest.fixture(scope="module")
def network(world: Workspace) -> TasteRecommender:
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world))
    assert isinstance(recommender, TasteRecommender)
    return recommender


def rows(answer: dict[str, Any]) -> list[int]:
    return [int(song["song_id"].removeprefix("song-")) for song in answer["songs"]]


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({"allow": [f"song-{row}" for row in range(40, 80)]}, lambda row: 40 <= row < 80),
        ({"artists": ["ARTIST 2", "artist 3"]}, lambda row: row % 7 in (2, 3)),
        ({"released_from": "2000-02-01"}, lambda row: row >= 31),
        ({"released_from": "2000-01-11", "released_to": "2000-01-20"}, lambda row: 10 <= row < 20),
        ({"market": "SE"}, lambda row: row % 3 == 0),
        ({"market": "SE", "artists": ["Artist 1"], "exclude": ["song-15"]}, lambda row: row % 21 == 15 and row > 15),
        ({"market": "SE", "allow": ["song-6", "song-7", "song-8", "nothing"]}, lambda row: row == 6),
    ],
)
@pytest.mark.parametrize("history", [SONGS, []])
def test_an_answer_keeps_to_what_is_asked_and_holds_all_that_qualify(
    app: Client, limits: dict[str, Any], fits: Any, history: list[str]
) -> None:
    expected = {row for row in range(NUM_SONGS) if fits(row) and row != WITHOUT_VECTOR} - {
        int(song.removeprefix("song-")) for song in history
    }
    answer = ask(app, k=NUM_SONGS, history=history, **limits)
    assert set(rows(answer)) == expected
    short_answer = ask(app, k=3, history=history, **limits)
    assert rows(short_answer) == rows(answer)[:3]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"released_from": "2000-02-31"}, "2000-02-31"),
        ({"released_from": "spring"}, "released_from"),
        ({"market": ""}, "market"),
        ({"market": "FR"}, "no song is available in market 'FR'; available markets: DE, SE"),
        ({"artists": ["Artist 1", "Abba"]}, "the catalog has no song by 'Abba'"),
        ({"artists": [" "]}, "artists"),
        ({"artists": "Abba"}, "artists"),
        ({"diversity": 1.5}, "diversity"),
        ({"explain": 1}, "explain"),
        ({"allow": [3]}, "allow"),
    ],
)
def test_invalid_limits_are_a_422(app: Client, limits: dict[str, Any], message: str) -> None:
    response = app.post("/v1/recommendations", {"history": SONGS, **limits})
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["where"].split(".")[0] == next(iter(limits))
    assert message in response.json()["detail"] + error["where"]
    (answer,) = app.post("/v1/recommendations/batch", {"requests": [{"history": SONGS, **limits}]}).json()["answers"]
    assert answer["errors"] == [error]


def test_diversity_makes_answers_less_alike(app: Client, network: TasteRecommender) -> None:
    def mean_similarity(diversity: float) -> float:
        song_rows = rows(ask(app, k=10, diversity=diversity))
        assert len(set(song_rows)) == 10
        assert not set(song_rows) & {3, 50, 9}
        vectors = network.song_vectors[song_rows]
        return float((vectors @ vectors.T)[~np.eye(10, dtype=np.bool_)].mean())

    assert mean_similarity(0.0) > mean_similarity(0.5) > mean_similarity(1.0)
    assert ask(app, k=10, diversity=0.0)["songs"] == ask(app, k=10)["songs"]


@pytest.mark.parametrize("diversity", [0.0, 0.4])
def test_an_explained_answer_gives_reasons_for_each_song_and_the_rest_stays(app: Client, diversity: float) -> None:
    plain, explained = ask(app, diversity=diversity), ask(app, explain=True, diversity=diversity)
    assert (plain["last_plays"], {song["reasons"] for song in plain["songs"]}) == (None, {None})
    assert [song["song_id"] for song in explained["last_plays"]] == SONGS
    assert all(1 <= len(song["reasons"]) <= 3 for song in explained["songs"])
    assert rows(plain) == rows(explained)


def test_without_plays_the_reason_is_popularity(app: Client) -> None:
    answer = ask(app, history=[], explain=True)
    assert {tuple(song["reasons"]) for song in answer["songs"]} == {("it is among the most played songs",)}
    assert answer["last_plays"] == []


def test_songs_are_found_by_title_and_artist(app: Client) -> None:
    result = app.get("/v1/songs", params={"query": "title 12"}).json()
    assert result["songs"][0]["song_id"] == "song-12"
    assert result["count"] == 12  # the titles 12, 112, and 120 to 129
    artist_result = app.get("/v1/songs", params={"query": "ARTIST 3", "k": 5}).json()
    assert len(artist_result["songs"]) == 5
    assert {song["artist"] for song in artist_result["songs"]} == {"Artist 3"}
    assert app.get("/v1/songs").status_code == 422
    assert app.get("/v1/songs", params={"query": "x" * 201}).status_code == 422
    assert app.get("/v1/songs", params={"query": " "}).json()["count"] == 0


def test_similar_songs_are_the_nearest_by_cosine(app: Client, network: TasteRecommender) -> None:
    scores = network.song_vectors @ network.song_vectors[5]
    scores[[5, WITHOUT_VECTOR]] = -np.inf
    similar = app.get("/v1/songs/song-5/similar", params={"k": 7}).json()
    play_counts = {song["song_id"]: song["plays"] for song in app.get("/v1/songs/popular?k=1000").json()["songs"]}
    assert (similar["title"], similar["artist"], similar["plays"]) == ("Title 5", "Artist 5", play_counts["song-5"])
    assert rows(similar) == np.argsort(-scores, kind="stable")[:7].tolist()
    assert similar["songs"][0]["score"] == pytest.approx(float(scores.max()), rel=1e-4)
    assert app.get(f"/v1/songs/song-{WITHOUT_VECTOR}/similar").json()["songs"] == []
    assert app.get("/v1/songs/none/similar").status_code == 404
    assert app.get("/v1/songs/song-5/similar", params={"k": 0}).status_code == 422


ODD_IDS = [
    *("AC/DC – Song 4, Part 4", "a/similar", "..", ".", "a%2Fb", "a?b#c", "line\nbreak", "+ &=;", "Zoë 🎵", "\\", '"'),
    *("x" * 512, "7"),
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a release whose first songs with embeddings have the ids ODD_IDS."""
    workspace = Workspace(tmp_path_factory.mktemp("odd") / "workspace")
    write_world(workspace)
    rows_with_vector = [row for row in range(len(ODD_IDS) + 1) if row != WITHOUT_VECTOR]
    rename_songs(workspace, dict(zip(rows_with_vector, ODD_IDS, strict=True)))
    write_release(workspace, ranked=False)
    with service(workspace) as replica:
        yield Client(replica)


@pytest.mark.parametrize("song_id", ODD_IDS, ids=range(len(ODD_IDS)))
def test_songs_of_any_id_have_every_endpoint(odd: Client, song_id: str) -> None:
    path = quote(song_id, safe="").replace(".", "%2E")
    similar = odd.get(f"/v1/songs/{path}/similar", params={"k": 3}).json()
    assert (similar["song_id"], len(similar["songs"])) == (song_id, 3)
    answer = ask(odd, history=[song_id], allow=[song_id, "song-50"], k=5)
    assert (answer["unknown_songs"], answer["plays"]) == (0, 1)
    assert song_id in [song["song_id"] for song in ask(odd, history=["song-50"], allow=[song_id])["songs"]]
    (point,) = odd.post("/v1/map", {"songs": [song_id]}).json()["points"]
    assert point["song_id"] == song_id


def test_songs_are_found_by_ids_as_pandas_writes_them(odd: Client) -> None:
    assert odd.get("/v1/songs/7.0/similar").json()["song_id"] == "7"
    answer = odd.post("/v1/map", {"songs": ["song-50", "7.0", " 7", "7", "none"]}).json()
    assert [point["song_id"] for point in answer["points"]] == ["song-50", "7"]
    assert answer["unknown_songs"] == 1
    assert ask(odd, history=["7.0", " 7"])["unknown_songs"] == 0


def test_each_song_on_a_map_has_coordinates(app: Client) -> None:
    song_ids = ["song-1", "song-2", "nothing", "song-1", f"song-{WITHOUT_VECTOR}", "song-9"]
    answer = app.post("/v1/map", {"songs": song_ids}).json()
    assert [point["song_id"] for point in answer["points"]] == ["song-1", "song-2", "song-9"]
    assert answer["points"][0]["title"] == "Title 1"
    assert answer["unknown_songs"] == 2
    assert all(-1 <= point[axis] <= 1 for point in answer["points"] for axis in "xy")
    assert app.post("/v1/map", {"songs": ["nothing"]}).json()["points"] == []
    assert app.post("/v1/map", {"songs": []}).status_code == 422


def test_the_page_lets_nothing_in_from_elsewhere_and_needs_no_key(world: Workspace) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": f"read:{KEY}"})
    with service(world, keys) as replica:
        client = Client(replica)
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        rules = page.headers["content-security-policy"]
        assert "default-src 'none'" in rules
        assert "unsafe" not in rules
        assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in page.text
        assert client.get("/v1/songs", params={"query": "a"}).status_code == 401
        assert client.post("/").status_code in (401, 405)
        assert Client(replica, key=KEY).get("/v1/songs", params={"query": "title"}).json()["count"] > 0
