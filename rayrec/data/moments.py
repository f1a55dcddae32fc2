"""Reads moments from Unix seconds, Unix milliseconds and ISO 8601, and converts them to ms since 1970 UTC.

Columns of plays may also have dates with the month in words, as Last.fm writes them.

A single moment must have a time zone. In a column of plays, times without a zone are in the time zone of the import's
settings. If a clock change repeats a local time, the first of the two moments is taken; if it skips one, the time is
moved forward to the end of the skipped hour.
"""

import re
from datetime import datetime, timedelta, timezone
from typing import Annotated
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator

from rayrec.data.spelling import Problems, missing, plain, valid_text
from rayrec.errors import InputError

NO_TIME = "no time"
NOT_A_TIME = "time is neither unix seconds, unix milliseconds nor ISO 8601"
NOT_LOCAL = "time does not match the time pattern of this format"
NOT_A_ZONE = "unknown time zone"
OUT_OF_RANGE = "time is not between 1970 and 2100"
IN_MICROSECONDS = "time is in unix microseconds; expected unix seconds or milliseconds"
IN_NANOSECONDS = "time is in unix nanoseconds; expected unix seconds or milliseconds"

# Numbers below are seconds (until the year 5138), from here on milliseconds (since March 1973).
FIRST_MILLISECONDS = 100_000_000_000
FIRST_MICROSECONDS, FIRST_NANOSECONDS = 10**14, 10**17  # such numbers are rejected
FIRST_YEAR, LAST_YEAR = 1971, 2100  # local times from the first to before the last year are accepted, in any zone
END_MS = 4_102_444_800_000  # 2100-01-01
ASSUMED_GAP_MS = 180_000  # between plays without times: about the length of a song, so that a line is one session
LINE_GAP_MS = 21 * ASSUMED_GAP_MS  # between two lines of a user's plays without times: starts a new session
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
NUMBER = r"^[+-]?\d{1,19}(\.\d*)?$"
ZONED = r"\d:?\d{2}(:?\d{2}([.,]\d+)?)?\s*([Zz]|UTC|[+-]\d{2}(:?\d{2})?)$"
ISO = r"^\d{4}-?\d{2}-?\d{2}[T ]\d{2}:?\d{2}"
DATE = r"\d{4}-?\d{2}-?\d{2}"
DATE_ALONE = r"^\d{4}-\d{2}-\d{2}$"  # in a column of plays; eight digits without hyphens are a number there
LOCAL = rf"{DATE_ALONE}|{ISO}(:?\d{{2}}([.,]\d+)?)?$"
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# 14 Nov 2023. With the month in words, day and month cannot be confused, unlike in 11/12/2023.
WRITTEN_DATE = rf"^(\d{{1,2}}) (?i:({'|'.join(MONTHS)})[a-z]{{0,6}}) (\d{{4}})$"
WRITTEN = rf"{WRITTEN_DATE[:-1]}(,? (\d{{1,2}}):(\d{{2}})(:\d{{2}})?)?$"  # 14 Nov 2023, 23:05, as Last.fm shows times
EXPECTED = "give ISO 8601 with a zone, such as 2015-01-20T18:30:00Z, or unix seconds or milliseconds"

_NUMBER = re.compile(NUMBER, re.ASCII)
_ISO_TIME = re.compile(
    r"(\d{4})(-?)(\d{2})\2(\d{2})[T ](\d{2})(:?)(\d{2})(?:\6(\d{2})(?:[.,](\d+))?)?\s*"
    r"(?:[Zz]|UTC|([+-](?:[01]\d|2[0-3]))(?::?([0-5]\d))?)",
    re.ASCII,
)


def time_zone(name: str) -> ZoneInfo:
    """Return the time zone of an IANA name. Raises `InputError` for an unknown one."""
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):  # the errors of zoneinfo for an unknown zone
        raise InputError(f"unknown time zone {name!r}; give an IANA name such as Europe/Berlin or UTC") from None


