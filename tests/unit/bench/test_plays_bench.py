"""The benchmark of plays by length of the history: which plays it sends, and that the application takes them."""

from collections import Counter
from pathlib import Path
from typing import Any

from served import NUM_SONGS, Client, service, write_release, write_world

from rayrec.bench.serve_bench import LONG_USERS, bench_history_lengths
from rayrec.storage.workspace import Workspace

SONGS = [f"song-{row}" for row in range(NUM_SONGS)]


def test_each_measured_play_meets_a_history_of_the_length_asked_for() -> None:
    lengths: Counter[str] = Counter()
    measured: dict[str, list[int]] = {"few": [], "many": []}

    def post(body: dict[str, Any]) -> None:
        for play in body.get("plays", [body]):
            if "plays" not in body:
                measured[play["user_id"].split("-")[1]].append(lengths[play["user_id"]])
            assert play["event_id"] == f"{play['user_id']}-{lengths[play['user_id']]}"
            lengths[play["user_id"]] += 1

    result = bench_history_lengths(post, SONGS, name="x", rounds=3, plays=16, few=5, many=1_200)
    assert measured["few"] == [5] * 48
    assert measured["many"] == [1_200 + number // LONG_USERS for number in range(48)]
    assert result.to_json()["many_plays"] == 1_200
    assert result.rounds == 3


def test_the_application_takes_the_plays_of_the_bench(workspace: Workspace, tmp_path: Path) -> None:
    write_world(workspace)
    write_release(workspace)
    with service(workspace, store=f"sqlite:///{tmp_path}/s.sqlite") as open_service:
        client = Client(open_service)

        def post(body: dict[str, Any]) -> None:
            answer = client.post("/v1/plays", body).json()
            assert answer["taken"] == len(body.get("plays", [body]))

        result = bench_history_lengths(post, SONGS, name="x", rounds=2, plays=4, few=3, many=300)
        assert result.ratio > 0
        taste = client.get("/v1/users/x-many-0/taste").json()
        assert taste["plays"] == 301
