"""What things cost: the account's own prices where they can be had, else the dated catalogue. Each says which.

`modal billing rates --json` prints a flat object of strings, USD per hour, whose keys the server makes
(`modal/cli/billing.py` of the client: `{k: str(v) for k, v in rates.items()}`); those that gpuctl knows are in
`catalog/pricing.toml`. What it printed is kept for a day, by account. May import: `gpuctl.errors`, `catalog`,
`files`, `modal_cli`, `paths`, `reach`, `target`, `times`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from gpuctl import catalog
from gpuctl.catalog.pricing import pricing
from gpuctl.errors import GpuctlError
from gpuctl.paths import cache_dir
from gpuctl.target import Target
from gpuctl.times import age

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import ModalEnv, Runner

SCHEMA = 1
KEPT_SECONDS = 24 * 3600
# The client itself gives up on a server that it cannot reach after a minute; a price is not worth that.
ASK_SECONDS = 15.0

_FEW = 6  # strange keys that are named; --json has all
ASKED_WITH = "modal billing rates --json"

Source = Literal["account", "catalogue"]
CPU_CORE, MEMORY_GIB = "CPU core", "GiB of memory"


@dataclass(frozen=True)
class Price:
    """USD for an hour of one unit: a card, a physical core, a GiB of memory.

    `as_of`: ISO 8601, a day for the catalogue's, a time for the account's own; `where` they were read.
    """

    usd_per_hour: Decimal
    source: Source
    as_of: str
    where: str

    @property
    def usd_per_second(self) -> Decimal:
        return self.usd_per_hour / 3600


@dataclass(frozen=True)
class Rates:
    """Every price that gpuctl reckons with; `gpus` by the type's name, for one card."""

    gpus: Mapping[str, Price]
    cpu_core: Price
    memory_gib: Price
    reason: str | None  # why the account's own prices are not there; None where they are
    unrecognised: tuple[str, ...] = ()  # keys of the account's own prices that gpuctl does not know

    def only(self, gpus: Collection[str]) -> Rates:
        """The prices of these types, and of CPU and memory: what is said of them is said of these alone."""
        kept = {name: price for name, price in self.gpus.items() if name in gpus}
        return dataclasses.replace(self, gpus=MappingProxyType(kept))

    @property
    def fetched_at(self) -> str | None:
        """When the account's own prices were asked for (ISO 8601); None where none of them is."""
        times = {price.as_of for _, price in self._all() if price.source == "account"}
        return min(times, default=None)

    @property
    def from_catalogue(self) -> tuple[str, ...]:
        """What the catalogue prices: the names of GPUs, `CPU core`, `GiB of memory`."""
        return tuple(name for name, price in self._all() if price.source == "catalogue")

    @property
    def source(self) -> Literal["account", "catalogue", "mixed"]:
        if not self.from_catalogue:
            return "account"
        return "catalogue" if self.fetched_at is None else "mixed"

    def said(self, *, at: datetime | None = None) -> str:
        """Where the prices come from and how old they are, for people: a clause that begins in lower case."""
        fetched_at = self.fetched_at
        strange = ""
        if self.unrecognised:
            few, more = self.unrecognised[:_FEW], len(self.unrecognised) - _FEW
            strange = f"; not recognised: {', '.join(few)}" + (f" and {more} more" if more > 0 else "")
        if fetched_at is None:
            return f"list prices of {self._days()} ({self.reason}{strange})"
        own = f"your account's own prices (`{ASKED_WITH}`, {age(fetched_at, at=at)} old)"
        if self.source == "mixed":
            own += (
                f", but list prices of {self._days()} for {', '.join(self.from_catalogue)}: "
                "your account's have no key for it that gpuctl knows"
            )
        return own + strange

    def named(self) -> str:
        """Whose prices they are, in a few words: for an error, where `said` would be too long."""
        return "your account's prices" if self.source == "account" else f"list prices of {self._days()}"

    def document(self, *, at: datetime | None = None) -> dict[str, Any]:
        """`prices` in the documents of `--json` (docs/json.md)."""
        fetched_at = self.fetched_at
        return {
            "source": self.source,
            "fetched_at": fetched_at,
            "age_seconds": None if fetched_at is None else int(_seconds_since(fetched_at, at)),
            "list_prices_of": self._days() if self.from_catalogue else None,
            "from_catalogue": list(self.from_catalogue),
            "unrecognised_keys": list(self.unrecognised),
            "reason": self.reason,
        }

    def _all(self) -> Iterator[tuple[str, Price]]:
        yield from self.gpus.items()
        yield CPU_CORE, self.cpu_core
        yield MEMORY_GIB, self.memory_gib

    def _days(self) -> str:
        days = sorted({price.as_of for _, price in self._all() if price.source == "catalogue"})
        return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def rates(
    target: Target,
    *,
    runner: Runner | None = None,
    console: Console | None = None,
    environ: Mapping[str, str] | None = None,
    at: datetime | None = None,
) -> Rates:
    """The prices to reckon with. Never fails: what cannot be had is the catalogue's, and `reason` says why.

    `runner=None`: no process and no network, only what is kept from the last day. Else the account is asked when
    nothing is, which takes a second, and at most `ASK_SECONDS`; `console` hears of it with `--verbose`.
    """
    environ = os.environ if environ is None else environ
    at = at or datetime.now(UTC)
    if target is Target.LOCAL:
        return from_catalogue("this machine has no prices")
    not_asked = "your account's own are asked for when deploying, or by `gpuctl gpus`"
    if runner is None and not _anything_kept():
        return from_catalogue(not_asked)  # without what follows imports: a dry run is to be quick
    from gpuctl.modal_cli import ModalEnv
    from gpuctl.reach import check_credentials

    try:
        check_credentials(environ)
    except GpuctlError:
        return from_catalogue("no credentials for Modal")
    env = ModalEnv.modal(environ)
    kept = _kept(env, at)
    if kept is not None:
        return kept
    if runner is None:
        return from_catalogue(not_asked)
    if console is not None:
        console.detail(f"$ {ASKED_WITH}")
    return _asked(env, runner, at)