def validate_zone_name(name: str | None) -> str | None:
    """Return the name of the zone of a setting, or None. Raises `ValueError`, for pydantic, if the zone is unknown."""
    try:
        return name if name is None else time_zone(name).key
    except InputError as error:
        raise ValueError(str(error)) from None


TimeZone = Annotated[str, AfterValidator(validate_zone_name)]


def now_ms() -> int:
    """Return the current time, ms UTC."""
    return round(datetime.now(timezone.utc).timestamp() * 1000)


def format_iso(moment: int) -> str:
    """Return a moment, ms UTC, as ISO 8601 with milliseconds, the form in all answers."""
    return (EPOCH + timedelta(milliseconds=moment)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_timestamp(value: str | int | float) -> int:
    """Return a moment from a command, a setting or a request as ms UTC.

    Raises `InputError` for a value that is not a time, has no zone, or is not between 1970 and 2100.
    """
    text = str(value).strip()
    if _NUMBER.match(text):
        number = float(text)
        ms = round(number * 1000) if abs(number) < FIRST_MILLISECONDS else round(number)
    else:
        ms = _parse_iso(text)
    if not 0 <= ms < END_MS:
        raise InputError(f"{OUT_OF_RANGE}: {value!r}; {EXPECTED}")
    return ms


def _parse_iso(text: str) -> int:
    match = _ISO_TIME.fullmatch(text)
    if match is None:
        if re.fullmatch(DATE, text):
            raise InputError(f"time {text!r} has no time of day and no zone; {EXPECTED}")
        if re.match(ISO, text) and not re.search(ZONED, text):
            raise InputError(f"time {text!r} has no zone; {EXPECTED}")
        raise InputError(f"time {text!r} is not a time; {EXPECTED}")
    year, _, month, day, hour, _, minute, second, fraction, zone_hours, zone_minutes = match.groups()
    try:
        local = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second or 0), tzinfo=timezone.utc)
    except ValueError as error:
        raise InputError(f"time {text!r} is not a time: {error}; {EXPECTED}") from error
    offset = timedelta(hours=abs(int(zone_hours or 0)), minutes=int(zone_minutes or 0))
    seconds = (local - EPOCH).total_seconds()
    seconds += offset.total_seconds() if (zone_hours or "").startswith("-") else -offset.total_seconds()
    return int(seconds) * 1000 + int(((fraction or "") + "000")[:3])


def to_ms(values: pa.Array, problems: Problems, *, column: str = "played_at", timezone: str = "UTC") -> np.ndarray:
    """int64 (R,): ms since 1970 UTC of a column of strings, numbers, dates or timestamps.

    Numbers below 1e11 are seconds, others milliseconds. Times without a zone are in `timezone`, an IANA name, and dates
    without a time are midnight there. Rows that cannot be read are rejected in `problems` and become 0. Raises
    `InputError`, which names `column`, for a type that cannot hold times, and `InputError` for an unknown zone.
    """
    zone = time_zone(timezone)
    values = plain(values)
    data_type = values.type
    if pa.types.is_timestamp(data_type):
        times = _from_timestamps(values, problems, zone)
    elif pa.types.is_date(data_type):
        times = _from_timestamps(values.cast(pa.date32()).cast(pa.timestamp("s")), problems, zone)
    elif pa.types.is_integer(data_type):
        problems.mark(_to_numpy(values.is_null()), NO_TIME)
        times = _seconds_to_ms(_to_numpy(pc.fill_null(values.cast(pa.int64(), safe=False), 0)), problems)
    elif pa.types.is_floating(data_type) or pa.types.is_decimal(data_type):
        times = _from_floats(values, problems)
    elif pa.types.is_null(data_type) or any(
        is_text(data_type) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    ):
        times = _from_strings(valid_text(values, problems), problems, zone)
    else:
        raise InputError(f"column {column!r} holds {data_type}; expected times; {EXPECTED}")
    problems.mark((times < 0) | (times >= END_MS), OUT_OF_RANGE)
    return np.where(problems.bad, np.int64(0), times)


