"""Schedules: the functions of deployed apps that are called at certain times. Imports store, calls, wire.

When the next time of each is due is written down, and a call is made under a name of its own, which the ledger knows
already where a plane was killed between the two: nothing fires twice. What was due while there was no plane is called
late, once, where that is no more than a minute ago: a plane that is killed is back in a moment. What was missed for
longer is left out, as cron does; what the cloud does with it is not known.

`modal.Period` counts from the deployment, and each one starts it anew; `modal.Cron` does not care about deployments.
Fields of Cron: `*`, numbers, names, ranges, steps, lists; of both days one is enough where both are given. It is of
the clock on the wall of its timezone.
"""

from __future__ import annotations

import asyncio
import calendar
import contextlib
import datetime as dt
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from gpuctl.local.wire import invalid

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuctl.local.functions import Functions
    from gpuctl.local.store import Deployment, Store

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS schedules (
    function_id TEXT PRIMARY KEY, app_id TEXT NOT NULL, since REAL NOT NULL, due REAL NOT NULL
) STRICT;
"""
_LATE_SECONDS = 60.0  # what is due for longer was missed
_LOOK_SECONDS = 30.0  # the clock on the wall may be set: it is looked at so often
_NEVER = 8 * 366  # days: 29 February comes again within eight years
_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
_NAMES = (
    (3, {name.lower(): n for n, name in enumerate(calendar.month_abbr) if name}),
    (4, {name: n for n, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}),
)


class Schedules:
    """Every function with a schedule of every deployed app. `fire(function_id, key)` calls one, once for each key."""

    def __init__(self, store: Store, functions: Functions, fire: Callable[[str, str], None]) -> None:
        self._db = store.extend(_SCHEMA)
        self._functions = functions
        self._fire = fire
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Fire from now on: what the plane before this one was to fire."""
        self._loop = asyncio.create_task(self._run())

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()

    def publish(self, deployment: Deployment) -> None:
        """What was deployed has these schedules, and no others."""
        self.forget(deployment.app_id)
        for function_id, definition_id in deployment.layout.definition_ids.items():
            schedule = schedule_of(self._functions.data(definition_id))
            if schedule is None:
                continue
            since = deployment.deployed_at
            due = following(schedule, since=since, after=time.time())
            if due is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO schedules VALUES (?, ?, ?, ?)",
                    [function_id, deployment.app_id, since, due],
                )
        self._changed.set()

    def forget(self, app_id: str) -> None:
        """The app is stopped, or deployed anew."""
        self._db.execute("DELETE FROM schedules WHERE app_id = ?", [app_id])

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                soonest = self._fire_due()
            except Exception:
                log.exception("schedules could not be fired")
                soonest = None
            wait = _LOOK_SECONDS if soonest is None else min(_LOOK_SECONDS, max(0.0, soonest - time.time()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)

    def _fire_due(self) -> float | None:
        """Call what is due; when the next will be."""
        now = time.time()
        for row in self._db.execute("SELECT * FROM schedules WHERE due <= ?", [now]).fetchall():
            function_id, due = str(row["function_id"]), float(row["due"])
            if now - due <= _LATE_SECONDS:
                try:
                    self._fire(function_id, f"schedule:{function_id}:{due!r}")
                except Exception:
                    log.exception("function %s could not be called by its schedule", function_id)
            else:
                log.warning(
                    "function %s: its schedule missed %s", function_id, dt.datetime.fromtimestamp(due)
                )
            definition = self._functions.data(self._functions.definition_of(function_id))
            schedule = schedule_of(definition)
            later = None if schedule is None else following(schedule, since=float(row["since"]), after=now)
            if later is None:
                self._db.execute("DELETE FROM schedules WHERE function_id = ?", [function_id])
            else:
                self._db.execute("UPDATE schedules SET due = ? WHERE function_id = ?", [later, function_id])
        soonest = self._db.execute("SELECT min(due) FROM schedules").fetchone()[0]
        return None if soonest is None else float(soonest)


def schedule_of(data: Any) -> Any | None:
    """The api_pb2.Schedule of a function's definition, if it has one."""
    for holder in (data, data.ranked_functions[0].function if data.ranked_functions else None):
        if holder is not None and holder.HasField("schedule"):
            return holder.schedule
    return None


def check(data: Any) -> None:
    """Refuse a schedule that says nothing, as the cloud does when it is deployed."""
    schedule = schedule_of(data)
    if schedule is None:
        return
    try:
        if following(schedule, since=0.0, after=0.0) is None:
            raise ValueError("it never happens")
    except (ValueError, OSError, KeyError) as error:
        raise invalid(f"The schedule of '{data.function_name}' is not valid: {error}.") from None


def following(schedule: Any, *, since: float, after: float) -> float | None:
    """The next time after `after`, in seconds since 1970, of an api_pb2.Schedule that counts from `since`.

    None: there is none. A ValueError where it cannot be read.
    """
    if schedule.WhichOneof("schedule_oneof") == "cron":
        return Cron.read(schedule.cron.cron_string).following(
            after, ZoneInfo(schedule.cron.timezone or "UTC")
        )
    return _following_period(schedule.period, since, after)


def _following_period(period: Any, since: float, after: float) -> float:
    """Years and months go by the calendar, the rest by the clock, all of it in UTC."""
    clock = dt.timedelta(
        weeks=period.weeks,
        days=period.days,
        hours=period.hours,
        minutes=period.minutes,
        seconds=period.seconds,
    ).total_seconds()
    months = 12 * period.years + period.months
    if clock < 0 or months < 0 or clock + months <= 0:
        raise ValueError("a period must be longer than nothing")
    if not months:
        return since + clock * (max(0.0, (after - since) // clock) + 1)
    began = dt.datetime.fromtimestamp(since, dt.UTC)
    count = 1
    while True:
        year, month = divmod(began.year * 12 + began.month - 1 + months * count, 12)
        day = min(began.day, calendar.monthrange(year, month + 1)[1])
        at = began.replace(year=year, month=month + 1, day=day).timestamp() + clock * count
        if at > after:
            return at
        count += 1


@dataclass(frozen=True)
class Cron:
    """The values that each of the five fields allows."""

    fields: tuple[frozenset[int], ...]
    either_day: bool

    @classmethod
    def read(cls, text: str) -> Cron:
        """A ValueError where it is no cron expression."""
        words = text.lower().split()
        if len(words) != 5:
            raise ValueError(f"{text!r} has not the five fields of cron")
        fields = [cls._field(word, n) for n, word in enumerate(words)]
        fields[4] = frozenset(day % 7 for day in fields[4])
        return cls(tuple(fields), words[2][0] != "*" and words[4][0] != "*")

    @staticmethod
    def _field(word: str, n: int) -> frozenset[int]:
        names = dict(_NAMES).get(n, {})
        lowest, highest = _FIELDS[n]
        values: set[int] = set()
        for part in word.split(","):
            span, _, step = part.partition("/")
            ends = [str(lowest), str(highest)] if span == "*" else span.split("-")
            numbers = [names[end] if end in names else int(end) for end in ends]
            if len(numbers) == 1:
                numbers.append(highest if step else numbers[0])
            first, last = numbers
            if not lowest <= first <= last <= highest or ("/" in part and int(step) < 1):
                raise ValueError(f"{part!r} is not within {lowest} and {highest}")
            values.update(range(first, last + 1, int(step or 1)))
        return frozenset(values)

    def following(self, after: float, zone: dt.tzinfo) -> float | None:
        """The first whole minute after `after` at which the clock in `zone` shows what is asked for."""
        minutes, hours, _, _, _ = self.fields
        at = after // 60 * 60 + 60
        last = at + _NEVER * 86400.0
        while at < last:
            wall = dt.datetime.fromtimestamp(at, zone)
            if not self._day(wall):
                midnight = dt.datetime.combine(wall.date() + dt.timedelta(days=1), dt.time(), zone)
                at = max(at + 60, midnight.timestamp() // 60 * 60)
            elif wall.hour not in hours:
                at += 60 * (60 - wall.minute)
            elif wall.minute not in minutes:
                at += 60
            else:
                return at
        return None

    def _day(self, wall: dt.datetime) -> bool:
        _, _, days, months, weekdays = self.fields
        in_month, in_week = wall.day in days, wall.isoweekday() % 7 in weekdays
        fits = (in_month or in_week) if self.either_day else (in_month and in_week)
        return wall.month in months and fits
