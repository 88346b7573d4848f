"""What was spent: Modal's own bill for full days and hours, and an estimate of what runs since the last full hour.

`modal billing report` tells full intervals only, a row for each object and interval (`modal/cli/billing.py`: keys
`object_id`, `description`, `environment`, `interval_start` in UTC without a zone, `cost`, and `tags`, which is JSON in
a string). What is newer is reckoned: the time that each container of gpuctl's has run since then, times its price. May
import: `gpuctl.errors`, `catalog`, `cost`, `modal_cli`, `paths`, `prices`, `reach`, `records`, `specs`,
`target`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from gpuctl.catalog.pricing import pricing
from gpuctl.cost import usd
from gpuctl.errors import GpuctlError, usage_error
from gpuctl.modal_cli import (
    billing_report_argv,
    billing_summary_argv,
    container_list_argv,
    shown,
)
from gpuctl.paths import state_dir
from gpuctl.prices import rates
from gpuctl.reach import environment_name, no_environment, reach
from gpuctl.records import DeploymentRecord, Records
from gpuctl.specs.resources import OWN_TAG
from gpuctl.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import ModalEnv, Runner

# Up to here hours are asked for; beyond, full days and only the hours of today: a month of hours is a long answer.
_HOURS_FOR = timedelta(days=7)
_UNTAGGED = "-"
_ZERO = Decimal(0)


@dataclass(frozen=True)
class Tag:
    """`--tag KEY` or `--tag KEY=VALUE`."""

    key: str
    value: str | None

    @classmethod
    def parse(cls, text: str) -> Tag:
        key, equals, value = text.partition("=")
        if not key or (equals and not value):
            raise usage_error(f"--tag: {text!r} is not of the form KEY or KEY=VALUE")
        return cls(key, value if equals else None)


@dataclass(frozen=True)
class Charge:
    """USD of one object of Modal's (an App, a Volume) in some time; `billed` by Modal, or `estimated` by us."""

    object_id: str
    name: str
    environment: str
    tags: Mapping[str, str]
    billed: Decimal = _ZERO
    estimated: Decimal = _ZERO


@dataclass(frozen=True)
class Line:
    """The sum of charges that go together: of one App in one Environment, or of one value of a tag."""

    name: str
    environment: str | None  # None: of several
    object_ids: tuple[str, ...]
    tags: Mapping[str, str]  # what all of them have
    billed: Decimal
    estimated: Decimal

    @property
    def total(self) -> Decimal:
        return self.billed + self.estimated


@dataclass(frozen=True)
class Credits:
    """The credits that this month's bill has used, USD, and whether the workspace pays for a plan."""

    used: Decimal
    pays_for_plan: bool
    billed_beyond: Decimal  # what is billed nevertheless, the plan's own price left out

    @property
    def left(self) -> Mapping[str, Decimal]:
        """USD, by the plans that the workspace may have, each with its published credits.

        Modal tells what was used and not what is left, nor the plan.
        """
        plans = [plan for plan in pricing().plans if not (self.pays_for_plan and plan is pricing().plans[0])]
        return {plan.name: max(plan.credits_usd - self.used, _ZERO) for plan in plans}


