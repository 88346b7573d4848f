"""When a schedule runs: ours and the local plane's, which know nothing of each other, against the definition."""

from __future__ import annotations

import datetime as dt
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modal_proto import api_pb2

from gpuctl.errors import GpuctlError
from gpuctl.local import schedules as plane
from gpuctl.specs.reader import Reader
from gpuctl.specs.schedule import Cron, Schedule, read_schedule

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Australia/Lord_Howe",
    "America/Santiago",
)
NOW = dt.datetime(2026, 11, 28, 22, 0, tzinfo=dt.UTC)


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def following(text: str, now: dt.datetime, zone: str = "UTC") -> dt.datetime | None:
    """Both answers, which must be one."""
    ours = Cron.parse(text).next(now, ZoneInfo(zone))
    theirs = plane.Cron.read(text).following(now.timestamp(), ZoneInfo(zone))
    assert (None if ours is None else ours.timestamp()) == theirs, (text, now, zone)
    return ours


@pytest.mark.parametrize(
    ("text", "zone", "now", "then"),
    [
        ("0 0 * * *", "UTC", "2026-11-28T22:00", "2026-11-29T00:00"),
        ("0 0 * * *", "UTC", "2026-11-29T00:00", "2026-11-30T00:00"),
        ("*/15 9-17 * * mon-fri", "UTC", "2026-11-28T12:00", "2026-11-30T09:00"),
        ("5/20 * * * *", "UTC", "2026-11-28T12:26", "2026-11-28T12:45"),
        ("0 6 1 JAN,JUL *", "UTC", "2026-11-28T12:00", "2027-01-01T06:00"),
        ("0 0 13 * 5", "UTC", "2026-11-28T12:00", "2026-12-04T00:00"),  # a 13th, or a Friday
        ("0 0 */2 * 5", "UTC", "2026-11-28T12:00", "2026-12-11T00:00"),  # both: one begins with *
        ("0 0 * * 7", "UTC", "2026-11-28T12:00", "2026-11-29T00:00"),  # Sunday by its other number
        ("0 0 29 2 *", "UTC", "2026-11-28T12:00", "2028-02-29T00:00"),
        ("0 6 * * *", "America/New_York", "2026-11-28T12:00", "2026-11-29T11:00"),
        # The clock goes from 2:00 to 3:00: there is no 2:30 that day.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", "2026-03-30T00:30"),
        # And back from 3:00 to 2:00: 2:30 comes twice.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", "2026-10-25T00:30"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30", "2026-10-25T01:30"),
    ],
)
def test_cron(text: str, zone: str, now: str, then: str) -> None:
    assert following(text, at(now), zone) == at(then)


FIELDS = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]


@st.composite
def expressions(draw: st.DrawFn) -> str:
    fields = []
    for lowest, highest in FIELDS:
        number = st.integers(lowest, highest)
        span = st.tuples(number, number).map(lambda two: f"{min(two)}-{max(two)}")
        stepped = st.tuples(span | st.just("*"), st.integers(1, 20)).map(lambda two: f"{two[0]}/{two[1]}")
        part = number.map(str) | span | stepped
        fields.append(draw(st.just("*") | st.lists(part, min_size=1, max_size=3).map(",".join)))
    return " ".join(fields)


def shows(text: str, wall: dt.datetime) -> bool:
    """Whether a clock that shows `wall` shows what the expression asks for: the definition, value by value."""

    def allowed(field: str, lowest: int, highest: int) -> set[int]:
        values = set()
        for part in field.split(","):
            span, _, step = part.partition("/")
            first, last = (
                (lowest, highest) if span == "*" else (int(span.split("-")[0]), int(span.split("-")[-1]))
            )
            values |= set(range(first, last + 1)[:: int(step or 1)])
        return values

    fields = text.split()
    minute, hour, day, month, weekday = (
        allowed(field, *limits) for field, limits in zip(fields, FIELDS, strict=True)
    )
    in_week = wall.isoweekday() in weekday or (wall.isoweekday() == 7 and 0 in weekday)
    days = [wall.day in day, in_week]
    either = fields[2][0] != "*" and fields[4][0] != "*"
    fits = any(days) if either else all(days)
    return wall.minute in minute and wall.hour in hour and wall.month in month and fits


