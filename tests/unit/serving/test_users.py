"""Stored users over HTTP, without Ray: the online state equals the batch job's, and answers reflect new plays."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from served import AT, NUM_SONGS, Client, ms, service, write_release, write_world
from stores import needs_redis

from rayrec.bench.redis_servers import RedisServer
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import now_ms
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import read_states, taste_table
from rayrec.online import user_state
from rayrec.recommend.answer import load_recommender, reasons
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.reranking import network_of
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.serving.requests import query_histories, read_stored
from rayrec.serving.serve_config import MAX_PLAYS
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace

MINUTE = 60_000
TASTE_TOLERANCE = 1e-5  # absolute, per number of a taste vector: states are stored with 24 bits per number


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("users") / "workspace")
    write_world(workspace, opinions=True)
    for name, seed in (("1", 0), ("2", 5)):
        write_release(workspace, name, seed=seed, activate=name == "1")
    return workspace


@pytest.fixture
def app(world: Workspace, uri: str) -> Iterator[Client]:
    with service(world, store=uri) as replica:
        yield Client(replica)


def recommender(world: Workspace, model: str = "model1") -> BaseRecommender:
    return load_recommender(world, Dataset(world), releases.default_parts(world, model))


def encoder(world: Workspace, model: str = "model1") -> TasteEncoder:
    return network_of(recommender(world, model)).encoder


def history_of(events: list[dict[str, Any]]) -> Histories:
    """Return the history that an import makes of the events: their plays in time order."""
    events = sorted(events, key=lambda event: event["played_at"])
    return Histories.from_lists(
        [[int(event["song_id"].removeprefix("song-")) for event in events]],
        [[event["played_at"] for event in events]],
        skipped=[[event.get("skipped", False) for event in events]],
    )


def events_of(user: str, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    times = AT + np.cumsum(random.integers(1_000, 10 * MINUTE, count))
    return [
        {
            "event_id": f"{user}-{number}",
            "user_id": user,
            "song_id": f"song-{random.integers(NUM_SONGS)}",
            "played_at": int(time),
            "skipped": bool(random.random() < 0.3),
        }
        for number, time in enumerate(times)
    ]


def send(app: Client, *events: dict[str, Any]) -> dict[str, Any]:
    response = app.post("/v1/plays", events[0] if len(events) == 1 else {"plays": list(events)})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def taste(app: Client, user: str, at: int) -> dict[str, Any]:
    response = app.get(f"/v1/users/{user}/taste", params={"at": at})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def recommend(app: Client, **body: Any) -> dict[str, Any]:
    response = app.post("/v1/recommendations", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def require_problem(response: Any, status: int, expected_text: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert expected_text in response.text


def require_taste_of_batch(
    world: Workspace, online_taste: dict[str, Any], events: list[dict[str, Any]], at: int
) -> None:
    """Check that the vectors equal those in the batch job's table over the same plays, and those of its states."""
    batch_encoder = encoder(world, online_taste["model"])
    table = taste_table(batch_encoder, history_of(events), at)
    for horizon in ("short", "long"):
        np.testing.assert_allclose(
            online_taste[horizon], table.column(f"taste_{horizon}")[0].as_py(), atol=TASTE_TOLERANCE
        )
        state_taste = batch_encoder.tastes(read_states(table, batch_encoder.model.config.state_layers), at, horizon)[0]
        np.testing.assert_allclose(online_taste[horizon], state_taste, atol=TASTE_TOLERANCE)
    assert online_taste["plays"] == table.column("plays")[0].as_py() == len(events)
    assert ms(online_taste["last_played_at"]) == table.column("last_played_at")[0].as_py()


