"""What an audit collects: problems, notes, and what was looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from rayrec.errors import RayrecError
from rayrec.progress import Progress
from rayrec.storage.artifacts import sha256
from rayrec.storage.workspace import Workspace

UNREADABLE = (RayrecError, OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong, or worth knowing, and where."""

    path: str  # of a file or folder of the workspace
    text: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One thing that was looked at."""

    kind: str  # dataset, splits, descriptions, songs, models, tastes, indexes, reports, releases
    id: str
    files: int  # compared with their checksums
    problems: int


@dataclass(kw_only=True)
class Audit:
    """The findings so far. Problems make a workspace unsound, notes do not."""

    workspace: Workspace
    bar: Progress
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)  # paths that stand under a checksum
    damaged: set[str] = field(default_factory=set)  # paths that are missing or not as they were made

    @property
    def is_sound(self) -> bool:
        """True where nothing is wrong."""
        return not self.problems

    def problem(self, path: str, text: str) -> None:
        """Something is wrong with a file or folder."""
        self.problems.append(Finding(path=path, text=text))

    def note(self, path: str, text: str) -> None:
        """Something is worth knowing."""
        self.notes.append(Finding(path=path, text=text))

    def require(self, holds: bool, path: str, text: str) -> None:
        """A problem unless `holds`."""
        if not holds:
            self.problem(path, text)

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """A with block in which whatever cannot be read is a problem of `path`."""
        try:
            yield
        except UNREADABLE as error:
            self.problem(path, f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}")

    def compare(self, files: dict[str, str]) -> int:
        """Compare files, path -> sha256, with their checksums; how many there are."""
        for path, expected in files.items():
            if path in self.covered:
                continue
            self.covered.add(path)
            self.bar.advance(note=path[-60:])
            if not self.workspace.exists(path):
                self.damaged.add(path)
                self.problem(path, "is missing")
                continue
            with self.reading(path):
                if sha256(self.workspace, path) != expected:
                    self.damaged.add(path)
                    self.problem(path, "does not match its checksum")
        return len(files)

    @contextmanager
    def looking_at(self, kind: str, item: str, files: int) -> Iterator[None]:
        """A with block that looks at one thing and adds it to the list."""
        before = len(self.problems)
        yield
        self.checked.append(Checked(kind=kind, id=item, files=files, problems=len(self.problems) - before))

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "sound": self.is_sound,
            "problems": [asdict(finding) for finding in self.problems],
            "notes": [asdict(finding) for finding in self.notes],
            "checked": [asdict(item) for item in self.checked],
        }
