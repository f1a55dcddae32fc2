"""Deezer: deezer-data_NUMBER.xlsx, which Deezer sends to a user on request. Written from public descriptions.

The sheet of the listening history has the columns Song Title, Artist, ISRC, Album Title, Listening Time (seconds) and
Date, which is read as UTC. The song id is the ISRC, or `artist – title` without one.
"""

import re
import zipfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import IO, Any, cast

from rayrec.data import columns
from rayrec.data.spelling import name_song
from rayrec.errors import DamagedInputError, first_line
from rayrec.importing.readers.accounts import account_of, check_accounts
from rayrec.importing.readers.json_rows import Record, RowCollector, text
from rayrec.importing.readers.reader import (
    STREAM_MS,
    Batch,
    ReadOptions,
    Unit,
    file_name,
    open_source,
    required_columns,
)

SHEET = "_listeningHistory"  # end of the name of the sheet, after a number
TITLE, ARTIST, ISRC, SECONDS, DATE = "Song Title", "Artist", "ISRC", "Listening Time", "Date"
ACCOUNT = re.compile(r"deezer-data_(\d+)", re.IGNORECASE)


class DeezerReader:
    """Reads deezer-data_NUMBER.xlsx. Line numbers are row numbers. A play of under 30 seconds counts as skipped.

    The user is the `user` setting if given, else the number in the file's name, else the name of the file's folder.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Return one unit per file."""
        return [Unit(source=source)]

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch with the whole file. Raises `DamagedInputError` if a part of the archive is damaged."""
        rows = RowCollector(columns.PLAYS, unit.source)
        user = self.options.user or _account_number(unit.source) or account_of(unit.source)
        header, *lines = _read_sheet(unit.source)
        names = [str(name).strip() for name in header]
        required_columns(unit.source, names, (TITLE, ARTIST, DATE), (ISRC, SECONDS))
        for row_number, cells in enumerate(lines, start=2):
            play = dict(zip(names, cells, strict=False))
            if any(cell is not None for cell in cells):
                rows.add(_to_row(play, user), Record(row_number, play))
        yield rows.batch(len(lines) + 1)


def check_deezer_accounts(sources: Sequence[str], user: str) -> list[str]:
    """Same as `check_accounts`, for files whose names may contain the number of an account."""
    return check_accounts(sources, user, _account_number)


def _account_number(source: str) -> str | None:
    match = ACCOUNT.match(file_name(source))
    return match[1] if match else None


def _read_sheet(source: str) -> list[Sequence[Any]]:
    """Return the rows of the listening history, the header first."""
    import openpyxl

    with open_source(source) as stream:
        try:
            with zipfile.ZipFile(cast(IO[bytes], stream)) as archive:
                broken_part = archive.testzip()
            if broken_part is not None:
                raise ValueError(f"its part {broken_part} does not match its checksum")
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
            sheet = next((worksheet for worksheet in book.worksheets if worksheet.title.endswith(SHEET)), None)
            if sheet is not None:
                sheet.reset_dimensions()  # some writers store wrong dimensions, and rows beyond them would be ignored
                rows = list(sheet.iter_rows(values_only=True))
        except Exception as error:  # openpyxl raises exceptions of many types for a broken part
            raise DamagedInputError(
                f"{source} is not a valid Excel file: {first_line(error)}; fetch it again"
            ) from error
    if sheet is None or not rows:
        raise DamagedInputError(
            f"{source} has no listening history, a sheet whose name ends in {SHEET}; check the format"
        )
    return rows


def _to_row(play: dict[str, Any], user: str) -> dict[str, Any]:
    title, artist = text(play.get(TITLE)), text(play.get(ARTIST))
    seconds = play.get(SECONDS)
    skipped = None
    if isinstance(seconds, int | float) and seconds >= 0:  # -1 means unknown
        skipped = seconds * 1000 < STREAM_MS
    return {
        columns.USER: user,
        columns.SONG_ID: text(play.get(ISRC)) or name_song(artist, title),
        columns.PLAYED_AT: _date_text(play.get(DATE)),
        columns.SKIPPED: skipped,
        columns.TITLE: title,
        columns.ARTIST: artist,
    }


def _date_text(value: Any) -> str | None:
    """Return a date cell, either an Excel date or text, as text with the zone UTC."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds") + "Z"
    cell_text = text(value)
    return (
        f"{cell_text}Z"
        if cell_text and re.fullmatch(r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}(:\d{2})?", cell_text)
        else cell_text
    )
