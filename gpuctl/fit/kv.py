"""How many tokens the KV cache holds. May import: gpuctl.fit, the standard library.

vLLM divides the memory into blocks of one size; a block holds so many tokens of one group of layers. What a layer
keeps is different (all tokens, a window, a state), so layers are grouped by it, and a request takes blocks for each
group (vLLM `v1/core/kv_cache_utils.py`, `v1/kv_cache_interface.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.fit.architecture import Attention
from gpuctl.fit.weights import stages

if TYPE_CHECKING:
    from gpuctl.fit.architecture import Architecture

BLOCK = 16  # tokens, vLLM's default with FlashAttention


@dataclass(frozen=True)
class Group:
    """Layers with one block table: tokens in a block, and the window beyond which blocks are given back."""

    block: int
    window: int | None = None

    def blocks(self, context: int, batch: int) -> int:
        """Blocks that one request of so many tokens needs, `batch` being the tokens of one step."""
        if self.window is None:
            return -(-context // self.block)
        return -(-min(self.window - 1 + batch, context) // self.block) + 1


@dataclass(frozen=True)
class Pool:
    """The cache of an engine: bytes of a block on a GPU of each stage, and the groups that share the blocks."""

    block_bytes: tuple[int, ...]
    groups: tuple[Group, ...]
    batch: int

    def request(self, context: int) -> int:
        """Blocks that one request of so many tokens needs."""
        return sum(group.blocks(context, self.batch) for group in self.groups)

    def blocks(self, free: list[int]) -> int:
        """Blocks in the memory that each stage has free."""
        return max(0, min(room // size for room, size in zip(free, self.block_bytes, strict=True)))

    def tokens(self, blocks: int, context: int, *, by_concurrency: bool) -> int:
        """Tokens as the engine logs them."""
        if by_concurrency:
            return int(blocks / self.request(context) * context)
        return blocks // len(self.groups) * min(group.block for group in self.groups)

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


def pool(
    architecture: Architecture, tensor_parallel: int, pipeline_parallel: int, kv_bytes: float, batch: int
) -> Pool:
    """The cache's blocks and groups, for an element of `kv_bytes`."""
    sizes = []
    for stage in stages(len(architecture.layers), pipeline_parallel):
        size = 0.0
        for i in stage:
            cache = architecture.layers[i].cache
            assert isinstance(cache, Attention)
            heads = max(1, -(-cache.kv_heads // tensor_parallel))
            size += BLOCK * heads * (cache.key + cache.value) * kv_bytes
        sizes.append(int(size))
    return Pool(tuple(sizes), (Group(BLOCK),), batch)
