"""The catalogue is honest: every fact has a source, and the sources' own tables agree."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path

import pytest

from gpuctl import catalog
from gpuctl.catalog import tables
from gpuctl.catalog.clouds import cloud_prices
from gpuctl.catalog.configs import config_of
from gpuctl.catalog.repository import is_repository


def test_the_local_plane_answers_with_the_catalogue_s_prices() -> None:
    path = Path(tables.__file__).parents[1] / "local" / "rates.json"
    assert path.read_text(encoding="utf-8") == tables.local_rates(), "run: python -m gpuctl.catalog"
    rates = json.loads(path.read_text(encoding="utf-8"))["rates"]
    assert rates["gpu_hour_cost_t4"] == "0.5904"  # 0.000164 a second
    assert rates["cpu_hour_cost"] == "0.0473"


@pytest.mark.parametrize("name", tables.NAMES)
def test_what_is_read_is_what_is_written(name: str) -> None:
    path = Path(tables.__file__).parent / "compiled" / f"{name}.json"
    assert path.read_text(encoding="utf-8") == tables.compiled(name), "run: python -m gpuctl.catalog"


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


def test_what_the_gpus_can_do() -> None:
    gpus = catalog.gpus()
    for gpu in gpus.values():
        # CUDA shows less than the label, which is in units of 1e9 bytes for some cards and of 2**30 for others.
        assert gpu.visible_gib is not None
        assert 0.9 * gpu.vram_gib < gpu.visible_gib < gpu.vram_gib
        assert set(gpu.tflops) <= {"bf16", "fp16", "fp8", "fp4"}
        # Tensor cores double their throughput with each halving of the format, when nothing sparse is counted.
        sixteen = gpu.tflops.get("bf16") or gpu.tflops["fp16"]
        for form, times in (("fp8", 2), ("fp4", 4)):
            if form in gpu.tflops:
                assert gpu.tflops[form] == pytest.approx(times * sixteen, rel=0.02)
        # fp8 came with Ada (8.9), fp4 with Blackwell (10.0), bf16 with Ampere (8.0).
        assert gpu.compute_capability is not None
        assert ("bf16" in gpu.tflops) == (gpu.compute_capability >= (8, 0))
        assert ("fp8" in gpu.tflops) == (gpu.compute_capability >= (8, 9))
        assert ("fp4" in gpu.tflops) == (gpu.compute_capability >= (10, 0))
        assert set(gpu.sources) == {"visible_gib", "bandwidth_gb_s", "tflops", "compute_capability"}
        assert all(re.fullmatch(r"202\d-\d\d-\d\d", source.as_of) for source in gpu.sources.values())
        assert gpu.best_for
    assert gpus["H100"].bandwidth_gb_s == 3350
    assert gpus["B200+"].visible_gib == gpus["B200"].visible_gib
    assert gpus["A10"].max_vram_gib == 96


def test_other_clouds() -> None:
    prices = cloud_prices()
    assert len({(price.cloud, price.gpu) for price in prices}) == len(prices)
    for price in prices:
        assert price.gpu in catalog.gpus()
        assert 0.1 < price.usd_per_hour < 20
        assert price.source.where.startswith("https://")


def test_models() -> None:
    models = catalog.builtin_models()
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
    assert next(iter(models)) == "tiny"
    for kind, least in (
        ("llm", 60),
        ("vision", 40),
        ("embedding", 8),
        ("reranker", 5),
        ("speech", 6),
        ("image", 8),
    ):
        assert sum(model.kind == kind for model in models.values()) >= least
    every = [name for model in models.values() for name in (model.alias, *model.also)]
    assert len(set(every)) == len(every), "a name stands for two models"
    repos = [model.repo for model in models.values()]
    assert len(set(repos)) == len(repos), "two models are the same"
    for model in models.values():
        assert (model.repo is None) == (model.alias == "tiny")
        assert model.repo is None or is_repository(model.repo)
        assert model.kind in catalog.KINDS
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", model.alias)
    assert models["llama3"].gated
    assert models["qwen3"].gated is False
    assert models["whisper"].gated is None, "what no source says is not known"


FACTS = (
    "licence", "gated", "parameters_b", "active_b", "context", "dtype", "weights_gib", "engine", "engine_since",
    "tool_parser", "reasoning_parser",
)  # fmt: skip


@pytest.mark.parametrize("model", catalog.builtin_models().values(), ids=lambda model: model.alias)
def test_each_fact_of_a_model_has_a_source(model: catalog.Model) -> None:
    sources = model.sources
    assert set(sources) == {fact for fact in FACTS if getattr(model, fact) is not None}
    for source in sources.values():
        assert "{" not in source.where
        assert "None" not in source.where
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", source.as_of)
    if model.active_b is not None and model.parameters_b is not None:
        assert model.active_b < model.parameters_b
    assert model.context is None or 64 <= model.context <= 2**24
    assert (model.tool_parser is None and model.reasoning_parser is None) or model.chats
    assert model.source in {source.where for source in sources.values()}


@pytest.mark.parametrize(
    "model",
    [m for m in catalog.builtin_models().values() if m.repo and config_of(m.repo)],
    ids=lambda m: m.alias,
)
def test_a_model_s_config_agrees_with_what_the_catalogue_says(model: catalog.Model) -> None:
    assert model.repo is not None
    config = config_of(model.repo)
    assert config is not None
    text = config.get("text_config", config)
    assert model.context == text.get("max_position_embeddings", config.get("max_position_embeddings"))
    quantised = "quantization_config" in config or "quantization_config" in text
    assert quantised == (model.dtype not in ("bfloat16", "float16", "float32"))


def test_a_config_that_stands_in_says_what_differs() -> None:
    known = catalog.named("qwen3-235b-a22b-2507")
    assert known is not None
    assert known.repo is not None
    ours, theirs = config_of(known.repo), config_of("Qwen/Qwen3-235B-A22B")
    assert ours is not None
    assert theirs is not None
    assert {key for key in ours if ours[key] != theirs[key]} == {"max_position_embeddings"}
    without = config_of("Qwen/Qwen3.6-27B")
    assert without is not None
    assert "quantization_config" not in without
    assert config_of("nobody/nothing") is None


def test_other_names() -> None:
    for name in ("llama3.1", "llama3-8b", "llama3"):
        known = catalog.named(name)
        assert known is not None
        assert known.repo == "meta-llama/Llama-3.1-8B-Instruct"
    assert catalog.named("nobody") is None


def test_a_stated_size_wins_over_parameters() -> None:
    assert catalog.models()["gpt-oss-20b"].download_gib == 25.63
    assert round(catalog.models()["qwen3"].download_gib or 0, 1) == 15.3
    # Where no size is stated, the format in which the weights are published counts.
    assert round(catalog.models()["qwen3-32b-fp8"].download_gib or 0, 1) == 29.8
    assert round(catalog.models()["glm-5.2-nvfp4"].download_gib or 0, 0) == 389
    assert catalog.models()["sdxl"].download_gib is None


def test_both_builds_are_of_one_engine() -> None:
    engine = catalog.vllm()
    assert engine.version == "0.32.0"
    assert engine.cuda.base is not None
    assert "devel" in engine.cuda.base
    assert engine.cpu.base is None
    assert engine.cpu.index == "https://download.pytorch.org/whl/cpu"
    assert engine.cpu.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


CONFIGS = sorted((Path(tables.__file__).parent / "configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_of_a_repository_and_has_its_shape(path: Path) -> None:
    org, name = path.stem.split("--")
    assert org
    assert name
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    assert config["model_type"]
    assert text["hidden_size"] > 0
    assert text["vocab_size"] > 0


def test_the_notice_names_where_each_config_is_from() -> None:
    notice = (CONFIGS[0].parent / "NOTICE.md").read_text(encoding="utf-8")
    patterns = re.findall(r"`([^`\s]+--[^`\s]+)`", notice)
    for pattern in patterns:
        assert [path for path in CONFIGS if fnmatch.fnmatch(path.stem, pattern)], (
            f"no file is called {pattern}"
        )