@dataclass(frozen=True)
class Spending:
    """What was spent from `since` on: `lines` billed up to `billed_until` and estimated from there to `at`. UTC."""

    target: Target
    since: datetime
    billed_until: datetime
    at: datetime
    tag: Tag | None
    lines: tuple[Line, ...]  # the dearest first
    credits: Credits | None

    @property
    def billed(self) -> Decimal:
        return sum((line.billed for line in self.lines), _ZERO)

    @property
    def estimated(self) -> Decimal:
        return sum((line.estimated for line in self.lines), _ZERO)

    def document(self) -> dict[str, Any]:
        """`gpuctl cost --json` (docs/json.md): USD as numbers, rounded to a millionth."""
        used = self.credits
        return {
            "target": self.target.value,
            "since": _iso(self.since),
            "billed_until": _iso(self.billed_until),
            "at": _iso(self.at),
            "tag": None if self.tag is None else self.tag.key,
            "billed_usd": _number(self.billed),
            "estimated_usd": _number(self.estimated),
            "usd": _number(self.billed + self.estimated),
            "lines": [
                {
                    "name": line.name,
                    "environment": line.environment,
                    "object_ids": list(line.object_ids),
                    "tags": dict(line.tags),
                    "billed_usd": _number(line.billed),
                    "estimated_usd": _number(line.estimated),
                    "usd": _number(line.total),
                }
                for line in self.lines
            ],
            "credits": None
            if used is None
            else {
                "used_usd": _number(used.used),
                "left_usd_by_plan": {name: _number(left) for name, left in used.left.items()},
                "billed_beyond_usd": _number(used.billed_beyond),
            },
        }

    def cells(self) -> Iterator[tuple[str, ...]]:
        """The table: a line each, and their sum."""
        for line in self.lines:
            yield (
                line.name,
                line.environment or "-",
                usd(line.billed),
                _estimate(line.estimated),
                usd(line.total),
            )
        if len(self.lines) != 1:
            yield (
                "total",
                "-",
                usd(self.billed),
                _estimate(self.estimated),
                usd(self.billed + self.estimated),
            )

    def header(self) -> tuple[str, ...]:
        first = "NAME" if self.tag is None or self.tag.value is not None else self.tag.key.upper()
        return (first, "ENVIRONMENT", "BILLED", "ESTIMATED", "TOTAL")

    def notes(self) -> Iterator[str]:
        """What the figures are, and are not."""
        if self.target is Target.LOCAL:
            return
        if self.billed_until > self.since:
            yield (
                f"billed: Modal's own figures, {_minute(self.since)} to {_minute(self.billed_until)} UTC, full "
                "hours only; the last one may still grow"
            )
        yield (
            f"estimated: since {_minute(self.billed_until)} UTC, the time that the containers of gpuctl's "
            "deployments run, times their price; those that ended since then, and other Apps, are not in it"
        )
        if self.credits is not None:
            yield _credits_said(self.credits)


def spending(
    name: str | None,
    *,
    since: str | None,
    tag: str | None,
    target: Target,
    environment: str | None,
    runner: Runner,
    console: Console,
    at: datetime | None = None,
) -> Spending:
    """What `name`, or everything, cost since then; on this machine, where nothing is charged, nothing."""
    at = at or datetime.now(UTC)
    wanted = None if tag is None else Tag.parse(tag)
    start = _month(at) if since is None else _since(since, at)
    hour = at.replace(minute=0, second=0, microsecond=0)
    if environment is not None:
        environment = environment_name(target, environment)
    records = [
        record
        for record in Records(state_dir()).all(target, environment)
        if name is None or name in (record.name, record.app_id)
    ]
    if target is Target.LOCAL:
        if name is not None and not records:
            Records(state_dir()).find(name, target, environment_name(target, environment))
        console.say(
            "nothing is charged on this machine; what it would cost on Modal: gpuctl serve … --dry-run"
        )
        return Spending(target, start, start, at, wanted, (), None)

    env = reach(target)
    ask = _asker(env, runner, console)
    with console.spinner("asking Modal for the bill"):
        charges = list(_billed(start, hour, ask))
        if name is not None:
            _check_known(name, charges, records, environment)
        boundary = max(start, hour)
        charges += _estimated(records, charges, boundary, at, ask, runner)
        used = _credits(ask) if name is None and wanted is None else None
    kept = [
        charge
        for charge in charges
        if (name is None or name in (charge.name, charge.object_id) or _is_of(charge, records))
        and (environment is None or charge.environment == environment)
        and (wanted is None or _has(charge, wanted))
    ]
    lines = _lines(kept, wanted)
    begin = start if start >= hour else _beginning(start, at)
    return Spending(target, min(begin, boundary), boundary, at, wanted, lines, used)


# -- what Modal tells


def _asker(env: ModalEnv, runner: Runner, console: Console) -> Callable[[Sequence[str]], Any]:
    def ask(argv: Sequence[str]) -> Any:
        console.detail(f"$ {shown(argv)}")
        done = runner.run(argv, env)
        if done.returncode != 0:
            missing = no_environment(done.stderr, env.target)
            if missing is not None:
                raise missing
            said = " ".join(done.stderr.split()).removeprefix("Error: ") or f"exit code {done.returncode}"
            raise GpuctlError(f"`{shown(argv)}` failed: {said}")
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise GpuctlError(f"`{shown(argv)}` printed no JSON: {done.stdout[:200]}") from None

    return ask