def test_the_online_state_is_what_the_batch_job_computes_over_the_same_plays(app: Client, world: Workspace) -> None:
    """300 plays arrive alone and in batches, out of order, some of them twice."""
    events, random = events_of("ann", 300), np.random.default_rng(2)
    order = np.argsort(np.arange(300) + random.uniform(0, user_state.WINDOW / 2, 300), kind="stable")
    position, counts = 0, {"taken": 0, "repeated": 0, "rejected": 0}
    while position < 300:
        size = int(random.choice([1, 1, 2, 30]))
        batch = [events[row] for row in order[position : position + size]]
        if random.random() < 0.3:
            batch.append(batch[0])
        answer = send(app, *batch)
        for name in counts:
            counts[name] += answer[name]
        position += size
    assert (counts["taken"], counts["rejected"]) == (300, 0)
    assert counts["repeated"] > 3
    at = events[-1]["played_at"] + MINUTE
    require_taste_of_batch(world, taste(app, "ann", at), events, at)


@pytest.mark.parametrize("horizon", ["short", "long"])
@pytest.mark.parametrize("exclude_heard", [False, True])
def test_a_stored_user_is_recommended_what_the_whole_history_is(
    app: Client, world: Workspace, horizon: Any, exclude_heard: bool
) -> None:
    """Retrieval and rankers use the songs played, and the user has more plays than the window holds."""
    events = events_of("ann", 200, seed=4)
    send(app, *events)
    at = events[-1]["played_at"] + MINUTE
    rows, scores = recommender(world).recommend_one(
        history_of(events), at, 10, horizon=horizon, exclude_heard=exclude_heard
    )
    answer = recommend(app, user_id="ann", at=at, k=10, horizon=horizon, exclude_heard=exclude_heard)
    assert [song["song_id"] for song in answer["songs"]] == [f"song-{row}" for row in rows]
    np.testing.assert_allclose([song["score"] for song in answer["songs"]], scores, atol=TASTE_TOLERANCE)
    assert (answer["source"], answer["plays"], ms(answer["at"])) == ("taste", 200, at)


def test_skips_and_likes_online_are_those_that_an_import_of_the_same_events_has(world: Workspace, uri: str) -> None:
    """Likes from before, between and after the plays, some sent twice; the first one before the user has any play."""
    events = events_of("ann", 200, seed=6)
    likes = [
        {"type": "like", "event_id": f"like-{number}", "user_id": "ann", "song_id": song, "played_at": at}
        for number, song, at in (
            (0, "song-9", AT - 5 * MINUTE),
            (1, events[150]["song_id"], events[150]["played_at"] + 5),
            (2, "song-3", events[199]["played_at"] + 5),
            (3, events[3]["song_id"], events[160]["played_at"]),
        )
    ]
    full_history = history_of(events)
    full_history = replace(full_history, likes=history_of(likes))
    with service(world, store=uri) as replica:
        app = Client(replica)
        assert send(app, likes[0])["outcomes"] == ["taken"]
        for start in range(0, 200, 40):
            assert send(app, *events[start : start + 40])["taken"] == 40
        assert send(app, *likes[1:], likes[0], likes[2])["outcomes"] == ["taken"] * 3 + ["repeated"] * 2
        (user,) = asyncio.run(replica.users.read(replica.live, ["ann"]))
        assert user is not None
        for actual, expected in ((user.plays, full_history), (user.likes, full_history.likes)):
            assert actual is not None
            assert expected is not None
            np.testing.assert_array_equal(actual.songs, expected.songs)
            np.testing.assert_array_equal(actual.played_at, expected.played_at)
        np.testing.assert_array_equal(user.plays.skipped, full_history.skipped)
        at = events[-1]["played_at"] + MINUTE
        all_songs = [f"song-{song}" for song in range(NUM_SONGS)]
        answer = app.post("/v1/rank", {"user_id": "ann", "at": at, "songs": all_songs, "explain": True}).json()
    batch_recommender = recommender(world)
    features = batch_recommender.explain(full_history, at, np.arange(NUM_SONGS))
    assert {song for song, song_features in enumerate(features) if song_features.get("user_liked")} == {
        int(like["song_id"].removeprefix("song-")) for like in likes
    }
    assert isinstance(batch_recommender, TwoStepRecommender)
    ranking = batch_recommender.rank_queries(
        full_history, Queries.at_end(full_history, at), NUM_SONGS, songs_to_rank=[np.arange(NUM_SONGS)]
    )
    scores = dict(zip(ranking.songs[0].tolist(), ranking.scores[0].tolist(), strict=True))
    assert len(answer["songs"]) > NUM_SONGS - 5
    title = f"Title {full_history.songs[-1]}"
    for song in answer["songs"]:
        row = int(song["song_id"].removeprefix("song-"))
        assert song["reasons"] == reasons(features[row], title)
        assert ("you liked it" in song["reasons"]) == bool(features[row]["user_liked"])
        assert song["score"] == pytest.approx(scores[row], abs=TASTE_TOLERANCE)


