"""How caches are grouped: as vLLM 0.32's own code groups them (`tests/vllm_kv.py` made the golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuctl import catalog
from gpuctl.catalog.overheads import engine_constants
from gpuctl.fit import architecture, kv
from vllm_kv import BATCH, MEMORY, MODELS

GOLDEN: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("vllm-0.32-kv.json").read_text(encoding="utf-8")
)
CONFIGS = Path(catalog.__file__).parent / "configs"
CONSTANTS = engine_constants("0.32.0")


def test_the_golden_is_whole() -> None:
    assert {row["model"] for row in GOLDEN} == set(MODELS)
    assert len(GOLDEN) == len(MODELS) * 6


@pytest.mark.parametrize(
    "row", GOLDEN, ids=lambda row: f"{row['model']}-{row['tensor_parallel']}-{row['context']}"
)
def test_blocks_groups_and_tokens_are_those_of_vllm(row: dict[str, Any]) -> None:
    config = json.loads((CONFIGS / f"{row['model']}.json").read_text(encoding="utf-8"))
    read = architecture.read(config, what=row["model"])
    pool = kv.pool(read, row["tensor_parallel"], 1, kv.Format("auto", 2), BATCH, CONSTANTS)
    assert pool
    blocks = pool.blocks([MEMORY])
    ours = {
        "blocks": blocks,
        "groups": len(pool.groups),
        "block_bytes": pool.block_bytes[0],
        "request": pool.request(row["context"]),
        "tokens": pool.tokens(blocks, row["context"], by_concurrency=True),
    }
    assert ours == {name: row[name] for name in ours}


def test_windows_and_states_take_less_than_everything() -> None:
    everything, window, state = kv.Group(16), kv.Group(16, window=1024), kv.Group(0, states=2)
    assert everything.blocks(32_000, 8192) == 2000
    assert window.blocks(32_000, 8192) == (1023 + 8192 + 15) // 16 + 1
    assert window.blocks(32_000, 8192) == window.blocks(64_000, 8192)
    assert state.blocks(32_000, 8192) == state.blocks(1, 8192) == 2


def test_the_longest_request_leaves_the_engine_its_block() -> None:
    pool = kv.Pool((1000,), (kv.Group(16),), 8192)
    blocks = pool.blocks([100_500])
    assert blocks == 100
    assert pool.longest(blocks, 10**6) == 99 * 16
    assert pool.longest(blocks, 500) == 500
    assert pool.longest(1, 10**6) == 0


@pytest.mark.parametrize("name", kv.formats())
def test_every_format_of_the_cache_is_known(name: str) -> None:
    kept = kv.cache_format(name, 2)
    assert kept
    assert 0 < kept.bytes <= 4
    assert kv.cache_format("no-such", 2) is None
