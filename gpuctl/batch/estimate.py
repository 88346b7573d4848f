"""How long a job may take and what it may cost, from its tokens and its GPUs: pure arithmetic, no I/O. May import:
batch (sampling's values, follow's words), cost.

    GPU seconds at best  = tokens in / prefill + tokens out / decode        of the roofline (docs/fit.md)
    GPU seconds          = that / BEST ... that / LEAST
    container seconds    = GPU seconds + containers x start
    time                 = start + GPU seconds / containers
    cost                 = container seconds x price of a container
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from gpuctl.batch.follow import duration
from gpuctl.batch.sampling import CONFIDENCE, Range
from gpuctl.cost import usd, usd_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Shares of the roofline. Bulk runs that were published reach 0.16 to 0.73 of it: benchmarks/data/batch_throughput.csv
# has them with their sources, and a test holds these two figures to them.
BEST, LEAST = 0.8, 0.15

# Seconds from a container's start until its engine answers. On Modal an unmodified vLLM took 460 s with a model of 27
# GiB on an A100, its weights in a Volume (https://logeshumapathi.com/blog/2026/05/17/vllm-serverless.html, 2026-05-17),
# one of 14 GB "easily over 4 minutes" the first time (https://devcheolu.com/en/posts/IS7OXEYpwN4pBSS77j4p), and engines
# with their caches warm 60 s (https://www.yuvraj97.com/deep-dives/cold-start-engineering). At most what those take and
# a first download at 54 MB/s, as `--startup-timeout` reckons; at least what a warm cache takes: assumptions.
_START_LEAST, _LEAST_PER_GIB = 40.0, 0.5
_START_MOST, _MOST_PER_GIB = 180.0, 20.0
# The last shard that a container works on while the others have none: there are eight of them for each at least.
_UNEVEN = 1 / 8


@dataclass(frozen=True)
class Tokens:
    """What there is to do. `out_high`: None: only the context bounds it, and that is not known."""

    rows: int  # that have a request
    tokenised: int  # of them
    tokens_in: Range
    shared: int  # of `tokens_in.low`, what an engine that keeps the beginnings of prompts need not read again
    out_low: int
    out_high: int | None
    capped: bool  # whether all requests say how long an answer may be
    missing: str | None = None  # why it is not the model's tokenizer that counted
    not_counted: Mapping[str, int] | None = None  # pictures and the like

    def said(self) -> str:
        """In a line."""
        known = self.tokens_in
        if self.missing is not None:
            how = f"from the number of letters, because {self.missing}"
            parts = [f"{span(known.low, known.high)} in ({how})"]
        elif known.low == known.high:
            every = f"all of the {self.rows:,} rows" if self.rows > 1 else "the only row"
            parts = [f"{short(known.likely)} in ({every} tokenised)"]
        else:
            sure = f"{CONFIDENCE:.0%} sure"
            how = f"{self.tokenised:,} of {self.rows:,} rows tokenised; {span(known.low, known.high)}, {sure}"
            parts = [f"about {short(known.likely)} in ({how})"]
        if self.out_high:
            why = "" if self.capped else ", as the context has room for no more"
            parts.append(f"{span(self.out_low, self.out_high)} out{why}")
        elif self.out_high is None:
            parts.append(f"at least {short(self.out_low)} out")
        if self.not_counted:
            what = ", ".join(
                f"{count:,} {kind if count > 1 else kind.removesuffix('s')}"
                for kind, count in sorted(self.not_counted.items())
            )
            parts.append(f"{what} not counted")
        return "tokens: " + ", ".join(parts)

    def document(self) -> dict[str, Any]:
        known = self.tokens_in
        return {
            "rows": self.rows,
            "tokenised_rows": self.tokenised if self.missing is None else 0,
            "no_tokenizer": self.missing,
            "tokens_in": {
                "low": int(known.low),
                "likely": round(known.likely),
                "high": -int(-known.high // 1),
            },
            "tokens_out": {"low": self.out_low, "high": self.out_high},
            "not_counted": dict(self.not_counted or {}),
        }


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one container at best; `decode` is None where nothing is written."""

    prefill: float
    decode: float | None

    def seconds(self, tokens_in: float, tokens_out: float) -> float:
        return tokens_in / self.prefill + (tokens_out / self.decode if self.decode else 0.0)


