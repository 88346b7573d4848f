"""Facts with sources: GPUs, models, engines. May import: gpuctl.errors and the standard library.

Each table is a TOML file beside this module, read on first use. Whatever has no source is left out of the
tables (None here), never guessed.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_BYTES_PER_PARAMETER = 2  # bfloat16, in which the models without a stated file size are published


@dataclass(frozen=True)
class Gpu:
    """One type of card: memory in GiB, most cards per container, list price in USD per second and card."""

    name: str
    vram_gib: int
    max_count: int
    usd_per_second: float
    price_as_of: str
    price_source: str
    exact: bool
    note: str | None


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
    return MappingProxyType(
        {
            row["name"]: Gpu(
                name=row["name"],
                vram_gib=row["vram_gib"],
                max_count=row["max_count"],
                usd_per_second=row["usd_per_second"],
                price_as_of=row["price_as_of"].isoformat(),
                price_source=row["price_source"],
                exact=row.get("exact", False),
                note=row.get("note"),
            )
            for row in _table("gpus.toml")["gpu"]
        }
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
            for row in _table("models.toml")["model"]
        }
    )


@functools.cache
def vllm() -> Engine:
    """The engine."""
    row = _table("engines.toml")["vllm"]
    return Engine(
        version=row["version"],
        cuda=_build(row["cuda"]),
        cpu=_build(row["cpu"]),
    )


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


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
