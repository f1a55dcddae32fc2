"""Times of plays: unix seconds, unix milliseconds or ISO 8601 with a zone, to ms since 1970 UTC."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.importing.readers.reader import Problems, missing

NO_TIME = "no time"
NOT_A_TIME = "time is neither unix seconds, unix milliseconds nor ISO 8601"
NO_ZONE = "time without a zone"
OUT_OF_RANGE = "time is not between 1970 and 2100"

# Numbers below are seconds (until the year 5138), from here on milliseconds (since March 1973).
FIRST_MILLISECONDS = 100_000_000_000
END_MS = 4_102_444_800_000  # 2100-01-01
NUMBER = r"^[+-]?\d{1,18}(\.\d*)?$"
ZONED = r"\d:?\d{2}(:?\d{2}([.,]\d+)?)?\s*([Zz]|UTC|[+-]\d{2}(:?\d{2})?)$"
ISO = r"^\d{4}-?\d{2}-?\d{2}[T ]\d{2}:?\d{2}"


def to_ms(values: pa.Array, problems: Problems) -> np.ndarray:
    """int64 (R,): ms since 1970 UTC of a column of strings, numbers or timestamps.

    Each value is told seconds from milliseconds by its size (under 1e11: seconds). Values that
    cannot be read are marked in `problems` and come out as 0.
    """
    if pa.types.is_timestamp(values.type):
        times = _from_timestamps(values, problems)
    elif pa.types.is_integer(values.type):
        problems.mark(_numpy(values.is_null()), NO_TIME)
        times = _scale(_numpy(pc.fill_null(values.cast(pa.int64(), safe=False), 0)))
    elif pa.types.is_floating(values.type):
        times = _from_floats(values, problems)
    else:
        times = _from_strings(values.cast(pa.string()), problems)
    problems.mark((times < 0) | (times >= END_MS), OUT_OF_RANGE)
    return np.where(problems.bad, np.int64(0), times)


def _numpy(values: pa.Array) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _scale(numbers: np.ndarray) -> np.ndarray:
    """Seconds to ms, in the type that came; ms stay."""
    seconds = (numbers > -FIRST_MILLISECONDS) & (numbers < FIRST_MILLISECONDS)
    scaled: np.ndarray = np.where(seconds, numbers * 1000, numbers)
    return scaled


def _from_timestamps(values: pa.Array, problems: Problems) -> np.ndarray:
    problems.mark(_numpy(values.is_null()), NO_TIME)
    if values.type.tz is None:
        problems.mark(np.ones(len(values), dtype=bool), NO_ZONE)
    whole = values.cast(pa.timestamp("ms", values.type.tz), safe=False).cast(pa.int64())
    return _numpy(pc.fill_null(whole, 0))


def _from_floats(values: pa.Array, problems: Problems) -> np.ndarray:
    numbers = _numpy(values.cast(pa.float64()))  # null becomes NaN
    problems.mark(np.isnan(numbers), NO_TIME)
    ms: np.ndarray = np.clip(np.nan_to_num(np.rint(_scale(numbers))), -1, END_MS)
    return ms.astype(np.int64)


def _from_strings(values: pa.Array, problems: Problems) -> np.ndarray:
    problems.mark(missing(values), NO_TIME)
    try:
        return _scale(_numpy(pc.fill_null(values.cast(pa.int64()), 0)))
    except pa.ArrowInvalid:
        pass
    try:
        moments = values.cast(pa.timestamp("ms", "UTC")).cast(pa.int64())
        return _numpy(pc.fill_null(moments, 0))
    except pa.ArrowInvalid:
        return _from_mixed_strings(values, problems)


def _from_mixed_strings(values: pa.Array, problems: Problems) -> np.ndarray:
    """The slow way, for columns where not every value is a whole number or ISO to the millisecond."""
    trimmed = pc.fill_null(pc.utf8_trim_whitespace(values), "")
    numeric = _numpy(pc.match_substring_regex(trimmed, NUMBER))
    looks_iso = _numpy(pc.match_substring_regex(trimmed, ISO))
    zoned = _numpy(pc.match_substring_regex(trimmed, ZONED))
    texts = pd.Series(_numpy(trimmed), dtype=object)
    numbers = pd.to_numeric(texts.where(numeric), errors="coerce").fillna(0).to_numpy(dtype=np.float64)
    iso = texts.where(looks_iso & zoned).str.replace("UTC", "Z", regex=False).str.replace("z", "Z", regex=False)
    moments = pd.to_datetime(iso, errors="coerce", utc=True, format="ISO8601")
    readable = moments.notna().to_numpy()
    ms = moments.dt.as_unit("ms").astype("int64").to_numpy()
    problems.mark(looks_iso & ~zoned, NO_ZONE)
    problems.mark(~numeric & ~readable, NOT_A_TIME)
    return np.where(numeric, np.rint(_scale(numbers)), np.where(readable, ms, 0)).astype(np.int64)
