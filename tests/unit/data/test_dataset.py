"""Parts of the histories are merged while they are read: each user once, in bounded batches."""

import numpy as np
import pytest
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset, merge_users
from rayrec.data.histories import Histories, concatenate
from rayrec.errors import DamagedArtifactError, NotFoundError
from rayrec.importing.staging import write_histories
from rayrec.storage.workspace import Workspace, histories_file


def plays_by_user(histories: Histories) -> dict[str, list[tuple[int, int]]]:
    """User -> (moment, song) of every play; fails if a user occurs twice."""
    assert len(set(histories.user_ids)) == len(histories)
    spans = zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
    return {
        user: list(zip(histories.played_at[start:end].tolist(), histories.songs[start:end].tolist(), strict=True))
        for user, (start, end) in zip(histories.user_ids, spans, strict=True)
    }


def cut_into_parts(histories: Histories, count: int, seed: int) -> list[Histories]:
    """Put each play into a random part. Each part is sorted by user id and omits users without plays in it."""
    histories = histories.take(np.argsort(histories.user_ids))
    part_numbers = np.random.default_rng(seed).integers(count, size=histories.num_plays)
    parts = [histories.keep(part_numbers == number) for number in range(count)]
    return [part.take(part.lengths > 0) for part in parts]


@pytest.mark.parametrize("users_per_batch", [1, 7, 1_000])
def test_parts_read_as_one_history_a_user_whatever_the_batches(workspace: Workspace, users_per_batch: int) -> None:
    full = random_histories(80, 50, seed=3)
    full = full.take(full.lengths > 0)
    dataset = write_dataset(workspace, full, 50, buckets=1)
    for number, part in enumerate(cut_into_parts(full, 4, seed=1)):
        workspace.write_table(histories_file(number, 0), part.to_arrow(), row_group_rows=11)
    dataset = Dataset(workspace)
    object.__setattr__(dataset.manifest, "parts", 4)
    batches = list(dataset.read_bucket(0, users_per_batch))
    assert max(len(batch) for batch in batches) <= users_per_batch
    assert plays_by_user(concatenate(batches)) == plays_by_user(full)
    later_parts = concatenate(list(dataset.read_bucket(0, users_per_batch, first_part=2)))
    expected = merge_users(cut_into_parts(full, 4, seed=1)[2:])
    assert plays_by_user(later_parts) == plays_by_user(expected)
    user = str(full.user_ids[-1])
    assert plays_by_user(dataset.history(user)) == {user: plays_by_user(full)[user]}
    user_ids = [str(full.user_ids[row]) for row in (5, 2, 5, 40)]
    user_ids.insert(1, "nobody")
    histories = dataset.histories(user_ids)
    assert histories.user_ids.tolist() == user_ids
    all_plays = {**plays_by_user(full), "nobody": []}
    assert [plays_by_user(histories.take(np.array([row])))[user] for row, user in enumerate(user_ids)] == [
        all_plays[user] for user in user_ids
    ]
    assert dataset.histories(["nobody"]).lengths.tolist() == [0]
    with pytest.raises(NotFoundError, match="'nobody' not found"):
        dataset.history("nobody")


def test_plays_of_one_moment_keep_the_order_of_the_parts() -> None:
    first = Histories.from_lists([[5, 6]], [[10, 10]], ["ann"])
    second = Histories.from_lists([[7], [8]], [[10], [3]], ["bob", "ann"])
    assert plays_by_user(merge_users([first, second])) == {"ann": [(3, 8), (10, 5), (10, 6)], "bob": [(10, 7)]}


def test_contexts_and_skips_that_a_part_lacks_are_zero_and_false() -> None:
    first = Histories.from_lists([[5]], [[10]], ["ann"])
    second = Histories.from_lists([[7]], [[5]], ["ann"], contexts=[[3]], skipped=[[True]])
    merged = merge_users([first, second])
    assert merged.contexts is not None
    assert merged.skipped is not None
    assert (merged.contexts.tolist(), merged.skipped.tolist()) == ([3, 0], [True, False])


def test_likes_of_all_parts_are_sorted_by_time_without_duplicates_and_a_part_may_have_none() -> None:
    first = Histories.from_lists([[5], [6]], [[10], [20]], ["ann", "bob"], likes=[[(5, 11), (7, 30)], []])
    second = Histories.from_lists([[], [8]], [[], [3]], ["ann", "cid"], likes=[[(5, 11), (5, 12), (9, 1)], [(8, 4)]])
    third = Histories.from_lists([[1]], [[1]], ["bob"])
    merged = merge_users([first, second, third])
    assert merged.likes is not None
    assert plays_by_user(merged) == {"ann": [(10, 5)], "bob": [(1, 1), (20, 6)], "cid": [(3, 8)]}
    assert plays_by_user(merged.likes) == {"ann": [(1, 9), (11, 5), (12, 5), (30, 7)], "bob": [], "cid": [(4, 8)]}


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
