"""Plays are counted within each fit range alone."""

import numpy as np
from worlds import write_dataset

from rayrec.data.histories import Histories
from rayrec.data.song_counts import SongCounter
from rayrec.data.split import FitRange
from rayrec.storage.workspace import Workspace, histories_file


def test_plays_are_counted_by_song_in_each_range(workspace: Workspace) -> None:
    histories = Histories.from_lists([[0, 2, 2], [2, 4]], [[10, 20, 30], [10, 40]], user_ids=["a", "b"])
    dataset = write_dataset(workspace, histories, num_songs=5, buckets=1)
    everything, early = SongCounter(dataset, [FitRange(), FitRange(before=30)])(0)
    assert [values.tolist() for values in everything] == [[0, 2, 4], [1, 3, 1]]
    assert [values.tolist() for values in early] == [[0, 2], [1, 2]]


def test_held_out_users_do_not_count_and_an_empty_bucket_counts_nothing(workspace: Workspace) -> None:
    histories = Histories.from_lists([[song] for song in range(50)], [[1]] * 50)
    dataset = write_dataset(workspace, histories, num_songs=50, buckets=1)
    allowed = FitRange(held_out_share=0.4)
    counted = SongCounter(dataset, [allowed])(0)[0][0]
    np.testing.assert_array_equal(counted, np.flatnonzero(allowed.allowed_users(histories.user_ids)))
    assert 0 < len(counted) < 50
    workspace.write_table(histories_file(0, 1), Histories.from_lists([], []).to_arrow())
    songs, plays = SongCounter(dataset, [allowed])(1)[0]
    assert len(songs) == len(plays) == 0
