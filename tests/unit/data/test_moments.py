"""Times of plays."""

from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayrec.data.moments import (
    END_MS,
    IN_MICROSECONDS,
    IN_NANOSECONDS,
    NO_TIME,
    NOT_A_TIME,
    NOT_A_ZONE,
    NOT_LOCAL,
    OUT_OF_RANGE,
    local_to_ms,
    parse_timestamp,
    to_ms,
)
from rayrec.data.spelling import Problems
from rayrec.errors import InputError

MOMENT = 1241478537000  # 2009-05-04T23:08:57Z


def convert(values: pa.Array, timezone: str = "UTC") -> tuple[list[int], list[str]]:
    problems = Problems(len(values))
    return to_ms(values, problems, timezone=timezone).tolist(), problems.reasons()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1241478537", MOMENT),
        ("1241478537000", MOMENT),
        ("1241478537.25", MOMENT + 250),
        ("2009-05-04T23:08:57Z", MOMENT),
        ("2009-05-04 23:08:57 UTC", MOMENT),
        ("2009-05-05T01:08:57+02:00", MOMENT),
        ("2009-05-04T16:08:57-0700", MOMENT),
        ("2009-05-04T23:08:57.123456Z", MOMENT + 123),
        ("2009-05-04T23:08Z", MOMENT - 57_000),
        (" 1241478537 ", MOMENT),
        ("0", 0),
    ],
)
def test_every_way_to_write_a_moment_gives_the_same_ms(text: str, expected: int) -> None:
    assert convert(pa.array([text])) == ([expected], [])
    # Next to a value of another form, the column takes the slow path: the result must not change.
    assert convert(pa.array([text, "x", "1241478537", "2009-05-04T23:08:57Z"]))[0] == [expected, 0, MOMENT, MOMENT]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, NO_TIME),
        ("", NO_TIME),
        ("soon", NOT_A_TIME),
        ("2009-05", NOT_A_TIME),
        ("2009-05-04T23", NOT_A_TIME),
        ("2009-02-30", NOT_A_TIME),
        ("2009-02-30T00:00:00Z", NOT_A_TIME),
        ("30 Feb 2009 23:05", NOT_A_TIME),
        ("4 Mai 2009 23:05", NOT_A_TIME),
        ("04 May 2009 24:05", NOT_A_TIME),
        ("04 May 09 23:05", NOT_A_TIME),
        ("-5", OUT_OF_RANGE),
        ("1241478537000000", IN_MICROSECONDS),
        ("1241478537000000000", IN_NANOSECONDS),
        ("5000000000000", OUT_OF_RANGE),  # milliseconds, of the year 2128
        ("2300-01-01T00:00:00Z", OUT_OF_RANGE),
    ],
)
def test_what_is_no_moment_has_a_reason(text: str | None, reason: str) -> None:
    assert convert(pa.array([text], pa.string())) == ([0], [reason])


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("04 May 2009 23:08", 8),
        ("4 May 2009, 23:08", 8),
        ("4 may 2009 23:08:00", 8),
        ("04 MAY 2009 23:00:30", 0.5),
        ("04 May 2009", -23 * 60),
    ],
)
def test_times_with_the_month_in_words_are_in_the_named_zone(text: str, minutes: float) -> None:
    hour = MOMENT - 537_000  # 23:00
    for texts in ([text], [text, "soon", "2009-05-04T23:08:57Z"]):
        assert convert(pa.array(texts))[0][0] == hour + minutes * 60_000
        assert convert(pa.array(texts), "Asia/Tokyo")[0][0] == hour + minutes * 60_000 - 9 * 3_600_000


def test_every_month_is_known_by_its_name_and_by_the_first_three_letters() -> None:
    for number in range(1, 13):
        day = datetime(2009, number, 4, tzinfo=timezone.utc)
        texts = [f"{day:%d %b %Y}", f"{day:%d %B %Y}", f"{day:%Y-%m-%d}"]
        (short, long, iso), reasons = convert(pa.array(texts))
        assert (short, long, reasons) == (iso, iso, [])


def test_the_border_between_seconds_and_milliseconds_is_1e11() -> None:
    assert convert(pa.array([100_000_000_000, 4_102_444_799])) == ([100_000_000_000, 4_102_444_799_000], [])


