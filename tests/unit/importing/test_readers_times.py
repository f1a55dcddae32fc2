"""Times of plays."""

import pyarrow as pa
import pytest

from rayrec.importing.readers.reader import Problems
from rayrec.importing.readers.times import NO_TIME, NO_ZONE, NOT_A_TIME, OUT_OF_RANGE, to_ms

MOMENT = 1241478537000  # 2009-05-04T23:08:57Z


def convert(values: pa.Array) -> tuple[list[int], list[str]]:
    problems = Problems(len(values))
    return to_ms(values, problems).tolist(), problems.reasons()


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
    # Beside a value of another form, the column takes the slow way: the answer must not change.
    assert convert(pa.array([text, "x", "1241478537", "2009-05-04T23:08:57Z"]))[0] == [expected, 0, MOMENT, MOMENT]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, NO_TIME),
        ("", NO_TIME),
        ("soon", NOT_A_TIME),
        ("2009-05-04", NOT_A_TIME),
        ("2009-02-30T00:00:00Z", NOT_A_TIME),
        ("2009-05-04T23:08:57", NO_ZONE),
        ("2009-05-04 23:08", NO_ZONE),
        ("-5", OUT_OF_RANGE),
        ("1241478537000000", OUT_OF_RANGE),  # microseconds
        ("2300-01-01T00:00:00Z", OUT_OF_RANGE),
    ],
)
def test_what_is_no_moment_has_a_reason(text: str | None, reason: str) -> None:
    assert convert(pa.array([text], pa.string())) == ([0], [reason])


def test_the_border_between_seconds_and_milliseconds_is_1e11() -> None:
    assert convert(pa.array([100_000_000_000, 4_102_444_799])) == ([100_000_000_000, 4_102_444_799_000], [])


def test_numbers_and_timestamps_of_parquet_are_read() -> None:
    assert convert(pa.array([1241478537, None])) == ([MOMENT, 0], [NO_TIME])
    assert convert(pa.array([1241478537.5, float("nan")])) == ([MOMENT + 500, 0], [NO_TIME])
    assert convert(pa.array([MOMENT * 1000], pa.timestamp("us", "UTC"))) == ([MOMENT], [])
    assert convert(pa.array([MOMENT * 1000], pa.timestamp("us"))) == ([0], [NO_ZONE])


def test_the_first_reason_of_a_row_stays() -> None:
    problems = Problems(1)
    problems.mark(problems.bad | True, "no user")
    to_ms(pa.array(["x"]), problems)
    assert problems.reasons() == ["no user"]