def local_to_ms(texts: pa.Array, zones: pa.Array, problems: Problems, *, form: str) -> np.ndarray:
    """int64 (R,): ms since 1970 UTC of local times, strings (R,) in the strptime format `form`.

    `zones`, strings (R,), are names such as Europe/Berlin; null means UTC. Rows that cannot be read are rejected in
    `problems` and become 0.
    """
    problems.mark(missing(texts), NO_TIME)
    timestamps = pd.Series(pd.to_datetime(pd.Series(_to_numpy(texts), dtype=object), errors="coerce", format=form))
    timestamps = timestamps.where((timestamps.dt.year >= FIRST_YEAR) & (timestamps.dt.year < LAST_YEAR))
    problems.mark(timestamps.isna().to_numpy(), NOT_LOCAL)
    times: np.ndarray = np.zeros(len(texts), dtype=np.int64)
    for zone_name in pc.unique(zones).to_pylist():
        rows = np.flatnonzero(
            _to_numpy(zones.is_null() if zone_name is None else pc.fill_null(pc.equal(zones, zone_name), False))
        )
        rows = rows[~problems.bad[rows]]
        try:
            zone = time_zone(zone_name or "UTC")
        except InputError:
            problems.mark(np.isin(np.arange(len(texts)), rows), NOT_A_ZONE)
            continue
        times[rows] = _local_to_utc(timestamps.iloc[rows].dt.as_unit("ms").astype("int64").to_numpy(), zone)
    return np.where(problems.bad, np.int64(0), times)


def _local_to_utc(local: np.ndarray, zone: ZoneInfo) -> np.ndarray:
    """int64 (R,): ms UTC of local times of a zone, given as int64 (R,) ms without the zone's offset.

    Times far outside of 1970 to 2100 are returned unchanged.
    """
    times = local.copy()
    rows = np.flatnonzero((local > -DAY_MS) & (local < END_MS + DAY_MS))
    if len(rows) and zone.key != "UTC":
        timestamps = pd.Series(local[rows].astype("datetime64[ms]"))
        take_first = np.ones(len(rows), dtype=bool)  # True: take the first of two moments with the same local time
        zoned = timestamps.dt.tz_localize(zone, ambiguous=take_first, nonexistent="shift_forward")
        times[rows] = zoned.dt.tz_convert("UTC").dt.as_unit("ms").astype("int64").to_numpy()
    return times


def _to_numpy(values: pa.Array) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _seconds_to_ms(numbers: np.ndarray, problems: Problems) -> np.ndarray:
    """Convert seconds to ms and leave ms unchanged; the type stays the same. Larger units are marked in `problems`."""
    problems.mark(numbers >= FIRST_NANOSECONDS, IN_NANOSECONDS)
    problems.mark(numbers >= FIRST_MICROSECONDS, IN_MICROSECONDS)
    is_seconds = (numbers > -FIRST_MILLISECONDS) & (numbers < FIRST_MILLISECONDS)
    scaled: np.ndarray = np.where(is_seconds, np.where(is_seconds, numbers, 0) * 1000, numbers)
    return scaled