def _beginning(start: datetime, at: datetime) -> datetime:
    """Where the first full interval that holds `start` begins: its hour, or, long ago, its day."""
    if at - start <= _HOURS_FOR:
        return start.replace(minute=0, second=0, microsecond=0)
    return _day(start)


def _billed(start: datetime, hour: datetime, ask: Callable[[Sequence[str]], Any]) -> Iterator[Charge]:
    """The rows of the report from `start` to the last full hour."""
    if start >= hour:
        return  # not one full hour yet
    begin, today = _beginning(start, hour), _day(hour)
    spans = [(begin, hour, "h")]
    if hour - start > _HOURS_FOR:
        spans = [(begin, today, "d"), (today, hour, "h")]
    for first, last, resolution in spans:
        if first < last:
            argv = billing_report_argv(_naive(first), end=_naive(last), resolution=resolution)
            rows = ask(argv)
            try:
                yield from map(_charge, rows)
            except (ValueError, KeyError, TypeError, AttributeError, InvalidOperation):
                raise GpuctlError(f"`{shown(argv)}` printed something else than a report") from None


def _charge(row: Mapping[str, Any]) -> Charge:
    tags = row.get("tags") or "{}"
    told = json.loads(tags) if isinstance(tags, str) else tags
    return Charge(
        object_id=str(row["object_id"]),
        name=str(row["description"]) or str(row["object_id"]),
        environment=str(row["environment"]),
        tags={str(key): str(value) for key, value in told.items()},
        billed=Decimal(str(row["cost"])),
    )


def _estimated(
    records: Iterable[DeploymentRecord],
    billed: Iterable[Charge],
    boundary: datetime,
    at: datetime,
    ask: Callable[[Sequence[str]], Any],
    runner: Runner,
) -> Iterator[Charge]:
    """What the containers that run now have cost since `boundary`, by the records that know their GPUs."""
    tags = {charge.object_id: charge.tags for charge in billed}
    running = {record.app_id: record for record in records if record.running}
    for environment in sorted({record.environment for record in running.values()}):
        argv = container_list_argv(environment=environment)
        try:
            for container in ask(argv):
                record = running.get(str(container["app_id"]))
                seconds = _seconds_since(str(container["start_time"]), boundary, at)
                if record is not None and seconds:
                    cost = _hourly(record, runner) * Decimal(str(seconds)) / 3600
                    told = tags.get(record.app_id) or dict(_tags_of(record))
                    yield Charge(record.app_id, record.name, environment, told, estimated=cost)
        except (ValueError, KeyError, TypeError):
            raise GpuctlError(f"`{shown(argv)}` printed something else than containers") from None


def _seconds_since(started: str, boundary: datetime, at: datetime) -> float:
    """Seconds that a container has run since `boundary`; 0 for one that is `Pending`: it is not charged yet."""
    if started == "Pending":
        return 0.0
    start = datetime.fromisoformat(started)
    return max((at - max(start, boundary)).total_seconds(), 0.0)


def _hourly(record: DeploymentRecord, runner: Runner) -> Decimal:
    """USD an hour of a container: as said when it was deployed, else by its dearest GPU and today's prices."""
    if record.usd_per_hour is not None:
        return Decimal(str(record.usd_per_hour))
    now = rates(record.target, runner=runner)
    reserved = pricing().reservation
    cards = (choice.replace("!", "").partition(":") for choice in record.gpu)
    gpus = [now.gpus[name].usd_per_hour * int(count or 1) for name, _, count in cards if name in now.gpus]
    memory = now.memory_gib.usd_per_hour * reserved.memory_mib / 1024
    return max(gpus, default=_ZERO) + now.cpu_core.usd_per_hour * reserved.cpu_cores + memory


def _tags_of(record: DeploymentRecord) -> Iterator[tuple[str, str]]:
    """The tags that the App was deployed with, from the command that its record keeps."""
    yield OWN_TAG
    words = list(record.argv)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--":
            return
        text = (
            following if word == "--tag" else word.removeprefix("--tag=") if word.startswith("--tag=") else ""
        )
        key, equals, value = text.partition("=")
        if equals:
            yield key, value


