"""The application without Ray: its answers, and the requests that it refuses."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from served import AT, NUM_SONGS, SONGS, WITHOUT_VECTOR, Client, ask, ids, ms, service

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Queries
from rayrec.data.moments import ASSUMED_GAP_MS
from rayrec.recommend.answer import history_of_songs, load_recommender
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.reranking import network_of
from rayrec.serving import service as service_module
from rayrec.serving.middleware import load_keys
from rayrec.serving.serve_config import MAX_BATCH, MAX_HISTORY, MAX_K, ServeConfig
from rayrec.serving.served_catalog import ServedCatalog
from rayrec.serving.service import Service
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace


@pytest.fixture(scope="module")
def replica(world: Workspace) -> Iterator[Service]:
    with service(world, max_body=200_000) as replica:
        yield replica


@pytest.fixture(scope="module")
def app(replica: Service) -> Client:
    return Client(replica)


@pytest.fixture(scope="module")
def recommender(world: Workspace) -> BaseRecommender:
    return load_recommender(world, Dataset(world), releases.default_parts(world))


def require_problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert (problem["status"], problem["type"]) == (status, "about:blank")
    assert problem["title"]
    assert problem["detail"]
    return problem


def test_a_song_heard_before_is_explained_by_its_plays(app: Client) -> None:
    answer = ask(app, explain=True, exclude_heard=False, allow=["song-3"])
    assert "you played it 2 times, last within the hour" in answer["songs"][0]["reasons"]
    assert [song["title"] for song in answer["last_plays"]] == ["Title 3", "Title 50", "Title 3", "Title 9"]


@pytest.mark.parametrize("horizon", ["short", "long"])
def test_the_answer_is_what_the_recommender_of_the_release_ranks(
    app: Client, world: Workspace, recommender: BaseRecommender, horizon: Any
) -> None:
    history = history_of_songs(Dataset(world).catalog(), SONGS, AT)
    rows, scores = recommender.recommend_one(history, AT, 10, horizon=horizon)
    answer = ask(app, k=10, horizon=horizon, exclude_heard=False)
    assert ids(answer) == [f"song-{row}" for row in rows]
    np.testing.assert_allclose([song["score"] for song in answer["songs"]], scores, rtol=1e-5)
    assert (answer["source"], answer["plays"], answer["unknown_songs"], ms(answer["at"])) == ("taste", 4, 0, AT)
    assert answer["songs"][0]["title"] == f"Title {rows[0]}"
    assert answer["songs"][0]["artist"] == f"Artist {rows[0] % 7}"


def test_the_weights_0_and_1_are_the_horizons_short_and_long(app: Client) -> None:
    assert ask(app, horizon=0.0)["songs"] == ask(app, horizon="short")["songs"]
    assert ask(app, horizon=1)["songs"] == ask(app, horizon="long")["songs"]
    assert ask(app, horizon=0.5)["songs"] != ask(app, horizon="short")["songs"]


def test_heard_and_excluded_songs_do_not_come_and_k_songs_still_do(app: Client) -> None:
    ranked_ids = ids(ask(app, k=MAX_K, exclude_heard=False))
    assert set(SONGS) <= set(ranked_ids)
    answer_ids = ids(ask(app, k=NUM_SONGS - 10, exclude=ranked_ids[:5]))
    assert not (set(SONGS) | set(ranked_ids[:5])) & set(answer_ids)
    assert f"song-{WITHOUT_VECTOR}" not in answer_ids
    assert len(set(answer_ids)) == len(answer_ids) == NUM_SONGS - 10
    all_ids = ids(ask(app, k=MAX_K, exclude=ranked_ids[:5]))
    assert len(all_ids) == NUM_SONGS - 1 - len(set(SONGS) | set(ranked_ids[:5]))


def test_unknown_songs_are_counted_and_leave_the_other_plays_at_their_times(app: Client) -> None:
    answer = ask(app, history=["nobody", *SONGS], exclude=["nowhere"])
    assert (answer["unknown_songs"], answer["plays"], answer["source"]) == (2, 4, "taste")
    assert answer["songs"] == ask(app)["songs"]
    earlier_plays = [
        {"song_id": song_id, "played_at": AT - ASSUMED_GAP_MS * (len(SONGS) - number)}
        for number, song_id in enumerate(SONGS)
    ]
    assert ask(app, history=[*SONGS, "nothing"])["songs"] == ask(app, history=earlier_plays)["songs"]


@pytest.mark.parametrize("history", [[], ["nobody", "nothing"]])
def test_where_no_song_is_known_the_popular_ones_answer_and_say_so(
    app: Client, world: Workspace, history: list[str]
) -> None:
    plays = sum(np.bincount(batch.songs, minlength=NUM_SONGS) for batch in Dataset(world).read_all())
    plays[WITHOUT_VECTOR] = -1  # type: ignore[index]
    expected = np.argsort(-np.asarray(plays), kind="stable")[:20]
    answer = ask(app, history=history)
    assert ids(answer) == [f"song-{row}" for row in expected]
    assert (answer["source"], answer["path"], answer["unknown_songs"]) == ("popular", "popular", len(history))
    assert ids(ask(app, history=history, exclude=[f"song-{expected[0]}"], k=5)) == ids(answer)[1:6]


def test_songs_that_pass_a_filter_are_searched_without_delaying_other_requests(
    app: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, list[threading.Thread]] = {"filter": [], "popular": []}
    fitting, choose_popular = ServedCatalog.fitting, service_module.choose_popular

    def search(catalog: ServedCatalog, attributes: Any) -> Any:
        threads["filter"].append(threading.current_thread())
        return fitting(catalog, attributes)

    def choose(*arguments: Any) -> Any:
        threads["popular"].append(threading.current_thread())
        return choose_popular(*arguments)

    monkeypatch.setattr(ServedCatalog, "fitting", search)
    monkeypatch.setattr(service_module, "choose_popular", choose)
    body = {"requests": [{"user_id": user, "artists": ["Artist 3"], "k": 5} for user in ("nobody", "no one")]}
    answers = app.post("/v1/recommendations/batch", body).json()["answers"]
    assert [{song["artist"] for song in answer["songs"]} for answer in answers] == [{"Artist 3"}] * 2
    for path in ("popular", "new"):
        assert app.get(f"/v1/songs/{path}", params={"artists": "Artist 3"}).status_code == 200
    assert {name: len(used) for name, used in threads.items()} == {"filter": 4, "popular": 2}
    # The event loop of these requests runs in this thread.
    assert threading.current_thread() not in [*threads["filter"], *threads["popular"]]


def test_plays_with_times_are_put_in_order(app: Client) -> None:
    history = [
        {"song_id": song, "played_at": AT - 3 * 86_400_000 * index} for index, song in enumerate(reversed(SONGS))
    ]
    assert ask(app, history=history)["songs"] == ask(app, history=history[::-1])["songs"]
    assert ask(app, history=history)["songs"] != ask(app)["songs"]


def test_the_batch_form_answers_as_single_calls_do(app: Client) -> None:
    requests = [
        {"history": SONGS, "at": AT},
        {"history": [], "at": AT, "k": 3},
        {"history": ["song-1"] * 40, "at": AT, "horizon": 0.3, "exclude": ["song-5"]},
        {"history": ["nobody", "song-8"], "at": AT, "horizon": "long", "exclude_heard": False},
    ] * 12
    answer = app.post("/v1/recommendations/batch", {"requests": requests}).json()
    assert len(answer["answers"]) == len(requests)
    assert len({entry["recommendation_id"] for entry in answer["answers"]}) == len(requests)
    singles = [app.post("/v1/recommendations", request).json() for request in requests[:4]] * 12
    for single, batch_answer in zip(singles, answer["answers"], strict=True):
        assert batch_answer.pop("recommendation_id") != single.get("recommendation_id")
        single = {name: value for name, value in single.items() if name != "recommendation_id"}
        assert {**batch_answer, "songs": ids(batch_answer)} == {**single, "songs": ids(single)}
        np.testing.assert_allclose(
            [song["score"] for song in batch_answer["songs"]], [song["score"] for song in single["songs"]], rtol=1e-4
        )


def test_tastes_are_the_vectors_of_the_network(app: Client, world: Workspace, recommender: BaseRecommender) -> None:
    history = history_of_songs(Dataset(world).catalog(), SONGS, AT)
    users = [{"history": SONGS, "at": AT}, {"history": ["nobody"], "at": AT}]
    answer = app.post("/v1/tastes", {"users": users}).json()
    assert answer["dim"] == 8
    assert [taste["unknown_songs"] for taste in answer["tastes"]] == [0, 1]
    for horizon in ("short", "long"):
        expected = network_of(recommender).vectors(history, Queries.at_end(history, AT), horizon)[0]
        np.testing.assert_allclose(answer["tastes"][0][horizon], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "body"),
        ({"history": SONGS, "user_id": "ann"}, "body"),
        ({"history": SONGS, "k": 0}, "k"),
        ({"history": SONGS, "k": MAX_K + 1}, "k"),
        ({"history": SONGS, "k": "5"}, "k"),
        ({"history": SONGS, "k": True}, "k"),
        ({"history": SONGS, "k": 10**400}, "k"),
        ({"history": SONGS, "horizon": -0.1}, "horizon"),
        ({"history": SONGS, "horizon": "medium"}, "horizon"),
        ({"history": SONGS, "horizon": 10**400}, "horizon"),
        ({"history": SONGS, "horizon": float("nan")}, "horizon"),
        ({"history": SONGS, "horizon": float("inf")}, "horizon"),
        ({"history": [3]}, "history"),
        ({"history": [""]}, "history"),
        ({"history": ["x" * 600]}, "history"),
        ({"history": "song-3"}, "history"),
        ({"history": ["song-3"] * (MAX_HISTORY + 1)}, "history"),
        ({"history": [{"song_id": "song-3", "played_at": -1}]}, "history.0.played_at"),
        ({"history": [{"song_id": "song-3", "played_at": 10**30}]}, "played_at"),
        ({"history": [{"song_id": "song-3", "played_at": "yesterday"}]}, "history.0.played_at"),
        ({"history": [{"song_id": "song-3", "played_at": "1e300"}]}, "played_at"),
        ({"history": [{"song_id": "song-3", "played_at": "2026-01-20T18:24:00"}]}, "played_at"),
        ({"history": [{"song_id": "song-3", "played_at": 5}, "song-4"]}, "for all of them or for none"),
        ({"history": [{"song_id": "song-3", "played_at": AT + 1}], "at": AT}, "after the moment"),
        ({"history": SONGS, "users": 3}, "users"),
        ({"history": SONGS, "exclude": [None]}, "exclude"),
        ([], "body"),
        (None, "body"),
    ],
)
def test_an_invalid_field_is_a_422_that_names_it(app: Client, body: Any, message: str) -> None:
    content = json.dumps(body).encode()
    response = app.post("/v1/recommendations", content=content, headers={"Content-Type": "application/json"})
    problem = require_problem(response, 422)
    assert message in problem["detail"] or any(message in error["where"] for error in problem["errors"])


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"{'k': 1}", b"[" * 100_000, b'{"k":' * 20_000])
def test_what_is_not_json_is_a_400(app: Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    require_problem(app.post("/v1/recommendations", content=content, headers=headers), 400)


@pytest.mark.parametrize("moment", [AT, AT / 1000, f"{AT / 1000:.3f}", str(AT), "2023-11-15T09:20:00Z"])
def test_a_moment_is_iso_8601_or_unix_seconds_or_ms(app: Client, moment: Any) -> None:
    answer = ask(app, at=moment)
    assert (answer["at"], answer["songs"]) == ("2023-11-15T09:20:00.000Z", ask(app)["songs"])
    users = [{"history": [{"song_id": "song-3", "played_at": moment}], "at": moment}]
    assert app.post("/v1/tastes", {"users": users}).json()["tastes"][0]["at"] == answer["at"]


@pytest.mark.parametrize("moment", [True, None, [], 1e300, float("nan"), -1.5, "now"])
def test_what_is_no_moment_is_refused_by_name(app: Client, moment: Any) -> None:
    content = json.dumps({"history": [{"song_id": "song-3", "played_at": 5}], "at": moment})
    response = app.post("/v1/recommendations", content=content, headers={"Content-Type": "application/json"})
    if moment is None:  # null counts as absent
        assert response.status_code == 200
    else:
        assert [error["where"] for error in require_problem(response, 422)["errors"]] == ["at"]


def test_errors_name_the_field_as_it_was_sent(app: Client) -> None:
    plays = [{"song_id": "song-3", "played_at": 5}, {"song_id": "song-3", "played_at": "noon"}]
    response = app.post("/v1/recommendations", {"history": plays, "k": 0})
    assert [error["where"] for error in response.json()["errors"]] == ["history.1.played_at", "k"]
    for path, where in (("k=0", "k"), ("horizon=far", "horizon"), ("at=noon", "at"), ("count=3", "count")):
        response = app.get(f"/v1/users/ann/recommendations?{path}")
        assert [error["where"] for error in require_problem(response, 422)["errors"]] == [where]
    mixed_response = app.post("/v1/recommendations", {"history": [{"song_id": "song-3", "played_at": 5}, "song-4"]})
    assert [error["where"] for error in require_problem(mixed_response, 422)["errors"]] == ["history"]


MANY_FIELDS = {f"field{number}": 0 for number in range(5_000)}


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/recommendations", MANY_FIELDS, "body"),
        ("/v1/recommendations", {"history": [MANY_FIELDS]}, "history.0"),
        ("/v1/recommendations/batch", MANY_FIELDS, "body"),
        ("/v1/rank", {"history": [MANY_FIELDS], "songs": ["song-3"]}, "history.0"),
        ("/v1/tastes", MANY_FIELDS, "body"),
        ("/v1/plays", MANY_FIELDS, "body"),
        ("/v1/plays", {"plays": [], **MANY_FIELDS}, "body"),
        ("/v1/songs", MANY_FIELDS, "body"),
        ("/v1/songs", {"songs": [{"song_id": "new"}, MANY_FIELDS]}, "songs.1"),
        ("/v1/map", MANY_FIELDS, "body"),
    ],
)
def test_an_object_of_thousands_of_unknown_fields_is_one_error(app: Client, path: str, body: Any, where: str) -> None:
    (error,) = require_problem(app.post(path, body), 422)["errors"]
    assert error["where"] == where
    assert re.fullmatch(r"got 5,00\d fields, expected at most \d+; see /openapi.json", error["detail"])


def test_thousands_of_unknown_parameters_are_one_error_and_such_an_object_of_a_batch_fails_alone(app: Client) -> None:
    parameters = "&".join(f"p{number}=1" for number in range(5_000))
    for path in ("/v1/songs/popular", "/v1/users/ann/recommendations"):
        (error,) = require_problem(app.get(f"{path}?{parameters}"), 422)["errors"]
        assert error["detail"].startswith("got 5,000 fields")
    answers = app.post("/v1/recommendations/batch", {"requests": [MANY_FIELDS, {"history": SONGS}]}).json()["answers"]
    assert answers[0]["errors"][0]["detail"].startswith("got 5,000 fields")
    assert answers[1]["songs"]


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/recommendations", {"history": ["song-3", *[{}] * 5_000]}, "history.1.song_id"),
        ("/v1/recommendations", {"history": [{"song_id": "song-3", "contexts": ["a", *range(30)]}]},
         "history.0.contexts.1"),
        ("/v1/recommendations", {"history": SONGS, "exclude": [0] * 5_000}, "exclude.0"),
        ("/v1/recommendations", {"history": SONGS, "allow": [0] * 5_000}, "allow.0"),
        ("/v1/recommendations", {"history": SONGS, "artists": [0] * 50}, "artists.0"),
        ("/v1/rank", {"history": SONGS, "songs": [0] * 900}, "songs.0"),
        ("/v1/songs", {"songs": [{}] * 900}, "songs.0.song_id"),
        ("/v1/songs", {"song_id": "new", "vector": ["x"] * 4_000}, "vector.0"),
        ("/v1/songs", {"song_id": "new", "markets": [0] * 400}, "markets.0"),
        ("/v1/map", {"songs": [0] * 900}, "songs.0"),
    ],
)  # fmt: skip
def test_of_a_list_the_first_bad_item_is_the_only_error(app: Client, path: str, body: Any, where: str) -> None:
    assert [error["where"] for error in require_problem(app.post(path, body), 422)["errors"]] == [where]


def test_a_bad_entry_of_tastes_fails_alone(app: Client) -> None:
    good, late = {"history": SONGS, "at": AT}, {"history": [{"song_id": "song-3", "played_at": AT + 1}], "at": AT}
    users = [{"history": [3]}, good, late, {"histories": []}]
    answer = app.post("/v1/tastes", {"users": users}).json()
    error_fields = [[error["where"] for error in taste.get("errors", [])] for taste in answer["tastes"]]
    assert error_fields == [["history.0"], [], ["at"], ["history", "histories"]]
    assert answer["tastes"][1] == app.post("/v1/tastes", {"users": [good]}).json()["tastes"][0]
    assert app.post("/v1/tastes", {"users": [3]}).json()["dim"] == answer["dim"] == len(answer["tastes"][1]["short"])


def test_an_answer_says_how_long_its_stages_took(app: Client) -> None:
    def stages(response: Any) -> dict[str, float]:
        parts = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
        return {name: float(ms) for name, ms in parts}

    first = stages(app.post("/v1/recommendations", {"history": SONGS, "at": AT}))
    assert list(first) == ["read", "encode", "project", "choose", "write", "total"]
    assert 0 < sum(first.values()) - first["total"] <= first["total"]
    assert "store" in stages(app.get("/v1/users/nobody/recommendations"))
    assert list(stages(app.get("/v1/nothing"))) == ["total"]


def test_a_batch_has_its_limit(app: Client) -> None:
    body = {"requests": [{"history": []}] * (MAX_BATCH + 1)}
    require_problem(app.post("/v1/recommendations/batch", body), 422)


def test_a_bad_request_of_a_batch_fails_alone(app: Client) -> None:
    good = {"history": SONGS, "at": AT, "k": 3}
    late = {"history": [{"song_id": "song-3", "played_at": AT + 1}], "at": AT}
    bad = [{"history": SONGS, "k": 0}, {}, 7, {"history": [{"song_id": 3}]}, late]
    answers = app.post("/v1/recommendations/batch", {"requests": [good, *bad, good]}).json()["answers"]
    assert ids(answers[0]) == ids(answers[-1]) == ids(ask(app, k=3))
    assert [error["where"] for answer in answers[1:-2] for error in answer["errors"]] == [
        "k", "body", "body", "history.0.song_id"]  # fmt: skip
    assert "after the moment" in answers[-2]["detail"]


def test_a_history_may_mix_song_ids_and_objects(app: Client) -> None:
    assert ask(app, history=["song-3", {"song_id": "song-50"}])["plays"] == 2


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/release", "/metrics", "/v1/songs?query=title", "/docs"])
def test_head_answers_as_get_without_the_body(app: Client, path: str) -> None:
    head, get = app.request("HEAD", path), app.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "Content-Type is missing; send JSON with `Content-Type: application/json`"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "is application/x-www-form-urlencoded; send JSON"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "encoded as gzip; send it without"),
    ],
)
def test_a_body_of_another_kind_is_a_415_that_says_what_to_send(
    app: Client, headers: dict[str, str], message: str
) -> None:
    problem = require_problem(app.post("/v1/recommendations", content=b'{"history": []}', headers=headers), 415)
    assert message in problem["detail"]
    for content_type in ("application/json; charset=utf-8", "application/vnd.rayrec+json"):
        options = {"content": b'{"history": []}', "headers": {"Content-Type": content_type}}
        assert app.post("/v1/recommendations", **options).status_code == 200


def test_long_answers_are_compressed_for_clients_that_take_it(app: Client) -> None:
    body = {"history": SONGS, "at": AT, "k": 100}
    plain = app.post("/v1/recommendations", body, headers={"Accept-Encoding": "identity"})
    compressed = app.post("/v1/recommendations", body, headers={"Accept-Encoding": "gzip"})
    assert compressed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert compressed.json()["songs"] == plain.json()["songs"]
    assert int(compressed.headers["content-length"]) < len(plain.content) / 3


def test_the_id_of_a_request_comes_back_and_stands_in_the_log_of_its_failure(
    app: Client, replica: Service, monkeypatch: Any, caplog: Any
) -> None:
    assert app.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert app.get("/v1/nothing", headers={"X-Request-ID": "abc-2"}).headers["x-request-id"] == "abc-2"
    generated_ids = {
        app.get("/healthz", headers={"X-Request-ID": invalid_id}).headers["x-request-id"]
        for invalid_id in ("", "a b", "x" * 200)
    }
    assert len(generated_ids) == 3
    assert all(len(request_id) == 32 for request_id in generated_ids)

    async def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(type(replica), "recommend", fail)
    response = app.post("/v1/recommendations", {"history": SONGS}, headers={"X-Request-ID": "abc-3"})
    assert "abc-3" in require_problem(response, 500)["detail"]
    assert "request abc-3 failed" in caplog.text


def test_the_documentation_needs_nothing_from_other_machines(app: Client) -> None:
    page = app.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "http" not in page.text
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js"):
        assert f"docs/{name}" in page.text
        assert app.get(f"/docs/{name}").status_code == 200
    require_problem(app.get("/docs/redoc.standalone.js"), 404)


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_document_names_the_role_of_each_operation_and_whether_a_key_is_required(
    world: Workspace, has_keys: bool
) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": "read:" + "r" * 20} if has_keys else {})
    with service(world, keys) as replica:
        paths = Client(replica).get("/openapi.json").json()["paths"]
    roles = {
        ("/v1/recommendations", "post"): "read",
        ("/v1/plays", "post"): "write",
        ("/v1/users/{user_id}", "delete"): "admin",
        ("/metrics", "get"): "admin",
        ("/v1/songs/popular", "get"): "read",
        ("/v1/rank", "post"): "read",
    }
    for (path, method), role in roles.items():
        assert paths[path][method]["security"] == [*([] if has_keys else [{}]), {"key": [role]}]
        assert paths[path][method]["description"].endswith(f"Role of the key: {role}.")
    assert paths["/healthz"]["get"]["security"] == paths["/readyz"]["get"]["security"] == [{}]


def test_a_body_over_the_limit_is_a_413(app: Client) -> None:
    require_problem(
        app.post("/v1/recommendations", content=b" " * 200_001, headers={"Content-Type": "application/json"}), 413
    )


def test_what_is_not_there_is_a_404_and_a_wrong_method_a_405(app: Client) -> None:
    require_problem(app.get("/v1/nothing"), 404)
    for method, path, allowed in (
        ("GET", "/v1/recommendations", "POST"),
        ("PUT", "/v1/songs", "GET, HEAD, POST"),
        ("POST", "/v1/users/ann/taste", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("GET", "/v1/users/ann", "DELETE"),
    ):
        response = app.request(method, path)
        require_problem(response, 405)
        assert response.headers["allow"] == allowed


def test_an_unexpected_error_is_a_500_without_its_text(app: Client, replica: Service, monkeypatch: Any) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(type(replica), "recommend", fail)
    problem = require_problem(app.post("/v1/recommendations", {"history": SONGS}), 500)
    assert "secret" not in json.dumps(problem)


def test_health_readiness_and_release_name_what_answers(app: Client, world: Workspace) -> None:
    active = releases.read_active(world)
    assert app.get("/healthz").json()["status"] == "ok"
    assert app.get("/readyz").json()["release"] == active["active"]
    status = app.get("/v1/release").json()
    assert (status["release"], status["activated"], status["agreed"]) == (active["active"], active["active"], True)
    assert [replica["replica"] for replica in status["replicas"]] == [status["replica"]]
    assert status["refused"] is None


def test_the_metrics_tell_latency_by_stage_batches_paths_and_the_release(app: Client, world: Workspace) -> None:
    ask(app)
    text = app.get("/metrics").text
    for name in ("read", "encode", "project", "choose", "write"):
        assert f'stage="{name}"' in text
    assert 'rayrec_answers_total{path="exact"' in text
    assert f'release="{releases.read_active(world)["active"]}"' in text
    assert "rayrec_batch_users_bucket" in text
    assert 'route="/v1/recommendations"' in text


def test_the_metrics_tell_how_often_a_mask_of_songs_came_from_the_cache(app: Client) -> None:
    def lookups(outcome: str) -> float:
        (line,) = [
            line
            for line in app.get("/metrics").text.splitlines()
            if line.startswith("rayrec_cache_lookups{") and f'outcome="{outcome}"' in line
        ]
        return float(line.split()[-1])

    before = {outcome: lookups(outcome) for outcome in ("hits", "misses")}
    for _ in range(3):
        ask(app, artists=["Artist 4", "artist 6"])
    assert (lookups("misses") - before["misses"], lookups("hits") - before["hits"]) == (1, 2)


def test_the_document_shows_every_endpoint_with_an_example_and_its_problems(app: Client) -> None:
    document = app.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert "500" in operation["responses"], path
            assert "HTTPValidationError" not in json.dumps(operation)
            if "requestBody" in operation:
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                assert schemas[reference.rsplit("/", 1)[1]]["examples"], path


def test_the_examples_of_the_document_are_good_requests(app: Client) -> None:
    document = app.get("/openapi.json").json()
    examples = 0
    for path, methods in document["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body:
            reference = body["content"]["application/json"]["schema"]["$ref"]
            for example in document["components"]["schemas"][reference.rsplit("/", 1)[1]]["examples"]:
                assert app.post(path, example).status_code == 200, path
                examples += 1
    assert examples >= 5


def request_schemas(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return path -> schema of the body of each POST."""
    references = {
        path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for path, methods in document["paths"].items()
        if "post" in methods
    }
    schemas = document["components"]["schemas"]
    return {path: schemas[reference.rsplit("/", 1)[1]] for path, reference in references.items()}