@given(
    text=expressions(),
    minutes=st.integers(0, 3 * 365 * 1440),
    seconds=st.integers(0, 59),
    zone=st.sampled_from(ZONES),
)
@settings(max_examples=60, deadline=None)
def test_cron_is_the_first_minute_that_fits(text: str, minutes: int, seconds: int, zone: str) -> None:
    now = at("2026-01-01T00:00") + dt.timedelta(minutes=minutes, seconds=seconds)
    found = following(text, now, zone)
    minute = now.replace(second=0)
    for n in range(1, 4000):
        one = minute + dt.timedelta(minutes=n)
        if shows(text, one.astimezone(ZoneInfo(zone))):
            assert found == one
            return
    assert found is None or found > minute + dt.timedelta(minutes=3999)


def test_a_day_that_never_comes() -> None:
    assert following("0 0 30 2 *", NOW) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cron": "0 0 * *"}, "has 4 fields, not 5"),
        ({"cron": "60 * * * *"}, "minute '60': '60' is not a number from 0 to 59"),
        ({"cron": "0 0 * * funday"}, "or SUN to SAT"),
        ({"cron": "0 5-3 * * *"}, "5-3 goes backwards"),
        ({"cron": "*/0 * * * *"}, "the step '0'"),
        ({"cron": "@daily"}, "short for '0 0 * * *'"),
        ({"cron": "0 0 31 2 *"}, "never happens"),
        ({"cron": "0 0 * * *", "timezone": "Mars/Olympus"}, "--timezone: 'Mars/Olympus'"),
        ({"cron": "0 0 * * *", "timezone": "../../etc/passwd"}, "--timezone"),
        ({"timezone": "UTC"}, "--timezone: is the clock of --cron"),
        ({"cron": "0 0 * * *", "every": "1h"}, "does not go with --every"),
        ({"every": "0h"}, "--every: '0h' is no period"),
        ({"every": "hourly"}, "such as 30m, 1h or 7d"),
        ({"cron": ""}, "has 0 fields"),
        ({"cron": "1.5 * * * *"}, "'1.5' is not a number"),
    ],
)
def test_what_is_no_schedule(options: dict[str, str], says: str) -> None:
    read = Reader()
    given_ = {"cron": None, "timezone": None, "every": None} | options
    assert read_schedule(read, **given_) is None
    assert len(read.problems) == 1
    assert says in read.problems[0]


def test_every() -> None:
    schedule = read_schedule(Reader(), cron=None, timezone=None, every="90m")
    assert schedule == Schedule(unit="minutes", count=90)
    assert str(schedule) == "every 90 minutes"
    assert Schedule.from_document(schedule.document()) == schedule
    since = NOW - dt.timedelta(hours=4)
    assert schedule.next(NOW, since=since) == since + dt.timedelta(hours=4.5)
    assert schedule.next(since, since=since) == since + dt.timedelta(hours=1.5)
    proto = api_pb2.Schedule(period=api_pb2.Schedule.Period(minutes=90))
    theirs = plane.following(proto, since=since.timestamp(), after=NOW.timestamp())
    assert theirs == (since + dt.timedelta(hours=4.5)).timestamp()


@pytest.mark.parametrize(
    ("period", "since", "after", "then"),
    [
        ({"months": 1}, "2026-01-31T08:00", "2026-02-01T00:00", "2026-02-28T08:00"),
        ({"months": 1}, "2026-01-31T08:00", "2026-02-28T08:00", "2026-03-31T08:00"),
        ({"years": 1, "days": 1}, "2026-01-31T08:00", "2026-02-01T00:00", "2027-02-01T08:00"),
        ({"seconds": 2.5}, "2026-01-31T08:00", "2026-01-31T08:01", "2026-01-31T08:01:02.5"),
    ],
)
def test_periods_of_the_plane(period: dict[str, float], since: str, after: str, then: str) -> None:
    proto = api_pb2.Schedule(period=api_pb2.Schedule.Period(**period))
    found = plane.following(proto, since=at(since).timestamp(), after=at(after).timestamp())
    assert found == at(then).timestamp()


def test_a_period_of_nothing_is_none() -> None:
    with pytest.raises(ValueError, match="longer than nothing"):
        plane.following(api_pb2.Schedule(period=api_pb2.Schedule.Period()), since=0, after=0)


def test_the_usage_error_of_a_field_is_one() -> None:
    with pytest.raises(GpuctlError) as error:
        Cron.parse("0 24 * * *")
    assert error.value.exit_code == 2
