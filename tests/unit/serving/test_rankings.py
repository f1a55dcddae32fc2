"""Rankings over HTTP: rankings of given songs, further pages, popular songs and new songs."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import BEGIN, NUM_SONGS, SONGS, WITHOUT_VECTOR, Client, ids, ms, service, write_release
from worlds import random_histories, write_dataset, write_song_vectors

from rayrec.data.dataset import Dataset
from rayrec.data.moments import DAY_MS
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.jobs.add_songs import add_songs
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.serving.serve_config import MAX_K
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace

SPREAD = 60  # factor on the time between plays, so that they span weeks
AT = BEGIN + 40_000_000 * SPREAD  # ms UTC, after all plays


def write_weeks(workspace: Workspace) -> None:
    histories = random_histories(60, NUM_SONGS)
    histories = histories.take(histories.lengths > 0)
    write_dataset(workspace, replace(histories, played_at=BEGIN + histories.played_at * SPREAD), NUM_SONGS)
    write_song_vectors(workspace, np.ones((NUM_SONGS, 8), np.float32), {"dataset": "by-hand"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("rankings") / "workspace")
    write_weeks(workspace)
    write_release(workspace)
    return workspace


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Client]]:
    """A workspace whose release has only the network, without retrieval and rankers, and a client of it."""
    workspace = Workspace(tmp_path_factory.mktemp("plain") / "workspace")
    write_weeks(workspace)
    write_release(workspace, ranked=False)
    with service(workspace) as replica:
        yield workspace, Client(replica)


@pytest.fixture(scope="module")
def plays(world: Workspace) -> np.ndarray:
    counts = [np.bincount(batch.songs, minlength=NUM_SONGS) for batch in Dataset(world).read_all()]
    return np.asarray(np.sum(counts, axis=0))


def post(app: Client, path: str, **body: Any) -> dict[str, Any]:
    response = app.post(f"/v1/{path}", {"at": AT, **({} if "user_id" in body else {"history": SONGS}), **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def get(app: Client, path: str, **params: Any) -> dict[str, Any]:
    response = app.get(f"/v1/{path}", params=params)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def require_refusal(response: Any, where: str) -> str:
    assert response.status_code == 422, response.text
    (error,) = response.json()["errors"]
    assert error["where"] == where
    detail: str = error["detail"]
    return detail


def rows(answer: dict[str, Any]) -> list[int]:
    return [int(song.removeprefix("song-")) for song in ids(answer)]


def scores(answer: dict[str, Any]) -> dict[str, float]:
    return {song["song_id"]: song["score"] for song in answer["songs"]}


@pytest.mark.parametrize("horizon", ["short", "long", 0.4])
def test_given_songs_have_the_order_and_the_scores_of_recommendations(app: Client, horizon: Any) -> None:
    recommendations = post(app, "recommendations", horizon=horizon, exclude_heard=False, k=30)
    ranking = post(app, "rank", horizon=horizon, songs=sorted(ids(recommendations)))
    assert ids(ranking) == ids(recommendations)
    assert scores(ranking) == pytest.approx(scores(recommendations), rel=1e-4)
    assert (ranking["source"], ranking["plays"], ranking["unknown_song_ids"]) == ("taste", 4, [])


def test_songs_that_nothing_retrieves_are_ranked_among_the_others(app: Client) -> None:
    recommendations = post(app, "recommendations", exclude_heard=False, k=MAX_K)
    ranking = post(app, "rank", songs=[f"song-{row}" for row in range(NUM_SONGS)])
    assert set(ids(ranking)) >= set(ids(recommendations))
    assert len(ids(ranking)) + len(ranking["unknown_song_ids"]) == NUM_SONGS
    values = list(scores(ranking).values())
    assert values == sorted(values, reverse=True)
    retrieved_ids = [song for song, score in scores(recommendations).items() if score > 0]
    assert [song for song in ids(ranking) if song in retrieved_ids] == retrieved_ids
    # A song without plays has almost no features: it comes last, but its score is above 0.
    assert 0 < min(values) < values[0]


def test_ids_that_are_not_known_are_named_and_each_song_comes_once(app: Client) -> None:
    ranking = post(app, "rank", songs=["song-9", "nobody", "song-4", "song-9", "nothing", "nobody", " song-4"])
    assert sorted(ids(ranking)) == ["song-4", "song-9"]
    assert ranking["unknown_song_ids"] == ["nobody", "nothing"]
    assert post(app, "rank", songs=["nobody"])["songs"] == []


def test_a_ranking_without_plays_is_by_popularity(app: Client, plays: np.ndarray) -> None:
    songs = [11, 3, 150, 42, 90]
    ranking = post(app, "rank", history=[], songs=[f"song-{row}" for row in songs])
    assert ranking["source"] == "popular"
    assert rows(ranking) == sorted(sorted(songs), key=lambda row: -plays[row])
    assert list(scores(ranking).values()) == [plays[row] for row in rows(ranking)]


@pytest.mark.parametrize("history", [SONGS, []])
def test_the_same_songs_are_ranked_with_plays_and_without(
    app: Client, plain: tuple[Workspace, Client], history: list[str]
) -> None:
    songs = ["song-8", f"song-{WITHOUT_VECTOR}", "song-61"]
    for client in (app, plain[1]):  # with rankers and by the network alone
        ranking = post(client, "rank", history=history, songs=songs)
        assert sorted(ids(ranking)) == ["song-61", "song-8"]
        assert ranking["unknown_song_ids"] == [f"song-{WITHOUT_VECTOR}"]


def test_a_network_alone_ranks_by_cosine(plain: tuple[Workspace, Client]) -> None:
    workspace, app = plain
    network = load_recommender(workspace, Dataset(workspace), releases.default_parts(workspace))
    assert isinstance(network, TasteRecommender)
    taste = np.array(app.post("/v1/tastes", {"users": [{"history": SONGS, "at": AT}]}).json()["tastes"][0]["long"])
    songs = [8, 3, 100, WITHOUT_VECTOR, 61]
    ranking = post(app, "rank", songs=[f"song-{row}" for row in songs], horizon="long")
    cosines = network.song_vectors[songs] @ taste
    expected = sorted((row for row in songs if row != WITHOUT_VECTOR), key=lambda row: -cosines[songs.index(row)])
    assert rows(ranking) == expected
    assert ranking["unknown_song_ids"] == [f"song-{WITHOUT_VECTOR}"]
    assert ranking["songs"][0]["score"] == pytest.approx(float(cosines.max()), rel=1e-4)


def test_given_songs_are_ranked_for_a_stored_user_and_explained(app: Client) -> None:
    plays = [
        {"event_id": f"e{position}", "user_id": "rank-ann", "song_id": song, "played_at": AT - 60_000 * (4 - position)}
        for position, song in enumerate(SONGS)
    ]
    assert app.post("/v1/plays", {"plays": plays}).json()["taken"] == 4
    recommendations = post(app, "recommendations", user_id="rank-ann", exclude_heard=False, k=10)
    assert "song-3" not in ids(recommendations)
    ranking = post(app, "rank", user_id="rank-ann", songs=["song-3", *ids(recommendations)[::-1]], explain=True)
    assert [song for song in ids(ranking) if song != "song-3"] == ids(recommendations)
    assert all(1 <= len(song["reasons"]) <= 3 for song in ranking["songs"])
    heard_song = next(song for song in ranking["songs"] if song["song_id"] == "song-3")
    assert any(reason.startswith("you played it 2 times") for reason in heard_song["reasons"])


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"songs": []}, "songs"),
        ({}, "songs"),
        ({"songs": ["song-1"] * (MAX_K + 1)}, "songs"),
        ({"songs": [1]}, "songs.0"),
    ],
)
def test_a_ranking_needs_songs(app: Client, body: dict[str, Any], where: str) -> None:
    require_refusal(app.post("/v1/rank", {"history": SONGS, **body}), where)


@pytest.mark.parametrize("history", [SONGS, []])
def test_the_pages_of_a_ranking_are_the_ranking(app: Client, history: list[str]) -> None:
    pages: list[dict[str, Any]] = []
    cursor = None
    for k in (10, 25, 25):
        body = {"history": history, "k": k, **({"cursor": cursor} if cursor else {})}
        pages.append(app.post("/v1/recommendations", body).json())
        cursor = pages[-1]["cursor"]
    assert len({page["at"] for page in pages}) == 1  # all pages have the `at` of the first
    full = post(app, "recommendations", history=history, k=60, at=ms(pages[0]["at"]))
    assert [song for page in pages for song in page["songs"]] == full["songs"]


def test_after_the_last_page_there_is_no_cursor(app: Client) -> None:
    first = post(app, "recommendations", k=NUM_SONGS - 10)
    last = post(app, "recommendations", k=100, cursor=first["cursor"])
    assert last["cursor"] is None
    assert len(set(ids(first)) | set(ids(last))) == len(ids(first)) + len(ids(last))
    assert set(ids(first)) | set(ids(last)) == set(ids(post(app, "recommendations", k=MAX_K)))


@pytest.mark.parametrize("history", [SONGS, []])
def test_a_page_that_ends_with_the_last_song_has_no_cursor(app: Client, history: list[str]) -> None:
    body = {"history": history, "allow": ["song-20", "song-30"], "exclude_heard": False}
    full = post(app, "recommendations", **body, k=2)
    assert (sorted(ids(full)), full["cursor"]) == (["song-20", "song-30"], None)
    first = post(app, "recommendations", **body, k=1)
    last = post(app, "recommendations", **body, k=1, cursor=first["cursor"])
    assert (first["songs"] + last["songs"], last["cursor"]) == (full["songs"], None)
    for options in ({"diversity": 0.5}, {"explore": 0.5}):
        assert post(app, "recommendations", history=history, k=5, **options)["cursor"] is None


def test_a_stored_user_pages_on_after_another_play(app: Client) -> None:
    play = {"user_id": "pages-ann", "song_id": "song-5", "event_id": "p1"}
    app.post("/v1/plays", play)
    first = get(app, "users/pages-ann/recommendations", k=5)
    app.post("/v1/plays", {**play, "event_id": "p2", "song_id": "song-6"})
    second = get(app, "users/pages-ann/recommendations", k=5, cursor=first["cursor"])
    assert len(second["songs"]) == 5
    assert ms(second["at"]) >= ms(first["at"])


def forged_cursor(*fields: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


@pytest.mark.parametrize(
    "cursor", ["", "x", "é", forged_cursor(), forged_cursor("a", 1, None), forged_cursor(3), "bnVsbA"]
)
def test_an_invalid_cursor_is_refused(app: Client, cursor: str) -> None:
    require_refusal(app.post("/v1/recommendations", {"history": SONGS, "cursor": cursor}), "cursor")
    require_refusal(app.get("/v1/songs/popular", params={"cursor": cursor}), "cursor")


def test_a_cursor_of_one_list_of_songs_is_refused_by_the_other_and_so_is_a_place_that_no_list_has(app: Client) -> None:
    for path, other_path in (("popular", "new"), ("new", "popular")):
        cursor = get(app, f"songs/{path}", k=5)["cursor"]
        assert len(get(app, f"songs/{path}", k=5, cursor=cursor)["songs"]) == 5
        refusal = require_refusal(app.get(f"/v1/songs/{other_path}", params={"k": 5, "cursor": cursor}), "cursor")
        assert "another request" in refusal
        digest, _, at = json.loads(base64.urlsafe_b64decode(cursor + "=="))
        beyond = forged_cursor(digest, 10**60, at)
        require_refusal(app.get(f"/v1/songs/{path}", params={"k": 5, "cursor": beyond}), "cursor")


def test_a_cursor_is_for_the_request_that_it_came_from(app: Client) -> None:
    cursor = post(app, "recommendations", k=5)["cursor"]
    body = {"history": SONGS, "at": AT, "cursor": cursor}
    assert "another request" in require_refusal(app.post("/v1/recommendations", {**body, "horizon": "long"}), "cursor")
    assert app.post("/v1/recommendations", {**body, "k": 7, "explain": True}).status_code == 200
    digest, _, at = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    for first, moment in ((-1, at), (MAX_K, at), ("2", at), (2, 10**30), (2, "now")):
        require_refusal(
            app.post("/v1/recommendations", {**body, "cursor": forged_cursor(digest, first, moment)}), "cursor"
        )


def test_diverse_answers_have_no_further_pages(app: Client) -> None:
    assert post(app, "recommendations", k=5, diversity=0.5)["cursor"] is None


def test_popular_songs_come_by_plays_page_by_page(app: Client, plays: np.ndarray) -> None:
    expected = [row for row in np.argsort(-plays, kind="stable").tolist() if row != WITHOUT_VECTOR]
    first = get(app, "songs/popular", k=30)
    second = get(app, "songs/popular", k=1000, cursor=first["cursor"])
    assert rows(first) + rows(second) == expected
    assert [song["plays"] for song in first["songs"]] == plays[expected[:30]].tolist()
    assert second["cursor"] is None
    assert first["songs"][0]["artist"] == f"Artist {expected[0] % 7}"


def test_popular_and_new_songs_keep_to_artists(app: Client) -> None:
    for path in ("songs/popular", "songs/new"):
        all_rows = rows(get(app, path, k=MAX_K))
        first_page = get(app, path, artists=["ARTIST 2", "artist 5"], k=10)
        assert rows(first_page) == [row for row in all_rows if row % 7 in (2, 5)][:10]
        assert set(rows(get(app, path, artists=["ARTIST 2", "artist 5"], cursor=first_page["cursor"]))).isdisjoint(
            rows(first_page)
        )
        assert "'Nobody'" in require_refusal(
            app.get(f"/v1/{path}", params={"artists": ["Artist 1", "Nobody"]}), "artists"
        )
        require_refusal(app.get(f"/v1/{path}", params={"artist": "Artist 1"}), "artist")


def test_new_songs_come_by_the_day_of_their_first_play(app: Client, world: Workspace) -> None:
    first_days = np.full(NUM_SONGS, np.iinfo(np.int64).max)
    for batch in Dataset(world).read_all():
        np.minimum.at(first_days, batch.songs, batch.played_at // DAY_MS)
    expected = [row for row in np.lexsort((-np.arange(NUM_SONGS), -first_days)).tolist() if row != WITHOUT_VECTOR]
    expected = [row for row in expected if first_days[row] < np.iinfo(np.int64).max]
    answer = get(app, "songs/new", k=MAX_K)
    assert rows(answer) == expected
    assert len(set(first_days[expected].tolist())) > 2
    days = [np.datetime64(song["first_played"]).astype(int) for song in answer["songs"]]
    assert days == first_days[expected].tolist()


def test_a_release_without_a_retrieval_has_no_new_songs_and_says_why(plain: tuple[Workspace, Client]) -> None:
    response = plain[1].get("/v1/songs/new")
    assert response.status_code == 404
    assert "rayrec retrieval" in response.json()["detail"]


def test_added_songs_are_the_newest_and_can_be_ranked(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    write_weeks(workspace)
    write_release(workspace)
    (tmp_path / "new.csv").write_text(
        "song,title,artist\n" + "".join(f"new-{row},New {row},Artist 2\n" for row in "abc")
    )
    describe(workspace, DescribeConfig(append=True), str(tmp_path / "new.csv"))
    add_songs(workspace)
    releases.create_release(workspace)
    with service(workspace) as replica:
        app = Client(replica)
        newest_songs = get(app, "songs/new", k=4)["songs"]
        ranking = post(app, "rank", songs=["song-3", "new-b", f"song-{WITHOUT_VECTOR}"])
        ranking_without_plays = post(app, "rank", history=[], songs=["new-b", "song-3"])
        popular_ids = ids(get(app, "songs/popular", k=MAX_K))
    assert [song["song_id"] for song in newest_songs[:3]] == ["new-c", "new-b", "new-a"]
    assert [song["first_played"] is None for song in newest_songs] == [True, True, True, False]
    assert set(ids(ranking)) == {"song-3", "new-b", f"song-{WITHOUT_VECTOR}"}
    assert popular_ids[-3:] == ["new-a", "new-b", "new-c"]
    assert len(popular_ids) == NUM_SONGS + 3  # now every song has a vector
    assert ids(ranking_without_plays) == ["song-3", "new-b"]
