"""Arms of an experiment, the impression log, and events, through the application."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import AT, Client, service, write_release, write_world

from rayrec.data.impressions import read_impressions
from rayrec.errors import InputError, NotFoundError
from rayrec.online.sqlite_store import SqliteStore
from rayrec.online.state_store import Change, StoreUnavailableError
from rayrec.serving.serve_config import Experiment, ServeConfig
from rayrec.storage.artifacts import read_dataset_manifest, write_dataset_manifest
from rayrec.storage.releases import activate_release
from rayrec.storage.workspace import Workspace

ARMS = {"control": {"share": 0.4}, "diverse": {"share": 0.4, "diversity": 0.9, "horizon": "long"}}
USERS = [f"user-{row}" for row in range(60)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("experiments") / "workspace")
    write_world(workspace)
    write_release(workspace, "1", seed=1)
    write_release(workspace, "2", seed=2, ranked=False, activate=False)
    return workspace


def config(arms: dict[str, Any]) -> dict[str, Any]:
    return {"experiment": {"name": "x", "arms": arms}}


def other_release(world: Workspace) -> str:
    names = world.folders("releases")
    live_id = world.read_json("releases/active")["active"]
    return next(name for name in names if name != live_id)


class Logged:
    """An application with an impression log of its own."""

    def __init__(self, world: Workspace, folder: Path, **settings: Any) -> None:
        self.world = world
        self._service = service(world, store=f"sqlite:///{folder}/states.sqlite", log_impressions=True, **settings)

    def __enter__(self) -> "Logged":
        self.world.delete("serving/impressions")
        self.replica = self._service.__enter__()
        self.app = Client(self.replica)
        for user in USERS:
            plays = [
                {
                    "event_id": f"{user}-{n}",
                    "user_id": user,
                    "song_id": f"song-{n * 7 + len(user)}",
                    "played_at": AT + n,
                }
                for n in range(4)
            ]
            assert self.app.post("/v1/plays", {"plays": plays}).json()["taken"] == 4
        return self

    def __exit__(self, *error: object) -> None:
        self._service.__exit__(None, None, None)

    def recommend(self, user: str = "", **body: Any) -> dict[str, Any]:
        user_field = {"user_id": user} if user else {}
        response = self.app.post("/v1/recommendations", {"k": 5, "at": AT + 10_000, **user_field, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def rows(self, kind: Any) -> list[dict[str, Any]]:
        assert self.replica.log is not None
        self.replica.log.flush()
        return [row for table in read_impressions(self.world, kind) for row in table.to_pylist()]


@pytest.fixture
def logged(world: Workspace, tmp_path: Path) -> Iterator[Logged]:
    with Logged(world, tmp_path, **config(ARMS)) as logging_app:
        yield logging_app


def test_a_user_is_always_in_the_same_arm_and_arms_have_their_shares_of_users() -> None:
    experiment = Experiment(name="x", arms=ARMS)
    users = [f"user {row}" for row in range(10_000)]
    arms = [experiment.arm_of(user) for user in users]
    assert arms == [Experiment(name="x", arms=ARMS).arm_of(user) for user in users]
    counts = Counter(arms)
    assert counts["control"] == pytest.approx(4_000, abs=200)
    assert counts["diverse"] == pytest.approx(4_000, abs=200)
    assert counts[None] == pytest.approx(2_000, abs=200)
    other_arms = [Experiment(name="y", arms=ARMS).arm_of(user) for user in users]
    num_unchanged = sum(a == b for a, b in zip(arms, other_arms, strict=True))
    assert num_unchanged == pytest.approx(3_600, abs=200)  # another name draws again: 0.4² + 0.4² + 0.2² keep their arm


def test_answers_name_the_arm_and_have_its_settings(logged: Logged) -> None:
    experiment = Experiment(name="x", arms=ARMS)
    arm_counts = Counter()  # type: ignore[var-annotated]
    for user in USERS:
        arm = experiment.arm_of(user)
        answer = logged.recommend(user)
        assert answer["arm"] == arm
        arm_counts[arm] += 1
        arm_settings = (
            {"diversity": 0.9, "horizon": "long"} if arm == "diverse" else {"diversity": 0.0, "horizon": "short"}
        )
        assert answer["songs"] == logged.recommend(user, **arm_settings)["songs"]
    assert set(arm_counts) == {"control", "diverse", None}


def test_a_user_who_was_never_seen_is_recommended_popular_songs_in_the_arm_that_the_first_play_keeps(
    logged: Logged,
) -> None:
    user = next(f"new-{row}" for row in range(100) if Experiment(name="x", arms=ARMS).arm_of(f"new-{row}") == "diverse")
    first = logged.recommend(user)
    assert (first["source"], first["arm"]) == ("popular", "diverse")
    assert first["songs"] == logged.recommend(history=[])["songs"]
    play = {"event_id": "n", "user_id": user, "song_id": first["songs"][0]["song_id"], "played_at": AT}
    assert logged.app.post("/v1/plays", play).json()["taken"] == 1
    second = logged.recommend(user)
    assert (second["source"], second["arm"]) == ("taste", "diverse")
    assert [row["arm"] for row in logged.rows("answers")] == ["diverse", None, "diverse"]


def test_requests_with_a_history_or_a_setting_that_differs_between_arms_are_in_no_arm(logged: Logged) -> None:
    user = next(user for user in USERS if Experiment(name="x", arms=ARMS).arm_of(user) == "diverse")
    assert logged.recommend(user, exclude_heard=False)["arm"] == "diverse"
    assert logged.recommend(user, diversity=0.0)["arm"] is None
    assert logged.recommend(user, horizon="long")["arm"] is None
    assert logged.recommend(history=["song-3"])["arm"] is None


def nonzero_scores(songs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the score of each song id. Scores near 0 are left out: a batch may order such songs differently."""
    return {song["song_id"]: song["score"] for song in songs if song["score"] > 1e-6}


