"""`rayrec recommend` and the HTTP API give the same answer to the same request to the same release."""

import json
from typing import Any

import pytest
from served import AT, Client, write_release, write_world

from rayrec.data.dataset import Dataset
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.online.load_states import load_states
from rayrec.online.state_store import open_store, store_uri
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

HISTORY = ["song-3", "song-50", "song-3", "song-9"]
SONGS = (["--songs", ",".join(HISTORY)], {"history": HISTORY})
HTTP_ONLY_FIELDS = {"recommendation_id", "arm", "cursor"}  # only in HTTP: for the log, experiments and further pages
STATE_TOLERANCE = 5e-3  # relative tolerance for answers from stored states, which are rounded
# Name of a case -> flags and fields of a request, in addition to the songs or the user.
REQUESTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "nothing else": ([], {}),
    "heard songs too": (["--no-exclude-heard"], {"exclude_heard": False}),
    "the long horizon": (["--horizon", "long"], {"horizon": "long"}),
    "both horizons": (["--horizon", "0.4"], {"horizon": 0.4}),
    "artists": (["--artists", "artist 1", "--artists", "Artist 2"], {"artists": ["artist 1", "Artist 2"]}),
    "released": (
        ["--released-from", "2020-01-03", "--released-to", "2020-01-20"],
        {"released_from": "2020-01-03", "released_to": "2020-01-20"},
    ),
    "a market": (["--market", "SE"], {"market": "SE"}),
    "allowed songs": (["--allow", "song-1,song-4,song-90"], {"allow": ["song-1", "song-4", "song-90"]}),
    "excluded songs": (["--exclude", "song-1,song-60"], {"exclude": ["song-1", "song-60"]}),
    "diversity": (["--diversity", "0.5"], {"diversity": 0.5}),
    "exploring": (["--explore", "0.3"], {"explore": 0.3}),
    "reasons": (["--explain"], {"explain": True}),
    "reasons of the long horizon": (["--explain", "--horizon", "long"], {"explain": True, "horizon": "long"}),
    "unknown songs": (
        ["--exclude", "gone", "--allow", "song-1,song-4,lost"],
        {"exclude": ["gone"], "allow": ["song-1", "song-4", "lost"]},
    ),
}


@pytest.fixture(scope="module", params=["two-step", "network"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with songs of 28 release days and two markets, and with the loaded states of all users."""
    folder = tmp_path_factory.mktemp("contract")
    workspace = Workspace(folder / "workspace")
    write_world(workspace)
    rows = [f"song-{row},2020-01-{row % 28 + 1:02},{'SE' if row % 3 else 'DE'}\n" for row in range(200)]
    (folder / "songs.csv").write_text("song,released,markets\n" + "".join(rows))
    describe(workspace, DescribeConfig(), str(folder / "songs.csv"))
    release = write_release(workspace, ranked=request.param == "two-step", artists=True)
    dataset = Dataset(workspace)
    store = open_store(store_uri(workspace, None), dataset.lineage)
    load_states(dataset, store, release)
    store.close()
    return workspace


@pytest.fixture
def ask_both(world: Workspace, app: Client, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that sends one request by command and by HTTP; it returns both answers and the command's stderr."""

    def ask(flags: list[str], body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
        arguments = ["--workspace", world.uri, "--json", "recommend", "--at", str(AT), "-k", "12", *flags]
        code = main(arguments)
        output = capsys.readouterr()
        response = app.post("/v1/recommendations", {"at": AT, "k": 12, **body})
        assert (code == 0) == (response.status_code == 200), output.err
        return json.loads(output.out), response.json(), output.err

    return ask


def require_same(by_command: dict[str, Any], by_http: dict[str, Any], rel: float = 1e-4) -> None:
    """Check that the HTTP answer, except HTTP_ONLY_FIELDS, equals the command's.

    Floats of songs may differ by a share `rel`.
    """
    assert set(by_http) - HTTP_ONLY_FIELDS <= set(by_command)
    if by_http["last_plays"] is None:  # HTTP omits the last plays without `explain`
        del by_http["last_plays"]
    fields = set(by_http) - HTTP_ONLY_FIELDS - {"songs"}
    assert {name: by_command[name] for name in fields} == {name: by_http[name] for name in fields}
    assert len(by_command["songs"]) == len(by_http["songs"])
    for command_song, http_song in zip(by_command["songs"], by_http["songs"], strict=True):
        assert set(command_song) == set(http_song)
        for name, value in http_song.items():
            assert command_song[name] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value)


@pytest.mark.parametrize("name", REQUESTS)
def test_songs_get_the_same_answer(ask_both: Any, name: str) -> None:
    flags, body = REQUESTS[name]
    by_command, by_http, _ = ask_both([*SONGS[0], *flags], {**SONGS[1], **body})
    assert by_http["songs"]
    assert by_http["source"] == "taste"
    require_same(by_command, by_http)


@pytest.mark.parametrize("name", ["nothing else", "the long horizon", "both horizons", "artists", "reasons"])
def test_a_stored_user_gets_the_same_answer(world: Workspace, ask_both: Any, name: str) -> None:
    user = str(next(Dataset(world).read_all()).user_ids[0])
    flags, body = REQUESTS[name]
    by_command, by_http, _ = ask_both(["--user", user, *flags], {"user_id": user, **body})
    assert by_http["plays"] > 0
    require_same(by_command, by_http, STATE_TOLERANCE)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize(
    "unknown",
    [
        (["--user", "nobody"], {"user_id": "nobody"}),
        (["--songs", "gone,lost"], {"history": ["gone", "lost"]}),
        (["--songs", ""], {"history": []}),
    ],
    ids=["unknown user", "unknown songs", "no songs"],
)
def test_where_no_play_is_known_both_answer_with_the_same_popular_songs(ask_both: Any, unknown: Any, name: str) -> None:
    flags, body = REQUESTS[name]
    by_command, by_http, stderr = ask_both([*unknown[0], *flags], {**unknown[1], **body})
    assert by_http["songs"]
    assert by_http["source"] == "popular"
    require_same(by_command, by_http)
    assert "popular songs are recommended" in stderr


def test_unknown_songs_are_counted_by_both_and_named_by_the_command(ask_both: Any) -> None:
    flags = ["--songs", "gone,song-3,lost,song-9", "--exclude", "gone"]
    body = {"history": ["gone", "song-3", "lost", "song-9"], "exclude": ["gone"]}
    by_command, by_http, stderr = ask_both(flags, body)
    assert (by_http["unknown_songs"], by_http["plays"]) == (3, 2)
    require_same(by_command, by_http)
    assert by_command["unknown_song_ids"] == ["gone", "lost"]
    assert "3 songs are not in the catalog and were left out: gone, lost" in " ".join(stderr.split())


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        (["--artists", "Abba"], {"artists": ["Abba"]}),
        (["--market", "FR"], {"market": "FR"}),
        (["--released-to", "2020-02-30"], {"released_to": "2020-02-30"}),
    ],
)
def test_values_that_fit_no_song_are_errors_of_the_same_words(ask_both: Any, flags: list[str], body: Any) -> None:
    by_command, by_http, _ = ask_both([*SONGS[0], *flags], {**SONGS[1], **body})
    (error,) = by_http["errors"]
    assert by_command["error"]["message"] in f"{error['where']}: {error['detail']}"
    assert error["where"] == next(iter(body))
