"""What other clouds publish as their prices: `clouds.toml`. May import: the catalogue."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpuctl.catalog import Source
from gpuctl.catalog.tables import table


@dataclass(frozen=True)
class CloudPrice:
    """What another cloud publishes: USD for an hour of one card, by Modal's name for it."""

    cloud: str
    gpu: str
    usd_per_hour: float
    note: str | None
    source: Source


@functools.cache
def cloud_prices() -> tuple[CloudPrice, ...]:
    """In the order of the table."""
    return tuple(
        CloudPrice(
            cloud=row["cloud"],
            gpu=row["gpu"],
            usd_per_hour=row["usd_per_hour"],
            note=row.get("note"),
            source=Source(row["source"], row["as_of"]),
        )
        for row in table("clouds")["price"]
    )
