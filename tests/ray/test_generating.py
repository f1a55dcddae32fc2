"""The generate job on a local cluster."""

import dataclasses

import numpy as np
import pytest
from oracle import user_index

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.histories import concatenate
from rayrec.data.synthetic import GenerateConfig, World
from rayrec.errors import InputError
from rayrec.jobs.generate import generate
from rayrec.storage.workspace import DATASET_MANIFEST, GENERATING, Workspace, histories_file

CONFIG = GenerateConfig(users=300, songs=200, artists=40, genres=5, plays=20, playlists=50, buckets=4)


@pytest.mark.usefixtures("cluster")
class TestGenerate:
    def test_data_set_holds_the_plays_of_the_world(self, workspace: Workspace) -> None:
        manifest = generate(workspace, CONFIG)
        dataset, world = Dataset(workspace), World(CONFIG)
        stored = concatenate(list(dataset.read_all()))
        expected = world.histories(user_index(stored.user_ids))
        assert sorted(stored.user_ids) == sorted(world.user_ids(np.arange(300)))
        np.testing.assert_array_equal(stored.songs, expected.songs)
        np.testing.assert_array_equal(stored.played_at, expected.played_at)
        np.testing.assert_array_equal(stored.contexts, expected.contexts)
        assert (manifest.users, manifest.plays) == (300, expected.num_plays)
        assert (manifest.first_play, manifest.last_play) == (expected.played_at.min(), expected.played_at.max())
        assert len(dataset.catalog()) == manifest.songs == 200
        songs, offsets = zip(*dataset.read_playlists(), strict=True)
        assert sum(len(batch_offsets) - 1 for batch_offsets in offsets) == manifest.playlists == 50
        assert sum(map(len, songs)) == manifest.playlist_entries

    def test_every_user_stands_in_the_bucket_of_its_hash(self, workspace: Workspace) -> None:
        generate(workspace, CONFIG)
        dataset = Dataset(workspace)
        for bucket in range(CONFIG.buckets):
            users = concatenate(list(dataset.read_bucket(bucket))).user_ids
            assert (dataset.bucket_of(users) == bucket).all()
        assert dataset.history("user-000123").num_plays > 0

    def test_an_interrupted_job_keeps_its_finished_buckets(self, workspace: Workspace) -> None:
        first = generate(workspace, CONFIG)
        workspace.delete(DATASET_MANIFEST)
        workspace.delete(histories_file(0, 2))
        _mark_unfinished(workspace, CONFIG)
        modified_at = workspace.filesystem.get_file_info(workspace.full(histories_file(0, 1))).mtime_ns
        second = generate(workspace, CONFIG)
        assert dataclasses.replace(second, created_at="") == dataclasses.replace(first, created_at="")
        assert workspace.filesystem.get_file_info(workspace.full(histories_file(0, 1))).mtime_ns == modified_at

    def test_unfinished_buckets_of_another_config_are_not_taken(self, workspace: Workspace) -> None:
        generate(workspace, CONFIG)
        workspace.delete(DATASET_MANIFEST)
        _mark_unfinished(workspace, CONFIG)
        other_config = CONFIG.replace(seed=1)
        generate(workspace, other_config)
        stored = concatenate(list(Dataset(workspace).read_all()))
        world = World(other_config)
        np.testing.assert_array_equal(stored.songs, world.histories(user_index(stored.user_ids)).songs)

    def test_a_data_set_is_replaced_only_on_purpose(self, workspace: Workspace) -> None:
        first = generate(workspace, CONFIG)
        smaller = CONFIG.replace(users=50)
        with pytest.raises(InputError, match="already has a data set"):
            generate(workspace, smaller)
        second = generate(workspace, smaller, repeat=True)
        assert (Dataset(workspace).manifest.users, second.users) == (50, 50)
        assert first.id != second.id


def _mark_unfinished(workspace: Workspace, config: GenerateConfig) -> None:
    workspace.write_json(GENERATING, to_mapping(config))
