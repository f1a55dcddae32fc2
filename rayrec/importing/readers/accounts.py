"""The user of a personal export: the one given with --user, else the one its records name, else its folder name."""

import posixpath
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rayrec.data.spelling import spell_id
from rayrec.errors import InputError
from rayrec.importing.readers import delimited
from rayrec.importing.readers.delimited import DelimitedRows
from rayrec.importing.readers.reader import (
    Batch,
    ReadOptions,
    Unit,
    byte_ranges,
    file_name,
    plain_path,
    split_options,
)

# Folder names that come from services, in lower case: they do not identify a user.
EXPORT_FOLDERS = (
    *("spotify extended streaming history", "spotify account data", "my_spotify_data", "mydata"),
    *("takeout", "youtube and youtube music", "youtube", "history", "apple_media_services", "apple music activity"),
    *("apple media services information", "deezer-data", "tidal", "listens"),
)
# A folder of Google Takeout, which translates the word between the two names; its subfolders belong to the export too.
YOUTUBE = re.compile(r"youtube\b.*\byoutube music")
TAKEOUT = re.compile(r"takeout-\d{8}t\d{6}z(-\d+)*")  # an archive that was unpacked into a folder with its name
YEARLY = re.compile(r"listens/\d{4}$")  # folders of a ListenBrainz export
COPY = re.compile(r"\s*(\(\d+\)|-?\d+)$")  # added by a browser or system to a second folder with the same name


class Users:
    """Determines the user of each record of a file."""

    def __init__(self, source: str, user: str, folder: str = "") -> None:
        """`user` is the setting, or empty; `folder` is the user if neither the setting nor the record names one."""
        self.source, self.user, self.folder = source, user, folder
        self._record_users: set[str] = set()

    def of(self, record_user: str | None) -> str:
        """Return the user of a record; `record_user` is the user that the record names, or None.

        Raises `InputError` if --user would merge several users.
        """
        if not self.user:
            return record_user or self.folder
        if record_user is not None and record_user not in self._record_users:
            self._record_users.add(record_user)
            if len(self._record_users) > 1:
                raise InputError(
                    f"{self.source} contains plays of several users, such as "
                    f"{' and '.join(sorted(self._record_users))}; --user would merge them; import without --user"
                )
        return self.user


def account_of(source: str) -> str:
    """Return the name of the innermost folder around a file whose name does not come from a service, spelled as an id.

    It is empty if it is not a user ID, such as `nan`.
    """
    return spell_id(file_name(account_folder(source))) or ""


def account_folder(source: str) -> str:
    """Return the path or URI of the folder whose name `account_of` returns."""
    return _account_folder(source)[0] + split_options(source)[1]


def _account_folder(source: str) -> tuple[str, str]:
    """Return the folder whose name is the user, and the folder of the export, both without options of a URI.

    The folder of the export is the service's folder directly in the first one, or the first one itself.
    """
    path = split_options(source)[0] if "://" in source else Path(source).expanduser().resolve().as_posix()
    export = folder = posixpath.dirname(path)
    while _is_export_folder(plain_path(folder)):
        export, folder = folder, posixpath.dirname(folder)
    return folder, export


def _is_export_folder(folder: str) -> bool:
    """True for a folder whose name comes from a service."""
    name = COPY.sub("", posixpath.basename(folder).lower())
    parent = COPY.sub("", posixpath.basename(posixpath.dirname(folder)).lower())
    return (
        name in EXPORT_FOLDERS
        or any(YOUTUBE.fullmatch(text) for text in (name, parent))
        or TAKEOUT.fullmatch(name) is not None
        or YEARLY.search(folder.lower()) is not None
    )


class AccountCsvReader(ABC):
    """Reads a csv file of one person's plays.

    The user is the `user` setting, or the name of the file's folder if the setting is empty.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    @abstractmethod
    def find(self, source: str, header: list[str]) -> dict[str, int]:
        """Return the columns to read: name -> position in the header. Raises `InputError` if one is missing."""

    @abstractmethod
    def batch(self, rows: DelimitedRows, user: str, source: str) -> Batch:
        """Convert rows to plays; the columns of `rows` have the names that `find` returns."""

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split the file into byte ranges. Raises `InputError` if a column is missing."""
        self.find(source, delimited.read_header(source, ","))
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch per block of 16 MiB."""
        user = self.options.user or account_of(unit.source)
        if not user:
            folder = account_folder(unit.source)
            raise InputError(f"{unit.source}: the name of folder {folder} is not a user ID; pass --user NAME")
        for rows in delimited.read_delimited(unit, ",", lambda header: self.find(unit.source, header)):
            yield self.batch(rows, user, unit.source)


def _no_user(source: str) -> str | None:
    return None


def check_accounts(sources: Sequence[str], user: str, name_of: Callable[[str], str | None] = _no_user) -> list[str]:
    """Return notes on how the users of exports are named.

    `name_of` returns the user that a file names, or None.

    Raises `InputError` if folder names would give two people the same user or one person two users, and if files name
    several users that `user` would merge.
    """
    if user:
        file_of = {name: source for source in reversed(sources) if (name := name_of(source))}
        if len(file_of) > 1:
            (first_user, first_file), (second_user, second_file) = sorted(file_of.items())[:2]
            raise InputError(
                f"{first_file} contains plays of user {first_user!r} and {second_file} of user {second_user!r}; "
                "--user would merge them; omit --user, or if both belong to one person, import each with --user, "
                "the second with --append"
            )
        return []
    exports: dict[str, set[str]] = defaultdict(set)
    user_of_export: dict[str, str] = {}
    for source in sources:
        account, (_, export) = account_of(source), _account_folder(source)
        name = name_of(source)
        if name is None:
            exports[account].add(export)
        else:
            user_of_export.setdefault(export, name)
    for account, export_folders in exports.items():
        if len(export_folders) > 1:
            raise InputError(
                f"Folders {' and '.join(sorted(export_folders)[:3])} would both be imported as user {account!r}, since "
                "the files name no user; pass --user NAME if they belong to one person, otherwise import each folder "
                "with its own --user, the second with --append"
            )
        mixed_folders = sorted(export_folders & set(user_of_export))
        if mixed_folders:
            raise InputError(
                f"{mixed_folders[0]} contains files that name the user, such as "
                f"{user_of_export[mixed_folders[0]]!r}, and files that do not; "
                "pass --user NAME to import all of them as one user"
            )
    if not exports:
        return []
    account_names = ", ".join(map(repr, sorted(exports)[:5])) + (" ..." if len(exports) > 5 else "")
    return [
        f"No user in the files: using the folder names as user IDs ({account_names}). Pass --user NAME to override."
    ]
