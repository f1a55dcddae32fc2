"""A job that is killed after its files are in place and before the manifest of the data set is."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rayrec.storage.workspace import DATASET_MANIFEST, Workspace


@contextmanager
def killed_before_manifest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt the block when it moves the manifest of a data set into place; fail if it does not come to this."""
    move = Workspace.move

    def move_or_kill(workspace: Workspace, source: str, target: str) -> None:
        if target == DATASET_MANIFEST:
            raise KeyboardInterrupt
        move(workspace, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "move", move_or_kill)
        with pytest.raises(KeyboardInterrupt):
            yield
