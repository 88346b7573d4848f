"""Does it fit: against what vLLM itself printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gpuctl import catalog
from gpuctl.catalog.overheads import engine_constants
from gpuctl.errors import GpuctlError
from gpuctl.fit import architecture
from gpuctl.fit.values import GIB, Ask, Card, ModelFacts, Verdict
from gpuctl.fit.verdict import judge

H100 = Card("H100", int(79.19 * GIB), 3.35e12, {"bf16": 989e12}, (9, 0), True, 0.001097)
LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def facts(config: dict[str, object]) -> ModelFacts:
    read = architecture.read(config, what="config.json")
    return ModelFacts("a model", None, None, read, None, "llm", read.context, "config.json")


@pytest.mark.parametrize(
    ("tp", "weights_gib", "kv_gib", "tokens"),
    [(1, 14.99, 58.11, 476_016), (2, 7.51, 63.76, 1_044_688), (4, 3.77, 67.44, 2_209_792)],
)
def test_llama_on_h100_as_vllm_0_19_logged_it(
    tp: int, weights_gib: float, kv_gib: float, tokens: int
) -> None:
    ask = Ask(context=8192, gpu_memory_utilization=0.95, engine_version="0.19.0")
    judged = judge(facts(LLAMA_3_1_8B), H100, tp, ask, engine_constants("0.19.0"))
    assert judged.per_gpu
    assert judged.verdict is Verdict.FITS
    assert judged.per_gpu.weights / GIB == pytest.approx(weights_gib, abs=0.01)
    assert judged.per_gpu.kv_cache / GIB == pytest.approx(kv_gib, rel=0.01)
    assert judged.kv_cache_tokens == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", None, "hidden_size is missing"),
        ("vocab_size", -5, "vocab_size is -5"),
        ("num_hidden_layers", "many", "num_hidden_layers is 'many'"),
        ("model_type", None, "model_type is missing"),
    ],
)
def test_a_field_that_is_missing_or_absurd_is_named(field: str, value: object, said: str) -> None:
    config = {**LLAMA_3_1_8B, field: value}
    with pytest.raises(GpuctlError) as error:
        architecture.read(config, what="m/config.json")
    assert error.value.problems[0].startswith("m/config.json: ")
    assert said in error.value.problems[0]


def test_heads_that_cannot_be_divided_are_a_no() -> None:
    judged = judge(facts(LLAMA_3_1_8B), H100, 3, Ask(), engine_constants("0.32.0"))
    assert judged.verdict is Verdict.NO
    assert "32 attention heads" in judged.reason


QWEN3_8B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "vocab_size": 151665,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def test_a_model_that_embeds_is_loaded_without_its_output_matrix() -> None:
    # Qwen3-Embedding-8B with vLLM 0.22: "Model loading took 14.11 GiB".
    chat = facts(QWEN3_8B)
    embeds = dataclasses.replace(chat, kind="embedding")
    ask = Ask(context=4096, engine_version="0.22.0")
    judged = judge(embeds, H100, 1, ask, engine_constants("0.22.0"))
    assert judged.per_gpu
    assert judged.per_gpu.weights / GIB == pytest.approx(14.11, abs=0.02)


def test_routed_experts_in_another_format_than_the_rest() -> None:
    # https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash on two H200: 74.35 GiB each.
    text = (Path(catalog.__file__).parent / "configs" / "deepseek-ai--DeepSeek-V4-Flash.json").read_text()
    read = architecture.read(json.loads(text), what="config.json")
    model = ModelFacts("v4", None, None, read, None, "llm", read.context, "config.json")
    h200 = Card("H200", int(139.8 * GIB), 4.8e12, {}, (9, 0), True, None)
    ask = Ask(context=4096, gpu_memory_utilization=0.78, engine_version="0.26.0")
    judged = judge(model, h200, 2, ask, engine_constants("0.26.0"))
    assert judged.per_gpu
    assert judged.per_gpu.weights / GIB == pytest.approx(74.35, rel=0.015)


def test_cards_without_a_switch_between_them_make_no_buffers_for_it() -> None:
    # Qwen3-8B on two T4 with vLLM 0.22 and --enforce-eager, at 0.85: 3.92 to 4.37 GiB for the cache.
    t4 = Card("T4", int(14.56 * GIB), 3.2e11, {}, (7, 5), True, None)
    ask = Ask(context=4096, gpu_memory_utilization=0.85, engine_version="0.22.1", enforce_eager=True)
    judged = judge(
        facts(QWEN3_8B), t4, 2, dataclasses.replace(ask, max_num_seqs=1), engine_constants("0.22.1")
    )
    assert judged.per_gpu
    assert judged.per_gpu.kv_cache / GIB == pytest.approx(4.1, rel=0.06)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000: no model has one as large"),
        ({"hidden_size": float("inf")}, "hidden_size is inf: a whole number is needed"),
        ({"torch_dtype": "x"}, "torch_dtype is 'x': one of float32"),
        ({"dtype": 16}, "dtype is 16: one of float32"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e308}}, "rope_scaling.factor is 1e+308"),
        ({"rope_scaling": 7}, "rope_scaling is 7: an object is needed"),
        ({"layer_types": ["full_attention"]}, "layer_types is ['full_attention']: one for each of the 32"),
        ({"layer_types": ["foo"] * 32}, "gpuctl knows no layer of the kind 'foo'"),
        ({"layer_types": ["sliding_attention"] * 32, "sliding_window": 0}, "sliding_window is 0"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8': an object is needed"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": ["a"]}},
            "quantization_config.weight_block_size is ['a']: two numbers",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": {"targets": 1, "weights": {"num_bits": 8}}},
                }
            },
            "quantization_config.config_groups.g.targets is 1: a list is needed",
        ),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 8}, "num_experts is missing"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 8, "num_experts": 0}, "num_experts is 0"),
    ],
)
def test_an_absurd_field_is_named_and_never_a_bug(changed: dict[str, object], said: str) -> None:
    with pytest.raises(GpuctlError) as error:
        facts({**LLAMA_3_1_8B, **changed})
    assert said in error.value.problems[0]


def test_weights_that_no_card_holds_are_a_certain_no() -> None:
    model = ModelFacts("big", None, None, None, 150 * GIB, "llm", None, "the hub")
    judged = judge(model, H100, 1, Ask(engine_version="0.32.0"), engine_constants("0.32.0"))
    assert judged.verdict is Verdict.NO
    assert (
        judge(model, H100, 2, Ask(engine_version="0.32.0"), engine_constants("0.32.0")).verdict
        is Verdict.UNKNOWN
    )


def test_a_quantisation_that_the_weights_do_not_have_is_refused() -> None:
    fp8 = facts({**QWEN3_8B, "quantization_config": {"quant_method": "fp8"}})
    constants = engine_constants("0.32.0")
    ask = Ask(context=4096, engine_version="0.32.0")
    judged = judge(fp8, H100, 1, dataclasses.replace(ask, quantization="awq"), constants)
    assert judged.verdict is Verdict.NO
    assert "the engine refuses 'awq'" in judged.reason
    assert (
        judge(fp8, H100, 1, dataclasses.replace(ask, quantization="fp8"), constants).verdict is Verdict.FITS
    )


def test_more_requests_at_once_never_take_less() -> None:
    constants = engine_constants("0.32.0")
    taken = []
    for many in (None, 257, 900, 1024, 1025, 3000):
        ask = Ask(context=4096, engine_version="0.32.0", max_num_seqs=many)
        judged = judge(facts(QWEN3_8B), H100, 1, ask, constants)
        assert judged.per_gpu
        taken.append(judged.per_gpu.activation)
    assert taken == sorted(taken)


def test_no_speed_is_told_of_32_bits() -> None:
    ask = Ask(context=4096, engine_version="0.32.0", dtype="float32")
    judged = judge(facts(QWEN3_8B), H100, 1, ask, engine_constants("0.32.0"))
    assert judged.verdict is Verdict.FITS
    assert judged.decode_tokens_per_s is None
