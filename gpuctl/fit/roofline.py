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

    Decode: in one step every request gets a token; the step takes as long as reading what it uses of the weights, and
    the cache of all requests, or as the multiplications, whichever is longer. Pipeline stages work on a part of the
    requests each. Prefill: 2 operations for each active parameter and token, and for each pair of tokens that attend
    to each other 2 for each number of the key and of the value, in every head.
    """
    operations = flops(card, architecture.quantization)
    stages = max(1, count // tensor_parallel)
    together = max(1.0, concurrency / stages)  # requests in one stage at once
    active = architecture.active_parameters
    decode = None
    if card.bandwidth_bytes_per_s:
        kept = sum(
            read_bytes(cache, context, tensor_parallel, kv, architecture.element_bytes)
            for layer in architecture.layers
            for cache in layer.caches
        )
        moved = weight_bytes * read_share(architecture, together) / count + together * kept / stages
        step = moved / card.bandwidth_bytes_per_s
        if operations:
            step = max(step, together * 2 * active / (operations * count))
        decode = concurrency / stages / step if step > 0 else None
    prefill = None
    if operations:
        inner = active - architecture.vocabulary * architecture.hidden  # logits are for the last token alone
        each = 2 * inner + attention_operations(architecture, context) / max(1, context)
        prefill = operations * count / each
    return Roofline(decode, prefill)


def flops(card: Card, quantization: Quantization | None) -> float | None:
    """Operations per second of one card in the format that the weights are multiplied in.

    That is theirs where the card has it, and where the engine does not make them wide again first, as it does with
    whole numbers that only the weights have (AWQ, GPTQ); else 16 bits.
    """
    wide = card.flops.get("bf16") or card.flops.get("fp16")
    if quantization is None or quantization.scheme is None:
        return wide
    own = {"fp8": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}.get(quantization.scheme.name, "")
    return card.flops.get(own) or wide


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


def read_share(architecture: Architecture, together: float) -> float:
    """The share of the weights that a step reads: not an embedding, of which rows are looked up, nor towers.

    Of experts, those that some request takes: with requests that choose independently, an expert is left alone by all
    with (1 - active / count) ** requests.
    """
    read = sum(t.elements for layer in architecture.layers for t in layer.tensors if t.parameter)
    read += architecture.vocabulary * architecture.hidden
    total = max(1, architecture.parameters)
    experts = architecture.experts
    if experts is None:
        return min(1.0, read / total)
    inside = sum(t.elements for layer in architecture.layers for t in layer.tensors if t.copies > 1)
    left_alone: float = (1 - experts.active / experts.count) ** together
    return min(1.0, (read - inside * left_alone) / total)
