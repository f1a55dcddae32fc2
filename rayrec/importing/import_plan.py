"""The plan of an import: settings, files, units of work, number of buckets; and the summary of its result."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, Field, model_validator

from rayrec.config import Settings, to_mapping
from rayrec.data.moments import TimeZone
from rayrec.data.spelling import validate_user
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.delimited import Delimiter, Separator
from rayrec.importing.readers.reader import (
    Reader,
    ReadOptions,
    SourceFile,
    Unit,
    file_name,
    find_files,
    is_compressed,
    plain_path,
    unterminated_file_warnings,
)
from rayrec.importing.readers.tabular import roles
from rayrec.importing.staging import UnitResult
from rayrec.storage.artifacts import SCHEMA_VERSION, SKIP_BELOW, Times, fingerprint

Kind = Literal["plays", "playlists"]

BUCKET_BYTES = 64 << 20
MIN_BUCKETS, MAX_BUCKETS = 16, 4096
UNGROUPED_UNITS = 2_048  # up to this number each unit is its own piece, so a damaged file affects no other
MAX_PIECES = 512  # maximum number of pieces if there are more units
MAX_READS = 1 << 18  # approximate maximum of reads, of two requests each, in an import's second pass or a retrieval
UNPACKED_RATIO = 6  # approximate bytes of text per byte of .gz, .bz2 or Parquet
DENSE_FORMATS = ("parquet",)
OR_SKIP = ", or skip it with --skip-damaged"  # added to the message about a damaged file
# Settings that do not change how a unit is read.
SETTINGS_NOT_FOR_READING = (
    *("paths", "min_user_plays", "min_song_plays", "buckets", "unit_mib"),
    *("max_rejected", "skip_damaged"),
)


class ImportConfig(Settings):
    """Settings of an import: which files, in which format, and which of their rows."""

    format: str = Field(description=f"Format of the files: {', '.join(FORMATS)}")
    paths: tuple[str, ...] = Field(
        min_length=1,
        description="Files or folders, local, s3:// or gs://, also .gz and .bz2; all files in a folder are imported",
    )
    kind: Kind = Field("plays", description="csv, parquet: whether a row is a play or a playlist entry")
    columns: dict[str, str] = Field(
        {},
        description="csv, parquet: column of each role, such as user=user_id,song=song_id,played_at=ts; "
        "song=artist+title makes song IDs from artist and title, and skipped=, with nothing after it, ignores a column "
        "named skipped",
    )
    delimiter: Delimiter = Field(",", description="csv: column delimiter; \\t for a tab")
    timezone: TimeZone = Field(
        "UTC", description="csv, parquet: time zone for times without a zone, such as Europe/Berlin"
    )
    skip_below: float = Field(
        SKIP_BELOW,
        ge=0,
        le=1,
        description="csv, parquet, yambda: share of a song below which a play counts as skipped",
    )
    user: Annotated[str, AfterValidator(validate_user)] = Field(
        "", description="User ID of all plays, for files that do not name a user"
    )
    user_separator: Separator = Field(
        "", description="sequences: separator between the user and the songs; if empty, each line is one user"
    )
    song_separator: Separator = Field(
        " ", min_length=1, description="sequences: separator between songs; \\t for a tab"
    )
    min_user_plays: int = Field(1, ge=1, description="Minimum plays per user (entries per playlist)")
    min_song_plays: int = Field(1, ge=1, description="Minimum plays per song, counted for the remaining users")
    buckets: int = Field(
        0,
        ge=0,
        le=MAX_BUCKETS,
        description="Number of buckets of users, fixed at the first import; 0: one per 64 MiB of input, 16 to 4096",
    )
    unit_mib: float = Field(64.0, gt=0, description="Input per task, in MiB of file size")
    max_rejected: float = Field(
        0.5, ge=0, le=1, description="Maximum share of rejected rows; if it is exceeded, nothing is imported"
    )
    skip_damaged: bool = Field(False, description="Skip files that cannot be read completely, instead of failing")

    @model_validator(mode="after")
    def _check_format(self) -> "ImportConfig":
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}; expected one of {', '.join(FORMATS)}")
        is_mapped = FORMATS[self.format].mapped
        if self.columns and not is_mapped:
            raise ValueError(f"format {self.format} has fixed columns; omit --columns")
        if self.timezone != "UTC" and not is_mapped:
            raise ValueError(f"format {self.format} has times in a known zone; omit --timezone")
        if self.kind == "playlists" and not (is_mapped or FORMATS[self.format].playlists):
            raise ValueError(f"format {self.format} contains plays, not playlists; omit --kind")
        if self.user and self.produces == "playlists":
            raise ValueError("playlists have no users; omit --user")
        if self.user and FORMATS[self.format].names_users:
            raise ValueError(f"format {self.format} names its users; omit --user")
        if self.user and self.format == "sequences" and self.user_separator:
            raise ValueError("the lines name their users before --user-separator; omit --user or --user-separator")
        known_roles = roles(self.kind == "playlists")
        unknown_roles = [role for role in self.columns if role not in known_roles]
        if unknown_roles:
            raise ValueError(f"unknown column role {unknown_roles[0]!r}; expected one of {', '.join(known_roles)}")
        return self

    @property
    def produces(self) -> Kind:
        """What the rows are: plays or playlist entries."""
        return "playlists" if FORMATS[self.format].playlists else self.kind

    @property
    def times(self) -> Times:
        """Whether plays have times or are only in order."""
        return FORMATS[self.format].times

    def reader(self) -> Reader:
        """Return the reader of the format, with these settings."""
        options = ReadOptions(
            playlists=self.produces == "playlists",
            columns=self.columns,
            delimiter=self.delimiter,
            timezone=self.timezone,
            skip_below=self.skip_below,
            user=self.user,
            user_separator=self.user_separator,
            song_separator=self.song_separator,
        )
        return FORMATS[self.format].make(options)

    @property
    def needs_lines(self) -> bool:
        """True if line numbers are needed after reading: to order rows without times, or to report dropped rows."""
        return self.times == "positions" or self.min_user_plays > 1 or self.min_song_plays > 1

    @property
    def drop_reasons(self) -> tuple[str, str]:
        """Reasons to drop rows: the user (or playlist) has too few rows, and the song has too few rows."""
        if self.produces == "playlists":
            return (
                f"playlist with fewer than {self.min_user_plays} entries",
                f"song in fewer than {self.min_song_plays} entries",
            )
        return f"user with fewer than {self.min_user_plays} plays", f"song with fewer than {self.min_song_plays} plays"


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """The files of an import and their units of work, both in the order of import."""

    files: list[SourceFile]
    units: list[Unit]
    unit_files: list[int]  # index in `files` of the file of each unit
    pieces: list[list[int]]  # units that one task reads into one file of fragments, in the order of import
    piece_names: list[str]  # depend on the names, sizes and dates of the files, and on how their units are read
    id: str  # depends on the settings and on the names, sizes and dates of the files
    notes: list[str] = field(default_factory=list)  # notes on the files, to show to a person
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why it cannot be read; it has no units

    @property
    def size(self) -> int:
        """Approximate bytes of input after decompression."""
        return sum(file.size * (UNPACKED_RATIO if _is_dense(file.source) else 1) for file in self.files)

    def line_offsets(self, lines: Sequence[int]) -> list[int]:
        """Return the number of lines before each unit in its file; `lines` is the number of lines of each unit."""
        offsets: list[int] = []
        lines_before, last_file = 0, -1
        for file, count in zip(self.unit_files, lines, strict=True):
            lines_before = lines_before if file == last_file else 0
            offsets.append(lines_before)
            lines_before, last_file = lines_before + count, file
        return offsets


def plan_import(config: ImportConfig, damaged: Mapping[str, str] | None = None) -> ImportPlan:
    """Find the files and split them into units; files in `damaged` (file -> reason) are left out.

    Raises `InputError` for a path that does not exist, a folder without files of the format, a file that is visibly
    damaged (unless it may be skipped) or lacks a header or a column, and files whose names would mix up their users.
    """
    files = find_files(config.paths, FORMATS[config.format].patterns)
    name_counts = Counter(file_name(file.source) for file in files)
    has_line_users = config.times == "positions" and not (config.user or config.user_separator)
    if has_line_users and len(name_counts) < len(files):
        raise InputError(
            f"two files are named {name_counts.most_common(1)[0][0]}, and user IDs are made from file name and line "
            "number; rename one of them, or pass --user-separator if the lines name users, or --user NAME if all plays "
            "belong to one person"
        )
    reader = config.reader()
    damaged = dict(damaged or {})
    units: list[Unit] = []
    unit_files: list[int] = []
    for file_index, file in enumerate(files):
        if file.source in damaged:
            continue
        try:
            file_units = reader.plan(file.source, file.size, max(1, round(config.unit_mib * (1 << 20))))
        except DamagedInputError as error:
            if not config.skip_damaged:
                raise DamagedInputError(f"{error}{OR_SKIP}") from error
            damaged[file.source], file_units = str(error), []
        units.extend(file_units)
        unit_files.extend([file_index] * len(file_units))
    file_fields = [list(file) for file in files]
    # The id stays in the data set's manifest, which a new format version of artifacts does not outdate.
    plan_settings = {**to_mapping(config), "files": file_fields}
    plan_id = fingerprint("import", plan_settings, {}, format_version=SCHEMA_VERSION)
    reading_settings = {
        name: value for name, value in to_mapping(config).items() if name not in SETTINGS_NOT_FOR_READING
    }
    reading_settings["lines"] = config.needs_lines
    unit_names = [
        fingerprint("unit", reading_settings, {"unit": repr((files[file], unit.start, unit.stop))})
        for file, unit in zip(unit_files, units, strict=True)
    ]
    units_per_file = Counter(unit_files)
    pieces = group_units([files[file].size / units_per_file[file] for file in unit_files])
    piece_names = [
        unit_names[piece[0]]
        if len(piece) == 1
        else fingerprint("piece", {"units": [unit_names[index] for index in piece]}, {})
        for piece in pieces
    ]
    return ImportPlan(
        files=files,
        units=units,
        unit_files=unit_files,
        pieces=pieces,
        piece_names=piece_names,
        id=plan_id,
        notes=file_notes(config, [file for file in files if file.source not in damaged]),
        damaged=damaged,
    )


def file_notes(config: ImportConfig, files: Sequence[SourceFile]) -> list[str]:
    """Return the notes of a format on the files of an import, such as that the last line of a file may be cut off."""
    file_format = FORMATS[config.format]
    notes = file_format.check_users([file.source for file in files], config.user) if file_format.check_users else []
    return [*notes, *unterminated_file_warnings(files)] if file_format.ends_with_line else notes


def group_units(sizes: Sequence[float]) -> list[list[int]]:
    """Group units of `sizes` bytes into pieces: one unit per piece, or consecutive units if there are very many."""
    if len(sizes) <= UNGROUPED_UNITS:
        return [[unit] for unit in range(len(sizes))]
    ends = np.cumsum(sizes)
    piece_numbers = np.minimum(ends / max(1, ends[-1]) * MAX_PIECES, MAX_PIECES - 1).astype(np.int64)
    return [
        unit_numbers.tolist()
        for unit_numbers in np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(piece_numbers)) + 1)
    ]


def bucket_groups(pieces: int, buckets: int) -> list[tuple[int, int]]:
    """Return the first and last bucket of each group of buckets, with about MAX_READS of groups times pieces.

    Each task of an import's second pass merges one group and reads a range of bytes of every piece. A task of a
    retrieval counts one group, and later tasks read a range of songs of every group. With few pieces, a group is one
    bucket.
    """
    group_size = max(1, -(-pieces * buckets // MAX_READS))
    return [(first, min(first + group_size, buckets) - 1) for first in range(0, buckets, group_size)]


def choose_buckets(size: int) -> int:
    """Return the number of buckets of users: one per 64 MiB of `size` (bytes), at least 16 and at most 4096."""
    return min(MAX_BUCKETS, max(MIN_BUCKETS, -(-size // BUCKET_BYTES)))


def _is_dense(source: str) -> bool:
    return is_compressed(source) or plain_path(source).endswith(DENSE_FORMATS)


FEW_REJECTED = 0.01  # share of rejected rows up to which there is no warning
OUTLIER_FACTOR = 10  # a file with 10 times the median number of rows per file, or with a tenth of it, is an outlier
OUTLIERS_SHOWN = 5
TEXT_SHOWN = 120  # characters of a rejected row


@dataclass(frozen=True, kw_only=True)
class RejectedRows:
    """The rows that were rejected for one reason."""

    reason: str
    rows: int
    share: float  # of all rows read
    source: str  # file of the first such row
    line: int  # line of the first such row
    text: str  # its text


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """Counts over the files of one import."""

    files: int
    bytes: int  # size of the files as stored
    read: int  # rows, good and bad
    rejected: int  # rows that are no plays, or could not be read
    not_plays: int  # rejected rows of other content that the format holds, such as podcasts
    reasons: list[RejectedRows]  # most frequent first
    rows_per_file: list[int]  # minimum, median and maximum of the usable rows per file
    outliers: dict[str, int]  # files with a tenth or ten times the usable rows of the median file
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why it was left out
    warnings: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the rows read that were rejected, without the rows in `beside`."""
        return (self.rejected - self.not_plays) / max(1, self.read - self.not_plays)

    def to_mapping(self) -> dict[str, Any]:
        """Return the summary as a dict for JSON."""
        return asdict(self)


