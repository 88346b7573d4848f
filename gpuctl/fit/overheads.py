"""What an engine takes beside weights and cache: profiled activations, graphs, libraries. Imports: gpuctl.fit, stdlib.

vLLM runs its largest batch once before it sizes the cache, and takes that run's peak away from it. The peak is in the
sampler (a row of logits for each request, in several copies) or in the widest layer; both are computed here from the
model's shapes. What cannot be derived is an `EngineConstants`, from `catalog/overheads.toml`, keyed by the version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.fit.architecture import Latent, Recurrent
from gpuctl.fit.values import GIB

if TYPE_CHECKING:
    from gpuctl.fit.architecture import Architecture
    from gpuctl.fit.values import Ask, Card

LORA_RANK = 16  # vLLM's default of --max-lora-rank

_LARGE = (
    70 * GIB
)  # cards from here on get the large defaults, an A100 excepted (EngineArgs.get_batch_defaults)
_HUGE = 160 * GIB
_LEAST_REQUESTS = 256  # at once, of the smaller cards
_LAYER_WIDTHS = (
    3  # tensors of the model's width alive in a feed-forward layer: its input, output and the residual
)
_LATENT_TOKENS, _LATENT_BLOCK = 65536, 64  # of a chunk of latents, and of a page of them
_CHUNK = 16384  # tokens that a mixture's workspace is made for at most (VLLM_FUSED_MOE_CHUNK_SIZE)


@dataclass(frozen=True)
class EngineConstants:
    """What holds for one version of the engine; sizes in bytes. The fields are explained in `overheads.toml`.

    `release` are the first two numbers of the version. `measured_on` is the version that the sizes were measured on;
    None: they are another version's, raised. `known` is False for a version whose engine is not the one that is
    described here.
    """

    version: str
    release: tuple[int, int]
    known: bool
    measured_on: str | None
    gpu_memory_utilization: float
    logits_copies: float
    logits_rows: int
    workspace: int
    expert_workspace: bool
    non_torch: int
    non_torch_parallel: int
    non_torch_parallel_plain: int
    non_torch_pipeline: int
    context: int
    graph: int
    graph_layer: int
    graph_experts: int
    graph_mxfp4: int
    graph_states: int
    graph_in_budget: bool
    warm_up: int
    warm_up_mxfp4: int
    huge_batch: int
    batches_in_flight: int
    state_blocks: int
    tokens_by_concurrency: bool
    chunked_windows: bool
    checkpoint_kv: bool
    mxfp4_stored: bool
    margin: float
    source: str


@dataclass(frozen=True)
class Batch:
    """The largest batch that the engine plans for: tokens in one step, requests, and the tokens of the longest."""

    tokens: int
    requests: int
    length: int


def batch(card: Card, ask: Ask, constants: EngineConstants, context: int) -> Batch:
    """What vLLM defaults to on a card when serving (`EngineArgs.get_batch_defaults`), capped by the context."""
    tokens, requests = 2048, _LEAST_REQUESTS
    if card.memory_bytes >= _LARGE and not card.name.upper().startswith("A100"):
        tokens, requests = 8192, 1024
        if card.memory_bytes >= _HUGE:
            tokens = constants.huge_batch
    asked = ask.max_num_seqs
    if asked is not None:  # more than any card's least default only ever adds to a default
        requests = asked if asked <= _LEAST_REQUESTS else max(requests, asked)
    if ask.max_num_batched_tokens is not None:
        return Batch(ask.max_num_batched_tokens, min(requests, ask.max_num_batched_tokens), context)
    tokens = max(1, min(tokens, requests * context))
    return Batch(tokens, min(requests, tokens), context)


def activation(
    architecture: Architecture,
    made: Batch,
    constants: EngineConstants,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    element_bytes: int,
    last: bool,
) -> int:
    """Bytes at the peak of the profiling run, on a GPU of the last stage (`last`) or of another.

    Layer: gate, up and their product, or a latent attention's keys and values of a long prompt's chunk, and what is of
    the model's width. Sampler: rows x vocabulary x (the model's element + 4 bytes x copies), scratch rows x vocabulary
    x 4, and hidden states. A mixture's two workspaces, batch x experts a token x width, and the images of the largest
    batch stay through both.
    (vLLM `GPUModelRunner.profile_run`, `_dummy_sampler_run`, `v1/sample/ops/topk_topp_sampler.py`,
    `fused_moe.py: TritonExperts.workspace_shapes`.)
    """
    vocabulary, hidden, tokens = architecture.vocabulary, architecture.hidden, made.tokens
    widths = _LAYER_WIDTHS * (2 if pipeline_parallel > 1 else 1)
    inner = -(-architecture.intermediate // tensor_parallel)
    wide = max(3 * inner * tokens, _expanded(architecture, made, tensor_parallel))
    peak = (wide + tokens * widths * hidden) * element_bytes
    if last:
        copies = constants.logits_copies * 4 + (element_bytes if element_bytes < 4 else 0)
        sampler = made.requests * vocabulary * copies + constants.logits_rows * vocabulary * 4
        sampler += (tokens + 2 * made.requests) * hidden * element_bytes
        peak = max(peak, int(sampler))
    experts = architecture.experts
    mxfp4 = architecture.quantization is not None and architecture.quantization.mxfp4_kernels
    if experts is not None and constants.expert_workspace and not mxfp4:
        each = -(-experts.intermediate // tensor_parallel)
        rows = min(tokens, _CHUNK) * experts.active
        peak += rows * (max(each, experts.width) + max(2 * each, experts.width)) * element_bytes
    return peak + tokens * architecture.image_bytes + constants.workspace


def _expanded(architecture: Architecture, made: Batch, tensor_parallel: int) -> int:
    """Elements of the keys and values that latent attention makes of so many latents at once, on one GPU.

    For 8 requests of full length or 4 pages of each, 65,536 tokens at most (vLLM, `mla_attention.py:
    determine_chunked_prefill_workspace_size`, and the profile run in `MLAAttention.forward_impl`).
    """
    widest = max(
        (
            -(-cache.heads // tensor_parallel) * cache.expanded
            for layer in architecture.layers
            for cache in layer.caches
            if isinstance(cache, Latent)
        ),
        default=0,
    )
    return min(max(8 * made.length, 4 * made.requests * _LATENT_BLOCK), _LATENT_TOKENS) * widest


def graph(architecture: Architecture, constants: EngineConstants, ask: Ask, layers: int) -> int:
    """Bytes of the CUDA graphs on a GPU that runs so many layers."""
    if ask.enforce_eager:
        return 0
    size = constants.graph + constants.graph_layer * layers
    if architecture.experts is not None:
        size += constants.graph_experts
    if architecture.quantization is not None and architecture.quantization.mxfp4_kernels:
        size += constants.graph_mxfp4
    if any(isinstance(cache, Recurrent) for layer in architecture.layers for cache in layer.caches):
        size += constants.graph_states
    return size


def warm_up(architecture: Architecture, constants: EngineConstants) -> int:
    """Bytes that have to be free beside everything else while the engine warms up."""
    if architecture.quantization is not None and architecture.quantization.mxfp4_kernels:
        return constants.warm_up_mxfp4
    return constants.warm_up


def non_torch(
    constants: EngineConstants,
    tensor_parallel: int,
    pipeline_parallel: int,
    capability: tuple[int, int] | None,
) -> int:
    """Bytes of what is not PyTorch's: libraries, and with several GPUs the buffers between them.

    The big buffers are those of NVSwitch's multicast, which Hopper and Blackwell's data-centre cards (compute
    capability 9.0 and 10.x) have; a card of which nothing is known counts as one of them.
    """
    if tensor_parallel > 1:
        plain = capability is not None and capability[0] not in (9, 10)
        return constants.non_torch_parallel_plain if plain else constants.non_torch_parallel
    return constants.non_torch_pipeline if pipeline_parallel > 1 else constants.non_torch


def lora(architecture: Architecture, adapters: int, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Bytes of so many adapters of rank 16 on one GPU: rank x (inputs + outputs) for each linear layer.

    The engine has room for all of them from the start, in every layer that can have one (vLLM
    `lora/layers/*: create_lora_weights`); experts have none.
    """
    size = 0
    for layer in architecture.layers:
        for tensor in layer.tensors:
            if tensor.linear and tensor.copies == 1:
                outputs = -(-tensor.rows // tensor_parallel)
                size += LORA_RANK * (tensor.columns * len(tensor.names) + outputs)
    return -(-size // pipeline_parallel) * adapters * architecture.element_bytes
