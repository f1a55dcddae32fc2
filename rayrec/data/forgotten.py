"""Deleted users: a list that hides them at once and keeps old plays from bringing them back.

An entry is a digest of a user's id and the moment of the deletion. Plays up to that moment are never taken again, by
an import, a load or a request; later ones are those of a new user. New entries are empty files, so that any process
may add one without a lock. They wait there until a compaction has erased the users' rows, and then move to one list.

The digest has no key: every replica and every later import must come to the same one, and a key that all of them read
would lie beside the list. It hides ids from whoever reads the list, not from one who guesses an id and looks it up.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from rayrec.data.spelling import spell_id
from rayrec.data.windows import NEVER
from rayrec.storage.workspace import FORGOTTEN, Workspace

WAITING = f"{FORGOTTEN}/waiting"  # an empty file for each deletion whose rows are not erased: digest and moment
ERASED = f"{FORGOTTEN}/erased.json"  # digest -> ms UTC of the last deletion
PURPOSE = b"rayrec forgotten"  # so that the digests are those of no other list


@dataclass(frozen=True)
class ForgottenUsers:
    """Deleted users."""

    moments: Mapping[str, int]  # digest of a user's id -> ms UTC of the last deletion

    def __len__(self) -> int:
        return len(self.moments)

    def until(self, user_ids: Iterable[str]) -> np.ndarray:
        """int64 (U,): ms UTC of each user's last deletion, NEVER for users who were not deleted."""
        users = list(user_ids)
        if not self.moments:
            return np.full(len(users), NEVER)
        return np.array([self.moments.get(user_digest(user), NEVER) for user in users], dtype=np.int64)

    def holds(self, user_ids: Iterable[str]) -> np.ndarray:
        """bool (U,): which users were deleted."""
        deleted: np.ndarray = self.until(user_ids) != NEVER
        return deleted

    def scrub(self, value: Any) -> Any:
        """A JSON value in which each text that is the id of a deleted user, or a path with it, is empty."""
        if isinstance(value, str):
            return "" if self._is_named(value) else value
        if isinstance(value, Mapping):
            return {self.scrub(key): self.scrub(item) for key, item in value.items()}
        return [self.scrub(item) for item in value] if isinstance(value, list | tuple) else value

    def _is_named(self, text: str) -> bool:
        parts = [text, *text.split("/")]
        # A file may be named after its user, with endings such as .csv.gz behind.
        parts += [part[:place] for part in parts for place, letter in enumerate(part) if letter == "." and place]
        return any(user_digest(user) in self.moments for part in parts if (user := spell_id(part)) is not None)


NOBODY = ForgottenUsers({})


def user_digest(user_id: str) -> str:
    """32 hex digits that stand for a user's id; the id cannot be read from them."""
    return blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=16, person=PURPOSE).hexdigest()


def mark_forgotten(workspace: Workspace, user_ids: Sequence[str], at: int) -> None:
    """Add users to the list, known or not, deleted at a moment, ms UTC. From now on they are hidden."""
    for user_id in user_ids:
        workspace.write_bytes(f"{WAITING}/{user_digest(user_id)}-{at}", b"")


def read_waiting(workspace: Workspace) -> ForgottenUsers:
    """The deleted users whose rows are not erased yet, by one listing."""
    return _latest(_entry(path) for path in workspace.files(WAITING))


def read_forgotten(workspace: Workspace) -> ForgottenUsers:
    """All deleted users."""
    erased = workspace.read_json(ERASED) if workspace.exists(ERASED) else {}
    return _latest([*erased.items(), *read_waiting(workspace).moments.items()])


def mark_erased(workspace: Workspace, waiting: ForgottenUsers) -> None:
    """Note that the rows of users are erased. Entries that came meanwhile stay; may be repeated at any point."""
    erased = workspace.read_json(ERASED) if workspace.exists(ERASED) else {}
    workspace.write_json(ERASED, dict(_latest([*erased.items(), *waiting.moments.items()]).moments))
    for path in workspace.files(WAITING):
        digest, at = _entry(path)
        if at <= waiting.moments.get(digest, NEVER):
            workspace.delete(path)


def _entry(path: str) -> tuple[str, int]:
    digest, _, at = path.rpartition("/")[2].partition("-")
    return digest, int(at)


def _latest(entries: Iterable[tuple[str, int]]) -> ForgottenUsers:
    moments: dict[str, int] = {}
    for digest, at in entries:
        moments[digest] = max(at, moments.get(digest, NEVER))
    return ForgottenUsers(moments)