@pytest.mark.parametrize(
    "kind", [int, float, Decimal, str, "{}.5".format], ids=["int", "float", "decimal", "text", "text.5"]
)
def test_micro_and_nanoseconds_are_named_whatever_the_column_holds(kind: Callable[[int], Any]) -> None:
    values = [kind(MOMENT * scale) for scale in (1, 1_000, 1_000_000)]
    times, reasons = convert(pa.array(values))
    assert (times[1:], reasons) == ([0, 0], [IN_MICROSECONDS, IN_NANOSECONDS])


def test_numbers_and_timestamps_of_parquet_are_read() -> None:
    assert convert(pa.array([1241478537, None])) == ([MOMENT, 0], [NO_TIME])
    assert convert(pa.array([1241478537.5, float("nan")])) == ([MOMENT + 500, 0], [NO_TIME])
    assert convert(pa.array([MOMENT * 1000], pa.timestamp("us", "UTC"))) == ([MOMENT], [])


def test_the_first_reason_of_a_row_stays() -> None:
    problems = Problems(1)
    problems.mark(problems.bad | True, "no user")
    to_ms(pa.array(["x"]), problems)
    assert problems.reasons() == ["no user"]


@pytest.mark.parametrize(
    "text",
    ["2015-01-20T18:30:00Z", "2015-01-20T19:30:00+01:00", "2015-01-20 18:30Z", "1421778600", "1421778600000"],
)
def test_one_moment_can_be_written_in_five_ways(text: str) -> None:
    assert parse_timestamp(text) == 1421778600000


def test_a_number_of_seconds_is_never_read_as_milliseconds() -> None:
    assert (
        parse_timestamp(1711929600) == parse_timestamp("1711929600") == parse_timestamp(1711929600000) == 1711929600000
    )
    assert parse_timestamp(1711929600.5) == 1711929600500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2015-01-20T18:30:00", "no zone"),
        ("soon", "not a time"),
        ("-5", "not between"),
        ("1711929600000000", "not between"),  # microseconds
        ("nan", "not a time"),
        ("1e9", "not a time"),
        ("2009-02-30T00:00:00Z", "not a time: day"),
        ("", "not a time"),
        ("2015-01-20T18:30:00+99:00", "not a time"),
        ("2015-01-20T18:30:00+00:99", "not a time"),
        ("2015-01-20T1830:00Z", "not a time"),
    ],
)
def test_what_is_no_moment_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_timestamp(text)


MOMENTS = st.one_of(
    st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
    st.from_regex(
        r"\A(19|20)\d\d-?[01]\d-?[0-3]\d[T ][0-2]\d:?[0-6]\d(:?[0-6]\d([.,]\d{1,9})?)?\s?(Z|z|UTC|[+-]\d\d(:?\d\d)?)?\Z"
    ),
    st.from_regex(r"\A[+-]?\d{1,14}(\.\d{0,4})?\Z"),
    st.text(max_size=12),
)


@settings(max_examples=100)
@given(MOMENTS)
@example("2009-05-04T23:08:57,5Z")
def test_a_command_reads_a_moment_as_an_import_does(text: str) -> None:
    """Except for times without a zone: a command refuses them, an import applies its time zone setting."""
    times, reasons = convert(pa.array([text, "x"]))
    if len(reasons) == 1 and convert(pa.array([text, "x"]), "Asia/Tokyo")[0] != times:
        with pytest.raises(InputError, match="no zone"):
            parse_timestamp(text)
    elif len(reasons) == 1:
        assert 0 <= times[0] < END_MS
        assert parse_timestamp(text) == times[0]
    else:
        with pytest.raises(InputError):
            parse_timestamp(text)


def test_columns_of_other_types_are_named() -> None:
    with pytest.raises(InputError, match="column 'played_at' holds duration"):
        convert(pa.array([1], pa.duration("s")))
    assert convert(pa.array([2**63], pa.uint64())) == ([0], [OUT_OF_RANGE])


