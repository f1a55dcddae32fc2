"""On object storage: whole files or none, patience with failures, a clear error where they do not end."""

from collections.abc import Iterator

import numpy as np
import pytest
from s3 import S3Server, s3_server

from rayrec.errors import BusyError, StorageError
from rayrec.storage import locking, object_storage
from rayrec.storage.workspace import Workspace

pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.fixture
def remote(server: S3Server, request: pytest.FixtureRequest) -> Iterator[Workspace]:
    yield Workspace(server.uri(request.node.name))
    server.fail(0.0)


def test_a_write_that_fails_leaves_what_was_there(remote: Workspace) -> None:
    remote.write_bytes("f", b"old")
    with pytest.raises(RuntimeError, match="half way"), remote.open_output("f") as stream:  # noqa: PT012
        stream.write(b"new")
        raise RuntimeError("half way")
    assert remote.read_bytes("f") == b"old"
    assert remote.files("") == ["f"]


def test_requests_that_fail_now_and_then_are_asked_again(remote: Workspace, server: S3Server) -> None:
    server.fail(0.15)
    before = server.counts()["failed"]
    arrays = {f"a/{number}.npy": np.full(50_000, number, dtype=np.float32) for number in range(12)}
    for path, array in arrays.items():
        remote.write_array(path, array)
    for path, array in arrays.items():
        np.testing.assert_array_equal(remote.read_array(path), array)
    assert remote.files("a") == sorted(arrays)
    assert server.counts()["failed"] > before


def test_a_storage_that_does_not_answer_is_named_and_nothing_half_is_there(
    remote: Workspace, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(object_storage, "CLIENT_ATTEMPTS", 1)
    hasty = Workspace(remote.uri)
    hasty.write_bytes("f", b"old")
    server.fail(1.0)
    with pytest.raises(StorageError, match=r"/f was not written in 4 attempts.*completed work is kept"):
        hasty.write_bytes("f", b"new" * 1000)
    server.fail(0.0)
    assert hasty.read_bytes("f") == b"old"


def test_a_lease_is_taken_refused_and_given_back(remote: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "SETTLE_SECONDS", 0.1)
    other = locking.Holder(host="elsewhere", pid=7, command="train", since="2026-11-24T10:00:00", token="t")
    remote.write_json(locking.LEASE, vars(other))
    with pytest.raises(BusyError, match="process 7 on elsewhere"), locking.exclusive(remote, "taste"):
        pass
    remote.delete(locking.LEASE)
    with locking.exclusive(remote, "taste"), locking.exclusive(Workspace(remote.uri), "inner"):
        assert remote.read_json(locking.LEASE)["command"] == "taste"
    assert not remote.exists(locking.LEASE)
