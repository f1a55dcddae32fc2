"""Joining parts keeps the plays and does not disturb readers and taste vectors; a killed run is continued."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import model_config, network
from without_ray import without_ray

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.importing import merging
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.compact import compact
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.taste import compute_tastes
from rayrec.model.checkpoint import save_model
from rayrec.model.train_config import TasteConfig
from rayrec.online.load_states import load_states
from rayrec.online.state_store import open_store
from rayrec.storage import artifacts, releases
from rayrec.storage.workspace import Workspace

START = 1_700_000_000


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def config_of(folder: Path, number: int, *, rows: int = 200, users: int = 40) -> ImportConfig:
    """Write the plays of day `number`; each day has some new users and some new songs."""
    random = np.random.default_rng(number)
    lines = [
        f"u{random.integers(users + 5 * number)},s{random.integers(60 + number)},"
        f"{START + number * 86_400 + int(random.integers(90_000))}"
        for _ in range(rows)
    ]
    path = folder / f"{number}.csv"
    path.write_text("\n".join(["user,song,played_at", *lines]) + "\n")
    return ImportConfig(format="csv", paths=(str(path),), buckets=3)


@pytest.fixture
def five_parts(workspace: Workspace, tmp_path: Path) -> Workspace:
    import_data(workspace, config_of(tmp_path, 0))
    for day in range(1, 5):
        append_plays(workspace, config_of(tmp_path, day))
    return workspace


def content(dataset: Dataset) -> dict[str, list[tuple[int, int]]]:
    whole = concatenate(list(dataset.read_all(users_per_batch=7)))
    assert len(set(whole.user_ids)) == len(whole)
    return plays_of(whole)


def plays_of(histories: Histories) -> dict[str, list[tuple[int, int]]]:
    return {
        user: list(zip(histories.played_at[a:b].tolist(), histories.songs[a:b].tolist(), strict=True))
        for user, a, b in zip(histories.user_ids, histories.offsets[:-1], histories.offsets[1:], strict=True)
    }


def test_the_plays_are_equal_and_those_who_read_the_old_files_are_not_disturbed(five_parts: Workspace) -> None:
    before = Dataset(five_parts)
    plays = content(before)
    made = compact(five_parts)
    after = Dataset(five_parts)
    assert (len(made.spans_before), made.spans) == (5, [(0, 4)])
    assert content(after) == plays
    assert content(before) == plays
    for name in ("users", "plays", "songs", "parts", "first_play", "last_play", "part_times", "read"):
        assert getattr(after.manifest, name) == getattr(before.manifest, name), name
    assert after.manifest.id != before.manifest.id
    assert after.manifest.plays_id == before.manifest.id
    assert after.descends_from(before.manifest.id)
    assert compact(five_parts).dataset == after.manifest  # nothing is left to join


def test_appends_go_on_and_are_joined_again(five_parts: Workspace, tmp_path: Path) -> None:
    compact(five_parts)
    again = append_plays(five_parts, config_of(tmp_path, 2))
    assert again.plays == 0
    (tmp_path / "other").mkdir()
    repeated = append_plays(five_parts, config_of(tmp_path / "other", 3))  # the same rows under another name
    assert (repeated.plays, repeated.merged) == (0, 200)
    append_plays(five_parts, config_of(tmp_path, 9))
    dataset = Dataset(five_parts)
    assert dataset.manifest.spans == [(0, 4), (5, 5)]
    assert dataset.manifest.plays_id == dataset.manifest.id
    plays = content(dataset)
    assert dataset.manifest.users == len(plays)
    compact(five_parts)
    assert Dataset(five_parts).manifest.spans == [(0, 5)]
    assert content(Dataset(five_parts)) == plays


@pytest.mark.parametrize("step", ["second bucket", "publishing"])
def test_a_killed_run_leaves_the_data_set_as_it_was_and_goes_on(
    five_parts: Workspace, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = Dataset(five_parts)
    plays = content(before)
    joiner, move = merging.BucketJoiner.__call__, Workspace.move
    done: list[Any] = []

    def killed_bucket(worker: Any, bucket: int) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(bucket)
        return joiner(worker, bucket)

    def killed_move(workspace: Workspace, source: str, target: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        move(workspace, source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        if step == "publishing":
            patch.setattr(Workspace, "move", killed_move)
        else:
            patch.setattr(merging.BucketJoiner, "__call__", killed_bucket)
        compact(five_parts)
    assert Dataset(five_parts).manifest == before.manifest
    assert content(Dataset(five_parts)) == plays
    first = done[0]
    if step == "second bucket":
        monkeypatch.setattr(
            merging.BucketJoiner,
            "__call__",
            lambda worker, bucket: pytest.fail("was done") if bucket == first else joiner(worker, bucket),
        )
    compact(five_parts)
    assert Dataset(five_parts).manifest.spans == [(0, 4)]
    assert content(Dataset(five_parts)) == plays


def write_model(workspace: Workspace) -> None:
    dataset = Dataset(workspace).manifest
    model = network(model_config(num_songs=dataset.songs))
    names = save_model(workspace, "models/m", model, np.ones(dataset.songs, dtype=np.bool_))
    inputs = {"dataset": dataset.id, "songs": "s"}
    artifacts.publish(workspace, artifacts.Manifest(kind="models", id="m", inputs=inputs), names)
    artifacts.publish(workspace, artifacts.Manifest(kind="songs", id="s", inputs={"dataset": dataset.id}), [])
    index = artifacts.Manifest(kind="indexes", id="i", inputs={"models": "m"})
    artifacts.publish(workspace, index, [])


def test_tastes_stay_and_go_on_and_live_releases_verify(five_parts: Workspace, tmp_path: Path) -> None:
    write_model(five_parts)
    tastes = compute_tastes(five_parts, TasteConfig())
    release = releases.create_release(five_parts)
    compact(five_parts)
    assert compute_tastes(five_parts, TasteConfig()) == tastes
    releases.verify_release(five_parts, release)
    append_plays(five_parts, config_of(tmp_path, 5))
    new = Dataset(five_parts).manifest.plays - artifacts.load_manifest(five_parts, "tastes", tastes.id).metrics["plays"]
    compact(five_parts)
    assert Dataset(five_parts).manifest.spans == [(0, 4), (5, 5)]  # the next taste vectors continue from part 5
    later = compute_tastes(five_parts, TasteConfig())
    assert later.metrics["base"] == tastes.id
    assert later.metrics["plays_computed"] <= 2 * new
    second = releases.create_release(five_parts)
    compact(five_parts)
    for each in (release, second):
        releases.verify_release(five_parts, each)
    five_parts.write_bytes(Dataset(five_parts).manifest.histories_files(1)[0], b"damaged")
    with pytest.raises(releases.DamagedArtifactError, match="bucket=00001"):
        releases.verify_release(five_parts, release)


def test_the_live_release_and_the_one_before_it_can_be_loaded_however_many_came_after(
    five_parts: Workspace, tmp_path: Path
) -> None:
    write_model(five_parts)
    made = []
    for day in range(5, 9):
        compute_tastes(five_parts, TasteConfig())
        made.append(releases.create_release(five_parts, activate=day < 7))
        append_plays(five_parts, config_of(tmp_path, day))
    compact(five_parts)
    assert Dataset(five_parts).manifest.spans == [(0, 4), (5, 5), (6, 6), (7, 7), (8, 8)]
    assert releases.active_release(five_parts) == made[1]
    for release in (made[1], releases.rollback(five_parts)):
        store = open_store(f"sqlite:///{tmp_path}/{release.id}.sqlite", Dataset(five_parts).lineage)
        tastes = artifacts.load_manifest(five_parts, "tastes", release.inputs["tastes"])
        assert load_states(Dataset(five_parts), store, release).users == tastes.metrics["users"]
        store.close()