@pytest.mark.parametrize(
    ("text", "zone", "utc"),
    [
        ("2026-01-01 10:00:00", "UTC", "2026-01-01T10:00Z"),
        ("2026-01-01 10:00:00", "Europe/Berlin", "2026-01-01T09:00Z"),
        ("2026-07-01T10:00:00.250", "Europe/Berlin", "2026-07-01T08:00:00.25Z"),
        ("2026-07-01 10:00", "America/New_York", "2026-07-01T14:00Z"),
        ("2026-07-01", "Asia/Tokyo", "2026-06-30T15:00Z"),  # midnight in Tokyo
        ("2026-03-29 01:59:59", "Europe/Berlin", "2026-03-29T00:59:59Z"),
        ("2026-03-29 02:00:00", "Europe/Berlin", "2026-03-29T01:00Z"),  # does not come: moved to 03:00
        ("2026-03-29 02:59:59", "Europe/Berlin", "2026-03-29T01:00Z"),
        ("2026-03-29 03:00:00", "Europe/Berlin", "2026-03-29T01:00Z"),
        ("2026-10-25 01:59:59", "Europe/Berlin", "2026-10-24T23:59:59Z"),
        ("2026-10-25 02:30:00", "Europe/Berlin", "2026-10-25T00:30Z"),  # comes twice: the first
        ("2026-10-25 03:00:00", "Europe/Berlin", "2026-10-25T02:00Z"),
        ("2026-09-06", "America/Santiago", "2026-09-06T04:00Z"),  # a day without a midnight begins at 01:00
    ],
)
def test_times_without_a_zone_are_in_the_named_zone(text: str, zone: str, utc: str) -> None:
    expected = parse_timestamp(utc)
    assert convert(pa.array([text]), zone) == ([expected], [])
    assert convert(pa.array([text, "x", "1241478537", None]), zone)[0] == [expected, 0, MOMENT, 0]
    timestamps = pa.array([text]).cast(pa.timestamp("us"))
    assert convert(timestamps, zone) == ([expected], [])
    if len(text) == 10:
        assert (
            convert(timestamps.cast(pa.date32()), zone)
            == convert(timestamps.cast(pa.date64()), zone)
            == ([expected], [])
        )


def test_times_with_a_zone_and_numbers_are_the_same_moments_whatever_zone_is_named() -> None:
    for values in (["2009-05-05T01:08:57+02:00"], ["1241478537"], ["2009-05-04 23:08:57 UTC", "x"], [MOMENT]):
        assert convert(pa.array(values), "Asia/Tokyo") == convert(pa.array(values))
    assert convert(pa.array([MOMENT], pa.timestamp("ms", "UTC")), "Asia/Tokyo") == ([MOMENT], [])
    far_times = pa.array([-(2**62), 2**62], pa.timestamp("s"))
    assert convert(far_times, "Asia/Tokyo") == ([0, 0], [OUT_OF_RANGE] * 2)


@pytest.mark.parametrize("name", ["", "Mars/Olympus", "+02:00", "../../etc/passwd", "/etc/passwd"])
def test_an_unknown_time_zone_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="give an IANA name such as Europe/Berlin"):
        convert(pa.array(["2026-01-01"]), name)


@pytest.mark.parametrize(
    ("text", "zone", "utc"),
    [
        ("08/03/2022 19:01", "America/Toronto", "2022-03-09T00:01Z"),
        ("08/03/2022 7:01", None, "2022-03-08T07:01Z"),
        ("25/10/2026 02:30", "Europe/Berlin", "2026-10-25T00:30Z"),  # comes twice: the first
        ("29/03/2026 02:30", "Europe/Berlin", "2026-03-29T01:00Z"),  # does not come: moved to 03:00
        ("08/03/2022 19:01", "Not/AZone", NOT_A_ZONE),
        ("08/03/2022 19:01", "../../etc/passwd", NOT_A_ZONE),
        ("2022-03-08 19:01", None, NOT_LOCAL),
        ("08/13/2022 19:01", None, NOT_LOCAL),
        ("08/03/1022 19:01", "America/Toronto", NOT_LOCAL),
        (None, None, NO_TIME),
    ],
)
def test_local_times_are_moments_of_their_zone(text: str | None, zone: str | None, utc: str) -> None:
    problems = Problems(2)
    texts, zones = pa.array([text, "01/01/2020 00:00"]), pa.array([zone, None], pa.string())
    times = local_to_ms(texts, zones, problems, form="%d/%m/%Y %H:%M")
    assert times[1] == parse_timestamp("2020-01-01T00:00Z")
    assert problems.reasons() == ([] if utc.endswith("Z") else [utc])
    assert times[0] == (parse_timestamp(utc) if utc.endswith("Z") else 0)
