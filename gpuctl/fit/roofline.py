"""How fast it can be at best. May import: gpuctl.fit, the standard library.

Bounds, not predictions: what the card's memory and arithmetic would allow if nothing else took time. docs/fit.md has
the formulas; what is shown of them is marked as an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.fit.architecture import Attention, Latent, Recurrent
from gpuctl.fit.kv import state_bytes, token_bytes

if TYPE_CHECKING:
    from gpuctl.fit.architecture import Architecture, Cache
    from gpuctl.fit.kv import Format
    from gpuctl.fit.quantization import Quantization
    from gpuctl.fit.values import Card

_FORMAT_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "fp4": 4}


@dataclass(frozen=True)
class Roofline:
    """Tokens per second of the whole engine, at best. None: a figure of the card is unknown."""

    decode: float | None
    prefill: float | None


def roofline(
    architecture: Architecture,
    card: Card,
    count: int,
    *,
    tensor_parallel: int,
    weight_bytes: int,
    kv: Format,
    concurrency: int,
    context: int,
) -> Roofline:
    """What so many requests of so many tokens can get.

    Decode: in one step every request gets a token; the step takes as long as reading the weights that the step uses
    and the cache of all requests takes, or the multiplications, whichever is longer. Prefill: 2 operations for each
    active parameter and token, and for each pair of tokens that attend to each other 4 x heads x width.
    """
    operations = flops(card, architecture.quantization)
    active, total = architecture.active_parameters, max(1, architecture.parameters)
    decode = None
    if card.bandwidth_bytes_per_s:
        share = _read_share(architecture, concurrency, active / total)
        kept = sum(
            read_bytes(cache, context, tensor_parallel, kv, architecture.element_bytes)
            for layer in architecture.layers
            for cache in layer.caches
        )
        # The weights' bytes are of all GPUs together; the cache's are of one stage, and stages work in turn.
        moved = weight_bytes * share / count + concurrency * kept * tensor_parallel / count
        step = moved / card.bandwidth_bytes_per_s
        if operations:
            step = max(step, concurrency * 2 * active / (operations * count))
        decode = concurrency / step if step > 0 else None
    prefill = None
    if operations:
        each = 2 * active + attention_operations(architecture, context) / max(1, context)
        prefill = operations * count / each
    return Roofline(decode, prefill)


def flops(card: Card, quantization: Quantization | None) -> float | None:
    """Operations per second in the format that the weights are multiplied in: theirs, or the next wider one."""
    bits = 16
    if quantization is not None and quantization.scheme is not None and "int" not in quantization.scheme.name:
        bits = quantization.scheme.bits
    able = {_FORMAT_BITS.get(name, 16): speed for name, speed in card.flops.items()}
    wide = [b for b in sorted(able) if b >= bits]
    return able[wide[0]] if wide else None


def read_bytes(cache: Cache, context: int, tensor_parallel: int, kv: Format, element_bytes: int) -> float:
    """Bytes that a step reads of one request's cache in one layer, on one GPU."""
    if isinstance(cache, Recurrent):
        return 2 * state_bytes(cache, tensor_parallel, element_bytes)  # and writes it back
    seen = context if cache.window is None else min(context, cache.window)
    return seen * token_bytes(cache, tensor_parallel, kv)


def attention_operations(architecture: Architecture, context: int) -> float:
    """Operations of attention over a whole prompt: each token with all before it, or with those of a window."""
    sum_ = 0.0
    for layer in architecture.layers:
        for cache in layer.caches:
            if isinstance(cache, Recurrent):
                continue
            pairs = context * context / 2
            if cache.window is not None and cache.window < context:
                pairs = context * cache.window - cache.window**2 / 2
            if isinstance(cache, Attention):
                sum_ += 2 * pairs * cache.heads * (cache.key + cache.value)
            elif isinstance(cache, Latent) and not cache.packed:
                sum_ += 4 * pairs * cache.heads * cache.width / cache.every
    return sum_


def _read_share(architecture: Architecture, concurrency: int, least: float) -> float:
    """The share of the weights that a step reads: of experts, those that some request of the batch takes.

    With requests that choose independently, an expert is left alone by all with (1 - active/count) ** requests.
    """
    experts = architecture.experts
    if experts is None:
        return 1.0
    inside = sum(
        t.rows * t.columns * t.copies for layer in architecture.layers for t in layer.tensors if t.copies > 1
    )
    share = inside / max(1, architecture.parameters)
    taken = 1 - (1 - experts.active / experts.count) ** concurrency
    return max(least, 1 - share + share * taken)
