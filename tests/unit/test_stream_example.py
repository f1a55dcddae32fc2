"""The consumer of a stream of plays: every play is stored once, whatever fails in between."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served import AT, Client, service, write_release, write_world

from rayrec.client import ApiUnavailableError
from rayrec.storage.workspace import Workspace

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream_plays.py"


class Topic:
    """A topic with one partition; after a restart of the consumer it delivers uncommitted messages again."""

    def __init__(self, values: list[bytes | None]) -> None:
        self._values, self.committed, self._next = values, 0, 0

    def restart(self) -> None:
        self._next = self.committed

    def consume(self, num_messages: int, timeout: float) -> list[Any]:
        offsets = range(self._next, min(self._next + num_messages, len(self._values)))
        self._next += len(offsets)
        return [self._message(offset) for offset in offsets]

    def commit(self, *, asynchronous: bool) -> None:
        assert not asynchronous
        self.committed = self._next

    def _message(self, offset: int) -> Any:
        fields: dict[str, Callable[[], Any]] = {
            "error": lambda: None,
            "topic": lambda: "plays",
            "partition": lambda: 0,
            "offset": lambda: offset,
            "value": lambda: self._values[offset],
        }
        return SimpleNamespace(**fields)


class Sender:
    """A client whose first `answers_to_lose` answers get lost, after the server has stored the plays."""

    def __init__(self, app: Client, answers_to_lose: int) -> None:
        self._app, self._answers_to_lose = app, answers_to_lose

    def plays(self, plays: list[dict[str, Any]]) -> dict[str, Any]:
        answer: dict[str, Any] = self._app.post("/v1/plays", {"plays": plays}).json()
        self._answers_to_lose -= 1
        if self._answers_to_lose >= 0:
            raise ApiUnavailableError("the server did not answer")
        return answer


def test_plays_are_committed_once_they_are_stored_and_count_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = runpy.run_path(str(EXAMPLE), run_name="example")["forward"]
    world = Workspace(tmp_path / "workspace")
    write_world(world)
    write_release(world)
    plays = [{"user_id": "ann", "song_id": f"song-{row}", "played_at": AT + row} for row in range(5)]
    topic = Topic([*(json.dumps(play).encode() for play in plays), b"{broken", None])  # None: a tombstone
    with service(world) as replica:
        app = Client(replica)
        sender = Sender(app, answers_to_lose=1)
        with pytest.raises(ApiUnavailableError):
            forward(topic, sender)
        assert topic.committed == 0
        topic.restart()
        answer = forward(topic, sender)
        assert (answer["taken"], answer["repeated"], answer["invalid"]) == (0, 5, 2)
        assert topic.committed == 7
        assert forward(topic, sender) is None
        assert app.get("/v1/users/ann/plays").json()["count"] == 5
    output = capsys.readouterr().err
    assert "left out: plays.5" in output
    assert "left out: plays.6" in output
