"""Pictures as a worker of `gpuctl batch` makes them, with a stand-in for the pipeline: which are made together, from
which noise, and what becomes of a row when something goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import pieces


class Image:
    """As Pillow's, as far as that is used."""

    def __init__(self, text: str, size: tuple[int, int]) -> None:
        self.text, self.size = text, size

    def save(self, file: Any, form: str) -> None:
        file.write(f"{form} {self.text}".encode())


class Tokenizer:
    model_max_length = 8

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.split())


class Pipeline:
    """Draws its arguments. What a prompt says is done: `oom`, `odd`, `bug`, `nsfw`, `lost`."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], dict[str, Any]]] = []
        self.room = 100  # pictures for which the memory does
        self.tokenizer = Tokenizer()

    def __call__(
        self,
        prompt: list[str],
        generator: list[Any],
        width: int = 64,
        height: int = 64,
        negative_prompt: list[str] | None = None,
        num_inference_steps: int = 5,
        guidance_scale: float = 7.5,
    ) -> SimpleNamespace:
        options = {"size": (width, height), "negative": negative_prompt, "steps": num_inference_steps}
        self.calls.append((prompt, options))
        if len(prompt) > self.room or "oom" in prompt:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if "lost" in prompt:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if "odd" in prompt:
            raise ValueError("`height` and `width` have to be divisible by 8")
        if "bug" in prompt:
            raise TypeError("'NoneType' object is not iterable")
        small = (width // 8 * 8, height // 8 * 8)
        images = [Image(f"{text} {seed}", small) for text, seed in zip(prompt, generator, strict=True)]
        return SimpleNamespace(images=images, nsfw_content_detected=["nsfw" in text for text in prompt])


Load = Callable[..., tuple[ModuleType, Any]]


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> Load:
    """Makes the processor, with a torch whose noise is its seed."""
    torch = ModuleType("torch")
    torch.Generator = lambda _: SimpleNamespace(manual_seed=lambda seed: seed)  # type: ignore[attr-defined]
    torch.cuda = SimpleNamespace(is_available=lambda: False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)

    def load(size: int, pipeline: Pipeline = pipeline) -> tuple[ModuleType, Any]:
        made = pieces.module("batch/diffusers.py.jinja", folder=tmp_path, constants={"BATCH_SIZE": size})
        made.load_pipeline = lambda: pipeline  # type: ignore[attr-defined]
        return made, made.DiffusersProcessor()

    return load


def run(module: ModuleType, processor: Any, *bodies: dict[str, Any]) -> list[Any]:
    """All rows through it, as the container's loop does it; what was refused at once is a Refused."""
    waiting = list(enumerate(bodies))
    flying, outcomes = 0, [None] * len(bodies)
    while waiting or flying:
        while waiting and flying < processor.capacity:
            key, body = waiting.pop(0)
            try:
                processor.start(key, {"row": key, "id": f"id-{key}", "body": {"prompt": "x", **body}})
                flying += 1
            except module.Refused as refused:
                outcomes[key] = refused
        for key, outcome in processor.step() if flying else ():
            outcomes[key] = outcome
            flying -= 1
    return outcomes


def texts(outcome: Any) -> list[str]:
    return [content.decode() for content in outcome.files.values()]


def test_a_row_becomes_files_and_an_answer_that_names_them(load: Load) -> None:
    module, processor = load(1)
    (one,) = run(module, processor, {"prompt": "a cat", "n": 2, "seed": 7, "size": "80x64"})
    assert one.files == {
        "pictures/000000/000000000-0.png": b"PNG a cat 7",
        "pictures/000000/000000000-1.png": b"PNG a cat 8",
    }
    assert one.answer["size"] == "80x64"
    assert one.answer["data"] == [
        {"file": "pictures/000000/000000000-0.png", "seed": 7},
        {"file": "pictures/000000/000000000-1.png", "seed": 8},
    ]


def test_without_a_seed_each_row_has_one_that_is_always_the_same(load: Load) -> None:
    first = [texts(outcome) for outcome in run(*load(1), {}, {}, {"n": 2})]
    assert first == [texts(outcome) for outcome in run(*load(3), {}, {}, {"n": 2})]
    assert len({text for row in first for text in row}) == 4