def test_the_next_answer_reflects_a_like_of_a_client_whose_clock_is_ahead(app: Client) -> None:
    send(app, *events_of("ann", 20))
    in_five_minutes = now_ms() + 5 * MINUTE
    like = {"type": "like", "event_id": "1", "user_id": "ann", "song_id": "song-4", "played_at": in_five_minutes}
    assert send(app, like)["outcomes"] == ["taken"]
    body = {"user_id": "ann", "songs": ["song-4", "song-5"], "explain": True}
    songs = app.post("/v1/rank", body).json()["songs"]
    assert {song["song_id"] for song in songs if "you liked it" in song["reasons"]} == {"song-4"}


def test_likes_are_no_plays_and_those_from_before_a_deletion_are_rejected(app: Client) -> None:
    like = {"type": "like", "event_id": "1", "user_id": "new", "song_id": "song-4"}
    assert send(app, like)["taken"] == 1
    assert recommend(app, user_id="new", k=3)["source"] == "popular"
    assert app.get("/v1/users/new/plays").json()["plays"] == []
    assert app.request("DELETE", "/v1/users/new").status_code == 204
    old = {**like, "event_id": "2", "played_at": AT}
    assert send(app, old)["outcomes"] == ["rejected"]


def test_the_next_recommendation_reflects_a_play(app: Client, world: Workspace) -> None:
    events = events_of("ann", 6)
    send(app, *events[:5])
    at = events[-1]["played_at"]
    before = recommend(app, user_id="ann", at=at, k=NUM_SONGS)
    assert events[5]["song_id"] in [song["song_id"] for song in before["songs"]]
    send(app, events[5])
    after = recommend(app, user_id="ann", at=at, k=NUM_SONGS)
    assert events[5]["song_id"] not in [song["song_id"] for song in after["songs"]]
    assert after["plays"] == before["plays"] + 1
    history = [
        {"song_id": event["song_id"], "played_at": event["played_at"], "skipped": event["skipped"]} for event in events
    ]
    songs_of_history = recommend(app, history=history, at=at, k=5)["songs"]
    assert [song["song_id"] for song in after["songs"][:5]] == [song["song_id"] for song in songs_of_history]


def test_a_first_play_makes_the_user_and_now_is_its_time(app: Client) -> None:
    answer = send(app, {"event_id": "1", "user_id": "new/user ë", "song_id": "song-3"})
    assert (answer["taken"], answer["outcomes"]) == (1, ["taken"])
    user_taste = app.get("/v1/users/new%2Fuser%20%C3%AB/taste").json()
    assert (user_taste["user_id"], user_taste["plays"], user_taste["rejected"]) == ("new/user ë", 1, 0)
    assert abs(ms(user_taste["at"]) - ms(user_taste["last_played_at"])) < 60 * MINUTE
    assert len(user_taste["short"]) == len(user_taste["long"]) == 8


def test_the_outcome_of_each_play_is_reported_and_counted(app: Client) -> None:
    plays = events_of("ann", 3) + events_of("bob", 1)
    unknown_play = {**plays[0], "event_id": "s", "song_id": "nobody"}
    answer = send(app, plays[0], unknown_play, plays[3], plays[0], plays[2], plays[1])
    assert answer["outcomes"] == ["taken", "unknown", "taken", "repeated", "taken", "taken"]
    assert [answer[name] for name in ("taken", "repeated", "rejected", "unknown_songs")] == [4, 1, 0, 1]
    assert send(app, unknown_play)["outcomes"] == ["unknown"]
    more_events = events_of("ann", 200)
    send(app, *more_events[3:])
    late_play = {**plays[0], "event_id": "late", "played_at": plays[0]["played_at"] + 1}
    assert send(app, late_play, more_events[199])["outcomes"] == ["rejected", "repeated"]
    assert taste(app, "ann", AT + 10**9)["rejected"] == 1
    metrics = app.get("/metrics").text
    for outcome, count in (("taken", 201), ("repeated", 2), ("rejected", 1), ("unknown", 2)):
        lines = [line for line in metrics.splitlines() if f'outcome="{outcome}"' in line and "plays_total" in line]
        assert [float(line.split()[-1]) for line in lines] == [count]


