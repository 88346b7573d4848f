"""What an engine takes beside weights and cache: profiled activations, graphs, libraries. Imports: gpuctl.fit, stdlib.

vLLM runs its largest batch once before it sizes the cache, and takes that run's peak away from it. The peak is in the
sampler (a row of logits for each request, in several copies) or in the widest layer; both are computed here from the
model's shapes. What cannot be derived is an `EngineConstants`, from `catalog/overheads.toml`, keyed by the version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.fit.values import GIB

if TYPE_CHECKING:
    from gpuctl.fit.architecture import Architecture
    from gpuctl.fit.values import Ask, Card

_LARGE = (
    70 * GIB
)  # cards from here on get the large defaults, an A100 excepted (EngineArgs.get_batch_defaults)
_HUGE = 160 * GIB


@dataclass(frozen=True)
class EngineConstants:
    """One range of engine versions. Sizes in bytes. `measured_on` is the version that they were measured on.

    `logits_copies`: how many float32 copies of the logits are alive at the sampler's peak, the 16-bit one aside.
    `logits_rows`: rows of the vocabulary's width that the sampling kernel keeps as scratch.
    `graph_in_budget`: whether the memory of CUDA graphs is taken from `gpu_memory_utilization` or comes on top.
    `tokens_by_concurrency`: whether the logged capacity is concurrency x context, or blocks over groups.
    """

    version: str
    measured_on: str | None
    gpu_memory_utilization: float
    logits_copies: float
    logits_rows: int
    workspace: int
    non_torch: int
    non_torch_parallel: int
    context: int
    graph_base: int
    graph_per_layer: int
    graph_in_budget: bool
    huge_batch: int
    tokens_by_concurrency: bool
    margin: float
    source: str


@dataclass(frozen=True)
class Batch:
    """The largest batch that the engine plans for: tokens in one step, and requests."""

    tokens: int
    requests: int


def batch(card: Card, ask: Ask, constants: EngineConstants, context: int) -> Batch:
    """What vLLM defaults to on a card when serving (`EngineArgs.get_batch_defaults`), capped by the context."""
    tokens, requests = 2048, 256
    if card.memory_bytes >= _LARGE and not card.name.startswith("A100"):
        tokens, requests = 8192, 1024
        if card.memory_bytes >= _HUGE:
            tokens = constants.huge_batch
    requests = ask.max_num_seqs or requests
    if ask.max_num_batched_tokens is not None:
        return Batch(ask.max_num_batched_tokens, min(requests, ask.max_num_batched_tokens))
    tokens = min(tokens, requests * context)
    return Batch(tokens, min(requests, tokens))


def activation(
    architecture: Architecture,
    made: Batch,
    constants: EngineConstants,
    *,
    tensor_parallel: int,
    element_bytes: int,
) -> int:
    """Bytes at the peak of the profiling run, on a GPU of the last stage.

    The sampler: rows x vocabulary x (the model's element + 4 bytes x copies) + scratch rows x vocabulary x 4, and the
    hidden states of the batch. A layer: gate, up and their product, and three tensors of the model's width. A mixture
    keeps its two workspaces, batch x experts a token x width, through both.
    (vLLM `GPUModelRunner.profile_run`, `_dummy_sampler_run`, `v1/sample/ops/topk_topp_sampler.py`,
    `fused_moe/fused_moe.py: TritonExperts.workspace_shapes`.)
    """
    vocabulary, hidden = architecture.vocabulary, architecture.hidden
    logits = made.requests * vocabulary * (element_bytes + 4 * constants.logits_copies)
    sampler = (
        logits
        + constants.logits_rows * vocabulary * 4
        + (made.tokens + 2 * made.requests) * hidden * element_bytes
    )
    inner = -(-architecture.intermediate // tensor_parallel)
    layer = made.tokens * (3 * inner + 3 * hidden) * element_bytes
    return int(max(sampler, layer)) + constants.workspace


def graph(constants: EngineConstants, ask: Ask, layers: int) -> int:
    """Bytes of the CUDA graphs on a GPU that runs so many layers."""
    if ask.enforce_eager:
        return 0
    return constants.graph_base + constants.graph_per_layer * layers
