"""Skips and likes in a data set: imported, appended, joined, erased and verified with the plays they belong to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.compact import compact
from rayrec.jobs.forget import forget_users
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.verify import verify_workspace
from rayrec.storage.workspace import Workspace

START = 1_700_000_000
FIRST_LINES = [
    f"ann,s1,{START},play,",
    f"ann,s2,{START + 1},skip,",
    f"ann,s1,{START + 2},like,",
    f"ann,s1,{START + 2},like,",
    f"ann,s3,{START + 9},like,",
    f"bob,s2,{START + 3},,true",
    f"cid,s2,{START + 4},like,",  # cid plays nothing
    f"bob,s1,{START + 5},dislike,",
]

pytestmark = pytest.mark.usefixtures("run_without_ray")


def write_csv(
    folder: Path, name: str, *lines: str, header: str = "user,song,played_at,event_type,liked"
) -> ImportConfig:
    path = folder / f"{name}.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return ImportConfig(format="csv", paths=(str(path),), buckets=2)


def all_histories(workspace: Workspace) -> Histories:
    return concatenate(list(Dataset(workspace).read_all()))


def events_by_user(histories: Histories | None, ids: list[str]) -> dict[str, list[tuple[str, int]]]:
    """User -> (song id, second from START) of each play or like."""
    assert histories is not None
    return {
        user: [
            (ids[song], at // 1000 - START)
            for song, at in zip(
                histories.songs[start:end].tolist(), histories.played_at[start:end].tolist(), strict=True
            )
        ]
        for user, start, end in zip(histories.user_ids, histories.offsets[:-1], histories.offsets[1:], strict=True)
    }


def likes(workspace: Workspace) -> dict[str, list[tuple[str, int]]]:
    ids = Dataset(workspace).catalog().table.column("song_id").to_pylist()
    return events_by_user(all_histories(workspace).likes, ids)


def count_stored_likes(workspace: Workspace) -> int:
    """The number of likes in the files of all parts, in which a like that two parts hold counts twice."""
    manifest = Dataset(workspace).manifest
    paths = [path for bucket in range(2) for path in manifest.histories_files(bucket)]
    return sum(len(songs) for path in paths for songs in workspace.read_table(path).column("liked").to_pylist())


def require_sound(workspace: Workspace) -> None:
    audit = verify_workspace(workspace)
    assert audit.is_sound, audit.problems


@pytest.fixture
def imported(workspace: Workspace, tmp_path: Path) -> Workspace:
    import_data(workspace, write_csv(tmp_path, "0", *FIRST_LINES))
    return workspace


def test_a_like_is_no_play_and_a_skip_is_one(imported: Workspace) -> None:
    manifest, histories = Dataset(imported).manifest, all_histories(imported)
    assert events_by_user(histories, ["s1", "s2", "s3"]) == {"ann": [("s1", 0), ("s2", 1)], "bob": [("s2", 3)]}
    assert likes(imported) == {"ann": [("s1", 2), ("s3", 9)], "bob": [("s2", 3)]}
    is_skipped = Dataset(imported).histories(["ann", "bob"]).skipped
    assert is_skipped is not None
    assert is_skipped.tolist() == [False, True, False]
    assert (manifest.plays, manifest.users, manifest.likes, manifest.merged, manifest.read) == (3, 2, 2, 1, 8)
    assert manifest.rejected == {
        "event is not a play, skip or like": 1,
        "like of a user without plays": 1,
    }
    require_sound(imported)


def test_appended_likes_stand_beside_the_earlier_plays_and_are_kept_when_parts_are_joined(
    imported: Workspace, tmp_path: Path
) -> None:
    plays_config = write_csv(tmp_path, "1", f"ann,s2,{START + 50}", header="user,song,played_at")
    assert append_plays(imported, plays_config).likes == 0
    result = append_plays(imported, write_csv(tmp_path, "2", f"bob,s4,{START + 60},like,", f"ann,s3,{START + 9},like,"))
    assert (result.plays, result.users, result.likes, result.merged) == (0, 0, 1, 1)
    append_plays(imported, write_csv(tmp_path, "3", f"cid,s1,{START + 70},play,", f"cid,s1,{START + 71},like,"))
    expected = {"ann": [("s1", 2), ("s3", 9)], "bob": [("s2", 3), ("s4", 60)], "cid": [("s1", 71)]}
    assert likes(imported) == expected
    dataset = Dataset(imported)
    batches = [batch for bucket in range(2) for batch in dataset.read_bucket(bucket, first_part=2)]
    assert {user for batch in batches for user in batch.user_ids} == {"cid"}  # the only user with plays since part 2
    require_sound(imported)
    plays = events_by_user(all_histories(imported), ["s1", "s2", "s3", "s4"])
    assert compact(imported).spans == [(0, 3)]
    assert (likes(imported), events_by_user(all_histories(imported), ["s1", "s2", "s3", "s4"])) == (expected, plays)
    require_sound(imported)


def test_likes_that_are_appended_again_are_duplicates_and_nothing_changes(imported: Workspace, tmp_path: Path) -> None:
    manifest = Dataset(imported).manifest
    result = append_plays(imported, write_csv(tmp_path, "1", *FIRST_LINES[:4], FIRST_LINES[5]))
    assert (result.dataset.id, result.plays, result.likes, result.merged) == (manifest.id, 0, 0, 5)
    result = append_plays(imported, write_csv(tmp_path, "2", *FIRST_LINES, f"ann,s3,{START + 90},play,"))
    assert (result.plays, result.likes, result.merged) == (1, 0, 6)
    assert count_stored_likes(imported) == 3
    require_sound(imported)


def test_the_like_of_a_known_play_is_kept_where_nothing_else_is_new(imported: Workspace, tmp_path: Path) -> None:
    result = append_plays(imported, write_csv(tmp_path, "1", f"ann,s1,{START},play,true", f"bob,s2,{START + 3},,true"))
    assert (result.plays, result.likes, result.merged) == (0, 0, 2)
    assert likes(imported) == {"ann": [("s1", 0), ("s1", 2), ("s3", 9)], "bob": [("s2", 3)]}
    assert events_by_user(all_histories(imported), ["s1", "s2", "s3"]) == {
        "ann": [("s1", 0), ("s2", 1)],
        "bob": [("s2", 3)],
    }
    require_sound(imported)


def test_the_first_likes_of_a_data_set_may_be_those_of_known_plays(workspace: Workspace, tmp_path: Path) -> None:
    import_data(workspace, write_csv(tmp_path, "0", f"ann,s1,{START}", header="user,song,played_at"))
    append_plays(workspace, write_csv(tmp_path, "1", f"ann,s1,{START},play,true"))
    assert likes(workspace) == {"ann": [("s1", 0)]}
    require_sound(workspace)


def test_a_deleted_users_likes_are_erased_and_older_ones_do_not_come_back(imported: Workspace, tmp_path: Path) -> None:
    forget_users(imported, ["ann"])
    compact(imported)
    assert likes(imported) == {"bob": [("s2", 3)]}
    append_plays(imported, write_csv(tmp_path, "1", f"ann,s1,{START + 80},like,", f"bob,s3,{START + 81},like,"))
    assert likes(imported) == {"bob": [("s2", 3), ("s3", 81)]}
    require_sound(imported)


def test_a_data_set_without_skips_and_likes_has_no_columns_for_them(workspace: Workspace, tmp_path: Path) -> None:
    manifest = import_data(workspace, write_csv(tmp_path, "0", f"ann,s1,{START}", header="user,song,played_at"))
    assert (manifest.has_skipped, manifest.has_likes, manifest.likes) == (False, False, 0)
    for bucket in range(2):
        (path,) = manifest.histories_files(bucket)
        assert workspace.read_table(path).column_names == ["user_id", "songs", "played_at"]


def test_users_and_songs_with_too_few_plays_take_their_likes_with_them(workspace: Workspace, tmp_path: Path) -> None:
    config: Any = write_csv(
        tmp_path,
        "0",
        *(f"{user},s{song},{START + song},play," for user in ("ann", "bob") for song in (1, 2)),
        f"cid,s1,{START},play,true",
        f"ann,s1,{START + 5},like,",
        f"ann,s9,{START + 6},like,",  # nobody plays s9
        f"cid,s1,{START + 7},like,",
    )
    manifest = import_data(workspace, config.replace(min_user_plays=2, min_song_plays=2))
    assert likes(workspace) == {"ann": [("s1", 5)], "bob": []}
    assert np.array_equal(all_histories(workspace).lengths, [2, 2])
    assert (manifest.likes, manifest.rejected) == (
        1,
        {"user with fewer than 2 plays": 1, "like of a user without plays": 1, "song with fewer than 2 plays": 1},
    )
    require_sound(workspace)
