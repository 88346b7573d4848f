"""What vLLM's own code makes of the KV caches that `gpuctl.fit` reads from configurations: the makers of a golden.

    .venv/bin/python tests/vllm_kv.py specs | ENGINE/bin/python tests/vllm_kv.py ask > tests/unit/vllm-0.32-kv.json

`ENGINE` is an environment with vLLM 0.32 (the build for CPUs will do: `~/.cache/gpuctl/local/images/*/tree/venv`).
`specs` runs with gpuctl, `ask` with vLLM; neither needs the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MODELS = (
    "meta-llama--Llama-3.1-8B-Instruct",
    "openai--gpt-oss-20b",
    "openai--gpt-oss-120b",
    "google--gemma-3-27b-it",
    "google--gemma-4-26B-A4B",
    "nvidia--Gemma-4-31B-IT-NVFP4",
    "Qwen--Qwen3.5-27B",
    "Qwen--Qwen3.5-35B-A3B",
    "nvidia--Nemotron-H-56B-Base-8K",
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1",
    "deepseek-ai--DeepSeek-V3",
    "deepseek-ai--DeepSeek-V3.2",
    "zai-org--GLM-5.2",
    "moonshotai--Kimi-K3",
    "XiaomiMiMo--MiMo-V2-Flash",
    "meta-llama--Llama-4-Scout-17B-16E-Instruct",
    "stepfun-ai--Step-3.7-Flash",
)
TENSOR_PARALLEL = (1, 2, 8)
CONTEXTS = (8192, 131072)
MEMORY = 20 * 2**30
BATCH = 8192
_BLOCK, _LATENT_BLOCK, _LATENT_AND_STATE = 16, 64, 128


def specs() -> None:
    """One line of JSON for each model: what each layer keeps, on one of so many GPUs."""
    from gpuctl.fit import architecture
    from gpuctl.fit.architecture import Attention, Latent

    configs = Path(__file__).parents[1] / "gpuctl" / "catalog" / "configs"
    for name in MODELS:
        read = architecture.read(
            json.loads((configs / f"{name}.json").read_text(encoding="utf-8")), what=name
        )
        for parallel in TENSOR_PARALLEL:
            layers: list[list[dict[str, Any]]] = []
            for layer in read.layers:
                kept: list[dict[str, Any]] = []
                for cache in layer.caches:
                    if isinstance(cache, Attention):
                        heads = max(1, -(-cache.kv_heads // parallel))
                        kept.append({**vars(cache), "kind": "attention", "kv_heads": heads})
                    elif isinstance(cache, Latent):
                        kept.append({**vars(cache), "kind": "latent"})
                    else:
                        kept.append(
                            {
                                "kind": "state",
                                "convolution": -(-cache.convolution // parallel),
                                "state": -(-cache.state // parallel),
                                "bytes": cache.state_bytes or read.element_bytes,
                            }
                        )
                layers.append(kept)
            print(json.dumps({"model": name, "tensor_parallel": parallel, "layers": layers}))


def ask() -> None:
    """What vLLM makes of them: blocks, groups, bytes of a block, blocks of a request, tokens."""
    from types import SimpleNamespace

    import torch
    from vllm.v1.core import kv_cache_utils as engine
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    found = []
    for line in sys.stdin:
        asked = json.loads(line)
        kept = [cache for layer in asked["layers"] for cache in layer]
        kinds = {cache["kind"] for cache in kept}
        block = _LATENT_BLOCK if "latent" in kinds and "attention" not in kinds else _BLOCK
        page = None
        if "state" in kinds:
            token = max(
                cache["kv_heads"] * (cache["key"] + cache["value"]) * 2
                if cache["kind"] == "attention"
                else cache["width"] * 2
                for cache in kept
                if cache["kind"] != "state"
            )
            state = max(c["convolution"] * 2 + c["state"] * c["bytes"] for c in kept if c["kind"] == "state")
            unit = _LATENT_AND_STATE if "latent" in kinds else block
            block = unit * -(-state // (unit * token))
            page = block * token
        made: dict[str, Any] = {}
        for i, layer in enumerate(asked["layers"]):
            for j, cache in enumerate(layer):
                name = f"{i}.{j}"
                if cache["kind"] == "attention":
                    shape = {
                        "block_size": block,
                        "num_kv_heads": cache["kv_heads"],
                        "head_size": cache["key"],
                        "head_size_v": cache["value"],
                        "dtype": torch.bfloat16,
                    }
                    if cache["window"] and cache["chunked"]:
                        made[name] = ChunkedLocalAttentionSpec(attention_chunk_size=cache["window"], **shape)
                    elif cache["window"]:
                        made[name] = SlidingWindowSpec(sliding_window=cache["window"], **shape)
                    else:
                        made[name] = FullAttentionSpec(**shape)
                elif cache["kind"] == "latent":
                    for width, dtype in ((cache["width"], torch.bfloat16), (cache["index"], torch.uint8)):
                        if width:
                            made[f"{name} {dtype}"] = MLAAttentionSpec(
                                block_size=block, num_kv_heads=1, head_size=width, dtype=dtype
                            )
                else:
                    wide = torch.float32 if cache["bytes"] == 4 else torch.bfloat16
                    made[name] = MambaSpec(
                        block_size=block,
                        shapes=((cache["convolution"],), (cache["state"],)),
                        dtypes=(torch.bfloat16, wide),
                        page_size_padded=page,
                        mamba_cache_mode="align",
                    )
        for context in CONTEXTS:
            cache_config = SimpleNamespace(
                mamba_cache_mode="align",
                num_gpu_blocks_override=None,
                prefix_cache_retention_interval=None,
                get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC,
            )
            config: Any = SimpleNamespace(
                cache_config=cache_config,
                scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
                parallel_config=SimpleNamespace(decode_context_parallel_size=1),
                model_config=SimpleNamespace(max_model_len=context),
                max_in_flight_tokens=2 * BATCH,
                attention_config=SimpleNamespace(hisparse_config=None),
                speculative_config=None,
            )
            groups = engine.get_kv_cache_groups(config, dict(made))
            planned = engine.get_kv_cache_config_from_groups(config, groups, MEMORY)
            size = engine._pool_bytes_per_block(config, groups)
            found.append(
                {
                    "model": asked["model"],
                    "tensor_parallel": asked["tensor_parallel"],
                    "context": context,
                    "blocks": planned.num_blocks,
                    "groups": len(groups),
                    "block_bytes": size,
                    "request": engine._max_memory_usage_bytes_from_groups(config, groups) // size,
                    "tokens": engine.get_kv_cache_capacity(config, planned)[0],
                }
            )
    print("[\n" + ",\n".join(map(json.dumps, found)) + "\n]")


if __name__ == "__main__":
    {"specs": specs, "ask": ask}[sys.argv[1]]()
