"""Facts with sources: GPUs, models, engines. May import: gpuctl.errors and the standard library.

Each table is a TOML file beside this module, read on first use (`tables.py` says how). Whatever has no source is left
out of the tables (None here), never guessed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gpuctl.catalog.tables import table

if TYPE_CHECKING:
    from collections.abc import Mapping

_BYTES_PER_PARAMETER = 2  # bfloat16, in which the models without a stated file size are published


@dataclass(frozen=True)
class Source:
    """Where a fact was read, and the day (ISO 8601) on which that source said so, or was read if it has no date."""

    where: str
    as_of: str


@dataclass(frozen=True)
class Gpu:
    """One type of card, by Modal's name for it. Memory in GiB: `vram_gib` is the label, `visible_gib` what CUDA shows.

    `bandwidth_gb_s` in 1e9 bytes a second; `tflops`, dense, by "bf16", "fp8" and "fp4", in 1e12 a second, without the
    formats that the card does not have ("fp16" where there is no "bf16"); `usd_per_second`, list price of one card.
    `sources`: where the figures are from, by the field's name.
    """

    name: str
    card: str
    vram_gib: int
    visible_gib: float | None
    bandwidth_gb_s: float | None
    tflops: Mapping[str, float]
    compute_capability: tuple[int, int] | None
    max_count: int
    usd_per_second: float
    price_as_of: str
    price_source: str
    exact: bool
    best_for: str
    note: str | None
    sources: Mapping[str, Source]

    @property
    def max_vram_gib(self) -> int:
        """Memory of as many cards as one container can have."""
        return self.vram_gib * self.max_count


@dataclass(frozen=True)
class CloudPrice:
    """What another cloud publishes: USD for an hour of one card."""

    cloud: str
    gpu: str
    usd_per_hour: float
    note: str | None
    source: Source


@dataclass(frozen=True)
class Model:
    """What an alias stands for; `repo` is None where the rendered file makes the model itself (`tiny`)."""

    alias: str
    repo: str | None
    licence: str
    gated: bool
    weights_gib: float | None
    parameters_b: float | None
    source: str
    note: str | None

    @property
    def download_gib(self) -> float | None:
        """Size of the weights in GiB: as stated, else 2 bytes for each stated parameter, else None."""
        if self.weights_gib is not None:
            return self.weights_gib
        return None if self.parameters_b is None else gib_of_parameters(self.parameters_b)


@dataclass(frozen=True)
class Build:
    """How the engine's image is built for one device."""

    base: str | None  # the registry image; None: Debian slim
    python: str
    package: str
    since: str | None  # the oldest version that the base suits
    index: str | None
    gpu_memory_utilization: float | None
    remove: tuple[str, ...]
    args: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Engine:
    """vLLM: the version that gpuctl takes unless told otherwise, and its builds."""

    version: str
    cuda: Build
    cpu: Build


def gib_of_parameters(billions: float) -> float:
    """GiB of the weights of a bfloat16 model with so many billions of parameters."""
    return billions * 1e9 * _BYTES_PER_PARAMETER / 2**30


@functools.cache
def gpus() -> Mapping[str, Gpu]:
    """All cards by name, in the order of the table: from small to large."""
    return MappingProxyType({row["name"]: _gpu(row) for row in table("gpus")["gpu"]})


@functools.cache
def cloud_prices() -> tuple[CloudPrice, ...]:
    """What other clouds publish, in the order of the table."""
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


@functools.cache
def models() -> Mapping[str, Model]:
    """All aliases, `tiny` first."""
    return MappingProxyType(
        {
            row["alias"]: Model(
                alias=row["alias"],
                repo=row["repo"] or None,
                licence=row["licence"],
                gated=row["gated"],
                weights_gib=row.get("weights_gib"),
                parameters_b=row.get("parameters_b"),
                source=row["source"],
                note=row.get("note"),
            )
            for row in table("models")["model"]
        }
    )


@functools.cache
def vllm() -> Engine:
    """The engine."""
    row = table("engines")["vllm"]
    return Engine(
        version=row["version"],
        cuda=_build(row["cuda"]),
        cpu=_build(row["cpu"]),
    )


def _gpu(row: Mapping[str, Any]) -> Gpu:
    capability = row.get("compute_capability")
    sources = row["sources"]
    return Gpu(
        name=row["name"],
        card=row["card"],
        vram_gib=row["vram_gib"],
        visible_gib=row.get("visible_gib"),
        bandwidth_gb_s=row.get("bandwidth_gb_s"),
        tflops=MappingProxyType(row["tflops"]),
        compute_capability=None if capability is None else _capability(capability),
        max_count=row["max_count"],
        usd_per_second=row["usd_per_second"],
        price_as_of=row["price_as_of"],
        price_source=row["price_source"],
        exact=row.get("exact", False),
        best_for=row["best_for"],
        note=row.get("note"),
        sources=MappingProxyType(
            {
                key: Source(where, sources[f"{key}_as_of"])
                for key, where in sources.items()
                if f"{key}_as_of" in sources
            }
        ),
    )


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _build(row: Mapping[str, Any]) -> Build:
    return Build(
        base=row.get("base"),
        python=row["python"],
        package=row["package"],
        since=row.get("since"),
        index=row.get("index"),
        gpu_memory_utilization=row.get("gpu_memory_utilization"),
        remove=tuple(row.get("remove", ())),
        args=tuple(row["args"]),
        env=MappingProxyType(dict(row["env"])),
    )