def test_every_schema_of_the_document_accepts_its_own_default_and_examples(app: Client) -> None:
    document = app.get("/openapi.json").json()
    values = 0
    parts: list[Any] = [document]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            # A property may have the name `default`, and an object of the document other examples than a schema.
            is_schema = bool({"type", "anyOf", "oneOf", "$ref"} & part.keys()) and "in" not in part
            examples = part.get("examples", []) if is_schema else []
            for value in [*examples, *([part["default"]] if is_schema and "default" in part else [])]:
                schema = Draft202012Validator({**part, "components": document["components"]})
                assert schema.is_valid(value), (part.get("title"), value)
                values += 1
        if isinstance(part, (dict, list)):
            parts += part.values() if isinstance(part, dict) else part
    assert values > 30


def test_generated_code_may_send_every_optional_field_with_its_default_or_null(app: Client) -> None:
    schemas = request_schemas(app.get("/openapi.json").json())
    for path in ("/v1/recommendations", "/v1/rank"):
        optional = schemas[path]["properties"].keys() - set(schemas[path].get("required", []))
        defaults = {name: schemas[path]["properties"][name].get("default") for name in optional}
        assert {"user_id", "history"} <= optional
        for example in schemas[path]["examples"]:
            assert app.post(path, {**defaults, **example}).json()["songs"] == app.post(path, example).json()["songs"]


def test_an_object_of_the_document_has_no_conditions_beside_its_properties_that_code_generators_cannot_read(
    app: Client,
) -> None:
    for name, schema in app.get("/openapi.json").json()["components"]["schemas"].items():
        assert not ("properties" in schema and {"oneOf", "anyOf", "allOf"} & schema.keys()), name


def test_every_endpoint_refuses_a_parameter_that_it_does_not_have(app: Client) -> None:
    endpoints = 0
    for path, methods in app.get("/openapi.json").json()["paths"].items():
        for method in methods:
            url = path.replace("{user_id}", "ann").replace("{song_id}", "song-3")
            errors = require_problem(app.request(method.upper(), url, params={"limit": 3, "query": "title"}), 422)
            assert "limit" in [error["where"] for error in errors["errors"]], path
            endpoints += 1
    assert endpoints >= 20
    assert len(app.get("/v1/songs?query=title&k=3").json()["songs"]) == 3