def _from_timestamps(values: pa.Array, problems: Problems, zone: ZoneInfo) -> np.ndarray:
    problems.mark(_to_numpy(values.is_null()), NO_TIME)
    integers = values.cast(pa.int64())
    per_ms = {"s": 0.001, "ms": 1, "us": 1_000, "ns": 1_000_000}[values.type.unit]
    numbers = _to_numpy(pc.fill_null(integers, 0))
    if per_ms < 1:  # seconds of distant years would overflow as ms
        times = np.clip(numbers, -DAY_MS // 1000, (END_MS + DAY_MS) // 1000) * 1000
    else:
        times = np.asarray(numbers // int(per_ms), dtype=np.int64)
    return _local_to_utc(times, zone) if values.type.tz is None else times


def _from_floats(values: pa.Array, problems: Problems) -> np.ndarray:
    numbers = _to_numpy(values.cast(pa.float64()))  # null becomes NaN
    problems.mark(np.isnan(numbers), NO_TIME)
    ms: np.ndarray = np.clip(np.nan_to_num(np.rint(_seconds_to_ms(numbers, problems))), -1, END_MS)
    return ms.astype(np.int64)


def _from_strings(values: pa.Array, problems: Problems, zone: ZoneInfo) -> np.ndarray:
    problems.mark(missing(values), NO_TIME)
    try:
        return _seconds_to_ms(_to_numpy(pc.fill_null(values.cast(pa.int64()), 0)), problems)
    except pa.ArrowInvalid:
        pass
    try:
        return _to_numpy(pc.fill_null(values.cast(pa.timestamp("ms", "UTC")).cast(pa.int64()), 0))
    except pa.ArrowInvalid:
        pass
    try:
        local = values.cast(pa.timestamp("ms")).cast(pa.int64())
        if pc.all(pc.match_substring_regex(values, LOCAL)).as_py() is not False:  # Arrow also accepts hours alone
            return _local_to_utc(_to_numpy(pc.fill_null(local, 0)), zone)
    except pa.ArrowInvalid:
        pass
    return _from_mixed_strings(values, problems, zone)


def _from_mixed_strings(values: pa.Array, problems: Problems, zone: ZoneInfo) -> np.ndarray:
    """int64 (R,): ms UTC of a column with other values than whole numbers and ISO 8601 to the millisecond; slower."""
    trimmed = pc.fill_null(pc.utf8_trim_whitespace(values), "")
    problems.mark(missing(trimmed), NO_TIME)
    is_written = _to_numpy(pc.match_substring_regex(trimmed, WRITTEN))
    if is_written.any():
        trimmed = pc.replace_with_mask(
            trimmed, pa.array(is_written), _written_to_iso(trimmed.filter(pa.array(is_written)))
        )
    is_number = _to_numpy(pc.match_substring_regex(trimmed, NUMBER))
    is_local = _to_numpy(pc.match_substring_regex(trimmed, LOCAL))
    is_zoned = _to_numpy(pc.match_substring_regex(trimmed, ISO)) & _to_numpy(pc.match_substring_regex(trimmed, ZONED))
    texts = pd.Series(_to_numpy(trimmed), dtype=object)
    numbers = pd.to_numeric(texts.where(is_number), errors="coerce").fillna(0).to_numpy(dtype=np.float64)
    iso = texts.where(is_zoned).str.replace("UTC", "Z", regex=False).str.replace("z", "Z", regex=False)
    timestamps, is_readable = _parse_iso_column(iso)
    times_of_numbers = np.clip(np.rint(_seconds_to_ms(numbers, problems)), -1, END_MS)
    times = np.where(is_number, times_of_numbers, np.where(is_readable, timestamps, 0)).astype(np.int64)
    if is_local.any():
        timestamps, is_readable_local = _parse_iso_column(texts.where(is_local))
        times[is_readable_local] = _local_to_utc(timestamps[is_readable_local], zone)
        is_readable = is_readable | is_readable_local
    problems.mark(~is_number & ~is_readable, NOT_A_TIME)
    return times


def _written_to_iso(texts: pa.Array) -> pa.Array:
    """Return times that `WRITTEN` matches, strings (R,), as ISO 8601 without a zone; a date alone becomes midnight."""
    parts = pd.Series(_to_numpy(texts), dtype=object).str.extract(WRITTEN)
    day, month, year, _, hour, minute, second = (parts[index] for index in range(7))
    month_numbers = month.str.lower().map({name: f"{index:02d}" for index, name in enumerate(MONTHS, 1)})
    time_of_day = hour.fillna("0").str.zfill(2) + ":" + minute.fillna("00") + second.fillna(":00")
    return pa.array(year + "-" + month_numbers + "-" + day.str.zfill(2) + "T" + time_of_day, pa.string())


def _parse_iso_column(texts: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Read ISO 8601 or missing values, those without a zone as UTC: int64 (R,) ms, and bool (R,) which were read."""
    texts_with_points = texts.str.replace(",", ".", regex=False)
    timestamps = pd.to_datetime(texts_with_points, errors="coerce", utc=True, format="ISO8601")
    return timestamps.dt.as_unit("ms").astype("int64").to_numpy(), timestamps.notna().to_numpy()
