"""The targets of `benchmarks/fit_accuracy.py`, held on published measurements of vLLM."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fit_accuracy.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_accuracy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_accuracy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scores(benchmark: ModuleType) -> list[Any]:
    rows, _ = benchmark.load()
    scored: list[Any] = benchmark.ours(rows)
    return scored


def test_all_targets_are_met(benchmark: ModuleType, scores: list[Any]) -> None:
    assert benchmark.missed(scores) == []


def test_enough_is_scored(benchmark: ModuleType, scores: list[Any]) -> None:
    rows, skipped = benchmark.load()
    assert len(rows) + len(skipped) == 85, "every row of the table is scored, or named with a reason"
    assert all(why for _, _, why in skipped)
    assert len(benchmark.errors(scores, "weights")) >= 50
    assert len(benchmark.errors(scores, "kv")) >= 50
    assert sum(score.row.outcome != "ok" for score in scores) >= 6


def test_weights_are_those_that_vllm_prints(benchmark: ModuleType, scores: list[Any]) -> None:
    """Half of the rows to the last digit that is printed, which is a hundredth of a GiB."""
    exact = [s for s in scores if s.error("weights") is not None]
    near = [s for s in exact if abs(s.said["weights"] - s.row.truth["weights"]) < 0.0101]
    assert len(near) > len(exact) / 2
    assert statistics.median(benchmark.errors(scores, "weights")) < 0.02


def test_a_target_that_is_missed_is_said(benchmark: ModuleType, scores: list[Any]) -> None:
    bent = benchmark.Score(scores[0].row, "dense", {**scores[0].said, "kv": 200 * scores[0].said["kv"]})
    found = benchmark.missed([bent, *scores[1:]])
    assert any("KV GiB, dense" in line for line in found), found
    oom = next(score for score in scores if score.row.outcome.startswith("oom"))
    flattering = benchmark.Score(oom.row, oom.family, oom.said, benchmark.Verdict.FITS)
    assert any("plain 'fits'" in line for line in benchmark.missed([*scores, flattering]))
