"""Joining parts keeps the plays and does not disturb readers and taste vectors; a killed run is continued."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import model_config, network

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.lineage import CleanConfig, find_garbage
from rayrec.importing import merging
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.add_songs import add_songs
from rayrec.jobs.compact import compact
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.taste import compute_tastes
from rayrec.model.added_songs import AddedSongs
from rayrec.model.checkpoint import save_model
from rayrec.model.train_config import TasteConfig
from rayrec.online.load_states import load_states
from rayrec.online.state_store import open_store
from rayrec.storage import artifacts, releases
from rayrec.storage.workspace import Workspace

START = 1_700_000_000

pytestmark = pytest.mark.usefixtures("run_without_ray")


def write_day(folder: Path, number: int, *, rows: int = 200, users: int = 40) -> ImportConfig:
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
    import_data(workspace, write_day(tmp_path, 0))
    for day in range(1, 5):
        append_plays(workspace, write_day(tmp_path, day))
    return workspace


def stored_users(workspace: Workspace, release: artifacts.Manifest) -> int:
    """Return the number of users with taste vectors in a release."""
    return int(artifacts.load_manifest(workspace, "tastes", release.inputs["tastes"]).metrics["users"])


def loaded_users(workspace: Workspace, release: artifacts.Manifest, folder: Path) -> int:
    """Return the number of users whose states `load_states` loads from a release into a new store."""
    dataset = Dataset(workspace)
    store = open_store(f"sqlite:///{folder}/{release.id}.sqlite", dataset.lineage)
    try:
        return load_states(dataset, store, release).users
    finally:
        store.close()


def content(dataset: Dataset) -> dict[str, list[tuple[int, int]]]:
    histories = concatenate(list(dataset.read_all(users_per_batch=7)))
    assert len(set(histories.user_ids)) == len(histories)
    return plays_by_user(histories)


def plays_by_user(histories: Histories) -> dict[str, list[tuple[int, int]]]:
    return {
        user: list(zip(histories.played_at[start:end].tolist(), histories.songs[start:end].tolist(), strict=True))
        for user, start, end in zip(histories.user_ids, histories.offsets[:-1], histories.offsets[1:], strict=True)
    }


def test_joining_keeps_the_plays_and_does_not_disturb_readers_of_the_old_files(five_parts: Workspace) -> None:
    before = Dataset(five_parts)
    plays = content(before)
    result = compact(five_parts)
    after = Dataset(five_parts)
    assert (len(result.spans_before), result.spans) == (5, [(0, 4)])
    assert content(after) == plays
    assert content(before) == plays
    for name in ("users", "plays", "songs", "parts", "first_play", "last_play", "part_times", "read"):
        assert getattr(after.manifest, name) == getattr(before.manifest, name), name
    assert after.manifest.id != before.manifest.id
    assert after.manifest.plays_id == before.manifest.id
    assert after.descends_from(before.manifest.id)
    assert compact(five_parts).dataset == after.manifest  # nothing is left to join


def test_a_hundred_parts_hold_what_one_import_of_all_files_holds_before_and_after_they_are_joined(
    workspace: Workspace, tmp_path: Path
) -> None:
    configs = [write_day(tmp_path, day, rows=20).replace(buckets=1) for day in range(100)]
    import_data(workspace, configs[0])
    for config in configs[1:]:
        append_plays(workspace, config)
    all_paths = tuple(path for config in configs for path in config.paths)
    single_import = Workspace(tmp_path / "single")
    import_data(single_import, configs[0].replace(paths=all_paths))
    expected = Dataset(single_import)
    for spans in ([(part, part) for part in range(100)], [(0, 99)]):
        dataset = Dataset(workspace)
        assert dataset.manifest.spans == spans
        assert content(dataset) == content(expected)
        assert dataset.catalog().table.equals(expected.catalog().table)
        for name in ("users", "plays", "songs", "read", "merged", "first_play", "last_play"):
            assert getattr(dataset.manifest, name) == getattr(expected.manifest, name), name
        compact(workspace)


def test_appends_go_on_and_are_joined_again(five_parts: Workspace, tmp_path: Path) -> None:
    compact(five_parts)
    same_file_result = append_plays(five_parts, write_day(tmp_path, 2))
    assert same_file_result.plays == 0
    (tmp_path / "other").mkdir()
    same_rows_result = append_plays(five_parts, write_day(tmp_path / "other", 3))  # the same rows under another name
    assert (same_rows_result.plays, same_rows_result.merged) == (0, 200)
    append_plays(five_parts, write_day(tmp_path, 9))
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
    join_bucket, move = merging.BucketJoiner.__call__, Workspace.move
    calls: list[Any] = []

    def join_or_kill(worker: Any, bucket: int) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(bucket)
        return join_bucket(worker, bucket)

    def move_or_kill(workspace: Workspace, source: str, target: str) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(target)
        move(workspace, source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        if step == "publishing":
            patch.setattr(Workspace, "move", move_or_kill)
        else:
            patch.setattr(merging.BucketJoiner, "__call__", join_or_kill)
        compact(five_parts)
    assert Dataset(five_parts).manifest == before.manifest
    assert content(Dataset(five_parts)) == plays
    first_call = calls[0]
    if step == "second bucket":
        monkeypatch.setattr(
            merging.BucketJoiner,
            "__call__",
            lambda worker, bucket: pytest.fail("was done") if bucket == first_call else join_bucket(worker, bucket),
        )
    compact(five_parts)
    assert Dataset(five_parts).manifest.spans == [(0, 4)]
    assert content(Dataset(five_parts)) == plays


def write_model(workspace: Workspace, model_id: str = "m") -> None:
    dataset = Dataset(workspace).manifest
    model = network(model_config(num_songs=dataset.songs))
    names = save_model(workspace, f"models/{model_id}", model, np.ones(dataset.songs, dtype=np.bool_))
    inputs = {"dataset": dataset.id, "songs": "s"}
    artifacts.publish(workspace, artifacts.Manifest(kind="models", id=model_id, inputs=inputs), names)
    artifacts.publish(workspace, artifacts.Manifest(kind="songs", id="s", inputs={"dataset": dataset.id}), [])
    index = artifacts.Manifest(kind="indexes", id=f"i-{model_id}", inputs={"models": model_id})
    artifacts.publish(workspace, index, [])


def test_tastes_stay_valid_and_are_continued_and_releases_verify(five_parts: Workspace, tmp_path: Path) -> None:
    write_model(five_parts)
    tastes = compute_tastes(five_parts, TasteConfig())
    release = releases.create_release(five_parts)
    compact(five_parts)
    assert compute_tastes(five_parts, TasteConfig()) == tastes
    releases.verify_release(five_parts, release)
    append_plays(five_parts, write_day(tmp_path, 5))
    new_plays = (
        Dataset(five_parts).manifest.plays - artifacts.load_manifest(five_parts, "tastes", tastes.id).metrics["plays"]
    )
    compact(five_parts)
    assert Dataset(five_parts).manifest.spans == [(0, 4), (5, 5)]  # the next taste vectors continue from part 5
    later_tastes = compute_tastes(five_parts, TasteConfig())
    assert later_tastes.metrics["base"] == tastes.id
    assert later_tastes.metrics["plays_computed"] <= 2 * new_plays
    second_release = releases.create_release(five_parts)
    compact(five_parts)
    for manifest in (release, second_release):
        releases.verify_release(five_parts, manifest)
    five_parts.write_bytes(Dataset(five_parts).manifest.histories_files(1)[0], b"damaged")
    with pytest.raises(releases.DamagedArtifactError, match="bucket=00001"):
        releases.verify_release(five_parts, release)


def test_the_live_release_and_the_one_before_it_can_be_loaded_however_many_came_after(
    five_parts: Workspace, tmp_path: Path
) -> None:
    write_model(five_parts)
    daily_releases = []
    for day in range(5, 9):
        compute_tastes(five_parts, TasteConfig())
        daily_releases.append(releases.create_release(five_parts, activate=day < 7))
        append_plays(five_parts, write_day(tmp_path, day))
    compact(five_parts)
    assert Dataset(five_parts).manifest.spans == [(0, 4), (5, 5), (6, 6), (7, 7), (8, 8)]
    assert releases.active_release(five_parts) == daily_releases[1]
    for release in (daily_releases[1], releases.rollback(five_parts)):
        assert loaded_users(five_parts, release, tmp_path) == stored_users(five_parts, release)


def test_an_arm_of_an_experiment_can_be_loaded(workspace: Workspace, tmp_path: Path) -> None:
    import_data(workspace, write_day(tmp_path, 0))
    write_model(workspace)
    daily_releases = []
    for day in range(1, 5):
        append_plays(workspace, write_day(tmp_path, day))
        compute_tastes(workspace, TasteConfig())
        daily_releases.append(releases.create_release(workspace, activate=True))
    arm = daily_releases[0]
    workspace.write_json(
        "serving/replicas/one.json", {"release": daily_releases[-1].id, "loading": None, "arms": [arm.id]}
    )
    compact(workspace)
    assert loaded_users(workspace, arm, tmp_path) == stored_users(workspace, arm)


def test_every_release_that_clean_keeps_can_be_loaded(workspace: Workspace, tmp_path: Path) -> None:
    import_data(workspace, write_day(tmp_path, 0))
    daily_releases = []
    for day in range(1, 5):
        append_plays(workspace, write_day(tmp_path, day))
        write_model(workspace, f"m{day}")
        compute_tastes(workspace, TasteConfig())
        release = releases.create_release(workspace)
        old = replace(release, created_at=f"2020-01-0{day}T00:00:00+00:00")
        workspace.write_json(release.path("manifest.json"), asdict(old))
        daily_releases.append(release)
    artifacts.reuse(workspace, "releases", daily_releases[0].id)
    garbage_paths = {item.path for item in find_garbage(workspace, CleanConfig())}
    kept_releases = [release for release in daily_releases if release.folder not in garbage_paths]
    assert kept_releases == [daily_releases[0], *daily_releases[2:]]
    compact(workspace)
    assert Dataset(workspace).manifest.spans == [(0, 1), (2, 3), (4, 4)]
    for release in kept_releases:
        assert loaded_users(workspace, release, tmp_path) == stored_users(workspace, release)


def test_taste_vectors_of_models_that_are_not_in_use_keep_no_parts_apart(workspace: Workspace, tmp_path: Path) -> None:
    import_data(workspace, write_day(tmp_path, 0))
    for day in range(1, 6):
        write_model(workspace, f"m{day}")
        compute_tastes(workspace, TasteConfig())
        if day == 1:
            releases.create_release(workspace, activate=True)
        append_plays(workspace, write_day(tmp_path, day))
    compact(workspace)
    assert Dataset(workspace).manifest.spans == [(0, 0), (1, 4), (5, 5)]  # of the live and of the current model


def rows_of_added_songs(workspace: Workspace, added_songs: artifacts.Manifest) -> list[int]:
    return AddedSongs.load(workspace, added_songs.folder).rows.tolist()


@pytest.mark.parametrize("joined", [False, True])
def test_songs_that_are_known_only_by_plays_since_the_training_keep_their_vectors(
    workspace: Workspace, tmp_path: Path, joined: bool
) -> None:
    """Also where the parts since the training were joined with earlier ones while another model was the current one."""
    import_data(workspace, write_day(tmp_path, 0))
    write_model(workspace)
    for day in range(1, 4):
        append_plays(workspace, write_day(tmp_path, day))
        before = add_songs(workspace)
        compute_tastes(workspace, TasteConfig())
    new_songs = rows_of_added_songs(workspace, before)
    assert len(new_songs) >= 3
    if joined:
        write_model(workspace, "n")
    compact(workspace)
    assert Dataset(workspace).manifest.spans == ([(0, 3)] if joined else [(0, 0), (1, 3)])
    append_plays(workspace, write_day(tmp_path, 4))
    after = add_songs(workspace, model_id="m")
    assert set(new_songs) <= set(rows_of_added_songs(workspace, after))
    assert after.metrics["with_plays"] >= before.metrics["with_plays"]


def test_the_plays_since_the_training_of_the_live_model_stay_apart_though_another_model_is_current(
    workspace: Workspace, tmp_path: Path
) -> None:
    import_data(workspace, write_day(tmp_path, 0))
    write_model(workspace)
    append_plays(workspace, write_day(tmp_path, 1))
    compute_tastes(workspace, TasteConfig())
    releases.create_release(workspace, activate=True)
    append_plays(workspace, write_day(tmp_path, 2))
    append_plays(workspace, write_day(tmp_path, 3))
    write_model(workspace, "n")
    compact(workspace)
    assert Dataset(workspace).manifest.spans == [(0, 0), (1, 1), (2, 3)]