def test_a_rejected_play_is_rejected_each_time_and_taken_once_it_is_corrected(app: Client) -> None:
    """Its client may not have received the first answer. A like from before a deletion has no other rules."""
    events = events_of("ann", 200)
    send(app, *events)
    late_play = {**events[0], "event_id": "late", "played_at": events[0]["played_at"] + 1}
    old_like = {"type": "like", "event_id": "like", "user_id": "bob", "song_id": "song-4", "played_at": AT}
    assert app.request("DELETE", "/v1/users/bob").status_code == 204
    for _ in range(2):
        assert send(app, late_play, old_like, late_play, old_like)["outcomes"] == ["rejected"] * 4
    corrected = [{**late_play, "played_at": events[-1]["played_at"] + 1}, {**old_like, "played_at": None}]
    assert send(app, *corrected)["outcomes"] == ["taken"] * 2
    assert send(app, *corrected)["outcomes"] == ["repeated"] * 2
    assert taste(app, "ann", AT + 10**9)["plays"] == 201


def test_unknown_contexts_say_nothing_and_times_come_in_any_form(app: Client) -> None:
    plays = events_of("ann", 1)[0]
    send(app, {**plays, "contexts": ["nowhere"], "played_at": "2026-01-20T18:24:00Z"})
    assert taste(app, "ann", AT + 10**12)["last_played_at"] == "2026-01-20T18:24:00.000Z"


def test_a_user_who_is_not_there_is_a_404_and_is_recommended_popular_songs(app: Client) -> None:
    require_problem(app.get("/v1/users/nobody/taste"), 404, "rayrec states load")
    answer = recommend(app, user_id="nobody", k=7)
    assert (answer["source"], answer["path"], answer["plays"]) == ("popular", "popular", 0)
    assert answer["songs"] == recommend(app, history=[], k=7)["songs"]


def test_the_plays_of_an_unknown_user_have_the_types_of_all_plays() -> None:
    query = read_stored(None, AT)
    histories: tuple[Any, ...] = (query.plays, query_histories([query, query]))
    for plays in histories:
        assert (plays.songs.dtype, plays.played_at.dtype) == (np.int32, np.int64)
        assert (plays.contexts.dtype, plays.skipped.dtype) == (np.int32, np.bool_)


def test_stored_users_and_histories_go_in_one_batch(app: Client) -> None:
    for user in ("ann", "bob"):
        send(app, *events_of(user, 30, seed=len(user)))
    at = AT + 10**9
    requests = [
        {"user_id": "bob", "at": at, "k": 4},
        {"history": ["song-3", "song-4"], "at": at, "k": 4},
        {"user_id": "nobody", "at": at, "k": 4},
        {"user_id": "ann", "at": at, "k": 4, "horizon": 0.5},
        {"user_id": "bob", "at": at, "k": 4},
    ]
    answers = app.post("/v1/recommendations/batch", {"requests": requests}).json()["answers"]
    for answer, request in zip(answers, requests, strict=True):
        single = recommend(app, **request)
        assert [song["song_id"] for song in answer["songs"]] == [song["song_id"] for song in single["songs"]]
        assert answer["source"] == single["source"]


