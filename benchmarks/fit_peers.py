"""What the peers say of the rows of `fit_accuracy.py`. Runs in an interpreter that has them; see there.

Standard input: rows as JSON. Standard output: peer -> line -> what it says, GiB for each GPU. Each peer's own functions
do the arithmetic; they are handed what they would have downloaded (config.json, the headers' dtypes and shapes), as
there is no hub here. A row that a peer cannot read is left out, and said on standard error.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
BYTES = {"BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4}


def hf_mem(row: dict[str, Any]) -> dict[str, float]:
    """Weights: the bytes of the headers, on as many GPUs. It knows no engine; the cache it gives is one request's."""
    from hf_mem.safetensors import compute_safetensors_kv_cache_size, parse_safetensors_metadata

    headers: dict[str, Any] = {}
    for i, (dtype, shape, copies) in enumerate(row["tensors"]):
        headers[f"t{i}"] = {"dtype": dtype, "shape": [*shape, copies], "data_offsets": [0, 0]}
    read = parse_safetensors_metadata({"model": headers})
    text = row["config"].get("text_config") or row["config"]
    cache = compute_safetensors_kv_cache_size(
        text, "F8_E4M3" if row["kv_dtype"] == "fp8" else "BF16", max_model_len=row["context"]
    )
    gpus = row["tp"] * row["pp"]
    left = row["memory_gib"] * row["utilization"] - read.bytes_count / GIB / gpus
    # What a user would conclude from its two figures: what the weights leave, over what a token takes.
    return {
        "weights": read.bytes_count / GIB / gpus,
        "kv": left,
        "tokens": left * gpus * GIB / (cache / row["context"]),
    }


def llm_d_planner(row: dict[str, Any]) -> dict[str, float]:
    """Weights, activations and what is left for the cache, as `planner.capacity_planner` computes them."""
    from planner import capacity_planner as planner
    from transformers import AutoConfig

    counts: dict[str, int] = {}
    for dtype, shape, copies in row["tensors"]:
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape) * copies
    planner.model_params_by_dtype = lambda *_, **__: counts
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(row["config"]), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
    gpus = row["tp"] * row["pp"]
    given = {"tp": row["tp"], "pp": row["pp"]}
    cache = planner.allocatable_kv_cache_memory(
        "model", config, row["memory_gib"], row["utilization"], max_model_len=row["context"], **given
    )
    one = planner.KVCacheDetail("model", config, row["context"], 1)
    token = one.per_token_memory_bytes * (0.5 if row["kv_dtype"] == "fp8" else 1)
    return {
        "weights": planner.per_gpu_model_memory_required("model", config, **given),
        "kv": cache / gpus,
        "tokens": cache * GIB / token,
        "activation": planner.estimate_vllm_activation_memory(config, tp=row["tp"]),
    }


def accelerate(row: dict[str, Any]) -> dict[str, float]:
    """`accelerate estimate-memory`: the size of the model when loaded, in 16 bits; nothing of an engine."""
    import torch
    import transformers
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel

    transformers.logging.set_verbosity_error()
    bare = {k: v for k, v in row["config"].items() if k != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(bare), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModel.from_config(config, dtype=torch.float32)
    total, _ = calculate_maximum_sizes(model)
    return {"weights": total / 2 / GIB / (row["tp"] * row["pp"])}


PEERS: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "hf-mem": hf_mem,
    "llm-d-planner": llm_d_planner,
    "accelerate estimate-memory": accelerate,
}


def main() -> None:
    rows = json.load(sys.stdin)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, ask in PEERS.items():
        said = found[name] = {}
        known: dict[str, dict[str, float]] = {}
        for row in rows:
            key = json.dumps({k: v for k, v in row.items() if k != "line"}, sort_keys=True)
            try:
                if key not in known:
                    known[key] = ask(row)
                said[str(row["line"])] = known[key]
            except Exception as error:
                print(f"{name}, line {row['line']}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
