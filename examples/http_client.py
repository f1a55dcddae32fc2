"""A client of the HTTP API, with nothing but the standard library: python examples/http_client.py --help

It asks once more where the connection breaks or the server is busy (503). That is safe for plays too:
a play carries an event id that is made before it is first sent, and counts once however often it comes.
"""

import argparse
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from typing import Any

TIMEOUT_SECONDS = 10.0
LONGEST_WAIT = 5.0  # seconds before the second try, whatever the server asks for


class ApiError(Exception):
    """The server refused: `problem` is what it says, as RFC 9457 has it."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(f"{problem.get('status')} {problem.get('title')}: {problem.get('detail', '')}")
        self.problem = problem


class Client:
    """One server. `key` is an API key; keep it in the environment, not in a program."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def recommend(self, *, user: str | None = None, history: list[Any] | None = None, **wish: Any) -> dict[str, Any]:
        """Songs for a stored user, or for whoever has the history: song ids, or plays with song and played_at.

        `wish`: k, horizon, exclude and whatever else the API takes.
        """
        who = {"user_id": user} if history is None else {"history": history}
        return self.post("/v1/recommendations", {**who, **wish})

    def played(self, user: str, song: str, played_at: str | None = None) -> dict[str, Any]:
        """Tell of a play; the next answer for the user reflects it."""
        play = {"event_id": str(uuid.uuid4()), "user_id": user, "song": song}
        return self.post("/v1/plays", play | ({"played_at": played_at} if played_at else {}))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises `ApiError` for a refusal and `OSError` where nobody answers."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), self.headers)
        try:
            return self._send(request)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise ApiError(_problem(error)) from error
            time.sleep(min(LONGEST_WAIT, float(error.headers.get("Retry-After") or 0.2)))
        except OSError:
            time.sleep(0.2)
        try:
            return self._send(request)
        except urllib.error.HTTPError as error:
            raise ApiError(_problem(error)) from error

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer


def _problem(error: urllib.error.HTTPError) -> dict[str, Any]:
    try:
        return dict(json.load(error))
    except ValueError:  # something between us and the server answered
        return {"status": error.code, "title": error.reason}


def main() -> None:
    parser = argparse.ArgumentParser(description="Recommend songs over HTTP. The key comes from RAYREC_API_KEY.")
    parser.add_argument("url", help="such as http://localhost:8000")
    parser.add_argument("--user", help="a stored user")
    parser.add_argument("--history", help="or song ids that were just played, with commas between them")
    parser.add_argument("--played", help="tell first that --user has played this song now")
    parser.add_argument("-k", type=int, default=10, help="how many songs (10)")
    given = parser.parse_args()
    if (given.user is None) == (given.history is None) or (given.played and not given.user):
        parser.error("give --user ID or --history ID,ID; --played goes with --user")
    client = Client(given.url, os.environ.get("RAYREC_API_KEY"))
    if given.played:
        client.played(given.user, given.played)
    history = None if given.history is None else given.history.split(",")
    for song in client.recommend(user=given.user, history=history, k=given.k)["songs"]:
        print(f"{song['score']:.3f}  {song['song']}  {song.get('artist') or ''}  {song.get('title') or ''}".rstrip())


if __name__ == "__main__":
    main()
