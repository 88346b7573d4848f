"""What may follow `--`: vLLM's own flags, less those that gpuctl sets. May import: gpuctl.specs.names.

vLLM 0.32.0 reads `--max-num-seqs`, `--max_num_seqs`, `--max-num-seqs=4`, any unambiguous beginning such as
`--max-num-se` (Python's argparse), and short forms such as `-tp` (`vllm/utils/argparse_utils.py`); the last one given
wins, so an overlooked spelling would silently undo what the file says.
"""

from __future__ import annotations

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
    return any(_meant(arg, [flag]) for arg in args)


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
