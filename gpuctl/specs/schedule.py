"""When a scheduled job runs: `--cron EXPR` with `--timezone`, or `--every 1h`. May import: errors, specs.reader.

A cron expression has five fields: minute, hour, day of the month, month, day of the week; each `*`, numbers, names
(JAN, MON), ranges, lists and steps. Where both days are given, one of them is enough, as in every cron. It is of the
clock on the wall of its timezone: a time that a change of clocks leaves out does not happen that day, and one that
comes twice happens twice.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gpuctl.specs.reader import Reader

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS = (  # name, lowest, highest, names of the lowest and those after it
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 7, _DAYS),
)
_MACROS = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *"}
_PERIOD = re.compile(r"([0-9]{1,6})\s*(m|min|h|d)", re.ASCII)
_UNITS = {"m": "minutes", "min": "minutes", "h": "hours", "d": "days"}  # as modal.Period calls them
_MOST_YEARS = 28  # after so many, every date has been each day of the week: what was not there never comes


@dataclass(frozen=True)
class Schedule:
    """Either `cron` (with `timezone`), or `unit` and `count`: every 30 minutes, hours or days since it was deployed."""

    cron: str | None = None
    timezone: str = "UTC"
    unit: str | None = None
    count: int = 0

    def __str__(self) -> str:
        if self.cron is not None:
            return f"cron {self.cron} ({self.timezone})"
        assert self.unit is not None
        return (
            f"every {self.unit.removesuffix('s')}" if self.count == 1 else f"every {self.count} {self.unit}"
        )

    def document(self) -> dict[str, Any]:
        if self.cron is not None:
            return {"cron": self.cron, "timezone": self.timezone}
        return {"every": {self.unit: self.count}}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Schedule:
        """The inverse of `document`."""
        if "cron" in document:
            return cls(cron=document["cron"], timezone=document["timezone"])
        ((unit, count),) = document["every"].items()
        return cls(unit=unit, count=count)

    def next(self, now: dt.datetime, *, since: dt.datetime) -> dt.datetime | None:
        """When it runs next after `now`, in UTC; `since`: when it was deployed. None: never."""
        if self.cron is not None:
            return Cron.parse(self.cron).next(now, ZoneInfo(self.timezone))
        assert self.unit is not None
        period = dt.timedelta(**{self.unit: self.count})
        return since + period * (max(0, (now - since) // period) + 1)


@dataclass(frozen=True)
class Cron:
    """The values of each field. `either_day`: both days are restricted, and one that fits is enough."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # Sunday is 0
    either_day: bool

    @classmethod
    def parse(cls, text: str) -> Cron:
        """A usage error that says which field is wrong."""
        if text.strip() in _MACROS:
            raise usage_error(
                f"--cron: {text!r} is short for {_MACROS[text.strip()]!r}; Modal takes five fields"
            )
        fields = text.split()
        if len(fields) != 5:
            raise usage_error(
                f"--cron: {text!r} has {len(fields)} field{'s' * (len(fields) != 1)}, not 5: minute, hour, day of the "
                "month, month, day of the week, such as '0 0 * * *' (each midnight)"
            )
        values = [_values(field, *limits) for field, limits in zip(fields, _FIELDS, strict=True)]
        minutes, hours, days, months, weekdays = values
        both = not fields[2].startswith("*") and not fields[4].startswith("*")
        return cls(
            tuple(sorted(minutes)),
            tuple(sorted(hours)),
            frozenset(days),
            frozenset(months),
            frozenset(day % 7 for day in weekdays),
            both,
        )

    def on(self, day: dt.date) -> bool:
        """Whether it runs on that day at all."""
        if day.month not in self.months:
            return False
        in_month, in_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return (in_month or in_week) if self.either_day else (in_month and in_week)

    def next(self, now: dt.datetime, zone: dt.tzinfo) -> dt.datetime | None:
        """The first time after `now`, in UTC; None where there is none within 28 years: February the 30th."""
        day = now.astimezone(zone).date() - dt.timedelta(days=1)
        for n in range(366 * _MOST_YEARS):
            date = day + dt.timedelta(days=n)
            if self.on(date):
                later = [at for at in self._times(date, zone) if at > now]
                if later:
                    return min(later)
        return None

    def _times(self, day: dt.date, zone: dt.tzinfo) -> Iterator[dt.datetime]:
        for hour in self.hours:
            for minute in self.minutes:
                for fold in (0, 1):
                    wall = dt.datetime(day.year, day.month, day.day, hour, minute, fold=fold, tzinfo=zone)
                    at = wall.astimezone(dt.UTC)
                    if at.astimezone(zone).replace(tzinfo=None) == wall.replace(tzinfo=None):
                        yield at


def _values(text: str, name: str, lowest: int, highest: int, called: tuple[str, ...]) -> set[int]:
    """The values of a field."""
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        if span == "*":
            start, end = lowest, highest
        else:
            start = _number(first, text, name, lowest, highest, called)
            end = _number(last, text, name, lowest, highest, called) if dash else start
            if slash and not dash:
                end = highest  # 5/15 is 5-59/15
        if slash and not (step.isascii() and step.isdigit() and int(step) > 0):
            raise usage_error(
                f"--cron: {name} {text!r}: the step {step!r} is not a whole number of at least 1"
            )
        if end < start:
            raise usage_error(f"--cron: {name} {text!r}: {span} goes backwards")
        found.update(range(start, end + 1, int(step) if slash else 1))
    return found


def _number(text: str, field: str, name: str, lowest: int, highest: int, called: tuple[str, ...]) -> int:
    if text.lower() in called:
        return lowest + called.index(text.lower())
    if text.isascii() and text.isdigit() and lowest <= int(text) <= highest:
        return int(text)
    names = f", or {called[0].upper()} to {called[-1].upper()}" if called else ""
    raise usage_error(f"--cron: {name} {field!r}: {text!r} is not a number from {lowest} to {highest}{names}")


def read_schedule(
    read: Reader, *, cron: str | None, timezone: str | None, every: str | None
) -> Schedule | None:
    """What the three options mean together; None where none is given. Problems are kept."""
    if cron is not None and every is not None:
        read.problem("--cron: does not go with --every: a job has one schedule")
        return None
    if timezone is not None and cron is None:
        read.problem("--timezone: is the clock of --cron, which is not given")
        return None
    if every is not None:
        match = _PERIOD.fullmatch(every.strip())
        if match is None or not int(match[1]):
            read.problem(f"--every: {every!r} is no period, such as 30m, 1h or 7d")
            return None
        return Schedule(unit=_UNITS[match[2]], count=int(match[1]))
    if cron is None:
        return None
    parsed = read.parsed(Cron.parse, cron)
    zone = _zone(read, timezone or "UTC")
    if parsed is None or zone is None:
        return None
    if parsed.next(dt.datetime.now(dt.UTC), zone) is None:
        read.problem(f"--cron: {cron!r} never happens: no such day comes")
        return None
    return Schedule(cron=" ".join(cron.split()), timezone=timezone or "UTC")


def _zone(read: Reader, name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        read.problem(f"--timezone: {name!r} is no timezone, such as Europe/Berlin or America/New_York")
        return None
