"""How many tokens the KV cache holds. May import: gpuctl.fit, the standard library.

vLLM divides the memory into blocks of one size; a block holds so many tokens of one group of layers. What layers keep
differs (all tokens, those of a window, a state), so layers are grouped by it, and a request takes blocks for each
group out of one pool (vLLM `v1/core/kv_cache_utils.py`, `v1/kv_cache_interface.py`, `platforms/interface.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpuctl.fit.architecture import Attention, Latent, Recurrent
from gpuctl.fit.weights import stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuctl.fit.architecture import Architecture, Cache
    from gpuctl.fit.overheads import EngineConstants

BLOCK = 16  # tokens in a block, vLLM's default
LATENT_BLOCK = 64  # with latent attention (FlashMLA)
_LATENT_AND_STATE = 128  # and beside a recurrence
_PAD_INSTEAD = 1.5  # kinds of layers of nearly equal number are padded to the larger


@dataclass(frozen=True)
class Format:
    """How an element of the cache is stored: bytes, and bytes of scales for each head of each token."""

    name: str
    bytes: float
    head_scale: int = 0


_FORMATS = {
    "fp8": Format("fp8", 1),
    "fp8_e4m3": Format("fp8_e4m3", 1),
    "fp8_e5m2": Format("fp8_e5m2", 1),
    "fp8_inc": Format("fp8_inc", 1),
    "int8": Format("int8", 1),
    "int8_per_token_head": Format("int8_per_token_head", 1, head_scale=4),
    "fp8_per_token_head": Format("fp8_per_token_head", 1, head_scale=4),
    "nvfp4": Format("nvfp4", 0.5625),
    "bfloat16": Format("bfloat16", 2),
    "bf16": Format("bf16", 2),
    "float16": Format("float16", 2),
    "float32": Format("float32", 4),
}


def cache_format(name: str | None, element_bytes: int) -> Format | None:
    """The format of a `--kv-cache-dtype`; "auto" or None is the model's own. None: gpuctl does not know it."""
    if name is None or name == "auto":
        return Format("auto", element_bytes)
    return _FORMATS.get(name)


def formats() -> tuple[str, ...]:
    """The names that `cache_format` knows."""
    return ("auto", *_FORMATS)


