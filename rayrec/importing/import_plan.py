"""What to import and how: the settings, the files, their units of work and the number of buckets."""

import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayrec.config import setting, to_mapping
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.files import SourceFile, ends_with_line, find_files, is_compressed
from rayrec.importing.readers.reader import Reader, ReadOptions, Unit
from rayrec.importing.readers.tabular import roles
from rayrec.storage.artifacts import fingerprint
from rayrec.storage.dataset_manifest import Times

Kind = Literal["plays", "playlists"]

BUCKET_BYTES = 64 << 20
MIN_BUCKETS, MAX_BUCKETS = 16, 4096
UNPACKED = 6  # bytes of text in a byte of .gz, about; Parquet is as dense
DENSE_FORMATS = ("parquet",)
# Settings that change nothing in what is read of a unit.
NOT_OF_READING = (
    *("paths", "min_user_plays", "min_song_plays", "buckets", "unit_mib"),
    *("max_rejected", "skip_damaged"),
)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """From which files, in which format, and which of their rows."""

    format: str = setting(help=f"format of the files: {', '.join(FORMATS)}")
    paths: tuple[str, ...] = setting(
        help="files, or folders whose files are all imported; .gz too, local, s3:// or gs://"
    )
    kind: Kind = setting("plays", help="what the rows of a csv or parquet file are: plays or playlists (their entries)")
    columns: dict[str, str] = setting(
        None, help="csv, parquet: which column of the file holds what, such as user=user_id,song=song_id,played_at=ts"
    )
    delimiter: str = setting(",", help="csv: the character between values; \\t for a tab")
    user: str = setting("", help="whose plays they are, for formats that do not say")
    user_separator: str = setting(
        "", help="sequences: what stands between the user and the songs of a line; without it each line is a user"
    )
    song_separator: str = setting(
        " ", help="sequences: what stands between the songs of a line; a space unless given, \\t: a tab"
    )
    min_user_plays: int = setting(1, help="leave out users with fewer plays (playlists with fewer entries)")
    min_song_plays: int = setting(1, help="leave out songs with fewer plays, counted over the users who stay")
    buckets: int = setting(
        0, help="number of buckets of users, fixed at the first import; 0: one per 64 MiB, 16 to 4096"
    )
    unit_mib: float = setting(64.0, help="MiB of a file that one task reads")
    max_rejected: float = setting(0.5, help="share of the rows that may be rejected; over it nothing is imported")
    skip_damaged: bool = setting(False, help="leave out files that cannot be read to their end, instead of stopping")

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", dict(self.columns or {}))
        for name in ("delimiter", "user_separator", "song_separator"):
            object.__setattr__(self, name, getattr(self, name).replace("\\t", "\t"))
        if self.format not in FORMATS:
            raise InputError(f"unknown format {self.format!r}; expected one of {', '.join(FORMATS)}")
        if not self.paths:
            raise InputError("no path to import; give at least one file or folder")
        if self.kind not in ("plays", "playlists"):
            raise InputError(f"kind is {self.kind!r}; expected plays or playlists")
        self._check_mapping()
        for name in ("min_user_plays", "min_song_plays"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.buckets <= MAX_BUCKETS:
            raise InputError(f"buckets is {self.buckets}; expected 1 to {MAX_BUCKETS}, or 0 to choose by size")
        if not 0 <= self.max_rejected <= 1:
            raise InputError(f"max_rejected is {self.max_rejected}; expected a share from 0 to 1, such as 0.5")
        if self.unit_mib <= 0:
            raise InputError(f"unit_mib is {self.unit_mib}; expected a positive number of MiB")

    def _check_mapping(self) -> None:
        mapped = FORMATS[self.format].mapped
        if self.columns and not mapped:
            raise InputError(f"format {self.format} has fixed columns; leave the column mapping out")
        if self.kind == "playlists" and not (mapped or FORMATS[self.format].playlists):
            raise InputError(f"format {self.format} holds plays, not playlists; leave the kind out")
        known = roles(self.kind == "playlists")
        unknown = [role for role in self.columns if role not in known]
        if unknown:
            raise InputError(f"cannot map a column to {unknown[0]!r}; expected some of {', '.join(known)}")
        if len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n':
            raise InputError(f"delimiter is {self.delimiter!r}; expected one character such as , or ;")
        if not self.song_separator:
            raise InputError("song_separator is empty; give what stands between the songs, such as : or a space")

    @property
    def produces(self) -> Kind:
        """What the rows are: plays or entries of playlists."""
        return "playlists" if FORMATS[self.format].playlists else self.kind

    @property
    def times(self) -> Times:
        """Whether plays come with times or only in order."""
        return FORMATS[self.format].times

    def reader(self) -> Reader:
        """The reader of the format, with these settings."""
        options = ReadOptions(
            playlists=self.produces == "playlists",
            columns=self.columns,
            delimiter=self.delimiter,
            user=self.user,
            user_separator=self.user_separator,
            song_separator=self.song_separator,
        )
        return FORMATS[self.format].make(options)

    @property
    def drop_reasons(self) -> tuple[str, str]:
        """Why rows are left out whose user (or playlist) or whose song has too few."""
        if self.produces == "playlists":
            return (
                f"playlist with fewer than {self.min_user_plays} entries",
                f"song in fewer than {self.min_song_plays} entries",
            )
        return f"user with fewer than {self.min_user_plays} plays", f"song with fewer than {self.min_song_plays} plays"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The files of an import and their units of work, both in the order of import."""

    files: list[SourceFile]
    units: list[Unit]
    unit_files: list[int]  # the file of each unit
    unit_names: list[str]  # change with the piece of file, its size and date, and how it is read
    id: str  # changes with the settings and with the names, sizes and dates of the files
    notes: list[str] = field(default_factory=list)  # what a person should know of the files
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why it cannot be read; it has no units

    @property
    def size(self) -> int:
        """Bytes of input, unpacked, about."""
        return sum(file.size * (UNPACKED if _is_dense(file.source) else 1) for file in self.files)

    def line_offsets(self, lines: Sequence[int]) -> list[int]:
        """The line of its file before each unit's first, from the number of lines of each unit."""
        offsets: list[int] = []
        before, last_file = 0, -1
        for file, count in zip(self.unit_files, lines, strict=True):
            before = before if file == last_file else 0
            offsets.append(before)
            before, last_file = before + count, file
        return offsets


def make_plan(config: ImportConfig) -> Plan:
    """Find the files and cut them into units.

    Raises `InputError` for a path that is not there, a folder without files of the format, a file
    that can be seen to be damaged (unless it may be skipped), to lack a header or a column, and files whose users
    their names would mix up.
    """
    files = find_files(config.paths, FORMATS[config.format].patterns)
    names = Counter(posixpath.basename(file.source) for file in files)
    if config.times == "positions" and not config.user_separator and len(names) < len(files):
        raise InputError(
            f"{names.most_common(1)[0][0]} is there twice, and lines without a user are named by file and number; "
            "rename one of the files"
        )
    reader, damaged = config.reader(), {}
    units: list[Unit] = []
    unit_files: list[int] = []
    for number, file in enumerate(files):
        try:
            found = reader.plan(file.source, file.size, max(1, round(config.unit_mib * (1 << 20))))
        except DamagedInputError as error:
            if not config.skip_damaged:
                raise
            damaged[file.source], found = str(error), []
        units.extend(found)
        unit_files.extend([number] * len(found))
    described = [list(file) for file in files]
    plan_id = fingerprint("import", {**to_mapping(config), "files": described}, {})
    how = {name: value for name, value in to_mapping(config).items() if name not in NOT_OF_READING}
    unit_names = [
        fingerprint("unit", how, {"unit": repr((files[file], unit.start, unit.stop))})
        for file, unit in zip(unit_files, units, strict=True)
    ]
    whole = [file for file in files if file.source not in damaged]
    return Plan(
        files=files,
        units=units,
        unit_files=unit_files,
        unit_names=unit_names,
        id=plan_id,
        notes=_notes(config, whole),
        damaged=damaged,
    )


def _notes(config: ImportConfig, files: Sequence[SourceFile]) -> list[str]:
    kind = FORMATS[config.format]
    notes = kind.check_users([file.source for file in files], config.user) if kind.check_users else []
    if kind.ends_with_line:
        open_ended = [file.source for file in files if not ends_with_line(file)]
        if open_ended:
            more = f" and {len(open_ended) - 1:,} more files" if len(open_ended) > 1 else ""
            notes.append(f"The last line of {open_ended[0]}{more} has no line end: the file may have been cut.")
    return notes


def choose_buckets(size: int) -> int:
    """One bucket of users per 64 MiB of input, at least 16 and at most 4096."""
    return min(MAX_BUCKETS, max(MIN_BUCKETS, -(-size // BUCKET_BYTES)))


def _is_dense(source: str) -> bool:
    return is_compressed(source) or source.endswith(DENSE_FORMATS)