def _credits(ask: Callable[[Sequence[str]], Any]) -> Credits | None:
    """From `modal billing summary`; None where it is not told, for whatever reason: the costs do not hang on it.

    The server names the adjustments; `credits` (negative) and `plan_cost` are as users published them in 2026.
    """
    try:
        summary = ask(billing_summary_argv())
        adjustments = {str(key): Decimal(str(value)) for key, value in summary["adjustments"].items()}
        billed = Decimal(str(summary["billed_cost"]))
    except (GpuctlError, KeyError, TypeError, AttributeError, InvalidOperation):
        return None
    if "credits" not in adjustments:
        return None
    plan = adjustments.get("plan_cost", _ZERO)
    return Credits(-adjustments["credits"], plan > 0, max(billed - plan, _ZERO))


def _credits_said(used: Credits) -> str:
    plan = pricing().plans[0]
    said = f"credits: {usd(used.used)} used this month"
    if used.billed_beyond:
        return f"{said}, and {usd(used.billed_beyond)} is billed beyond them"
    left = " or ".join(f"{usd(left)} on {name}" for name, left in used.left.items())
    return (
        f"{said}; Modal does not tell what is left: by the published credits of its plans "
        f"({plan.origin.as_of}) {left}"
    )


# -- what belongs together


def _is_of(charge: Charge, records: Sequence[DeploymentRecord]) -> bool:
    return any(record.app_id == charge.object_id for record in records)


def _has(charge: Charge, wanted: Tag) -> bool:
    return wanted.value is None or charge.tags.get(wanted.key) == wanted.value


def _check_known(
    name: str, charges: Sequence[Charge], records: Sequence[DeploymentRecord], environment: str | None
) -> None:
    """A name that neither the bill nor a record has is a wrong command."""
    here = [charge for charge in charges if environment is None or charge.environment == environment]
    if records or any(name in (charge.name, charge.object_id) for charge in here):
        return
    known = {charge.name for charge in here}
    known |= {record.name for record in Records(state_dir()).all(Target.MODAL, environment)}
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    said = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    where = f" in environment '{environment}'" if environment else ""
    raise usage_error(
        f"nothing named {name!r} was charged in that time or deployed by gpuctl{where}{said}",
        hint="gpuctl cost --since 30d",
    )


def _lines(charges: Iterable[Charge], tag: Tag | None) -> tuple[Line, ...]:
    """Charges of one App in one Environment together, or those of one value of the tag's key; the dearest first."""
    groups: dict[tuple[str, str | None], list[Charge]] = defaultdict(list)
    for charge in charges:
        if tag is not None and tag.value is None:
            groups[charge.tags.get(tag.key, _UNTAGGED), None].append(charge)
        else:
            groups[charge.name, charge.environment].append(charge)
    lines = [
        Line(
            name=name,
            environment=environment,
            object_ids=tuple(dict.fromkeys(charge.object_id for charge in group)),
            tags=dict(set.intersection(*(set(charge.tags.items()) for charge in group))),
            billed=sum((charge.billed for charge in group), _ZERO),
            estimated=sum((charge.estimated for charge in group), _ZERO),
        )
        for (name, environment), group in groups.items()
    ]
    return tuple(sorted(lines, key=lambda line: (-line.total, line.name, line.environment or "")))


# -- time and money


def _since(text: str, at: datetime) -> datetime:
    """`--since`: so long ago, or an ISO 8601 time; without a zone it is UTC, as in Modal's bill."""
    wrong = f"--since: {text!r} is no time: 30m, 12h or 7d ago, 2026-05-07, or 2026-05-07T09:30:00 (UTC)"
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    try:
        if text[-1:] in units and text[:-1].isascii() and text[:-1].isdecimal():
            since = at - timedelta(**{units[text[-1]]: int(text[:-1])})
        else:
            since = datetime.fromisoformat(text)
            since = since.replace(tzinfo=UTC) if since.tzinfo is None else since.astimezone(UTC)
    except (ValueError, OverflowError):
        raise usage_error(wrong) from None
    if since > at:
        raise usage_error(f"--since: {text!r} is in the future")
    return since


def _month(at: datetime) -> datetime:
    return _day(at).replace(day=1)


def _day(time: datetime) -> datetime:
    return time.replace(hour=0, minute=0, second=0, microsecond=0)


def _naive(time: datetime) -> str:
    return time.replace(tzinfo=None).isoformat(timespec="seconds")


def _minute(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _estimate(amount: Decimal) -> str:
    return f"~{usd(amount)}" if amount else "-"


def _number(amount: Decimal) -> float:
    return float(round(amount, 6))
