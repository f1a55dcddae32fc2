"""Whose plays a personal export holds: who --user says, else who its records say, else the name of its folder."""

import posixpath
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rayrec.errors import InputError
from rayrec.importing.readers import delimited
from rayrec.importing.readers.delimited import DelimitedRows
from rayrec.importing.readers.reader import Batch, ReadOptions, Unit, byte_ranges

# Folders that services name, in lower case: they say nothing of the person.
EXPORT_FOLDERS = (
    *("spotify extended streaming history", "spotify account data", "my_spotify_data", "mydata"),
    *("takeout", "youtube and youtube music", "youtube", "history", "apple_media_services", "apple music activity"),
    *("apple media services information", "deezer-data", "tidal", "listens"),
)
YOUTUBE = re.compile(r"youtube\b.*\byoutube music")  # of Takeout, which translates the word between, and what is below
TAKEOUT = re.compile(r"takeout-\d{8}t\d{6}z(-\d+)*")  # an archive, unpacked into a folder of its name
YEARLY = re.compile(r"listens/\d{4}$")  # the folders of ListenBrainz's export
COPY = re.compile(r"\s*(\(\d+\)|-?\d+)$")  # that a browser or system adds to a second folder of a name


class Users:
    """Says whose each record of a file is."""

    def __init__(self, source: str, user: str, folder: str = "") -> None:
        """`user` is the setting; `folder` the name of last resort."""
        self.source, self.user, self.folder = source, user, folder
        self._named: set[str] = set()

    def of(self, named: str | None) -> str:
        """The user of a record that names one, or none. Raises `InputError` where --user would merge several."""
        if not self.user:
            return named or self.folder
        if named is not None and named not in self._named:
            self._named.add(named)
            if len(self._named) > 1:
                raise InputError(
                    f"{self.source} holds plays of several users, such as {' and '.join(sorted(self._named))}; "
                    "--user would merge them; import without --user"
                )
        return self.user


def account_of(source: str) -> str:
    """The name of the innermost folder of a file that is not named by a service."""
    return posixpath.basename(account_folder(source))


def account_folder(source: str) -> str:
    """The path of that folder."""
    return _account_folder(source)[0]


def _account_folder(source: str) -> tuple[str, str]:
    """The folder that names a user, and the one in it, or itself, that is the export."""
    path = source if "://" in source else Path(source).expanduser().resolve().as_posix()
    export = folder = posixpath.dirname(path)
    while _is_of_export(folder):
        export, folder = folder, posixpath.dirname(folder)
    return folder, export


def _is_of_export(folder: str) -> bool:
    """True for a folder that a service names."""
    name = COPY.sub("", posixpath.basename(folder).lower())
    parent = COPY.sub("", posixpath.basename(posixpath.dirname(folder)).lower())
    return (
        name in EXPORT_FOLDERS
        or any(YOUTUBE.fullmatch(text) for text in (name, parent))
        or TAKEOUT.fullmatch(name) is not None
        or YEARLY.search(folder.lower()) is not None
    )


class AccountCsvReader(ABC):
    """Reads a csv of one person's plays; the user is the `user` setting where there is one, else the file's folder."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    @abstractmethod
    def find(self, source: str, header: list[str]) -> dict[str, int]:
        """The columns to read, name -> place in the header. Raises `InputError` where one is missing."""

    @abstractmethod
    def batch(self, rows: DelimitedRows, user: str, source: str) -> Batch:
        """The plays among some rows, by their names in `find`."""

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Byte ranges."""
        self.find(source, delimited.read_header(source, ","))
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch per block of 16 MiB."""
        user = self.options.user or account_of(unit.source)
        for rows in delimited.read_delimited(unit, ",", lambda header: self.find(unit.source, header)):
            yield self.batch(rows, user, unit.source)


def _nobody(source: str) -> str | None:
    return None


def check_accounts(sources: Sequence[str], user: str, name_of: Callable[[str], str | None] = _nobody) -> list[str]:
    """Notes on how the users of some exports are named.

    `name_of` gives the user that a file names, None where it names none.

    Raises `InputError` where names of folders would make one user of two people or two users of one, and where files
    name several users, whom `user` would merge.
    """
    if user:
        file_of = {name: source for source in reversed(sources) if (name := name_of(source))}
        if len(file_of) > 1:
            (one, first), (other, second) = sorted(file_of.items())[:2]
            raise InputError(
                f"{first} holds plays of user {one!r} and {second} of {other!r}; --user would merge them; omit it, "
                "or if they are one person's import each with --user, the second with --append"
            )
        return []
    exports: dict[str, set[str]] = defaultdict(set)
    named: dict[str, str] = {}
    for source in sources:
        account, (_, export) = account_of(source), _account_folder(source)
        name = name_of(source)
        if name is None:
            exports[account].add(export)
        else:
            named.setdefault(export, name)
    for account, folders in exports.items():
        if len(folders) > 1:
            raise InputError(
                f"Folders {' and '.join(sorted(folders)[:3])} would both be imported as user {account!r}; the files "
                "name no user. Give --user NAME if they are one person's, else import each folder with its own --user, "
                "the second with --append"
            )
        mixed = sorted(folders & set(named))
        if mixed:
            raise InputError(
                f"{mixed[0]} holds files that name the user, such as {named[mixed[0]]!r}, and files that do not; "
                "give --user NAME, under which all of them are imported"
            )
    if not exports:
        return []
    names = ", ".join(map(repr, sorted(exports)[:5])) + (" ..." if len(exports) > 5 else "")
    return [f"No user in the files: using the folder names as user IDs ({names}). Pass --user NAME to override."]