def from_catalogue(reason: str) -> Rates:
    """The list prices, all of them."""
    return _joined({}, None, reason)


def _asked(env: ModalEnv, runner: Runner, at: datetime) -> Rates:
    from gpuctl.files import write_private
    from gpuctl.modal_cli import billing_rates_argv

    done = runner.run(billing_rates_argv(), env, timeout=ASK_SECONDS)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()).removeprefix("Error: ") or f"exit code {done.returncode}"
        return from_catalogue(f"`{ASKED_WITH}` failed: {said[:200]}")
    try:
        told = json.loads(done.stdout)
    except ValueError:
        told = None
    if not isinstance(told, dict) or not told:
        return from_catalogue(f"`{ASKED_WITH}` printed no prices")
    fetched_at = at.isoformat(timespec="seconds").replace("+00:00", "Z")
    document = {"schema": SCHEMA, "fetched_at": fetched_at, "rates": told}
    with contextlib.suppress(OSError, GpuctlError):  # a disk that is full costs a second each time, no more
        write_private(_file(env), json.dumps(document, indent=2) + "\n")
    return _joined(told, fetched_at, None)


def _kept(env: ModalEnv, at: datetime) -> Rates | None:
    try:
        document = json.loads(_file(env).read_text(encoding="utf-8"))
        told, fetched_at = document["rates"], document["fetched_at"]
        fresh = document["schema"] == SCHEMA and 0 <= _seconds_since(fetched_at, at) < KEPT_SECONDS
        return _joined(dict(told), fetched_at, None) if fresh else None
    except (OSError, ValueError, KeyError, TypeError, GpuctlError):
        return None  # a cache that cannot be read is no cache


def _folder() -> Path:
    return cache_dir(make=False) / "rates"


def _anything_kept() -> bool:
    try:
        return _folder().is_dir()
    except GpuctlError:  # no home directory
        return False


def _file(env: ModalEnv) -> Path:
    """Where the prices of the account behind `env` are kept: another account, profile or server, another file."""
    import hashlib

    from gpuctl.reach import account

    of = (account(env), env.variables.get("MODAL_SERVER_URL", ""))
    return (
        cache_dir(make=False) / "rates" / f"{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"
    )


def _joined(told: Mapping[str, Any], fetched_at: str | None, reason: str | None) -> Rates:
    """The account's own prices where `told` has them, the catalogue's for the rest."""
    listed = pricing()
    keys = listed.rate_keys

    def price(key: str | None, usd: Decimal, as_of: str, where: str) -> Price:
        own = _usd(told.get(key)) if key is not None else None
        if own is None or fetched_at is None:
            return Price(usd, "catalogue", as_of, where)
        return Price(own, "account", fetched_at, f"{ASKED_WITH}: {key}")

    core, memory = listed.cpu_core_hour, listed.memory_gib_hour
    found = {
        name: price(
            keys.gpus.get(name), Decimal(str(gpu.usd_per_second)) * 3600, gpu.price_as_of, gpu.price_source
        )
        for name, gpu in catalog.gpus().items()
    }
    if fetched_at is not None and not keys.known & told.keys():
        reason = f"`{ASKED_WITH}` has none of the keys that gpuctl knows"
    return Rates(
        gpus=MappingProxyType(found),
        cpu_core=price(keys.cpu_core, core.usd, core.origin.as_of, core.origin.source),
        memory_gib=price(keys.memory_gib, memory.usd, memory.origin.as_of, memory.origin.source),
        reason=reason,
        unrecognised=tuple(sorted(set(map(str, told)) - keys.known)),
    )


def _usd(text: object) -> Decimal | None:
    """A price as the client prints it; None for what is none."""
    try:
        usd = Decimal(str(text))
    except InvalidOperation:
        return None
    return usd if usd.is_finite() and usd >= 0 else None


def _seconds_since(time: str, at: datetime | None) -> float:
    return ((at or datetime.now(UTC)) - datetime.fromisoformat(time)).total_seconds()