class TooManyRejectedError(InputError):
    """More rows were rejected than the settings allow; nothing was imported."""

    def __init__(self, message: str, summary: ImportSummary) -> None:
        super().__init__(message)
        self.summary = summary

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.summary)


def summarize(
    plan: ImportPlan,
    units: Sequence[UnitResult],
    rejected: Iterable[tuple[int, pa.Table]],
    non_play_reasons: Sequence[str] = (),
) -> ImportSummary:
    """Summarize the results of all units.

    `rejected` are unit numbers and rejected rows, columns.REJECTED, with lines from the start of the unit. The
    rows rejected for `non_play_reasons` are other content that the format holds in addition to plays.
    """
    damaged = plan.damaged
    rows_by_file: dict[str, int] = {file.source: 0 for file in plan.files}
    rejected_counts: dict[str, int] = {}
    for file, unit in zip(plan.unit_files, units, strict=True):
        rows_by_file[plan.files[file].source] += unit.usable
        for reason, count in unit.rejected.items():
            rejected_counts[reason] = rejected_counts.get(reason, 0) + count
    rows_read = sum(unit.read for unit in units)
    examples = _examples(plan, units, rejected, set(rejected_counts))
    reasons = [
        RejectedRows(
            reason=reason, rows=rejected_counts[reason], share=rejected_counts[reason] / rows_read, **examples[reason]
        )
        for reason in sorted(rejected_counts, key=lambda reason: -rejected_counts[reason])
    ]
    usable_rows = {source: count for source, count in rows_by_file.items() if source not in damaged}
    median = statistics.median(usable_rows.values()) if usable_rows else 0
    outliers = {
        source: count
        for source, count in usable_rows.items()
        if len(usable_rows) > 2 and (count * OUTLIER_FACTOR <= median or count >= median * OUTLIER_FACTOR)
    }
    summary = ImportSummary(
        files=len(rows_by_file),
        bytes=sum(file.size for file in plan.files),
        read=rows_read,
        rejected=sum(rejected_counts.values()),
        not_plays=sum(rejected_counts.get(reason, 0) for reason in non_play_reasons),
        reasons=reasons,
        rows_per_file=[min(usable_rows.values()), round(median), max(usable_rows.values())] if usable_rows else [],
        outliers=dict(sorted(outliers.items(), key=lambda item: item[1])[:OUTLIERS_SHOWN]),
        damaged=damaged,
        warnings=list(plan.notes),
    )
    if summary.share > FEW_REJECTED:
        rejected_plays = summary.rejected - summary.not_plays
        summary.warnings.append(
            f"{rejected_plays:,} of {rows_read - summary.not_plays:,} rows ({summary.share:.1%}) were rejected."
        )
    if damaged:
        damaged_warning = (
            f"{len(damaged):,} of {len(rows_by_file):,} files could not be read completely and were skipped."
        )
        summary.warnings.append(damaged_warning)
    return summary


