"""The constants of each version of the engine, from `overheads.toml`. May import: gpuctl.fit."""

from __future__ import annotations

import functools
from typing import Any

from gpuctl.catalog.tables import table
from gpuctl.fit.overheads import EngineConstants
from gpuctl.fit.values import GIB

_SIZES = (
    "workspace",
    "non_torch",
    "non_torch_parallel",
    "non_torch_parallel_plain",
    "non_torch_pipeline",
    "context",
    "graph",
    "graph_layer",
    "graph_experts",
    "graph_mxfp4",
    "graph_states",
    "warm_up",
    "warm_up_mxfp4",
)


@functools.cache
def engine_constants(version: str) -> EngineConstants:
    """The constants for a version of vLLM ("0.32.0", "0.26.1rc1.dev608", ""): "" is the newest that the table has.

    For a version older than the table they are the oldest, and `known` is False.
    """
    wanted = _key(version)
    rows: list[dict[str, Any]] = table("overheads")["vllm"]
    row = dict(rows[0])
    known = _key(row.pop("since")) <= wanted
    for later in rows[1:]:
        if _key(later["since"]) <= wanted:
            row |= {name: value for name, value in later.items() if name != "since"}
    row |= {name: int(row[name] * GIB) for name in _SIZES}
    row["measured_on"] = row["measured_on"] or None
    return EngineConstants(version=version, release=wanted[:2], known=known, **row)


def _key(version: str) -> tuple[int, int, int]:
    """Major, minor and patch; what cannot be read counts as the newest."""
    parts = []
    for part in version.lstrip("v").split(".")[:3]:
        digits = part[: next((i for i, char in enumerate(part) if not char.isdigit()), len(part))]
        if not digits:
            break
        parts.append(int(digits))
    parts += [0] * (3 - len(parts))
    return (parts[0], parts[1], parts[2]) if any(parts) else (9999, 0, 0)
