"""The verdict in the way of a deployment: which GPUs are taken, which refused, and what is rendered."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gpuctl import catalog, configs
from gpuctl.__main__ import main
from gpuctl.configs import Found, of_ref
from gpuctl.errors import GpuctlError
from gpuctl.fit.values import Ask
from gpuctl.fitting import cards, every_choice, facts_of, judge_with, longest_of
from gpuctl.plan import Plan, plan_serve
from gpuctl.prices import from_catalogue
from gpuctl.specs.model import ModelRef
from gpuctl.specs.serve import ServeSpec
from gpuctl.target import Target

# The shapes of Llama 3.1 70B: 131 GiB of weights in 16 bits.
LARGE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def found_with(config: dict[str, Any], name: str = "acme/model") -> Found:
    return Found(name, name, None, config, None, None, None, "a test")


def plan(found: Found | None = None, argv: list[str] | None = None, **options: Any) -> Plan:
    spec = ServeSpec.from_options(**{"model": "acme/model" if found else "qwen3"} | options)
    words = argv or ["serve", spec.model.alias or spec.model.title]
    return plan_serve(spec, found or of_ref(spec.model, online=False), argv=words)


def refused(found: Found | None = None, argv: list[str] | None = None, **options: Any) -> GpuctlError:
    with pytest.raises(GpuctlError) as caught:
        plan(found, argv, **options)
    assert caught.value.exit_code == 2
    return caught.value


def rendered(made: Plan, name: str) -> str | None:
    match = re.search(rf"^{name} = (.*?)(?:  #.*)?$", made.source, re.M)
    return match[1] if match else None


def notes(made: Plan) -> str:
    return "\n".join(made.notes)


# -- auto


def test_auto_is_the_default_and_takes_the_cheapest_that_fits() -> None:
    made = plan()
    assert rendered(made, "GPU") == '"L40S"'
    assert rendered(made, "MAX_MODEL_LEN") == "40960"
    assert "--gpu auto: L40S, the cheapest that fits" in notes(made)
    assert (
        "# --gpu auto chose L40S: the cheapest that fits 32 requests of 4,096 tokens at once.\n"
        in made.source
    )
    assert made.source == plan(gpu="AUTO").source
    assert [str(choice) for choice in made.spec.gpu.choices] == ["L40S"] if made.spec.gpu else False
    assert rendered(plan(model="tiny"), "GPU") == '"T4"'


def test_auto_takes_as_many_as_it_must() -> None:
    made = plan(found_with(LARGE))
    gpu = rendered(made, "GPU")
    assert gpu is not None
    count = int(gpu.strip('"').partition(":")[2])
    assert count > 1
    assert rendered(made, "TENSOR_PARALLEL") == str(count)


def test_auto_asks_for_more_where_more_is_asked() -> None:
    def dollars(**options: Any) -> float:
        (choice,) = plan(**options).spec.gpu.choices  # type: ignore[union-attr]
        return choice.count * catalog.gpus()[choice.type].usd_per_second

    assert dollars() <= dollars(concurrency="128") < dollars(concurrency="128", max_model_len="40960")


def test_auto_stays_within_the_smallest_plan_that_will_do() -> None:
    def count(**options: Any) -> int:
        return plan(found_with(LARGE), **options).spec.gpu.choices[0].count  # type: ignore[union-attr]

    assert count(max_containers="5") * 5 <= 10
    assert count(max_containers="20") * 20 <= 50
    assert count(max_containers="100") >= 1  # no plan has so many: said, not refused


def test_auto_takes_what_max_hourly_cost_pays_for() -> None:
    made = plan(max_hourly_cost="1.8")
    assert made.cost is not None
    assert made.cost.dearest.most_usd <= 1.8
    assert "which --max-hourly-cost pays for; without it L40S" in notes(made)
    assert rendered(plan(max_hourly_cost="50"), "GPU") == '"L40S"'
    assert "--max-hourly-cost" in str(refused(max_hourly_cost="0.1"))


def test_auto_cannot_choose_for_what_is_not_known() -> None:
    error = refused(found_with({}))
    assert "--gpu auto: cannot choose for acme/model" in str(error)
    assert "--gpu H100" in (error.hint or "")
    error = refused(engine_args=["--speculative-config", "{}"])
    assert "--speculative-config" in str(error)


def test_auto_where_nothing_holds_it() -> None:
    error = refused(found_with({**LARGE, "num_hidden_layers": 4000}))
    assert "fits on no GPU of Modal" in str(error)


# -- named


def test_what_cannot_fit_is_refused_with_the_fix() -> None:
    error = refused(gpu="T4", argv=["serve", "qwen3", "--gpu", "T4", "--name", "qwen3", "--", "--seed", "1"])
    assert str(error).startswith("--gpu: qwen3 does not fit on T4: ")
    fix, _, said = (error.hint or "").partition("  # ")
    assert fix == "gpuctl serve qwen3 --gpu L40S --name qwen3 -- --seed 1"
    assert "fits: on L40S, $1.95 an hour" in said
    assert "--force deploys it as it is" in said


def test_the_fix_keeps_the_model_and_tells_what_is_cheaper() -> None:
    error = refused(model="qwen3-32b", gpu="L40S", argv=["serve", "qwen3-32b", "--gpu", "L40S"])
    fix, _, said = (error.hint or "").partition("  # ")
    assert fix.startswith("gpuctl serve qwen3-32b --gpu ")
    assert "cheaper: gpuctl serve qwen3-32b-fp8 --gpu " in said


def test_the_fix_works(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "qwen3-32b", "--gpu=L4:2", "--max-model-len", "40960", "--dry-run"]
    assert main(argv) == 2
    hint = capsys.readouterr().err.partition("hint: ")[2]
    program, *words = shlex.split(hint, comments=True)
    assert program == "gpuctl"
    assert "--dry-run" in words  # what was asked without paying is not answered by a command that pays
    assert main(words) == 0


def test_a_refusal_says_what_the_gpu_was_taken_for() -> None:
    assert "on any (assumed T4, the smallest GPU that Modal may give): " in str(refused(gpu="any"))
    assert "on T4: " in str(refused(gpu="T4"))
    made = plan(gpu="any", force=True)
    assert any("on any (assumed T4" in text for text in made.warnings)


def test_of_several_the_unfit_are_named_and_may_be_dropped() -> None:
    error = refused(gpu="T4,L40S,T4:2,H100", argv=["serve", "qwen3", "--gpu", "T4,L40S,T4:2,H100"])
    assert [line.partition(":")[0] for line in error.problems] == ["--gpu"] * len(error.problems)
    assert "does not fit on T4: " in error.problems[0]
    assert (error.hint or "").startswith("gpuctl serve qwen3 --gpu L40S,H100  #") or "T4:2" in (
        error.hint or ""
    )
    made = plan(gpu="T4,L40S,H100", drop_unfit=True)
    assert '"T4"' not in made.source
    assert [str(choice) for choice in made.spec.gpu.choices] == ["L40S", "H100"]  # type: ignore[union-attr]
    assert "--drop-unfit: without T4: " in notes(made)
    assert "does not fit on T4" in str(refused(gpu="T4", drop_unfit=True))


def test_force_overrides_and_says_so() -> None:
    made = plan(gpu="T4", force=True)
    assert rendered(made, "GPU") == '"T4"'
    assert rendered(made, "MAX_MODEL_LEN") is None
    assert any("--force: qwen3 does not fit on T4: " in text for text in made.warnings)
    assert plan(gpu="H100", force=True).warnings == ()


def test_the_context_is_the_shortest_of_the_longest() -> None:
    alone = int(rendered(plan(found_with(LARGE), gpu="A100-80GB:2"), "MAX_MODEL_LEN") or 0)
    assert 1000 < alone < 131072
    assert rendered(plan(found_with(LARGE), gpu="H200:4"), "MAX_MODEL_LEN") == "131072"
    assert rendered(plan(found_with(LARGE), gpu="H200:4,A100-80GB:2"), "MAX_MODEL_LEN") == str(alone)
    asked = plan(found_with(LARGE), gpu="A100-80GB:2", max_model_len=str(alone))
    assert asked.candidates[0].verdict != "no"
    assert f"--max-model-len {alone}, the longest that fits" in notes(
        plan(found_with(LARGE), gpu="A100-80GB:2")
    )


def test_what_was_assumed_is_said() -> None:
    assert "assumed an H100 with 80 GB" in notes(plan(gpu="H100"))
    assert "assumed an H100" not in notes(plan(gpu="H100!"))
    assert "assumed T4, the smallest GPU" in notes(plan(gpu="any", model="tiny"))


def test_fewer_at_once_than_asked_is_said_not_refused() -> None:
    made = plan(gpu="L40S", max_model_len="40960", concurrency="64")
    assert "tight: " in notes(made)
    assert made.candidates[0].verdict == "tight"


def test_what_is_not_known_is_said_not_refused() -> None:
    made = plan(found_with({}), gpu="H100")
    assert any("whether acme/model fits on H100 is not known" in text for text in made.warnings)
    assert "--max-model-len is left to the engine" in notes(made)
    assert rendered(made, "MAX_MODEL_LEN") is None


# -- the engine's own arguments


@pytest.mark.parametrize(
    ("args", "verdict"),
    [
        ([], "no"),
        (["--gpu-memory-utilization", "0.2"], "no"),
        (["--cpu-offload-gb", "8"], "unknown"),
        (["--hf-overrides", "{}"], "unknown"),
        (["--dtype", "int3"], "unknown"),
        (["--gpu-memory-utilization", "lots"], "unknown"),
        (["--kv-cache-dtype", "turboquant_k8v4"], "unknown"),
    ],
)
def test_arguments_that_tell_on_memory_are_read(args: list[str], verdict: str) -> None:
    made = plan(gpu="T4", force=True, engine_args=args)
    assert any(text.startswith("--force: ") for text in made.warnings) == (verdict == "no")
    assert any("is not known" in text for text in made.warnings) == (verdict == "unknown")
    assert rendered(made, "MAX_MODEL_LEN") is None


def test_a_smaller_share_holds_less() -> None:
    def tokens(*args: str) -> int:
        return plan(gpu="H100", engine_args=args).candidates[0].kv_cache_tokens or 0

    assert tokens() == tokens("--gpu-memory-utilization", "0.92") > tokens("--gpu-memory-utilization=0.5")
    assert tokens("--enforce-eager") >= tokens()


def test_stages_divide_the_gpus() -> None:
    made = plan(gpu="H100:4", engine_args=["--pipeline-parallel-size", "2"])
    assert rendered(made, "TENSOR_PARALLEL") == "2"
    assert "does not fit on H100:4" in str(refused(gpu="H100:4", engine_args=["-pp", "3"]))


def test_a_context_above_the_model_s_own_needs_a_word_to_the_engine() -> None:
    error = refused(gpu="H100", max_model_len="65536")
    assert "--max-model-len: 65,536 tokens are more than the 40,960" in str(error)
    for told in (
        {"env_var": ["VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"]},
        {"engine_args": ["--hf-overrides", '{"rope_scaling": {}}']},
        {"force": True},
    ):
        assert rendered(plan(gpu="H100", max_model_len="65536", **told), "MAX_MODEL_LEN") == "65536"


# -- this machine


def test_on_this_machine_the_context_is_what_its_cache_holds() -> None:
    made = plan(target=Target.LOCAL)
    assert rendered(made, "GPU") is None
    length = int(rendered(made, "MAX_MODEL_LEN") or 0)
    # 36 layers x 8 heads x 128 x 2 (keys and values) x 2 bytes for each token, in 1 GiB
    assert 0.8 * 2**30 < length * 36 * 8 * 128 * 2 * 2 < 2**30
    assert f"--max-model-len {length}: the KV cache of the build for CPUs" in notes(made)
    assert rendered(plan(target=Target.LOCAL, gpu="H100"), "MAX_MODEL_LEN") == str(length)
    assert rendered(plan(target=Target.LOCAL, model="tiny"), "MAX_MODEL_LEN") == "2048"
    assert rendered(plan(target=Target.LOCAL, max_model_len="512"), "MAX_MODEL_LEN") == "512"
    assert rendered(plan(target=Target.LOCAL, gpu="auto"), "GPU") == '"L40S"'
    assert "does not fit on T4" in str(refused(target=Target.LOCAL, gpu="T4"))


def test_tiny_is_known_as_it_is_made(tmp_path: Path) -> None:
    source = plan(model="tiny").source
    function = source[source.index("def make_tiny_model") :]
    scope: dict[str, Any] = {}
    exec("import json, pathlib, tempfile\n" + function, scope)
    made = json.loads((Path(scope["make_tiny_model"]()) / "config.json").read_text())
    assert configs._TINY.items() <= made.items()


@pytest.mark.parametrize("alias", ["llama3", "gpt-oss-20b", "deepseek-v3", "qwen3-30b-a3b", "gemma3-27b"])
def test_the_context_that_is_rendered_is_one_that_starts(alias: str) -> None:
    found = of_ref(ModelRef.parse(alias), online=False)
    facts, judge, known = facts_of(found), judge_with("0.32.0", found), cards(from_catalogue("a test"))
    for choice in every_choice(Ask()):
        card = known[choice.type]
        one = judge(facts, card, choice.count, Ask(concurrency=1))
        length = longest_of(one, facts.own_context)
        if one.verdict != "no":
            assert length
            assert judge(facts, card, choice.count, Ask(context=length)).verdict != "no", (choice, length)