def test_in_a_url_and_in_a_batch_users_are_in_their_arms(logged: Logged) -> None:
    experiment = Experiment(name="x", arms=ARMS)
    requests = [{"user_id": user, "at": AT + 10_000} for user in USERS]
    answers = logged.app.post("/v1/recommendations/batch", {"requests": requests}).json()["answers"]
    assert [answer["arm"] for answer in answers] == [experiment.arm_of(user) for user in USERS]
    assert len({answer["recommendation_id"] for answer in answers}) == len(USERS)
    for user, answer in zip(USERS[:10], answers, strict=False):
        response = logged.app.get(f"/v1/users/{user}/recommendations", params={"at": AT + 10_000}).json()
        assert response["arm"] == answer["arm"]
        assert nonzero_scores(response["songs"]) == pytest.approx(nonzero_scores(answer["songs"]), rel=1e-3)


def test_an_arm_may_answer_with_another_release(world: Workspace, tmp_path: Path) -> None:
    other_id = other_release(world)
    with service(world) as replica:
        live_id = replica.live.id
    experiment = config({"live": {"share": 0.5}, "other": {"share": 0.5, "release": other_id}})
    with Logged(world, tmp_path, **experiment) as logged:
        releases = {"live": live_id, "other": other_id}
        requests = [{"user_id": user, "at": AT + 10_000, "k": 5} for user in USERS]
        answers = logged.app.post("/v1/recommendations/batch", {"requests": requests}).json()["answers"]
        assert {answer["arm"] for answer in answers} == {"live", "other"}
        assert all(answer["release"] == releases[answer["arm"]] for answer in answers)
        arm_users = [user for user, answer in zip(USERS, answers, strict=True) if answer["arm"] == "other"]
        expected = {user: logged.recommend(user)["songs"] for user in arm_users}
    activate_release(world, other_id)
    try:
        with service(world, store=f"sqlite:///{tmp_path}/states.sqlite") as replica:
            for user in arm_users:  # the arm has answered as if its release were live
                body = {"user_id": user, "at": AT + 10_000, "k": 5}
                answer = Client(replica).post("/v1/recommendations", body).json()
                assert answer["release"] == other_id
                assert [song["song_id"] for song in answer["songs"]] == [song["song_id"] for song in expected[user]]
    finally:
        activate_release(world, live_id)


def test_a_play_moves_the_answers_of_both_releases(world: Workspace, tmp_path: Path) -> None:
    experiment = config({"other": {"share": 1.0, "release": other_release(world)}})
    with Logged(world, tmp_path, **experiment) as logged:
        before = logged.recommend("user-1")
        play = {"event_id": "late", "user_id": "user-1", "song_id": before["songs"][0]["song_id"], "played_at": AT + 9}
        assert logged.app.post("/v1/plays", play).json()["taken"] == 1
        after = logged.recommend("user-1")
        assert (before["plays"], after["plays"]) == (4, 5)
        assert before["songs"][0]["song_id"] not in [song["song_id"] for song in after["songs"]]


def test_pages_of_a_ranking_go_on_within_an_arm(world: Workspace, tmp_path: Path) -> None:
    arms = {"longer": {"share": 1.0, "horizon": 0.7}}
    with Logged(world, tmp_path / "pages", **config(arms)) as logging_app:
        full = logging_app.recommend("user-2", k=6)["songs"]
        first = logging_app.recommend("user-2", k=3)
        second = logging_app.recommend("user-2", k=3, cursor=first["cursor"])
        assert first["songs"] + second["songs"] == full
        assert [row["first"] for row in logging_app.rows("answers")] == [0, 0, 3]
        assert first["recommendation_id"] != second["recommendation_id"]
    arms["longer"]["horizon"] = 0.2
    with Logged(world, tmp_path / "later", **config(arms)) as later_app:
        # A cursor does not depend on the arm's settings.
        assert len(later_app.recommend("user-2", k=3, cursor=first["cursor"])["songs"]) == 3


