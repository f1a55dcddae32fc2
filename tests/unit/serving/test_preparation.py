"""The data of a release that replicas share is made once per node, by a separate process."""

import sys
from pathlib import Path

import pytest
from served import damage, write_release, write_world
from worker_memory import answer_requests, growth

from rayrec.data.dataset import Dataset
from rayrec.errors import RayrecError
from rayrec.jobs.planning.formulas import IDLE_WORKER, replica_memory, serving_memory
from rayrec.recommend.answer import load_recommender
from rayrec.serving import preparation, served_catalog
from rayrec.serving.preparation import answering_bytes, make_shared, prepare
from rayrec.serving.served_catalog import load_served_catalog
from rayrec.storage.artifacts import Manifest
from rayrec.storage.object_storage import CACHE_VARIABLE
from rayrec.storage.workspace import Workspace


@pytest.fixture
def release(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(preparation, "SMALL_RELEASE", 0)
    write_world(workspace)
    return write_release(workspace)


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every later start of a process fail."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")


def test_one_process_makes_the_catalog_for_all_replicas(
    workspace: Workspace, release: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(workspace, release.id)
    forbid_processes(monkeypatch)
    prepare(workspace, release.id)  # as the second replica does
    monkeypatch.setattr(served_catalog, "with_folded", None)  # so that making another table fails
    recommender = load_recommender(workspace, Dataset(workspace), release.inputs)
    catalog = load_served_catalog(workspace, release, recommender)
    assert catalog.find(["song-3", "nothing"]).tolist() == [3, -1]


def test_a_damaged_release_is_refused_with_what_the_process_found(workspace: Workspace, release: Manifest) -> None:
    damage(workspace, release.id)
    with pytest.raises(RayrecError, match=r"cannot be prepared: .*model.safetensors does not match the checksum"):
        prepare(workspace, release.id)
    damage(workspace, release.id)  # changes the same bit again, which repairs the file
    prepare(workspace, release.id)


def test_a_small_release_is_left_to_the_replica(
    workspace: Workspace, release: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_processes(monkeypatch)
    monkeypatch.setattr(preparation, "SMALL_RELEASE", answering_bytes(workspace, release) + 1)
    prepare(workspace, release.id)
    monkeypatch.setattr(preparation, "SMALL_RELEASE", answering_bytes(workspace, release))
    with pytest.raises(FileNotFoundError):
        prepare(workspace, release.id)


@pytest.mark.slow
def test_private_memory_of_a_replica_at_a_million_songs_is_less_than_100_mb_above_that_at_10_000(
    tmp_path: Path,
) -> None:
    replica_growth = {}
    for songs in (10_000, 1_000_000):
        workspace = Workspace(tmp_path / str(songs))
        write_world(workspace, num_songs=songs)
        release = write_release(workspace, kind="ivf")
        idle_bytes, shared_growth, _ = growth(make_shared, workspace.uri, release.id)
        assert idle_bytes - IDLE_WORKER + serving_memory(songs, 0, 0) == pytest.approx(
            idle_bytes + shared_growth, rel=0.15
        )
        _, replica_growth[songs], _ = growth(
            answer_requests, workspace.uri, f"sqlite:///{tmp_path}/{songs}.sqlite", songs
        )
        print(
            f"{songs:,} songs: the making {shared_growth / 1e6:.0f} MB, a replica {replica_growth[songs] / 1e6:.0f} MB"
        )
    assert idle_bytes - IDLE_WORKER + replica_memory() == pytest.approx(idle_bytes + replica_growth[10_000], rel=0.15)
    assert replica_growth[1_000_000] - replica_growth[10_000] < 100_000_000