def test_what_a_call_has_once_is_not_mixed_and_each_call_is_filled(load: Load, pipeline: Pipeline) -> None:
    """Of a GPU, a picture is the same to the bit only where as many are made at once."""
    module, processor = load(3)
    rows = [{"prompt": f"{n}", "size": "64x64" if n % 2 else "128x64"} for n in range(8)]
    rows += [{"prompt": "plain"}, {"prompt": "less", "negative_prompt": "red"}, {"num_inference_steps": 2}]
    outcomes = run(module, processor, *rows)
    assert [outcome.answer["size"] for outcome in outcomes[:2]] == ["128x64", "64x64"]
    assert all(len(prompts) == 3 for prompts, _ in pipeline.calls)
    for prompts, options in pipeline.calls:
        kinds = {int(text) % 2 for text in prompts if text.isdigit()}
        assert len(kinds) <= 1
        assert options["negative"] in (None, ["red"] * 3)
    assert sum(len(set(prompts)) for prompts, _ in pipeline.calls) == 11, "none is made twice for a row"


def test_one_that_fails_takes_nobody_with_it(load: Load) -> None:
    module, processor = load(4)
    good, odd, bug, nsfw, more = run(
        module,
        processor,
        {"prompt": "good"},
        {"prompt": "odd"},
        {"prompt": "bug", "n": 2},
        {"prompt": "nsfw", "seed": 4},
        {"prompt": "more", "n": 3},
    )
    assert len(good.files) == 1
    assert len(more.files) == 3
    assert (odd.code, odd.retry) == ("invalid_request", False)
    assert (bug.code, bug.retry) == ("engine_error", True)
    assert "TypeError: 'NoneType'" in bug.message
    assert (nsfw.code, nsfw.retry) == ("content_policy_violation", False)
    assert nsfw.message == "the model's safety checker withheld picture 1 of 1 (seed 4)"
    assert not processor.rows


def test_fewer_at_once_where_the_memory_does_not_do(
    load: Load, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    module, processor = load(8)
    pipeline.room = 3
    outcomes = run(module, processor, *({"prompt": f"{n}"} for n in range(9)), {"prompt": "oom"})
    assert [len(outcome.files) for outcome in outcomes[:9]] == [1] * 9
    assert (outcomes[9].code, outcomes[9].retry) == ("out_of_memory", True)
    assert "out of memory: 2 pictures at once from now on" in capsys.readouterr().out


def test_a_gpu_that_is_lost_ends_the_container(load: Load) -> None:
    with pytest.raises(RuntimeError, match="illegal memory"):
        run(*load(2), {"prompt": "lost"})


def test_a_size_that_the_model_makes_another_of_is_an_error(load: Load) -> None:
    (one,) = run(*load(1), {"size": "70x64"})
    assert one.message == "size: 70x64 was asked, and the model makes 64x64 of it"


def test_what_the_pipeline_would_pass_over_is_refused(load: Load, pipeline: Pipeline) -> None:
    module, processor = load(1)
    scale, long = run(module, processor, {"true_cfg_scale": 4.0}, {"prompt": "word " * 9})
    assert scale.message == "true_cfg_scale: Pipeline takes none"
    assert (long.code, long.message) == (
        "context_length_exceeded",
        "prompt has 9 tokens, and the model reads 8",
    )
    assert not pipeline.calls


class OfTwoScales(Pipeline):
    """Has one for its own guidance, and one that only a negative prompt has."""

    transformer = SimpleNamespace(config={"guidance_embeds": False})

    def __call__(  # type: ignore[override]
        self,
        prompt: list[str],
        generator: list[Any],
        negative_prompt: list[str] | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float = 4.0,
        **options: Any,
    ) -> SimpleNamespace:
        return super().__call__(prompt, generator, negative_prompt=negative_prompt)


def test_a_scale_without_effect_is_refused(load: Load) -> None:
    module, processor = load(1, OfTwoScales())
    alone, off, own, *fine = run(
        module,
        processor,
        {"true_cfg_scale": 4.0},
        {"true_cfg_scale": 1.0, "negative_prompt": "red"},
        {"guidance_scale": 7.5, "negative_prompt": "red"},
        {"negative_prompt": "red"},
        {"true_cfg_scale": 2.5, "negative_prompt": " "},
        {"true_cfg_scale": 1.0},
        {},
    )
    assert alone.message == 'true_cfg_scale: OfTwoScales needs a negative_prompt with it, which may be " "'
    assert off.message == "negative_prompt: OfTwoScales needs a true_cfg_scale above 1 with it"
    assert own.message.startswith("guidance_scale: this model is not guided by it, but by true_cfg_scale")
    assert [len(one.files) for one in fine] == [1, 1, 1, 1]


def test_with_several_text_encoders_the_one_that_reads_most_counts(load: Load, pipeline: Pipeline) -> None:
    longer = Tokenizer()
    longer.model_max_length = 20
    pipeline.tokenizer_2 = longer  # type: ignore[attr-defined]
    fine, long = run(*load(1), {"prompt": "word " * 9}, {"prompt": "word " * 21})
    assert len(fine.files) == 1
    assert long.message == "prompt has 21 tokens, and the model reads 20"
