"""The examples run on small planted data."""

import runpy
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rings import ring_plays, write_rows
from served import write_release, write_world
from serving_apps import running
from worlds import rename_songs, write_dataset

from rayrec import Workspace
from rayrec.client import Client
from rayrec.data.histories import Histories
from rayrec.storage.artifacts import listing
from rayrec.storage.releases import active_release

EXAMPLES = Path(__file__).parents[2] / "examples"
ID_WITH_COMMA = "Earth, Wind & Fire – Song 3"  # an id that readers build from artist and title


def example(name: str) -> SimpleNamespace:
    """Return the names that an example defines, without running its main function."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name="example"))


@pytest.mark.slow
def test_the_notebook_goes_from_plays_to_recommendations(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "plays_to_recommendations.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / "workspace")])
    for _ in range(2):  # a second run in the same workspace works, too
        runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    recalls = {line.split()[0]: float(line.split()[2]) for line in output.splitlines() if " recall@20 0." in line}
    assert recalls["two-step"] > 1.2 * recalls["popularity"]
    assert output.splitlines()[-1].count("–") == 1  # artist – title
    assert script.read_text().count("# %%") > 8


def test_own_data_goes_from_a_csv_to_recommendations(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plays = write_rows(tmp_path / "plays.csv", ring_plays(range(60)))
    module = example("own_data.py")
    recommender_class = module.rayrec.Recommender
    small_settings = {"hidden_dim": 8, "epochs": 1, "negatives": 16}
    module.main.__globals__["rayrec"] = SimpleNamespace(
        Recommender=lambda workspace, **_: recommender_class(workspace=workspace, **small_settings, progress=False)
    )
    for _ in range(2):  # a second run into the same folder works, too
        module.main(plays, "u3", str(tmp_path / "model"))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("of the next new songs among its first 20")
        assert [line.split()[0] for line in lines[-6:]] == ["user_id", *["u3"] * 5]
    assert active_release(Workspace(tmp_path / "model")) is not None


def write_tone(path: Path, pitch: float, seed: int) -> None:
    """Write a WAV file with two seconds of a tone of `pitch` Hz and a little noise."""
    rate = 16_000
    moments = np.arange(2 * rate) / rate
    signal = 0.4 * np.sin(2 * np.pi * pitch * moments) + 0.02 * np.random.default_rng(seed).normal(size=len(moments))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((signal * 32767).clip(-32768, 32767).astype(np.int16).tobytes())


def test_songs_that_sound_alike_get_vectors_that_are_near(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    num_songs = 12
    songs = [list(range(num_songs))] * 5
    times = [[60_000 * play for play in range(num_songs)]] * 5
    write_dataset(workspace, Histories.from_lists(songs, times), num_songs)
    for song in range(num_songs):  # even songs are low tones, odd songs are high tones
        write_tone(tmp_path / f"song-{song}.wav", (200 if song % 2 == 0 else 3_000) * (1 + song / 100), song)
    example("own_vectors.py").main(str(tmp_path), workspace.uri)
    output = capsys.readouterr().out
    assert "100% of the plays" in output
    (manifest,) = listing(workspace, "songs")
    for row in manifest.metrics["neighbors"]:
        kind = int(row["song"].split()[-1]) % 2
        assert [int(neighbor.split()[-1]) % 2 for neighbor in row["neighbors"][:2]] == [kind] * 2


def test_the_client_is_answered_by_the_application(
    cluster: None, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(workspace)
    rename_songs(workspace, {3: ID_WITH_COMMA})
    write_release(workspace)
    module = example("http_client.py")
    with running(workspace) as url:
        history_arguments = ["--history", ID_WITH_COMMA, "--history", "song-50"]
        monkeypatch.setattr("sys.argv", ["http_client.py", url, *history_arguments, "-k", "4"])
        module.main()
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines] == [
            song["song_id"] for song in Client(url).recommend(history=[ID_WITH_COMMA, "song-50"], k=4)["songs"]
        ]
        monkeypatch.setattr("sys.argv", ["http_client.py", url, "--user", "ann", "--played", ID_WITH_COMMA])
        module.main()
        assert len(capsys.readouterr().out.splitlines()) == 10
        assert Client(url).recommend(user_id="ann")["plays"] == 1
