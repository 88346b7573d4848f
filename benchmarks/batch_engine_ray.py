"""Ray Data's LLM processor over the rows of batch_engine.py: `batch_engine_ray.py MODEL ROWS TOKENS`, in its folder.

Ray ends its engine with each job, so that this is a process of its own. It prints the seconds from the first batch that
the engine began with to the last row, as JSON behind an @: what Ray rendered while it loaded is not in them.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def main(model: str, rows: int, tokens: int) -> None:
    lines = Path("input.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [{"messages": json.loads(line)["body"]["messages"]} for line in lines]
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=1 << 29)
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={
            "load_format": "dummy",
            "enforce_eager": True,
            "disable_log_stats": True,
            "distributed_executor_backend": "mp",  # what vLLM takes on a CPU
        },
        batch_size=256,
        concurrency=1,
        log_engine_metrics=False,
        placement_group_config={"bundles": [{"CPU": 1}]},  # otherwise it waits for a GPU
    )
    sampling = {"temperature": 0, "max_tokens": tokens}

    def ended(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "began": time.time() - row["time_taken_llm"],
            "ended": time.time(),
            "tokens": row["num_generated_tokens"],
        }

    processor = build_processor(
        config, preprocess=lambda row: {**row, "sampling_params": sampling}, postprocess=ended
    )
    answered = processor(ray.data.from_items(asked, override_num_blocks=-(-rows // 1000))).take_all()
    assert len(answered) == rows
    assert {row["tokens"] for row in answered} == {tokens}
    seconds = max(row["ended"] for row in answered) - min(row["began"] for row in answered)
    print("@" + json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
