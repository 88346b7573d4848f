"""What may follow `--`: vLLM's own flags, less those that gpuctl sets; which of them tell on memory. May import:
gpuctl.specs.names.

vLLM 0.32.0 reads `--max-num-seqs`, `--max_num_seqs`, `--max-num-seqs=4`, any unambiguous beginning such as
`--max-num-se` (Python's argparse), and short forms such as `-tp` (`vllm/utils/argparse_utils.py`); the last one given
wins, so an overlooked spelling would silently undo what the file says.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.specs import names

if TYPE_CHECKING:
    from collections.abc import Sequence

GPU_MEMORY_UTILIZATION = "--gpu-memory-utilization"

_AUTH = "requests are authenticated by Modal (--auth); see gpuctl token"
_URL = "gpuctl sets it; the address of the endpoint is Modal's"
_SECRET = "its value would stand in the file; use --secret NAME or --secret-from-env HF_TOKEN"  # noqa: S105 - advice
RESERVED = {
    "--model": "give MODEL instead",
    "--revision": "write the revision as MODEL@REVISION",
    "--served-model-name": "requests name the model as MODEL was given; for another App name use --name",
    "--host": _URL,
    "--port": _URL,
    "--uds": _URL,
    "--ssl-keyfile": _URL,
    "--ssl-certfile": _URL,
    "--root-path": _URL,
    "--grpc": _URL,
    "--headless": _URL,
    "--api-key": _AUTH,
    "--hf-token": _SECRET,
    "--max-num-seqs": "use --concurrency",
    "--max-model-len": "use --max-model-len before the --",
    "--tensor-parallel-size": "use the count of --gpu, as in --gpu H100:2",
}
_SHORT = {"-tp": "--tensor-parallel-size", "-t": "--tensor-parallel-size"}


def check_engine_args(args: Sequence[str]) -> list[str]:
    """The problems of what follows `--`; empty when vLLM may have it untouched."""
    problems = []
    if args and not args[0].startswith("-"):
        problems.append(f"{args[0]!r}: unexpected; arguments for vLLM follow a --, as in -- --enforce-eager")
    for arg in args:
        if not names.encodable(arg):
            problems.append(f"-- {arg!r}: not text that an argument can hold")
        flag = _meant(arg, list(RESERVED))
        if flag is not None:
            given = arg.partition("=")[0]
            spelled = given if given == flag else f"{given} ({flag})"
            problems.append(f"-- {spelled}: {RESERVED[flag]}")
    return problems


def gives(args: Sequence[str], flag: str) -> bool:
    """Whether the arguments hold this flag, in any spelling."""
    return any(_meant(arg, [flag, *_SYNONYMS.get(flag, ())]) for arg in args)


@dataclass(frozen=True)
class MemoryArgs:
    """What the arguments say about the engine's memory, as texts; None: not given.

    `lessens`: flags that can only take memory from a GPU; `unknowable`: flags whose effect is not reckoned here.
    """

    dtype: str | None = None
    quantization: str | None = None
    kv_dtype: str | None = None
    gpu_memory_utilization: str | None = None
    max_num_batched_tokens: str | None = None
    pipeline_parallel: str | None = None
    max_loras: str | None = None
    enable_lora: bool = False
    enforce_eager: bool = False
    lessens: tuple[str, ...] = ()
    unknowable: tuple[str, ...] = ()


_FIELDS = {
    "--dtype": "dtype",
    "--quantization": "quantization",
    "--kv-cache-dtype": "kv_dtype",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--device-memory-utilization": "gpu_memory_utilization",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--pipeline-parallel-size": "pipeline_parallel",
    "--max-loras": "max_loras",
}
_SWITCHES = {"--enable-lora": "enable_lora", "--enforce-eager": "enforce_eager"}
_SYNONYMS = {GPU_MEMORY_UTILIZATION: ("--device-memory-utilization",)}
_SHORT_MEMORY = {
    "-q": "--quantization",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-sc": "--speculative-config",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-ep": "--enable-expert-parallel",
}
_LESSENS = (
    "--cpu-offload-gb", "--offload-group-size", "--offload-num-in-group", "--offload-prefetch-step",
    "--language-model-only", "--limit-mm-per-prompt", "--skip-mm-profiling", "--mm-encoder-only",
    "--kv-sharing-fast-prefill",
)  # fmt: skip
# Flags of vLLM 0.32.0 (`vllm/engine/arg_utils.py`) that change what is loaded, kept or captured.
_UNKNOWABLE = (
    "--additional-config", "--block-size", "--compilation-config", "--config", "--config-format",
    "--cudagraph-capture-sizes", "--data-parallel-size", "--decode-context-parallel-size",
    "--disable-hybrid-kv-cache-manager",
    "--disable-sliding-window", "--enable-dbo", "--enable-eplb", "--enable-expert-parallel", "--enable-sleep-mode",
    "--eplb-config", "--hf-config-path", "--hf-overrides", "--kv-cache-dtype-skip-layers", "--kv-cache-memory-bytes",
    "--load-format", "--mamba-block-size", "--mamba-cache-dtype", "--mamba-cache-mode", "--mamba-ssm-cache-dtype",
    "--max-cudagraph-capture-size", "--max-lora-rank", "--mm-processor-kwargs", "--model-class-overrides",
    "--model-impl", "--num-gpu-blocks-override", "--optimization-level", "--performance-mode",
    "--prefill-context-parallel-size", "--quantization-config", "--spec-method", "--spec-model", "--spec-tokens",
    "--speculative-config", "--ubatch-size", "--worker-cls", "--worker-extension-cls", "--lora-dtype",
    "--fully-sharded-loras", "--runner", "--convert",
)  # fmt: skip


_QUANTISES = ("bitsandbytes", "gguf")  # values of --load-format; the others load the same weights another way


def memory_args(args: Sequence[str]) -> MemoryArgs:
    """What of the arguments tells on memory. Of a flag that is given twice the last one counts, as vLLM has it."""
    texts: dict[str, str] = {}
    switches: dict[str, bool] = {}
    lessens: list[str] = []
    unknowable: list[str] = []
    flags = [*_FIELDS, *_SWITCHES, *_LESSENS, *_UNKNOWABLE]
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.startswith("-O"):
            unknowable.append("--optimization-level")
            continue
        if name.startswith("--no-") and "--" + name[5:].replace("_", "-") in _SWITCHES:
            switches[_SWITCHES["--" + name[5:].replace("_", "-")]] = False
            continue
        dotted = name.partition(".")[0]  # --compilation-config.cudagraph_mode NONE
        flag = _SHORT_MEMORY.get(dotted) or _meant(dotted, flags)
        if flag is None:
            continue
        if flag in _FIELDS:
            if not equals:
                value = args[i + 1] if i + 1 < len(args) else ""
            texts[_FIELDS[flag]] = value
        elif flag in _SWITCHES:
            switches[_SWITCHES[flag]] = True
        elif flag != "--load-format" or (value or "".join(args[i + 1 : i + 2])) in _QUANTISES:
            (lessens if flag in _LESSENS else unknowable).append(flag)
    return MemoryArgs(
        dtype=texts.get("dtype"),
        quantization=texts.get("quantization"),
        kv_dtype=texts.get("kv_dtype"),
        gpu_memory_utilization=texts.get("gpu_memory_utilization"),
        max_num_batched_tokens=texts.get("max_num_batched_tokens"),
        pipeline_parallel=texts.get("pipeline_parallel"),
        max_loras=texts.get("max_loras"),
        enable_lora=switches.get("enable_lora", False),
        enforce_eager=switches.get("enforce_eager", False),
        lessens=tuple(dict.fromkeys(lessens)),
        unknowable=tuple(dict.fromkeys(unknowable)),
    )


def _meant(arg: str, flags: list[str]) -> str | None:
    """Which of the flags vLLM would read this argument as."""
    name = arg.partition("=")[0]
    if name in _SHORT:
        return _SHORT[name] if _SHORT[name] in flags else None
    if not name.startswith("--") or name == "--":
        return None
    name = name.replace("_", "-")
    if name in flags:
        return name
    # A beginning of several flags is ambiguous, and vLLM refuses it; the shortest that is not: "--ho".
    beginnings = [flag for flag in flags if flag.startswith(name)]
    return beginnings[0] if beginnings and len(name) > 3 else None


def stages(args: Sequence[str]) -> int:
    """Stages that the model's layers are dealt out to (pipeline parallelism); 1 where the arguments do not say."""
    text = memory_args(args).pipeline_parallel
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else 1


def adapters(args: Sequence[str]) -> list[str]:
    """The names that `--lora-modules NAME=PATH …` gives to adapters; of one given as JSON its `name`."""
    names = []
    listed = False
    for arg in args:
        if arg.startswith("-"):
            flag, equals, value = arg.partition("=")
            listed = flag.replace("_", "-") == "--lora-modules"
            if not (listed and equals):
                continue
            arg = value
        if listed and arg.startswith("{"):
            with contextlib.suppress(ValueError):
                names.append(str(json.loads(arg).get("name")))
        elif listed:
            names.append(arg.partition("=")[0])
    return names