def test_every_answer_is_in_the_log_as_it_was_given(logged: Logged) -> None:
    answers = {
        recommendation["recommendation_id"]: recommendation for recommendation in map(logged.recommend, USERS[:8])
    }
    response = logged.app.post("/v1/recommendations", {"history": ["song-3"], "k": 2}, headers={"X-Request-ID": "q"})
    answers[response.json()["recommendation_id"]] = response.json()
    rows = logged.rows("answers")
    assert {row["recommendation_id"] for row in rows} == set(answers)
    for row, user in zip(rows, [*USERS[:8], None], strict=True):
        answer = answers[row["recommendation_id"]]
        assert (row["user_id"], row["arm"], row["release"]) == (user, answer["arm"], answer["release"])
        assert row["experiment"] == ("x" if answer["arm"] else None)
        assert row["song_ids"] == [song["song_id"] for song in answer["songs"]]
    assert rows[-1]["request_id"] == "q"


def test_a_ranking_of_given_songs_is_in_the_log_too_and_plays_may_name_it(logged: Logged) -> None:
    songs = ["song-3", "song-50", "song-9", "nothing"]
    ranking = logged.app.post("/v1/rank", {"user_id": "user-3", "at": AT + 10_000, "songs": songs}).json()
    (row,) = logged.rows("answers")
    assert row["recommendation_id"] == ranking["recommendation_id"]
    assert row["song_ids"] == [song["song_id"] for song in ranking["songs"]]
    assert (len(row["song_ids"]), row["user_id"], row["experiment"], row["arm"], row["first"]) == (
        *(3, "user-3"),
        *(None, None, 0),
    )
    play = {"event_id": "r", "user_id": "user-3", "song_id": "song-9", "played_at": AT + 20_000}
    assert (
        logged.app.post("/v1/plays", {**play, "recommendation_id": ranking["recommendation_id"]}).json()["taken"] == 1
    )
    (event,) = [row for row in logged.rows("events") if row["event_id"] == "r"]
    assert event["recommendation_id"] == ranking["recommendation_id"]


def test_explored_songs_are_in_the_log_with_their_probabilities(logged: Logged) -> None:
    answer = logged.recommend("user-6", explore=0.6)
    assert sum(song["probability"] is not None for song in answer["songs"]) == 3
    (row,) = logged.rows("answers")
    for name in ("explored", "probability"):
        assert row[name] == [song[name] for song in answer["songs"]]


def test_plays_are_in_the_log_once_with_the_answer_that_they_name(logged: Logged) -> None:
    answer = logged.recommend("user-3")
    play = {"event_id": "p", "user_id": "user-3", "song_id": answer["songs"][0]["song_id"], "share_listened": 0.8}
    play["recommendation_id"] = answer["recommendation_id"]
    skip = {**play, "event_id": "s", "type": "skip", "share_listened": 0.01}
    for outcome in ("taken", "repeated"):
        assert logged.app.post("/v1/plays", {"plays": [play, skip]}).json()["outcomes"] == [outcome] * 2
    rows = [row for row in logged.rows("events") if row["event_id"] in ("p", "s")]
    assert [(row["type"], row["skipped"], row["share_listened"]) for row in rows] == [
        ("play", False, 0.8),
        ("skip", True, 0.01),
    ]
    assert {row["recommendation_id"] for row in rows} == {answer["recommendation_id"]}