def test_the_state_of_another_model_is_computed_anew_and_kept(world: Workspace, uri: str) -> None:
    """A release with another network goes live: its states come from the plays, not from the old network's states."""
    events = events_of("ann", 160, seed=9)
    at = events[-1]["played_at"] + MINUTE
    with service(world, store=uri) as replica:
        send(Client(replica), *events[:150])
        taste_before = taste(Client(replica), "ann", at)
    releases.activate_release(world, releases.list_releases(world)[1].id)
    try:
        with service(world, store=uri) as replica:
            app = Client(replica)
            assert send(app, *events[150:])["taken"] == 10
            taste_after = taste(app, "ann", at)
            assert (taste_before["model"], taste_after["model"]) == ("model1", "model2")
            require_taste_of_batch(world, taste_after, events, at)
            rows, _ = recommender(world, "model2").recommend_one(history_of(events), at, 10)
            answer = recommend(app, user_id="ann", at=at, k=10, exclude_heard=False)
            assert [song["song_id"] for song in answer["songs"]] == [f"song-{row}" for row in rows]
    finally:
        releases.rollback(world)
    with service(world, store=uri) as replica:  # back to the first release, with a read before any new play
        require_taste_of_batch(world, taste(Client(replica), "ann", at), events, at)


def test_a_moment_before_the_last_play_is_refused(app: Client) -> None:
    events = events_of("ann", 2)
    send(app, *events)
    early = events[-1]["played_at"] - 1
    require_problem(app.get("/v1/users/ann/taste", params={"at": early}), 422, "after the moment")
    require_problem(app.post("/v1/recommendations", {"user_id": "ann", "at": early}), 422, "after the moment")
    assert ms(taste(app, "ann", early + 1)["at"]) == early + 1


@pytest.fixture(scope="module")
def unused(world: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """An application whose store stays empty."""
    with service(world, store=f"sqlite:///{tmp_path_factory.mktemp('unused')}/states.sqlite") as replica:
        yield Client(replica)


PLAY = {"event_id": "e", "user_id": "ann", "song_id": "song-1"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "event_id"),
        ({**PLAY, "event_id": ""}, "event_id"),
        ({**PLAY, "event_id": "x" * 513}, "event_id"),
        ({**PLAY, "user_id": ""}, "user_id"),
        ({**PLAY, "user_id": 3}, "user_id"),
        ({"event_id": "e", "song_id": "song-1"}, "user_id"),
        ({**PLAY, "song_id": None}, "song"),
        ({**PLAY, "skipped": "yes"}, "skipped"),
        ({**PLAY, "share_listened": 1.1}, "share_listened"),
        ({**PLAY, "share_listened": True}, "share_listened"),
        ({**PLAY, "contexts": ["x"] * 32}, "contexts"),
        ({**PLAY, "played_at": -1}, "played_at"),
        ({**PLAY, "played_at": "yesterday"}, "played_at"),
        ({**PLAY, "played_at": "2099-01-01T00:00:00Z"}, "more than a day in the future"),
        ({**PLAY, "played_at": "2999-01-01T00:00:00Z"}, "not between 1970 and 2100"),
        ({**PLAY, "more": 1}, "more"),
        ({"plays": []}, "plays"),
        ({"plays": [PLAY] * (MAX_PLAYS + 1)}, "plays"),
        ({"plays": 7}, "plays"),
        ([PLAY], "body"),
    ],
)
def test_invalid_plays_are_a_422_and_nothing_is_stored(unused: Client, body: Any, message: str) -> None:
    require_problem(unused.post("/v1/plays", body), 422, message)
    assert unused.get("/v1/users/ann/taste").status_code == 404