@dataclass(frozen=True)
class Machine:
    """A container that may be handed out: how fast with the shortest answers and with the longest, and its price."""

    name: str
    fast: Speed
    slow: Speed
    weights_gib: float
    usd_per_hour: tuple[Decimal, Decimal]  # as reserved, and at its limits

    @property
    def start(self) -> tuple[float, float]:
        """Seconds until it answers."""
        return (
            _START_LEAST + _LEAST_PER_GIB * self.weights_gib,
            _START_MOST + _MOST_PER_GIB * self.weights_gib,
        )


@dataclass(frozen=True)
class Spans:
    """From the least to the most: seconds until it ends, and what all containers together take and cost."""

    seconds: tuple[float, float]
    container_seconds: tuple[float, float]
    usd: tuple[float, float] | None

    def document(self) -> dict[str, Any]:
        def of(pair: tuple[float, float], digits: int) -> dict[str, float]:
            return {"low": round(pair[0], digits), "high": round(pair[1], digits)}

        return {
            "seconds": of(self.seconds, 1),
            "container_seconds": of(self.container_seconds, 1),
            "usd": None if self.usd is None else of(self.usd, 6),
        }


def spans(tokens: Tokens, machines: Sequence[Machine], containers: int, *, timeout: int) -> Spans | None:
    """`containers`: that work at once; `timeout`: seconds after which a start is given up. None: no end is known."""
    if tokens.out_high is None or not machines:
        return None
    found = [_on(tokens, machine, containers, timeout) for machine in machines]
    costs = [one.usd for one in found if one.usd is not None]
    return Spans(
        seconds=(min(one.seconds[0] for one in found), max(one.seconds[1] for one in found)),
        container_seconds=(
            min(one.container_seconds[0] for one in found),
            max(one.container_seconds[1] for one in found),
        ),
        usd=(min(cost[0] for cost in costs), max(cost[1] for cost in costs)),
    )


def _on(tokens: Tokens, machine: Machine, containers: int, timeout: int) -> Spans:
    assert tokens.out_high is not None
    first, last = machine.start
    last = max(first, min(last, float(timeout)))
    read = max(0.0, tokens.tokens_in.low - tokens.shared)
    least = machine.fast.seconds(read, tokens.out_low) / BEST
    most = machine.slow.seconds(tokens.tokens_in.high, tokens.out_high) / LEAST
    if containers > 1:
        most *= 1 + _UNEVEN
    # One container that is up before the others may have done all of it.
    together = least + first, most + containers * last
    low, high = (float(price) / 3600 for price in machine.usd_per_hour)
    return Spans(
        seconds=(first + least / containers, last + most / containers),
        container_seconds=together,
        usd=(together[0] * low, together[1] * high),
    )


_ENOUGH = 20  # rows that ended while others waited: fewer tell nothing


@dataclass(frozen=True)
class Measured:
    """What a job of the same work came to that had fewer rows: a taste. Seconds are of its containers together.

    `working`: from when they could answer until they ended, in which few rows do not keep them busy; `busy`: seconds
    of that in which rows waited for them, and the rows that ended then.
    """

    job: str
    rows: int
    starting: float  # of one container, until it could answer
    working: float
    busy: tuple[float, int]

    def expected(self, rows: int, containers: int, usd_per_hour: Decimal | None) -> Spans:
        """All rows, if they are like those: as fast as when it was busy, or as on the whole.

        Where it was never busy, only that it takes no longer is known.
        """
        most = self.working / self.rows * rows
        seconds, ended = self.busy
        least = min(most, seconds / ended * rows) if ended >= _ENOUGH else 0.0
        together = (least + self.starting, most + containers * self.starting)
        price = None if usd_per_hour is None else float(usd_per_hour) / 3600
        return Spans(
            (self.starting + least / containers, self.starting + most / containers),
            together,
            None if price is None else (together[0] * price, together[1] * price),
        )


