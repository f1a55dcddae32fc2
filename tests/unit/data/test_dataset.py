"""Parts of the histories are merged while they are read: each user once, in bounded batches."""

import numpy as np
import pytest
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset, merge_users
from rayrec.data.histories import Histories, concatenate
from rayrec.errors import DamagedArtifactError, NotFoundError
from rayrec.importing.staging import write_histories
from rayrec.storage.workspace import Workspace, histories_file


def rows_of(histories: Histories) -> dict[str, list[tuple[int, int]]]:
    """User -> (moment, song) of every play; fails if a user occurs twice."""
    assert len(set(histories.user_ids)) == len(histories)
    spans = zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
    return {
        user: list(zip(histories.played_at[a:b].tolist(), histories.songs[a:b].tolist(), strict=True))
        for user, (a, b) in zip(histories.user_ids, spans, strict=True)
    }


def cut_into_parts(histories: Histories, count: int, seed: int) -> list[Histories]:
    """Put each play into a random part. Each part is sorted by user id and omits users without plays in it."""
    histories = histories.take(np.argsort(histories.user_ids))
    part = np.random.default_rng(seed).integers(count, size=histories.num_plays)
    kept = [histories.keep(part == number) for number in range(count)]
    return [one.take(one.lengths > 0) for one in kept]


@pytest.mark.parametrize("users_per_batch", [1, 7, 1_000])
def test_parts_read_as_one_history_a_user_whatever_the_batches(workspace: Workspace, users_per_batch: int) -> None:
    whole = random_histories(80, 50, seed=3)
    whole = whole.take(whole.lengths > 0)
    dataset = write_dataset(workspace, whole, 50, buckets=1)
    for number, part in enumerate(cut_into_parts(whole, 4, seed=1)):
        workspace.write_table(histories_file(number, 0), part.to_arrow(), row_group_rows=11)
    dataset = Dataset(workspace)
    object.__setattr__(dataset.manifest, "parts", 4)
    batches = list(dataset.read_bucket(0, users_per_batch))
    assert max(len(batch) for batch in batches) <= users_per_batch
    assert rows_of(concatenate(batches)) == rows_of(whole)
    later = concatenate(list(dataset.read_bucket(0, users_per_batch, first_part=2)))
    expected = merge_users(cut_into_parts(whole, 4, seed=1)[2:])
    assert rows_of(later) == rows_of(expected)
    user = str(whole.user_ids[-1])
    assert rows_of(dataset.history(user)) == {user: rows_of(whole)[user]}
    several = [str(whole.user_ids[row]) for row in (5, 2, 5, 40)]
    several.insert(1, "nobody")
    histories = dataset.histories(several)
    assert histories.user_ids.tolist() == several
    everyone = {**rows_of(whole), "nobody": []}
    assert [rows_of(histories.take(np.array([row])))[user] for row, user in enumerate(several)] == [
        everyone[user] for user in several
    ]
    assert dataset.histories(["nobody"]).lengths.tolist() == [0]
    with pytest.raises(NotFoundError, match="'nobody' not found"):
        dataset.history("nobody")


def test_plays_of_one_moment_keep_the_order_of_the_parts() -> None:
    one = Histories.from_lists([[5, 6]], [[10, 10]], ["ann"])
    two = Histories.from_lists([[7], [8]], [[10], [3]], ["bob", "ann"])
    assert rows_of(merge_users([one, two])) == {"ann": [(3, 8), (10, 5), (10, 6)], "bob": [(10, 7)]}


def test_what_one_part_does_not_tell_is_none_and_false() -> None:
    one = Histories.from_lists([[5]], [[10]], ["ann"])
    two = Histories.from_lists([[7]], [[5]], ["ann"], contexts=[[3]], skipped=[[True]])
    merged = merge_users([one, two])
    assert merged.contexts is not None
    assert merged.skipped is not None
    assert (merged.contexts.tolist(), merged.skipped.tolist()) == ([3, 0], [True, False])


def test_likes_of_all_parts_stand_by_time_each_once_and_of_a_part_without_there_are_none() -> None:
    one = Histories.from_lists([[5], [6]], [[10], [20]], ["ann", "bob"], likes=[[(5, 11), (7, 30)], []])
    two = Histories.from_lists([[], [8]], [[], [3]], ["ann", "cid"], likes=[[(5, 11), (5, 12), (9, 1)], [(8, 4)]])
    three = Histories.from_lists([[1]], [[1]], ["bob"])
    merged = merge_users([one, two, three])
    assert merged.likes is not None
    assert rows_of(merged) == {"ann": [(10, 5)], "bob": [(1, 1), (20, 6)], "cid": [(3, 8)]}
    assert rows_of(merged.likes) == {"ann": [(1, 9), (11, 5), (12, 5), (30, 7)], "bob": [], "cid": [(4, 8)]}


def test_a_part_in_another_order_is_refused(workspace: Workspace) -> None:
    write_dataset(workspace, Histories.from_lists([[1], [2]], [[1], [2]], ["ann", "bob"]), 5, buckets=1)
    workspace.write_table(histories_file(1, 0), Histories.from_lists([[1], [2]], [[1], [2]], ["bob", "ann"]).to_arrow())
    dataset = Dataset(workspace)
    object.__setattr__(dataset.manifest, "parts", 2)
    with pytest.raises(DamagedArtifactError, match="part=0001"):
        list(dataset.read_bucket(0))


def test_a_batch_is_bounded_by_plays_where_some_users_have_many(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrec.data.dataset.PLAYS_PER_READ", 500)
    monkeypatch.setattr("rayrec.importing.staging.PLAYS_PER_ROW_GROUP", 100)
    lengths = [3] * 200 + [2_000] + [40] * 100 + [3] * 200
    histories = Histories.from_lists(
        [np.zeros(length, int) for length in lengths],  # type: ignore[misc]
        [np.arange(length) for length in lengths],  # type: ignore[misc]
    )
    dataset = write_dataset(workspace, histories, 1, buckets=1)
    write_histories(workspace, histories_file(0, 0), [histories])
    sizes = [batch.num_plays for batch in dataset.read_bucket(0, users_per_batch=5_000)]
    assert sum(sizes) == sum(lengths)
    assert max(sizes) <= 500 + 2_000
    assert sorted(sizes)[-2] <= 600
