"""What `gpuctl gpus` tells: the cards with their prices, chosen and sorted. May import: catalog, errors, prices.

Pure: the prices come in as `Rates`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from gpuctl import catalog
from gpuctl.catalog.clouds import cloud_prices
from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuctl.catalog import Gpu
    from gpuctl.catalog.clouds import CloudPrice
    from gpuctl.prices import Price, Rates

UNKNOWN = "-"


@dataclass(frozen=True)
class Offer:
    """One card with what it costs: at Modal, and at other clouds."""

    gpu: Gpu
    price: Price
    elsewhere: tuple[CloudPrice, ...]

    def cells(self, clouds: Sequence[str]) -> list[str]:
        """Under `header`: GiB, GB/s, TFLOPS, USD."""
        gpu = self.gpu
        per_hour = {price.cloud: price for price in self.elsewhere}
        return [
            gpu.name,
            str(gpu.vram_gib),
            _number(gpu.bandwidth_gb_s),
            *(_tflops(gpu, form) for form in FORMATS),
            UNKNOWN if gpu.compute_capability is None else ".".join(map(str, gpu.compute_capability)),
            str(gpu.max_count),
            str(gpu.max_vram_gib),
            f"{self.price.usd_per_second:.6f}",
            f"{self.price.usd_per_hour:.2f}",
            *(_elsewhere(per_hour.get(cloud)) for cloud in clouds),
            gpu.best_for,
        ]

    def document(self, *, compare: bool) -> dict[str, Any]:
        """One of `gpus` in the document of `gpuctl gpus --json` (docs/json.md)."""
        gpu, price = self.gpu, self.price
        capability = gpu.compute_capability
        document: dict[str, Any] = {
            "name": gpu.name,
            "card": gpu.card,
            "vram_gib": gpu.vram_gib,
            "visible_gib": gpu.visible_gib,
            "bandwidth_gb_s": gpu.bandwidth_gb_s,
            "tflops": dict(gpu.tflops),
            "compute_capability": None if capability is None else ".".join(map(str, capability)),
            "max_count": gpu.max_count,
            "max_vram_gib": gpu.max_vram_gib,
            "usd_per_second": round(float(price.usd_per_second), 6),
            "usd_per_hour": round(float(price.usd_per_hour), 4),
            "price": {"source": price.source, "as_of": price.as_of, "where": price.where},
            "best_for": gpu.best_for,
            "note": gpu.note,
            "sources": {name: _source(source) for name, source in gpu.sources.items()},
        }
        if compare:
            document["elsewhere"] = [
                {
                    "cloud": other.cloud,
                    "usd_per_hour": other.usd_per_hour,
                    "note": other.note,
                    **_source(other.source),
                }
                for other in self.elsewhere
            ]
        return document


FORMATS = ("bf16", "fp8", "fp4")
# What the highest comes first of; of a name and of a price, the lowest does.
_HIGHEST_FIRST: dict[str, Callable[[Offer], Any]] = {
    "vram": lambda offer: offer.gpu.vram_gib,
    "total-vram": lambda offer: offer.gpu.max_vram_gib,
    "bandwidth": lambda offer: offer.gpu.bandwidth_gb_s,
    "bf16": lambda offer: offer.gpu.tflops.get("bf16"),
    "fp8": lambda offer: offer.gpu.tflops.get("fp8"),
    "fp4": lambda offer: offer.gpu.tflops.get("fp4"),
    "compute-capability": lambda offer: offer.gpu.compute_capability,
}
_LOWEST_FIRST: dict[str, Callable[[Offer], Any]] = {
    "price": lambda offer: offer.price.usd_per_hour,
    "price-per-gib": lambda offer: offer.price.usd_per_hour / offer.gpu.vram_gib,
    "name": lambda offer: offer.gpu.name,
}
SORTS = (*_LOWEST_FIRST, *_HIGHEST_FIRST)


def header(clouds: Sequence[str]) -> list[str]:
    """The names of the columns of `Offer.cells`."""
    return [
        *("GPU", "VRAM", "GB/S", "BF16", "FP8", "FP4", "CC", "MAX", "TOTAL", "$/S", "$/H"),
        *(cloud.upper() for cloud in clouds),
        "BEST FOR",
    ]


def check(sort: str | None, min_vram: str | None) -> Decimal | None:
    """The smallest VRAM, in GiB; None: any. Usage errors for what `--sort` and `--min-vram` cannot be."""
    problems = []
    if sort is not None and sort not in SORTS:
        near = difflib.get_close_matches(sort.lower(), SORTS, n=2, cutoff=0.6)
        advice = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(SORTS)}"
        problems.append(f"--sort: unknown {sort!r}; {advice}")
    least = None
    if min_vram is not None:
        try:
            least = Decimal(min_vram)
        except ArithmeticError:
            least = Decimal("NaN")
        if not least.is_finite() or least <= 0:
            problems.append(f"--min-vram: {min_vram!r} is no number of GiB, such as 40")
    if problems:
        raise usage_error(problems)
    return least


def offers(rates: Rates, *, sort: str | None = None, min_vram: Decimal | None = None) -> list[Offer]:
    """The cards that have so much memory each, in the order of the catalogue (from small to large) or as sorted."""
    # A100 is the 40 GB card under another name, and B200+ at least a B200.
    cards = {gpu.name: gpu.card for gpu in catalog.gpus().values()}
    found = [
        Offer(gpu, rates.gpus[gpu.name], tuple(p for p in cloud_prices() if cards[p.gpu] == gpu.card))
        for gpu in catalog.gpus().values()
        if min_vram is None or gpu.vram_gib >= min_vram
    ]
    if sort in _LOWEST_FIRST:
        found.sort(key=_LOWEST_FIRST[sort])
    elif sort is not None:
        value = _HIGHEST_FIRST[sort]
        known = [offer for offer in found if value(offer) is not None]
        found = sorted(known, key=value, reverse=True) + [o for o in found if value(o) is None]
    return found


def clouds_of(found: Sequence[Offer]) -> list[str]:
    """The other clouds that lend any of them, in the order of the table."""
    lent = {price.cloud for offer in found for price in offer.elsewhere}
    return [cloud for cloud in dict.fromkeys(p.cloud for p in cloud_prices()) if cloud in lent]


def sources_said(found: Sequence[Offer], clouds: Sequence[str]) -> list[str]:
    """Where the other clouds' prices were read, and on which day: a line for each cloud."""
    lines = []
    for cloud in clouds:
        prices = [price for offer in found for price in offer.elsewhere if price.cloud == cloud]
        read = dict.fromkeys(f"{price.source.where} ({price.source.as_of})" for price in prices)
        notes = dict.fromkeys(f"; *: {price.note}" for price in prices if price.note)
        lines.append(f"{cloud}: {', '.join(read)}{''.join(notes)}")
    return lines


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"


def _tflops(gpu: Gpu, form: str) -> str:
    if form in gpu.tflops:
        return _number(gpu.tflops[form])
    if form == "bf16" and "fp16" in gpu.tflops:
        return f"fp16:{_number(gpu.tflops['fp16'])}"
    return UNKNOWN


def _elsewhere(price: CloudPrice | None) -> str:
    return UNKNOWN if price is None else f"{price.usd_per_hour:.2f}{'*' if price.note else ''}"


def _source(source: catalog.Source) -> dict[str, str]:
    return {"where": source.where, "as_of": source.as_of}
