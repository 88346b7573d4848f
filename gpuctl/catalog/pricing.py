"""What Modal charges beside the GPUs, and what its plans allow: `pricing.toml`. May import: the standard library.

Amounts are exact: USD as `Decimal`, as they stand in the file. Named tuples, because `serve --dry-run` reads this
table too, and making a class of them takes a fifth of what a dataclass takes.
"""

from __future__ import annotations

import functools
import tomllib
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Origin(NamedTuple):
    """Where a fact was read, on which day (ISO 8601), and how certain it is."""

    as_of: str
    source: str
    certain: str


class ListPrice(NamedTuple):
    """USD for an hour of one unit."""

    usd: Decimal
    origin: Origin


class Reservation(NamedTuple):
    """What a container reserves when nothing is asked, and the MiB of disk that count as one MiB of memory."""

    cpu_cores: Decimal
    memory_mib: int
    disk_per_memory: int
    origin: Origin


class RegionMultipliers(NamedTuple):
    """What a choice of region multiplies the price by: `broad` for "us", `narrow` for "us-west"."""

    broad: Decimal
    narrow: Decimal
    origin: Origin


class ModalPlan(NamedTuple):
    """What a workspace of this plan may run at once, and the credits (USD) that a month begins with."""

    name: str
    gpus: int
    containers: int
    credits_usd: Decimal
    origin: Origin


class RateKeys(NamedTuple):
    """The keys of `modal billing rates --json`, all of them USD per hour; `gpus` by the type's name here."""

    cpu_core: str
    memory_gib: str
    gpus: Mapping[str, str]
    others: frozenset[str]  # known, and priced for something that gpuctl does not use

    @property
    def known(self) -> frozenset[str]:
        return self.others | {self.cpu_core, self.memory_gib, *self.gpus.values()}


class Pricing(NamedTuple):
    """The whole file, but for what only explains it."""

    cpu_core_hour: ListPrice
    memory_gib_hour: ListPrice
    reservation: Reservation
    region: RegionMultipliers
    plans: tuple[ModalPlan, ...]  # the smallest first
    rate_keys: RateKeys


@functools.cache
def pricing() -> Pricing:
    """Read on first use."""
    text = (Path(__file__).parent / "pricing.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text, parse_float=Decimal)
    reservation, region, keys = table["reservation"], table["region"], table["rate_keys"]
    return Pricing(
        cpu_core_hour=ListPrice(table["cpu_core_hour"]["usd"], _origin(table["cpu_core_hour"])),
        memory_gib_hour=ListPrice(table["memory_gib_hour"]["usd"], _origin(table["memory_gib_hour"])),
        reservation=Reservation(
            cpu_cores=reservation["cpu_cores"],
            memory_mib=reservation["memory_mib"],
            disk_per_memory=reservation["disk_per_memory"],
            origin=_origin(reservation),
        ),
        region=RegionMultipliers(region["broad"], region["narrow"], _origin(region)),
        plans=tuple(
            ModalPlan(
                name=row["name"],
                gpus=row["gpus"],
                containers=row["containers"],
                credits_usd=Decimal(row["credits_usd"]),
                origin=_origin(row),
            )
            for row in table["plan"]
        ),
        rate_keys=RateKeys(
            cpu_core=keys["cpu_core"],
            memory_gib=keys["memory_gib"],
            gpus=MappingProxyType(keys["gpus"]),
            others=frozenset(keys["others"]["keys"]),
        ),
    )


def _origin(row: Mapping[str, Any]) -> Origin:
    return Origin(row["as_of"].isoformat(), row["source"], row["certain"])
