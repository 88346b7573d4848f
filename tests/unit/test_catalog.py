"""The catalogue is honest: every fact has a source, and the sources' own tables agree."""

from __future__ import annotations

import re

from gpuctl import catalog


def test_gpus() -> None:
    gpus = catalog.gpus()
    assert list(gpus) == [
        "T4", "L4", "A10", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000", "H100", "H200", "B200", "B200+",
    ]  # fmt: skip
    assert {gpu.max_count for name, gpu in gpus.items() if name != "A10"} == {8}
    assert gpus["A10"].max_count == 4
    for gpu in gpus.values():
        assert gpu.vram_gib > 0
        assert gpu.price_source
        assert re.fullmatch(r"2026-\d\d-\d\d", gpu.price_as_of)
        # Published per second; the hourly figures of Modal's page lie between a half and seven dollars.
        assert 0.5 < gpu.usd_per_second * 3600 < 7


def test_models() -> None:
    models = catalog.models()
    assert {
        "tiny",
        "llama3",
        "llama3-70b",
        "qwen3",
        "qwen3-0.6b",
        "qwen3-32b",
        "gpt-oss-20b",
        "mistral",
    } <= set(models)
    for model in models.values():
        assert model.licence
        assert model.source
        assert (model.repo is None) == (model.alias == "tiny")
        assert model.download_gib is not None
    assert models["llama3"].gated
    assert not models["qwen3"].gated


def test_a_stated_size_wins_over_parameters() -> None:
    assert catalog.models()["gpt-oss-20b"].download_gib == 25.63
    assert round(catalog.models()["qwen3"].download_gib or 0, 1) == 15.3


def test_both_builds_are_of_one_engine() -> None:
    engine = catalog.vllm()
    assert engine.version == "0.32.0"
    assert engine.cuda.base is not None
    assert "devel" in engine.cuda.base
    assert engine.cpu.base is None
    assert engine.cpu.index == "https://download.pytorch.org/whl/cpu"
    assert engine.cpu.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
