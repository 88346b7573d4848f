"""Facts with sources: GPUs, models, engines. May import: gpuctl.errors and the standard library.

Each table is a TOML file beside this module, read on first use (`tables.py` says how). Whatever has no source is left
out of the tables (None here), never guessed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gpuctl.catalog.own import own_models
from gpuctl.catalog.tables import table

if TYPE_CHECKING:
    from collections.abc import Mapping

TINY = "tiny"
KINDS = ("llm", "vision", "embedding", "reranker", "speech", "image")
CHATS = ("llm", "vision")
_BYTES_PER_PARAMETER = 2.0  # bfloat16, in which most models without a stated file size are published
_BYTES_OF = {"float32": 4.0, "fp8": 1.0, "int8": 1.0} | dict.fromkeys(("nvfp4", "mxfp4", "int4"), 4.5 / 8)


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
class OtherConfig:
    """Whose config.json stands in for a model's own: the same architecture, `without` some keys, others `changed`."""

    of: str
    without: tuple[str, ...]
    changed: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """What an alias stands for; `repo` is None where the rendered file makes the model itself (`tiny`).

    None everywhere else: not known. `kind`: "llm", "vision", "embedding", "reranker", "speech" or "image"; `context` in
    tokens; `active_b` of a mixture of experts, in billions; `dtype`: of the published weights; `revision`: of the
    alias, None: the newest of main. `mine`: from the user's own file.
    """

    alias: str
    repo: str | None
    also: tuple[str, ...] = ()
    kind: str = "llm"
    revision: str | None = None
    licence: str | None = None
    gated: bool | None = None
    parameters_b: float | None = None
    active_b: float | None = None
    context: int | None = None
    dtype: str | None = None
    weights_gib: float | None = None
    engine: str | None = None
    engine_since: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    note: str | None = None
    config: OtherConfig | None = None
    mine: str | None = None  # the file that it stands in
    given: frozenset[str] = frozenset()  # the facts that stand there
    read_in: Mapping[str, str] = field(default_factory=dict)  # the key of the source of each fact
    recipe: str | None = None

    @property
    def chats(self) -> bool:
        """Whether it answers chat requests, which is what `serve` waits for."""
        return self.kind in CHATS

    @property
    def download_gib(self) -> float | None:
        """Size of the weights in GiB: as stated, else the stated parameters in the format that they are published in.

        Four bits come with a scale of eight for each 16 weights (NVFP4) or 32 (MXFP4): the larger one is taken.
        """
        if self.weights_gib is not None:
            return self.weights_gib
        if self.parameters_b is None:
            return None
        return gib_of_parameters(self.parameters_b, _BYTES_OF.get(self.dtype or "", _BYTES_PER_PARAMETER))

    @property
    def sources(self) -> Mapping[str, Source]:
        """Where each fact was read, by the field's name."""
        read = {fact: _model_source(key, self.recipe) for fact, key in self.read_in.items()}
        if self.mine is not None:
            read |= dict.fromkeys(("alias", *self.given), Source(self.mine, ""))
        return MappingProxyType(read)

    @property
    def source(self) -> str:
        """Where most of it was read."""
        if self.mine is not None:
            return self.mine
        keys = list(self.read_in.values())
        return _model_source(max(keys, key=keys.count), self.recipe).where


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


@dataclass(frozen=True)
class PictureBuild:
    """How the image with diffusers is built for one device: the packages beside it, at exact versions."""

    python: str
    index: str | None
    packages: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Diffusers:
    """What makes pictures: its version, and its builds."""

    version: str
    cuda: PictureBuild
    cpu: PictureBuild


def gib_of_parameters(billions: float, bytes_each: float = _BYTES_PER_PARAMETER) -> float:
    """GiB of the weights of a model with so many billions of parameters, bfloat16 unless told otherwise."""
    return billions * 1e9 * bytes_each / 2**30


@functools.cache
def gpus() -> Mapping[str, Gpu]:
    """All cards by name, in the order of the table: from small to large."""
    return MappingProxyType({row["name"]: _gpu(row) for row in table("gpus")["gpu"]})


def models() -> Mapping[str, Model]:
    """All aliases, `tiny` first, the user's own last; one that the user's file names again is the user's."""
    mine = own_models()
    return builtin_models() if not mine else MappingProxyType({**builtin_models(), **mine})


def named(name: str) -> Model | None:
    """The model of this alias, or of another name of it."""
    mine = own_models().get(name)
    if mine is not None:
        return mine
    row = next((row for row in _rows() if name == row["alias"] or name in row.get("also", ())), None)
    return None if row is None else _model(row)


def of_repo(repo: str) -> Model | None:
    """What is known of a repository."""
    row = next((row for row in _rows() if row["repo"] == repo), None)
    return None if row is None else _model(row)


def names() -> list[str]:
    """Every alias, and every other name."""
    return [name for model in models().values() for name in (model.alias, *model.also)]


@functools.cache
def builtin_models() -> Mapping[str, Model]:
    """The aliases of the table alone."""
    return MappingProxyType({row["alias"]: _model(row) for row in _rows()})


@functools.cache
def _rows() -> list[dict[str, Any]]:
    """As they are in the table: a command wants one model, and to make all of them takes longer than to read them."""
    rows: list[dict[str, Any]] = table("models")["model"]
    return rows


def _model(row: Mapping[str, Any]) -> Model:
    config = row.get("config")
    fields = {key: row[key] for key in row.keys() & _PLAIN}
    return Model(
        repo=row["repo"] or None,
        also=tuple(row.get("also", ())),
        config=None
        if config is None
        else OtherConfig(config["of"], tuple(config.get("without", ())), config.get("changed", {})),
        read_in=row["from"],
        **fields,
    )


_PLAIN = frozenset(
    (
        "alias",
        "kind",
        "licence",
        "gated",
        "parameters_b",
        "active_b",
        "context",
        "dtype",
        "weights_gib",
        "engine",
        "engine_since",
        "tool_parser",
        "reasoning_parser",
        "note",
        "recipe",
    )
)


def _model_source(key: str, recipe: str | None) -> Source:
    row = table("models")["sources"][key]
    return Source(row["where"].format(recipe=recipe), row["as_of"])


@functools.cache
def vllm() -> Engine:
    """The engine."""
    row = table("engines")["vllm"]
    return Engine(
        version=row["version"],
        cuda=_build(row["cuda"]),
        cpu=_build(row["cpu"]),
    )


@functools.cache
def diffusers() -> Diffusers:
    """What makes pictures."""
    row = table("engines")["diffusers"]
    return Diffusers(
        version=row["version"],
        cuda=_picture_build(row["cuda"]),
        cpu=_picture_build(row["cpu"]),
    )


def _picture_build(row: Mapping[str, Any]) -> PictureBuild:
    return PictureBuild(
        python=row["python"],
        index=row.get("index"),
        packages=tuple(row["packages"]),
        env=MappingProxyType(dict(row["env"])),
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
