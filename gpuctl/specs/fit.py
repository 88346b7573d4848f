"""What `gpuctl fit` was asked, checked once. May import: gpuctl.errors, catalog, specs.

`FitSpec.from_options` takes what was typed, and raises one usage error that lists every problem of the command.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuctl import catalog
from gpuctl.errors import usage_error
from gpuctl.specs.gpu import ANY, AUTO, GpuRequest
from gpuctl.specs.reader import Reader

# As vLLM 0.32.0 spells them (`vllm/config/model.py`, `config/cache.py`); "auto" is what the model has.
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
KV_DTYPES = (
    "auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_per_token_head",
    "int8_per_token_head", "nvfp4",
)  # fmt: skip

_MOST_GPUS = 8  # of a container
_MOST_LORAS = 1024


@dataclass(frozen=True)
class FitSpec:
    """A valid question. Tokens; None: as the model, the engine or the plan has it."""

    model: str
    gpu: GpuRequest | None
    context: int | None
    concurrency: int | None
    dtype: str | None
    quantization: str | None
    kv_dtype: str | None
    lora: int
    gpu_memory_utilization: float | None
    tensor_parallel: int | None
    pipeline_parallel: int
    engine_version: str
    drop_unfit: bool

    @classmethod
    def from_options(
        cls,
        *,
        model: str,
        gpu: str | None = None,
        context: str | None = None,
        concurrency: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        kv_dtype: str | None = None,
        lora: str | None = None,
        gpu_memory_utilization: str | None = None,
        tensor_parallel: str | None = None,
        pipeline_parallel: str | None = None,
        engine_version: str | None = None,
        drop_unfit: bool = False,
    ) -> FitSpec:
        """Check what was typed (texts as they came; None: not given)."""
        read = Reader()
        every = gpu is not None and gpu.strip().lower() == AUTO
        request = None if gpu is None or every else read.parsed(GpuRequest.parse, gpu)
        tokens = read.optional_whole("--context", context, unit="tokens")
        at_once = read.optional_whole("--concurrency", concurrency, unit="requests")
        kind = read.one_of("--dtype", dtype, DTYPES)
        method = read.one_of("--quantization", quantization, quantizations())
        kv_kind = read.one_of("--kv-dtype", kv_dtype, KV_DTYPES)
        adapters = read.whole("--lora", lora, 0, at_least=0, at_most=_MOST_LORAS, unit="adapters")
        share = read.share("--gpu-memory-utilization", gpu_memory_utilization)
        tensor = read.optional_whole("--tensor-parallel", tensor_parallel, at_most=_MOST_GPUS, unit="GPUs")
        pipeline = read.whole("--pipeline-parallel", pipeline_parallel, 1, at_most=_MOST_GPUS, unit="GPUs")
        version = read.version("--engine-version", engine_version, built=True)
        _check_sizes(read, request, tensor, pipeline)
        if read.problems:
            raise usage_error(read.problems)
        return cls(
            model=model,
            gpu=request,
            context=tokens,
            concurrency=at_once,
            dtype=None if kind == "auto" else kind,
            quantization=method,
            kv_dtype=None if kv_kind == "auto" else kv_kind,
            lora=adapters,
            gpu_memory_utilization=share,
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            engine_version=version,
            drop_unfit=drop_unfit,
        )


def _check_sizes(read: Reader, request: GpuRequest | None, tensor: int | None, pipeline: int) -> None:
    """The parallel sizes against the GPUs: every GPU has one part of the model."""
    if tensor is not None and tensor * pipeline > _MOST_GPUS:
        read.problem(
            f"--tensor-parallel: {tensor} times --pipeline-parallel {pipeline} are {tensor * pipeline} GPUs; "
            f"a container has at most {_MOST_GPUS}"
        )
    for choice in request.choices if request else ():
        if choice.type == ANY and pipeline * (tensor or 1) > 1:
            read.problem("--gpu: 'any' is one GPU, which nothing can be split over")
        elif tensor is not None and tensor * pipeline != choice.count and choice.type != ANY:
            read.problem(
                f"--tensor-parallel: {tensor}"
                + (f" times --pipeline-parallel {pipeline}" if pipeline > 1 else "")
                + f" needs {tensor * pipeline} GPUs, and {choice} has {choice.count}"
                + _instead(choice.type, tensor * pipeline)
            )
        elif choice.count % pipeline:
            read.problem(
                f"--pipeline-parallel: {choice.count} GPUs of {choice} cannot be split into {pipeline} equal parts"
            )


def _instead(gpu: str, count: int) -> str:
    return f"; use --gpu {gpu}:{count}" if count <= catalog.gpus()[gpu].max_count else ""


def quantizations() -> tuple[str, ...]:
    """What `--quantization` takes: vLLM 0.32.0's methods (`model_executor/layers/quantization/__init__.py`)."""
    return (
        "awq", "auto_awq", "fp8", "fbgemm_fp8", "fp_quant", "modelopt", "modelopt_fp4", "modelopt_mxfp8",
        "modelopt_mixed", "auto_gptq", "gptq", "gptq_marlin", "awq_marlin", "bitsandbytes", "gguf", "humming",
        "compressed-tensors", "experts_int8", "quark", "moe_wna16", "torchao", "inc", "mxfp4", "gpt_oss_mxfp4",
        "deepseek_v4_fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "int8_per_channel_weight_only",
        "nvfp4_per_token", "mxfp8",
    )  # fmt: skip