def test_plays_that_were_stored_by_a_request_that_fails_are_in_the_log_once(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put of the second user conflicts with another writer, and then the store does not answer."""
    put, get, get_calls = SqliteStore.put, SqliteStore.get, list[Any]()

    def conflicting_put(self: Any, changes: list[Change]) -> list[bool]:
        return [*put(self, changes[:1]), *(False for _ in changes[1:])]

    def failing_get(self: Any, users: Any) -> Any:
        get_calls.append(users)
        if len(get_calls) > 1:
            raise StoreUnavailableError("the store does not answer")
        return get(self, users)

    body = {"plays": [{"event_id": "p", "user_id": user, "song_id": "song-1"} for user in ("user-1", "user-2")]}
    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "put", conflicting_put)
        patch.setattr(SqliteStore, "get", failing_get)
        assert logged.app.post("/v1/plays", body).status_code == 503
    assert logged.app.post("/v1/plays", body).json()["outcomes"] == ["repeated", "taken"]
    rows = [row for row in logged.rows("events") if row["event_id"] == "p"]
    assert [row["user_id"] for row in rows] == ["user-1", "user-2"]


def test_a_skip_is_a_play_that_was_skipped_and_a_like_is_no_play(logged: Logged) -> None:
    before = logged.recommend("user-4")
    first, second = (song["song_id"] for song in before["songs"][:2])
    like = {"event_id": "like", "user_id": "user-4", "song_id": first, "type": "like"}
    assert logged.app.post("/v1/plays", {"plays": [like, {**like, "song_id": "none"}]}).json()["outcomes"] == [
        "taken",
        "unknown",
    ]
    assert logged.recommend("user-4")["songs"] == before["songs"]
    skip = {"event_id": "skip", "user_id": "user-4", "song_id": second, "type": "skip", "played_at": AT + 100}
    assert logged.app.post("/v1/plays", skip).json()["taken"] == 1
    last = logged.app.get("/v1/users/user-4/plays").json()["plays"][-1]
    assert (last["song_id"], last["skipped"]) == (second, True)
    after = [song["song_id"] for song in logged.recommend("user-4")["songs"]]
    assert second not in after
    assert [row["type"] for row in logged.rows("events") if row["event_id"] in ("like", "skip")] == ["like", "skip"]


@pytest.mark.parametrize(
    ("imported", "skipped"), [({}, [True, True, False]), ({"skip_below": 0.2}, [True, False, False])]
)
def test_a_share_listened_is_a_skip_below_the_share_that_the_import_named(
    tmp_path: Path, imported: dict[str, Any], skipped: list[bool]
) -> None:
    workspace = Workspace(tmp_path / "workspace")
    write_world(workspace)
    write_dataset_manifest(workspace, replace(read_dataset_manifest(workspace), config={"plays": imported}))
    write_release(workspace, ranked=False)
    with Logged(workspace, tmp_path) as logged:
        plays = [
            {
                "event_id": f"s{n}",
                "user_id": "ann",
                "song_id": f"song-{n}",
                "played_at": AT + n,
                "share_listened": share,
            }
            for n, share in enumerate((0.1, 0.3, 0.5))
        ]
        assert logged.app.post("/v1/plays", {"plays": plays}).json()["taken"] == 3
        assert [play["skipped"] for play in logged.app.get("/v1/users/ann/plays").json()["plays"]] == skipped
        assert [row["skipped"] for row in logged.rows("events") if row["user_id"] == "ann"] == skipped


@pytest.mark.parametrize("more", [{"skipped": True}, {"share_listened": 0.9}, {"contexts": ["radio"]}])
def test_a_like_with_what_only_plays_have_is_refused(logged: Logged, more: dict[str, Any]) -> None:
    like = {"event_id": "like", "user_id": "ann", "song_id": "song-3", "type": "like", **more}
    response = logged.app.post("/v1/plays", like)
    assert response.status_code == 422
    assert "a like is not a play" in response.text


def test_a_log_that_cannot_be_written_fails_no_answer_and_is_counted(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged.rows("answers")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_table", lambda *_, **__: 1 / 0)
        patch.setattr("rayrec.data.impressions.MEMORY_BYTES", 4_000)
        for user in USERS[:6]:
            assert logged.recommend(user)["songs"]
    text = logged.app.get("/metrics").text
    match = re.search(r'rayrec_log_rows_total\{log="answers",outcome="dropped",[^}]*\} (\d+)', text)
    assert match is not None, text
    assert int(match[1]) == 4
    assert len(logged.rows("answers")) == 2


def test_a_deleted_user_is_in_no_log(logged: Logged) -> None:
    logged.recommend("user-5")
    assert any(row["user_id"] == "user-5" for row in logged.rows("answers"))
    assert logged.app.request("DELETE", "/v1/users/user-5").status_code == 204
    for kind in ("answers", "events"):
        assert not any(row["user_id"] == "user-5" for row in logged.rows(kind))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": {"a": {"share": 0.7}, "b": {"share": 0.7}}}, "add up to 1.4"),
        ({"arms": {"a": {"share": 0}}}, "arm a: share is 0"),
        ({"arms": {"a": {"share": 1, "k": 5}}}, "arm a: unknown setting 'k'"),
        ({"arms": {}}, "expected arms.NAME.share"),
        ({"arms": {str(n): {"share": 0.1, "release": str(n)} for n in range(3)}}, "use 3 releases"),
    ],
)
def test_a_wrong_experiment_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ServeConfig(experiment={"name": "x", **settings})


def test_an_arm_whose_release_does_not_exist_keeps_the_application_from_starting(world: Workspace) -> None:
    with pytest.raises(NotFoundError, match="none"), service(world, **config({"a": {"share": 1, "release": "none"}})):
        pass