@dataclass(frozen=True)
class TooLong:
    """Rows that have no room in the context, of those that were tokenised."""

    rows: int
    of: int
    longest: int  # tokens of the longest question
    context: int
    all_rows: bool  # whether those are all rows that there are

    def said(self) -> str:
        share = f"{self.rows:,} of the {self.of:,} rows{'' if self.all_rows else ' that were tokenised'}"
        have, end = ("has", "it ends as an error") if self.rows == 1 else ("have", "they end as errors")
        return (
            f"{share} {have} no room in the context of {self.context:,} tokens (the longest question has "
            f"{self.longest:,}): {end}"
        )


@dataclass(frozen=True)
class Estimate:
    """What is said of a job before it starts."""

    tokens: Tokens | None  # None: rows of a function, or for pictures, have none
    spans: Spans | None
    unknown: str | None  # why there are no spans
    containers: str  # what works on it: "8 L40S"
    measured: Measured | None = None
    too_long: TooLong | None = None
    pictures: int | None = None  # that are to be made; None: the rows ask for none

    def lines(self) -> list[str]:
        """For a person."""
        said = [] if self.tokens is None else [self.tokens.said()]
        if self.pictures is not None:
            said.append(f"pictures: {self.pictures:,}")
        if self.spans is None:
            if self.unknown is not None:
                said.append(f"time: {self.unknown}")
            return said
        cost = "" if self.spans.usd is None else f"; cost: {money(*self.spans.usd)}"
        line = f"time: {times(*self.spans.seconds)} on {self.containers}{cost}"
        if self.measured is not None:
            by = f"measured on {self.measured.rows:,} rows by job {self.measured.job}"
            line += f" ({by}, if the others are like them)"
        said.append(line)
        return said

    def cost_said(self) -> str | None:
        """For a question: what it costs."""
        if self.spans is None or self.spans.usd is None:
            return None
        return money(*self.spans.usd)

    def document(self) -> dict[str, Any]:
        """`estimate` of `--json`."""
        tokens = {} if self.tokens is None else self.tokens.document()
        if self.pictures is not None:
            tokens["pictures"] = self.pictures
        empty = {"seconds": None, "container_seconds": None, "usd": None}
        long = self.too_long
        return {
            **tokens,
            "confidence": CONFIDENCE,
            **(empty if self.spans is None else self.spans.document()),
            "unknown": self.unknown,
            "measured_by": None
            if self.measured is None
            else {"job": self.measured.job, "rows": self.measured.rows},
            "too_long": None
            if long is None
            else {"rows": long.rows, "of": long.of, "longest": long.longest, "context": long.context},
        }


# -- words


def short(number: float) -> str:
    """1,234 is itself; 45,678 is 45.7 k; 1,234,567 is 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= (1e4 if unit == "k" else size):
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:,.0f}"


def span(low: float, high: float) -> str:
    first, last = short(low), short(high)
    if first == last:
        return first
    if first.partition(" ")[2] == last.partition(" ")[2] and " " in first:
        first = first.partition(" ")[0]
    return f"{first} to {last}"


def times(low: float, high: float) -> str:
    first, last = duration(low), duration(high)
    if low < 1 <= high:
        return f"up to {last}"
    return first if first == last else f"{first} to {last}"


def money(low: float, high: float) -> str:
    if low == 0 < high:
        return f"up to {usd(Decimal(str(high)))}"
    return usd_range(Decimal(str(low)), Decimal(str(high)))
