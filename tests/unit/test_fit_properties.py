"""What must hold of every model, card and request: more asked never gets more, more given never gets less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpuctl.catalog.overheads import engine_constants
from gpuctl.fit import architecture, kv, weights
from gpuctl.fit.values import GIB, Ask, Candidate, Card, ModelFacts, Verdict
from gpuctl.fit.verdict import judge

VERSIONS = ("0.11.0", "0.16.0", "0.19.0", "0.20.0", "0.25.1", "0.32.0")
BEST_FIRST = (Verdict.FITS, Verdict.TIGHT, Verdict.NO)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of a family: dense, with windows, with experts, latent, or with a recurrence."""
    kind = draw(st.sampled_from(("llama", "gemma2", "qwen3_moe", "deepseek_v3", "qwen3_5", "nemotron_h")))
    heads = draw(st.sampled_from((8, 16, 32, 64)))
    layers = 4 * draw(st.integers(1, 16))
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": 128 * draw(st.integers(4, 64)),
        "intermediate_size": 256 * draw(st.integers(4, 96)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from((1, 2, 4, 8))),
        "head_dim": draw(st.sampled_from((64, 128, 256))),
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(1000, 260_000)),
        "max_position_embeddings": 2 ** draw(st.integers(11, 20)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if kind == "gemma2":
        config["sliding_window"] = draw(st.sampled_from((512, 4096)))
    if kind in ("qwen3_moe", "deepseek_v3", "qwen3_5"):
        config |= {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
    if kind == "deepseek_v3":
        config |= {
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 1,
        }
    if kind == "qwen3_5":
        config |= {
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "shared_expert_intermediate_size": 512,
            "mamba_ssm_dtype": "float32",
        }
    if kind == "nemotron_h":
        config |= {
            "hybrid_override_pattern": "M-M*" * (layers // 4),
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
            "conv_kernel": 4,
        }
    return config


# The engine plans for smaller batches on smaller cards; where it does, more memory can hold less. Here it is told.
ASKS = st.builds(
    Ask,
    context=st.integers(16, 2**17),
    concurrency=st.integers(1, 512),
    kv_dtype=st.sampled_from((None, "fp8")),
    gpu_memory_utilization=st.sampled_from((None, 0.8, 0.95)),
    enforce_eager=st.booleans(),
    max_num_batched_tokens=st.just(2048),
    max_num_seqs=st.just(256),
)
CARDS = st.builds(
    lambda gib: Card("a card", gib * GIB, 2e12, {"bf16": 5e14, "fp8": 1e15}, (9, 0), True, 0.001),
    st.integers(8, 288),
)


def asked(config: dict[str, Any], card: Card, count: int, ask: Ask, version: str) -> Candidate:
    read = architecture.read(config, what="config.json")
    facts = ModelFacts("a model", None, None, read, None, "llm", read.context, "config.json")
    return judge(facts, card, count, ask, engine_constants(version))


def within(config: dict[str, Any], ask: Ask) -> Ask:
    assert ask.context is not None
    return replace(ask, context=min(ask.context, config["max_position_embeddings"]))


def no_worse(one: Candidate, other: Candidate) -> bool:
    return BEST_FIRST.index(one.verdict) <= BEST_FIRST.index(other.verdict)


@settings(max_examples=150, deadline=None)
@given(configs(), CARDS, ASKS, st.sampled_from(VERSIONS), st.integers(1, 2**17))
def test_a_longer_context_never_holds_more(
    config: dict[str, Any], card: Card, ask: Ask, version: str, longer: int
) -> None:
    ask = within(config, ask)
    assert ask.context is not None
    assume(ask.context + longer <= config["max_position_embeddings"])
    short = asked(config, card, 1, ask, version)
    long = asked(config, card, 1, replace(ask, context=ask.context + longer), version)
    assert no_worse(short, long)
    assert (short.max_concurrency or 0) >= (long.max_concurrency or 0)


@settings(max_examples=150, deadline=None)
@given(configs(), CARDS, ASKS, st.sampled_from(VERSIONS), st.integers(1, 500))
def test_more_requests_never_fit_better(
    config: dict[str, Any], card: Card, ask: Ask, version: str, more: int
) -> None:
    ask = within(config, ask)
    few = asked(config, card, 1, ask, version)
    many = asked(config, card, 1, replace(ask, concurrency=ask.concurrency + more), version)
    assert no_worse(few, many)
    assert few.kv_cache_tokens == many.kv_cache_tokens
    if few.decode_tokens_per_s and many.decode_tokens_per_s:
        assert few.decode_tokens_per_s <= many.decode_tokens_per_s * 1.000001


@settings(max_examples=150, deadline=None)
@given(configs(), CARDS, ASKS, st.sampled_from(VERSIONS), st.integers(1, 100))
def test_a_bigger_card_is_never_worse(
    config: dict[str, Any], card: Card, ask: Ask, version: str, more: int
) -> None:
    ask = within(config, ask)
    small = asked(config, card, 1, ask, version)
    big = asked(config, replace(card, memory_bytes=card.memory_bytes + more * GIB), 1, ask, version)
    assert no_worse(big, small)
    assert (big.kv_cache_tokens or 0) >= (small.kv_cache_tokens or 0)
    assert (big.max_context or 0) >= (small.max_context or 0)
    assert (big.max_concurrency or 0) >= (small.max_concurrency or 0)


@settings(max_examples=200, deadline=None)
@given(
    configs(), CARDS, ASKS, st.sampled_from(VERSIONS), st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2))
)
def test_nothing_is_negative_and_all_is_accounted_for(
    config: dict[str, Any], card: Card, ask: Ask, version: str, tensor: int, pipeline: int
) -> None:
    ask = replace(within(config, ask), tensor_parallel=tensor, pipeline_parallel=pipeline)
    found = asked(config, card, tensor * pipeline, ask, version)
    assert found.reason
    memory = found.per_gpu
    if memory is None:
        assert found.verdict in (Verdict.NO, Verdict.UNKNOWN)
        return
    parts = vars(memory)
    assert all(isinstance(size, int) and size >= 0 for size in parts.values())
    if memory.kv_cache:
        assert sum(parts.values()) >= card.memory_bytes - 1
    for size in (found.kv_cache_tokens, found.max_context, found.max_concurrency):
        assert size is not None
        assert size >= 0
    assert found.max_context is not None
    assert found.max_context <= config["max_position_embeddings"]
    for speed in (found.decode_tokens_per_s, found.prefill_tokens_per_s, found.usd_per_million_tokens):
        assert speed is None or speed > 0


@settings(max_examples=100, deadline=None)
@given(configs(), st.sampled_from((2, 4)))
def test_weights_add_up_over_the_gpus(config: dict[str, Any], parts: int) -> None:
    read = architecture.read(config, what="config.json")
    whole = sum(weights.per_stage(read, 1, 1, 2, None))
    stages = weights.per_stage(read, 1, parts, 2, None)
    twice = (
        weights.bytes_on_gpu(read.first[0], 1, 2, None) if read.tied else 0
    )  # on the first stage and the last
    assert sum(stages) == whole + twice
    for tensor in read.tensors():
        rows, columns = weights.shape_on_gpu(tensor, parts)
        assert rows * columns * parts >= tensor.rows * tensor.columns, "nothing is lost"
        assert rows * columns <= max(tensor.rows, 64) * max(tensor.columns, 1) + 64 * tensor.columns


@settings(max_examples=100, deadline=None)
@given(configs(), st.sampled_from(VERSIONS), st.integers(1, 10_000))
def test_a_cache_holds_twice_as_much_in_half_the_bytes(
    config: dict[str, Any], version: str, mib: int
) -> None:
    assume(config["model_type"] in ("llama", "qwen3_moe", "deepseek_v3"))
    read = architecture.read(config, what="config.json")
    constants = engine_constants(version)
    wide, narrow = (
        kv.pool(read, 1, 1, kept, 2048, constants) for kept in (kv.Format("bfloat16", 2), kv.Format("fp8", 1))
    )
    assert wide
    assert narrow
    free = [mib * 2**20]
    assert narrow.blocks(free) // 2 == wide.blocks(free)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 7])
def test_every_layer_is_in_one_stage(parts: int) -> None:
    dealt = [i for part in weights.stages(30, parts) for i in part]
    assert dealt == list(range(30))