@dataclass(frozen=True)
class Group:
    """Layers with one block table: tokens in a block, the window beyond which blocks are given back, or a state.

    `states` is how many blocks a request takes for a state, whatever its length; 0: this is no state. `chunked`: the
    window begins at a block.
    """

    block: int
    window: int | None = None
    states: int = 0
    chunked: bool = False

    def blocks(self, context: int, in_flight: int) -> int:
        """Blocks that one request of so many tokens takes; `in_flight` tokens may be on their way at once."""
        if self.states:
            return self.states
        if self.window is None:
            return -(-context // self.block)
        if self.chunked:
            return -(-min(self.window + in_flight, context) // self.block)
        return -(-min(self.window - 1 + in_flight, context) // self.block) + 1


@dataclass(frozen=True)
class Pool:
    """The cache of an engine: bytes of a block on a GPU of each stage, and the groups that share the blocks."""

    block_bytes: tuple[int, ...]
    groups: tuple[Group, ...]
    in_flight: int

    def request(self, context: int) -> int:
        """Blocks that one request of so many tokens takes."""
        return sum(group.blocks(context, self.in_flight) for group in self.groups)

    def blocks(self, free: Sequence[int]) -> int:
        """Blocks in the memory that each stage has free, in bytes."""
        return max(0, min(room // size for room, size in zip(free, self.block_bytes, strict=True) if size))

    def tokens(self, blocks: int, context: int, *, by_concurrency: bool) -> int:
        """Tokens as the engine logs them ("GPU KV cache size"): for hybrid models no measure of bytes.

        Until 0.20: blocks / groups x the smallest block. Since 0.21: how many requests of the longest context fit at
        once, x that context.
        """
        if by_concurrency or all(group.states for group in self.groups):
            return int(blocks / self.request(context) * context)
        return blocks // len(self.groups) * min(g.block for g in self.groups if not g.states)

    def longest(self, blocks: int, limit: int) -> int:
        """The longest request, in tokens, up to `limit`; one block is the engine's own."""
        if self.request(1) > blocks - 1:
            return 0
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.request(middle) <= blocks - 1:
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(frozen=True)
class _Spec:
    """What one layer keeps: bytes of a page on one GPU, tokens in it."""

    page: int
    block: int
    window: int | None = None
    state: bool = False
    chunked: bool = False


def token_bytes(cache: Cache, tensor_parallel: int, kv: Format) -> float:
    """Bytes that a layer keeps of each token on one GPU; 0 for a state.

    Keys and values: heads x (key + value) x bytes, heads divided over the GPUs but at least one on each. A latent
    vector is on every GPU whole.
    """
    if isinstance(cache, Recurrent):
        return 0
    if isinstance(cache, Latent):
        each = cache.width if cache.packed else cache.width * kv.bytes
        return each / cache.every + cache.index
    heads = max(1, -(-cache.kv_heads // tensor_parallel))
    return heads * ((cache.key + cache.value) * kv.bytes + 2 * kv.head_scale)


def state_bytes(cache: Recurrent, tensor_parallel: int, element_bytes: int) -> int:
    """Bytes of a request's state in one layer, on one GPU."""
    return -(-cache.convolution // tensor_parallel) * element_bytes + -(-cache.state // tensor_parallel) * (
        cache.state_bytes or element_bytes
    )


def pool(
    architecture: Architecture,
    tensor_parallel: int,
    pipeline_parallel: int,
    kv: Format,
    batch: int,
    constants: EngineConstants,
) -> Pool | None:
    """The cache's blocks and groups; None for a model that keeps nothing (an encoder)."""
    specs = _specs(architecture, tensor_parallel, kv, constants)
    if not specs:
        return None
    in_flight = batch * (constants.batches_in_flight if pipeline_parallel == 1 else max(1, pipeline_parallel))
    parts = stages(len(architecture.layers), pipeline_parallel)
    kinds = dict.fromkeys((s.window, s.state, s.block if s.state else 0) for _, s in specs)
    if len(kinds) == 1:  # one kind of layer, of whatever width: one group
        size = tuple(sum(s.page for i, s in specs if i in part) for part in parts)
        only = specs[0][1]
        return Pool(size, (_group(only, constants),), in_flight)
    page = max(s.page for _, s in specs)
    buckets: dict[_Spec, list[int]] = {}
    for i, spec in specs:
        grown = spec if spec.page == page else _grow(spec, page)
        buckets.setdefault(grown, []).append(i)
    fewest, most = min(map(len, buckets.values())), max(map(len, buckets.values()))
    size_of_group = most if most < fewest * _PAD_INSTEAD else fewest
    groups: list[Group] = []
    widths = [0] * len(parts)
    for spec, layers in buckets.items():
        many = -(-len(layers) // size_of_group)
        for g in range(many):
            groups.append(_group(spec, constants))
            for stage, part in enumerate(parts):
                widths[stage] = max(widths[stage], sum(1 for i in layers[g::many] if i in part))
    return Pool(tuple(width * page for width in widths), tuple(groups), in_flight)


def _specs(
    architecture: Architecture, tensor_parallel: int, kv: Format, constants: EngineConstants
) -> list[tuple[int, _Spec]]:
    """What every layer keeps, in pages; a state's page is as large as that of the attention beside it."""
    caches = [(i, cache) for i, layer in enumerate(architecture.layers) for cache in layer.caches]
    states = [cache for _, cache in caches if isinstance(cache, Recurrent)]
    others = [cache for _, cache in caches if not isinstance(cache, Recurrent)]
    latent = any(isinstance(cache, Latent) for cache in others)
    block = LATENT_BLOCK if latent and not any(isinstance(c, Attention) for c in others) else BLOCK
    state_page = max((state_bytes(s, tensor_parallel, architecture.element_bytes) for s in states), default=0)
    if states and others:
        token = max(token_bytes(cache, tensor_parallel, kv) for cache in others)
        block = _LATENT_AND_STATE if latent else block
        block *= max(1, -(-state_page // int(block * token)))
        state_page = int(block * token)
    made = []
    for i, cache in caches:
        if isinstance(cache, Recurrent):
            made.append((i, _Spec(state_page, 0, state=True)))
        else:
            size = int(block * token_bytes(cache, tensor_parallel, kv))
            window = cache.window
            chunked = isinstance(cache, Attention) and cache.chunked
            if chunked and not constants.chunked_windows:
                window = None
            made.append((i, _Spec(size, block, window, chunked=chunked and window is not None)))
    return made


def _grow(spec: _Spec, page: int) -> _Spec:
    """A page made as large as the others': with more tokens where that goes up evenly, else padded."""
    if spec.state or page % spec.page:
        return replace(spec, page=page)
    return replace(spec, page=page, block=spec.block * (page // spec.page))


def _group(spec: _Spec, constants: EngineConstants) -> Group:
    return Group(spec.block, spec.window, constants.state_blocks if spec.state else 0, spec.chunked)
