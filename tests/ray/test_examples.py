"""The examples run as they stand, on small planted data."""

import runpy
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import write_release, write_world
from serving_apps import running
from worlds import write_dataset

from rayrec import Dataset, Workspace
from rayrec.client import Client
from rayrec.data.histories import Histories
from rayrec.data.synthetic.world import GenerateConfig, World
from rayrec.jobs.pipeline import run
from rayrec.storage.artifacts import listing
from rayrec.storage.releases import active_release

EXAMPLES = Path(__file__).parents[2] / "examples"
DAY_MS = 24 * 3600 * 1000
COLUMNS = {"user": "user_id", "song": "song_id", "played_at": "ts"}


def example(name: str) -> SimpleNamespace:
    """What an example defines, without running it."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name="example"))


def write_plays(path: Path, users: Any, songs: Any, moments: Any) -> None:
    """Plays as a Parquet file of the columns that the examples read; moments are ms UTC."""
    names = pa.array([f"song-{song}" for song in np.asarray(songs).tolist()])
    pq.write_table(pa.table({"user_id": pa.array(users), "song_id": names, "ts": pa.array(moments)}), path)


def test_the_notebook_goes_from_plays_to_recommendations(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "plays_to_recommendations.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / "workspace")])
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    recalls = {line.split()[0]: float(line.split()[2]) for line in told.splitlines() if " recall@20 0." in line}
    assert recalls["two-step"] > 1.2 * recalls["popularity"]
    assert told.splitlines()[-1].count("–") == 1  # artist – title
    assert script.read_text().count("# %%") > 8


def test_own_data_goes_from_a_csv_to_recommendations(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    histories = World(GenerateConfig(users=60, songs=40, artists=8, genres=4, plays=20.0)).histories(np.arange(60))
    users = np.repeat(histories.user_ids, histories.lengths).tolist()
    rows = zip(users, histories.songs.tolist(), (histories.played_at // 1000).tolist(), strict=True)
    path = tmp_path / "plays.csv"
    path.write_text("user_id,song_id,ts\n" + "".join(f"{user},{song},{moment}\n" for user, song, moment in rows))
    module = example("own_data.py")
    small = {"train": {"hidden_dim": 8, "epochs": 1, "negatives": 16, "workers": 0}, "embed": {"dim": 8, "epochs": 1}}
    whole = module.main.__globals__["run"]
    module.main.__globals__["run"] = lambda workspace, stages, **more: whole(workspace, {**stages, **small}, **more)
    module.main(str(path), str(tmp_path / "workspace"))
    told = capsys.readouterr().out.splitlines()
    assert "train: done" in " ".join(told)
    assert len(told[told.index(next(line for line in told if line.startswith("For "))) + 1 :]) == 5


def write_tone(path: Path, pitch: float, seed: int) -> None:
    """Two seconds of a tone with a little noise."""
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
    for song in range(num_songs):  # even songs are low, odd ones high
        write_tone(tmp_path / f"song-{song}.wav", (200 if song % 2 == 0 else 3_000) * (1 + song / 100), song)
    example("own_vectors.py").main(str(tmp_path), workspace.uri)
    told = capsys.readouterr().out
    assert "100% of the plays" in told
    (made,) = listing(workspace, "songs")
    for row in made.metrics["neighbours"]:
        kind = int(row["song"].split()[-1]) % 2
        assert [int(near.split()[-1]) % 2 for near in row["neighbours"][:2]] == [kind] * 2


def test_the_client_is_answered_by_the_application(
    cluster: None, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(workspace)
    write_release(workspace)
    module = example("http_client.py")
    with running(workspace) as url:
        monkeypatch.setattr("sys.argv", ["http_client.py", url, "--history", "song-3,song-50", "-k", "4"])
        module.main()
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines] == [
            song["song_id"] for song in Client(url).recommend(history=["song-3", "song-50"], k=4)["songs"]
        ]
        monkeypatch.setattr("sys.argv", ["http_client.py", url, "--user", "ann", "--played", "song-3"])
        module.main()
        assert len(capsys.readouterr().out.splitlines()) == 10
        assert Client(url).recommend(user_id="ann")["plays"] == 1


def test_a_night_goes_live_where_figures_hold_and_is_kept_back_where_they_fall(
    cluster: None, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(GenerateConfig(users=150, songs=60, artists=12, genres=4, plays=60.0, days=300.0, follow=0.8))
    histories = world.histories(np.arange(150))
    users = np.repeat(histories.user_ids, histories.lengths)
    last = int(histories.played_at.max())
    old = histories.played_at < last - 20 * DAY_MS
    first, second, third = (tmp_path / f"{name}.parquet" for name in ("first", "second", "third"))
    write_plays(first, users[old], histories.songs[old], histories.played_at[old])
    write_plays(second, users[~old], histories.songs[~old], histories.played_at[~old])
    stages = {
        "import": {"format": "parquet", "paths": [str(first)], "columns": COLUMNS, "buckets": 2},
        "split": {"test_days": 60.0, "validation_days": 20.0},
        "embed": {"dim": 8, "epochs": 2},
        "train": {
            "hidden_dim": 16,
            "epochs": 8,
            "learning_rate": 0.02,
            "negatives": 32,
            "workers": 0,
        },
        "evaluate": {"models": ["taste"], "bootstrap_samples": 0, "offsets": 0},
    }
    run(workspace, stages)
    nightly = example("nightly.py")
    before = active_release(workspace)
    assert before is not None
    assert nightly.main(workspace.root, str(second)) == 0
    live = active_release(workspace)
    assert live is not None
    assert live.id != before.id
    assert live.inputs["dataset"] == Dataset(workspace).manifest.id
    assert "is live" in capsys.readouterr().out
    assert nightly.main(workspace.root, str(second)) == 0
    assert "nothing is new" in capsys.readouterr().out
    rng = np.random.default_rng(0)  # a source gone wrong: everybody plays anything
    noise = np.repeat(histories.user_ids, 40)
    write_plays(third, noise, rng.integers(0, 60, len(noise)), last + 60_000 * np.arange(1, len(noise) + 1))
    assert nightly.main(workspace.root, str(third)) == 1
    assert "is kept back" in capsys.readouterr().out
    assert active_release(workspace) == live
