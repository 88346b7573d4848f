"""Which of vLLM's arguments tell on memory, in the spellings that vLLM reads."""

from __future__ import annotations

import pytest

from gpuctl.specs.engine_args import GPU_MEMORY_UTILIZATION, MemoryArgs, gives, memory_args


@pytest.mark.parametrize(
    ("args", "read"),
    [
        ("", MemoryArgs()),
        ("--seed 1 --enable-auto-tool-choice --tool-call-parser hermes", MemoryArgs()),
        ("--dtype half -q fp8", MemoryArgs(dtype="half", quantization="fp8")),
        ("--quantization=awq --kv_cache_dtype fp8", MemoryArgs(quantization="awq", kv_dtype="fp8")),
        ("--gpu_memory_utilization=0.8", MemoryArgs(gpu_memory_utilization="0.8")),
        ("--device-memory-utilization 0.7", MemoryArgs(gpu_memory_utilization="0.7")),
        ("--dtype half --dtype bfloat16", MemoryArgs(dtype="bfloat16")),
        ("--max-num-b 4096 -pp 2", MemoryArgs(max_num_batched_tokens="4096", pipeline_parallel="2")),
        (
            "--enforce-eager --enable-lora --max-loras 4",
            MemoryArgs(enforce_eager=True, enable_lora=True, max_loras="4"),
        ),
        ("--enforce-eager --no-enforce-eager", MemoryArgs()),
        ("--cpu-offload-gb 10", MemoryArgs(lessens=("--cpu-offload-gb",))),
        ("--speculative-config {} -sc {}", MemoryArgs(unknowable=("--speculative-config",))),
        ("--compilation-config.cudagraph_mode NONE", MemoryArgs(unknowable=("--compilation-config",))),
        ("-O3 -dp=2", MemoryArgs(unknowable=("--optimization-level", "--data-parallel-size"))),
        ("--load-format dummy --load-format=safetensors", MemoryArgs()),
        ("--load-format bitsandbytes", MemoryArgs(unknowable=("--load-format",))),
        ("--dtype", MemoryArgs(dtype="")),
    ],
)
def test_what_tells_on_memory(args: str, read: MemoryArgs) -> None:
    assert memory_args(args.split()) == read


def test_the_share_of_memory_has_two_names() -> None:
    assert gives(["--device-memory-utilization=0.5"], GPU_MEMORY_UTILIZATION)
    assert gives(["--gpu_memory_u", "0.5"], GPU_MEMORY_UTILIZATION)
    assert not gives(["--gpu-layers"], GPU_MEMORY_UTILIZATION)
