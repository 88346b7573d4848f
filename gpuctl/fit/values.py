"""What goes into the arithmetic and what comes out: frozen, with units. May import: the standard library.

Memory is in bytes and per GPU unless a name says otherwise; throughput is for the whole engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuctl.fit.architecture import Architecture

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU. `memory_bytes` is what CUDA shows of it (79.19 GiB of an "80 GB" H100).

    `measured` is False where that was extrapolated from the label. `flops` are dense, per second, by "bf16", "fp8"
    and "fp4"; a format that the card's tensor cores do not have is left out. None: no source says.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float | None
    flops: Mapping[str, float]
    compute_capability: tuple[int, int] | None
    measured: bool
    usd_per_second: float | None


@dataclass(frozen=True)
class Ask:
    """What is asked of the engine; None is "as the engine or the model would have it".

    `context` is in tokens, prompt and answer together; `concurrency` is how many requests of it at once; `lora` is
    the number of adapters that are loaded at once.
    """

    context: int | None = None
    concurrency: int = 1
    dtype: str | None = None
    quantization: str | None = None
    kv_dtype: str | None = None
    lora: int = 0
    gpu_memory_utilization: float | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int = 1
    engine_version: str = ""
    enforce_eager: bool = False
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None


@dataclass(frozen=True)
class PerGpu:
    """Where the memory of the fullest GPU goes, in bytes. `reserve` is what the engine leaves alone."""

    weights: int
    activation: int
    non_torch: int
    graph: int
    kv_cache: int
    reserve: int


class Verdict(StrEnum):
    """`no`: would not start. `tight`: starts within the error margin, or holds fewer requests than asked."""

    FITS = "fits"
    TIGHT = "tight"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Candidate:
    """One choice of GPUs, judged. Tokens, context, concurrency and throughput are for all of its GPUs together."""

    gpu: str
    count: int
    verdict: Verdict
    reason: str
    assumptions: tuple[str, ...] = ()
    per_gpu: PerGpu | None = None
    kv_cache_tokens: int | None = None
    max_context: int | None = None
    max_concurrency: int | None = None
    usd_per_hour: float | None = None
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    usd_per_million_tokens: float | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model as it was found: from its config.json, its safetensors headers, or the catalogue.

    `weight_bytes` is the sum over the tensors that the engine would load, where headers or an index tell it;
    `own_context` is the longest context that the model itself has; `kind` is "llm", "vision", "embedding",
    "reranker", "speech" or "image"; `source` says where the facts are from.
    """

    name: str
    repo: str | None
    revision: str | None
    architecture: Architecture | None
    weight_bytes: int | None
    kind: str
    own_context: int | None
    source: str
