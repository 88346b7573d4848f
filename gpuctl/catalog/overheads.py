"""The constants of each engine version, from `overheads.toml`. May import: gpuctl.errors, gpuctl.fit."""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from typing import Any

from gpuctl.fit.overheads import EngineConstants
from gpuctl.fit.values import GIB


@functools.cache
def engine_constants(version: str) -> EngineConstants:
    """The constants that hold for a version of vLLM ("0.32.0", "0.26.1rc1.dev608"): of the last row that is not newer.

    A version older than the first row has the first row's.
    """
    wanted = _key(version)
    chosen: dict[str, Any] | None = None
    for row in _rows():
        if chosen is None or _key(row["since"]) <= wanted:
            chosen = row
    assert chosen is not None
    return EngineConstants(
        version=version,
        measured_on=chosen.get("measured_on"),
        gpu_memory_utilization=chosen["gpu_memory_utilization"],
        logits_copies=chosen["logits_copies"],
        logits_rows=chosen["logits_rows"],
        workspace=_bytes(chosen["workspace"]),
        non_torch=_bytes(chosen["non_torch"]),
        non_torch_parallel=_bytes(chosen["non_torch_parallel"]),
        context=_bytes(chosen["context"]),
        graph_base=_bytes(chosen["graph_base"]),
        graph_per_layer=_bytes(chosen["graph_per_layer"]),
        graph_in_budget=chosen["graph_in_budget"],
        huge_batch=chosen["huge_batch"],
        tokens_by_concurrency=chosen["tokens_by_concurrency"],
        margin=chosen["margin"],
        source=chosen["source"],
    )


@functools.cache
def _rows() -> list[dict[str, Any]]:
    text = Path(__file__).with_name("overheads.toml").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = tomllib.loads(text)["vllm"]
    return rows


def _bytes(gib: float) -> int:
    return int(gib * GIB)


def _key(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version.lstrip("v"))
    return tuple(int(part or 0) for part in found.groups()) if found else (9999,)