def test_a_user_id_that_is_no_text_is_a_422(app: Client) -> None:
    content = b'{"event_id": "e", "user_id": "\\ud800", "song_id": "song-1"}'
    response = app.post("/v1/plays", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    assert app.get("/v1/users/" + "x" * 600 + "/taste").status_code == 422
    assert app.get("/v1/users/%FF/taste").status_code in (404, 422)


def test_a_bad_play_of_many_fails_alone_and_is_located(app: Client) -> None:
    plays = events_of("ann", 2)
    bad = [{}, {**plays[1], "played_at": "yesterday"}, 3]
    answer = app.post("/v1/plays", {"plays": [plays[0], *bad, plays[1]]}).json()
    assert answer["outcomes"] == ["taken", "invalid", "invalid", "invalid", "taken"]
    assert (answer["taken"], answer["invalid"]) == (2, 3)
    assert {"plays.1.event_id", "plays.2.played_at", "plays.3"} <= {error["where"] for error in answer["errors"]}
    assert taste(app, "ann", AT + 10**9)["plays"] == 2


@pytest.mark.parametrize(
    "user", ["a/b", "a/taste", "Zoë 🎵", "a%2Fb", "a?b#c", "line\nbreak", "..", "with, comma", "+ &="]
)
def test_users_of_any_id_have_every_endpoint(app: Client, user: str) -> None:
    send(app, {**PLAY, "user_id": user})
    path = f"/v1/users/{quote(user, safe='').replace('.', '%2E')}"
    assert app.get(f"{path}/taste").json()["user_id"] == user
    assert app.get(f"{path}/recommendations", params={"k": 3}).json()["plays"] == 1
    assert app.request("DELETE", path).status_code == 204
    assert app.get(f"{path}/taste").status_code == 404


@pytest.mark.parametrize(
    ("path", "status"), [("zoe/", 404), ("zoe/plays", 405), ("zoe/taste/", 404), ("/zoe", 404), ("zoe/ann", 404)]
)
def test_a_slash_is_part_of_a_user_id_only_if_it_is_escaped_so_that_no_wrong_path_deletes_a_user(
    app: Client, path: str, status: int
) -> None:
    for user in ("zoe", path):
        send(app, {**PLAY, "user_id": user})
    response = app.request("DELETE", f"/v1/users/{path}")
    assert response.status_code == status
    assert "location" not in response.headers
    assert app.get("/v1/users/zoe/taste").json()["plays"] == 1
    assert app.request("DELETE", f"/v1/users/{quote(path, safe='')}").status_code == 204
    assert app.get(f"/v1/users/{quote(path, safe='')}/taste").status_code == 404
    assert app.get(f"/v1/users/{path}/taste").status_code == 404
    assert app.get("/v1/songs/song-1/").status_code == 404


def test_a_user_and_a_song_are_one_however_their_ids_are_spelled(app: Client) -> None:
    """In a column with gaps, pandas turns 7 into 7.0. Imports and the API turn it into 7 again."""
    for number, (user, song) in enumerate([("7", "song-3"), (" 7.0", "song-3 "), ("7.00", "\tsong-5")]):
        send(app, {**PLAY, "user_id": user, "song_id": song, "event_id": f"e{number}"})
    user_taste = app.get("/v1/users/7.0/taste").json()
    assert (user_taste["user_id"], user_taste["plays"]) == ("7", 3)
    assert recommend(app, user_id="7.0 ", k=3)["plays"] == 3
    for empty_id in ("%20", "nan"):
        response = app.get(f"/v1/users/{empty_id}/taste")
        require_problem(response, 422, "user_id")
        assert "not a user ID; expected text other than spaces, nan, NaN, inf and -inf" in response.text
    assert app.post("/v1/plays", {**PLAY, "user_id": "NaN"}).status_code == 422


def test_recommendations_of_a_stored_user_by_get_are_those_by_post(app: Client) -> None:
    events = events_of("ann", 20)
    send(app, *events)
    at = events[-1]["played_at"]
    for options in ({"k": 5}, {"k": 5, "horizon": "long"}, {"k": 5, "horizon": 0.25, "exclude_heard": False}):
        by_get = app.get("/v1/users/ann/recommendations", params={**options, "at": at}).json()
        assert by_get["songs"] == recommend(app, user_id="ann", at=at, **options)["songs"]
    for invalid_option in ({"k": 0}, {"k": "x"}, {"horizon": "medium"}, {"horizon": 2}, {"at": "yesterday"}):
        response = app.get("/v1/users/ann/recommendations", params=invalid_option)
        require_problem(response, 422, next(iter(invalid_option)))


def test_a_deleted_user_is_answered_as_an_unknown_one_and_old_plays_stay_out(app: Client) -> None:
    events = events_of("ann", 200)
    send(app, *events)
    assert app.request("DELETE", "/v1/users/ann").status_code == 204
    require_problem(app.get("/v1/users/ann/taste"), 404, "rayrec states load")
    assert recommend(app, user_id="ann", k=7)["songs"] == recommend(app, history=[], k=7)["songs"]
    assert send(app, events[0], {**events[1], "event_id": "new"})["outcomes"] == ["repeated", "rejected"]
    untimed = {name: value for name, value in events[2].items() if name != "played_at"}
    assert send(app, untimed)["outcomes"] == ["repeated"]
    require_problem(app.get("/v1/users/ann/taste"), 404, "rayrec states load")
    assert send(app, {**PLAY, "event_id": "later"})["outcomes"] == ["taken"]
    assert app.get("/v1/users/ann/taste").json()["plays"] == 1
    assert app.request("DELETE", "/v1/users/nobody").status_code == 204


@needs_redis
def test_a_store_out_of_reach_is_a_503_that_says_when_to_try_again(world: Workspace, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    with service(world, store=server.uri) as replica:
        app = Client(replica)
        send(app, PLAY)
        server.kill()
        response = app.post("/v1/plays", {**PLAY, "event_id": "f"})
        require_problem(response, 503, "does not answer")
        assert response.headers["retry-after"] == "1"
        server.start()
        assert send(app, PLAY, {**PLAY, "event_id": "f"})["outcomes"] == ["repeated", "taken"]
    server.kill()


@pytest.mark.parametrize("store", ["nonsense", "sqlite:////dev/null/states.sqlite"], indirect=False)
def test_where_users_cannot_be_stored_histories_are_answered_all_the_same(world: Workspace, store: str) -> None:
    with service(world, store=store) as replica:
        app = Client(replica)
        require_problem(app.post("/v1/plays", PLAY), 503, "The store of user states cannot be opened")
        require_problem(
            app.post("/v1/recommendations", {"user_id": "ann"}), 503, "The store of user states cannot be opened"
        )
        assert len(recommend(app, history=["song-3"], k=3)["songs"]) == 3


def test_a_play_of_less_than_half_the_song_counts_as_skipped(app: Client) -> None:
    variants = [{"skipped": True}, {"share_listened": 0.49}, {"share_listened": 0.5}, {}]
    events = [
        {"user_id": "half", "event_id": f"e{row}", "song_id": "song-3", "played_at": AT + row, **fields}
        for row, fields in enumerate(variants)
    ]
    assert send(app, *events)["taken"] == 4
    plays = app.get("/v1/users/half/plays").json()["plays"]
    assert [play["skipped"] for play in plays] == [True, True, False, False]


def test_the_last_plays_of_a_user_are_listed_and_as_a_history_answer_the_same(app: Client) -> None:
    sent_plays = [
        {
            "user_id": "lister",
            "song_id": f"song-{song}",
            "played_at": AT + position * MINUTE,
            "event_id": f"l{position}",
        }
        for position, song in enumerate((3, 50, 9, 50))
    ]
    sent_plays[2]["skipped"] = True
    assert app.post("/v1/plays", {"plays": sent_plays}).json()["taken"] == 4
    answer = app.get("/v1/users/lister/plays").json()
    assert (answer["user_id"], answer["count"]) == ("lister", 4)
    assert [play["song_id"] for play in answer["plays"]] == ["song-3", "song-50", "song-9", "song-50"]
    assert [ms(play["played_at"]) for play in answer["plays"]] == [play["played_at"] for play in sent_plays]
    assert [play["skipped"] for play in answer["plays"]] == [False, False, True, False]
    assert answer["plays"][0]["title"] == "Title 3"
    assert app.get("/v1/users/lister/plays", params={"k": 1}).json()["plays"] == answer["plays"][-1:]
    history = [
        {name: play[name] for name in ("song_id", "played_at", "contexts", "skipped")} for play in answer["plays"]
    ]
    options = {"at": AT + 10 * MINUTE, "k": 10}
    stored_songs, given_songs = (
        app.post("/v1/recommendations", {**user_or_history, **options}).json()["songs"]
        for user_or_history in ({"user_id": "lister"}, {"history": history})
    )
    assert [song["song_id"] for song in stored_songs] == [song["song_id"] for song in given_songs]
    assert app.get("/v1/users/nobody-yet/plays").status_code == 404
