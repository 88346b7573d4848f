"""Follow a job that runs until it ends, and show how far it is. May import: batch.remote.

The driver says how far it is every other second, as a line of the App's logs; what it last said is in the Volume too,
and is asked for where the logs are silent.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuctl.batch.remote import Remote
    from gpuctl.cli.console import Console

RUNNING = "running"
_SILENT = 10.0  # seconds without a word after which the Volume is asked
_LOST = 90.0  # seconds without a word from the driver, anywhere, after which it is taken for dead
_WINDOW = 60.0  # seconds over which the rate of now is taken
_PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


def follow(
    remote: Remote,
    run: str | None,
    *,
    console: Console,
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The status in which the run ended: `done`, `stopped` or `failed`. `run`: None: whichever runs."""
    events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    shown = Progress(console)
    heard = asked = time.monotonic()
    follower = remote.follow(events.put)
    try:
        with console.spinner("starting …"):
            while True:
                status = _next(events)
                now = time.monotonic()
                if status is None and now - max(heard, asked) > _SILENT:
                    asked = now
                    status = remote.read_json("status.json")
                    if (
                        status is not None
                        and time.time() - status["time"] > _SILENT
                        and status["state"] == RUNNING
                    ):
                        status = None  # old: nobody says anything
                if status is None:
                    if now - heard > _LOST:
                        raise remote.silent()
                    shown.tick()
                    continue
                if run is not None and status["run"] != run:
                    continue
                heard = now
                pace = shown.update(status)
                if on_event is not None:
                    on_event({**status, **pace.document()})
                if status["state"] != RUNNING:
                    return status
    finally:
        follower.cancel()


def alive(status: Mapping[str, Any]) -> bool:
    """Whether the driver that last said this may still be there: it speaks every other second."""
    return time.time() - float(status["time"]) < _LOST


def _next(events: queue.SimpleQueue[dict[str, Any]]) -> dict[str, Any] | None:
    with contextlib.suppress(queue.Empty):
        return events.get(timeout=0.5)
    return None


@dataclass(frozen=True)
class Pace:
    """How fast a job is, over the last minute; None: not known yet."""

    left: int  # rows
    rows: float | None = None  # a second
    tokens_in: float | None = None
    tokens_out: float | None = None

    @property
    def seconds_left(self) -> float | None:
        return self.left / self.rows if self.rows else None

    def document(self) -> dict[str, Any]:
        """What an event has of it."""

        def rounded(number: float | None) -> float | None:
            return None if number is None else round(number, 3)

        return {
            "left": self.left,
            "rows_per_second": rounded(self.rows),
            "tokens_in_per_second": rounded(self.tokens_in),
            "tokens_out_per_second": rounded(self.tokens_out),
            "seconds_left": rounded(self.seconds_left),
        }


class Progress:
    """How far a job is, in one line: redrawn on a terminal, else one every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._history: deque[tuple[float, int, int, int]] = deque()
        self._text = "starting …"
        self._said = 0.0

    def update(self, status: Mapping[str, Any]) -> Pace:
        ended = status["done"] + status["failed"]
        self._history.append((status["time"], ended, status["tokens_in"], status["tokens_out"]))
        while len(self._history) > 2 and self._history[0][0] < status["time"] - _WINDOW:
            self._history.popleft()
        pace = self._pace(status["rows"] - ended)
        self._text = self._line(status, ended, pace)
        old = time.time() - status["time"] > _SILENT  # who follows it again, hears all of it again
        if self._console.live:
            self._console.progress(self._text)
        elif (time.monotonic() - self._said > _PLAIN_EVERY and not old) or status["state"] != RUNNING:
            self._said = time.monotonic()
            self._console.say(self._text)
        return pace

    def _pace(self, left: int) -> Pace:
        first, last = self._history[0], self._history[-1]
        seconds = last[0] - first[0]
        if seconds <= 0 or last[1] <= first[1]:
            return Pace(left)
        rows, tokens_in, tokens_out = ((last[n] - first[n]) / seconds for n in (1, 2, 3))
        return Pace(left, rows, tokens_in, tokens_out)

    def tick(self) -> None:
        if self._console.live:
            self._console.progress(self._text)

    def _line(self, status: Mapping[str, Any], ended: int, pace: Pace) -> str:
        rows = status["rows"]
        if status.get("phase") == "reading":
            return "reading the rows in the cloud …"
        if status.get("phase") == "writing":
            return "writing the answers in the cloud …"
        parts = [f"{_bar(ended, rows)}{ended:,} of {rows:,} rows"]
        if status["failed"]:
            parts.append(f"{status['failed']:,} failed")
        if pace.rows:
            parts.append(f"{pace.rows:,.0f} rows/s" if pace.rows >= 10 else f"{pace.rows:.2g} rows/s")
            if pace.tokens_in:
                parts.append(f"{pace.tokens_in:,.0f} tok/s in, {pace.tokens_out:,.0f} out")
            if pace.left and pace.seconds_left is not None:
                parts.append(f"{pace.left:,} rows left: {duration(pace.seconds_left)}")
        if waits := waits_for(status, ended):
            parts.append(waits)
        if status["usd"] is not None:
            parts.append(f"${status['usd']:.2f}")
        return ", ".join(parts)


def waits_for(status: Mapping[str, Any], ended: int) -> str:
    """Who is at work, or what nobody can go on without."""
    up, loading = status["containers"], status.get("containers_loading") or 0
    if status["state"] != RUNNING:
        return counted(up, "container") if up else ""
    again = status.get("retrying") or 0
    if ended == status["rows"] and not again:
        return "collecting the answers"
    tried = f"{again:,} tried again, " if again else ""
    if not up:
        return f"{tried}waiting for a container"
    containers = tried + counted(up, "container")
    if loading == up:
        return f"{containers}, loading"
    return f"{containers}, {loading} of them loading" if loading else containers


def _bar(ended: int, rows: int, width: int = 20) -> str:
    full = round(width * ended / rows) if rows else width
    return "█" * full + "░" * (width - full) + " "


def counted(number: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """As a person says it: 45 s, 12 min, 3 h 20 min, 4 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours / 24:.1f} days"
