"""The grammar of --gpu, as its user meets it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuctl import catalog
from gpuctl.errors import GpuctlError
from gpuctl.specs.gpu import GpuChoice, GpuRequest


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("H100", [GpuChoice("H100")]),
        ("h100:2", [GpuChoice("H100", 2)]),
        ("H100!", [GpuChoice("H100", 1, True)]),
        ("h100!:8", [GpuChoice("H100", 8, True)]),
        ("A100-80GB:4", [GpuChoice("A100-80GB", 4)]),
        ("H100,A100-80GB:2", [GpuChoice("H100"), GpuChoice("A100-80GB", 2)]),
        ("a10g:4", [GpuChoice("A10", 4)]),
        ("rtx-pro-6000", [GpuChoice("RTX-PRO-6000")]),
        ("b200+:8", [GpuChoice("B200+", 8)]),
        ("Any", [GpuChoice("any")]),
    ],
)
def test_reads(text: str, choices: list[GpuChoice]) -> None:
    assert list(GpuRequest.parse(text).choices) == choices


@pytest.mark.parametrize(
    "name", ["T4", "L4", "A10", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000"]
)
@pytest.mark.parametrize("spell", [str.lower, str.upper])
def test_any_case(name: str, spell: object) -> None:
    assert str(GpuRequest.parse(spell(name))) == name  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("H1000", "did you mean H100"),
        ("A100-8GB", "A100-80GB"),
        ("potato", "known types: T4"),
        ("B300", "use B200+"),
        ("b300:2", "use B200+"),
        ("H100:0", "from 1 to 8"),
        ("H100:-1", "from 1 to 8"),
        ("H100:two", "from 1 to 8"),
        ("H100:", "from 1 to 8"),
        ("H100:٢", "from 1 to 8"),
        ("H100:9", "at most 8"),
        ("A10:5", "at most 4"),
        ("A10G:8", "at most 4"),
        ("H100,", "empty entry"),
        (",H100", "empty entry"),
        ("H100,,L4", "empty entry"),
        ("", "no GPU given"),
        ("  ", "no GPU given"),
        ("H100,h100", "twice"),
        ("T4!", "only as H100!"),
        ("any:2", "neither a count"),
    ],
)
def test_refuses_in_one_line(text: str, says: str) -> None:
    with pytest.raises(GpuctlError) as caught:
        GpuRequest.parse(text)
    assert caught.value.exit_code == 2
    (problem,) = caught.value.problems
    assert problem.startswith("--gpu: ")
    assert says in problem


def test_all_problems_at_once() -> None:
    with pytest.raises(GpuctlError) as caught:
        GpuRequest.parse("H1000,L4:9,T4")
    assert len(caught.value.problems) == 2


def test_any_warns() -> None:
    assert GpuRequest.parse("any").warnings
    assert not GpuRequest.parse("H100").warnings


@pytest.mark.parametrize(
    ("text", "tensor_parallel"), [("H100", 1), ("H100:2", 2), ("H100:2,B200:2", 2), ("H100:2,B200", None)]
)
def test_tensor_parallel(text: str, tensor_parallel: int | None) -> None:
    assert GpuRequest.parse(text).tensor_parallel == tensor_parallel


valid = st.lists(
    st.sampled_from(list(catalog.gpus().values())).flatmap(
        lambda gpu: st.builds(
            GpuChoice,
            st.just(gpu.name),
            st.integers(1, gpu.max_count),
            st.booleans() if gpu.exact else st.just(False),
        )
    ),
    min_size=1,
    max_size=5,
    unique=True,
)


@given(valid)
def test_round_trip(choices: list[GpuChoice]) -> None:
    text = ",".join(map(str, choices))
    parsed = GpuRequest.parse(text)
    assert list(parsed.choices) == choices
    assert GpuRequest.parse(str(parsed)) == parsed
    assert GpuRequest.parse(text.swapcase()) == parsed


@given(st.text() | st.text("HAhatL1024:!,+-BG anyS", max_size=20))
def test_arbitrary_text_raises_nothing_else(text: str) -> None:
    problems: tuple[str, ...] = ()
    try:
        GpuRequest.parse(text)
    except GpuctlError as error:
        problems = error.problems
    assert all(line.startswith("--gpu: ") and "\n" not in line for line in problems)