def rejected_examples(summary: Mapping[str, Any]) -> list[str]:
    """Return one line per reject reason, with the first such row; `summary` comes from `ImportSummary.to_mapping`."""
    return [
        f"{entry['reason']}: {entry['source']}, line {entry['line']}: {entry['text']}" for entry in summary["reasons"]
    ]


def import_notes(summary: Mapping[str, Any]) -> list[str]:
    """Return the warnings of an import, followed by examples of rejected rows.

    The list is empty if there are no warnings or no files were read.
    """
    warnings = summary.get("warnings", [])
    return [*(f"Warning: {warning}" for warning in warnings), *(rejected_examples(summary) if warnings else [])]


def _examples(
    plan: ImportPlan, units: Sequence[UnitResult], rejected: Iterable[tuple[int, pa.Table]], reasons: set[str]
) -> dict[str, dict[str, Any]]:
    """Return reject reason -> source, line and text of the first such row."""
    examples: dict[str, dict[str, Any]] = {}
    offsets = plan.line_offsets([unit.lines for unit in units])
    if not reasons:
        return examples
    for unit_number, table in rejected:
        for reason in reasons - set(examples):
            row_index = table.column("reason").index(reason).as_py()
            if row_index >= 0:
                row = table.slice(row_index, 1).to_pylist()[0]
                text = str(row["text"])[:TEXT_SHOWN]
                examples[reason] = {"source": row["source"], "line": row["line"] + offsets[unit_number], "text": text}
        if reasons <= set(examples):
            break
    return examples
