"""What a sample says of all rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuctl.batch.sampling import CONFIDENCE, LONGEST, ROWS, Range, Sample, total

Rows = list[tuple[int, float]]  # bytes and tokens


def drawn(rows: Rows, file: Path, *, seed: int = 1, most: int = ROWS, longest: int = LONGEST) -> Sample:
    sample = Sample(file, rows=most, longest=longest, seed=seed)
    for size, tokens in rows:
        sample.see(size, repr(tokens).encode)
    return sample


def estimated(sample: Sample) -> Range:
    return total(
        [float(one.kept) for one in sample.longest],
        [(one.size, float(one.kept)) for one in sample.rest(10**12)],
        rest_rows=sample.rest_rows,
        rest_bytes=sample.rest_bytes,
        most=float(sample.rest_bytes + 50 * sample.rest_rows),
    )


def prose(dice: random.Random) -> tuple[int, float]:
    size = int(dice.lognormvariate(6, 1))
    return size, size * dice.uniform(0.2, 0.3) + 12


def two_languages(dice: random.Random) -> tuple[int, float]:
    size = int(dice.lognormvariate(5, 1))
    return size, size * (0.9 if dice.random() < 0.02 else 0.22)


def figures_now_and_then(dice: random.Random) -> tuple[int, float]:
    size = int(dice.lognormvariate(4, 2))
    return size, size * (1.0 if dice.random() < 0.002 else 0.25)


def heavy_tail(dice: random.Random) -> tuple[int, float]:
    size = int(min(1e6, 10 * dice.paretovariate(1.1)))
    return size, size * dice.uniform(0.1, 1.0)


def unlike_its_length(dice: random.Random) -> tuple[int, float]:
    size = int(dice.expovariate(0.01))
    return size, min(float(size), dice.paretovariate(2.5))


@pytest.mark.parametrize(
    "shape",
    [prose, two_languages, figures_now_and_then, heavy_tail, unlike_its_length],
    ids=lambda f: f.__name__,
)
def test_the_range_holds_the_total_as_often_as_it_says(
    shape: Callable[[random.Random], tuple[int, float]], tmp_path: Path
) -> None:
    """Of 60 inputs of 3,000 rows, each with its own sample of 1,000."""
    held, widths = 0, []
    for trial in range(60):
        dice = random.Random(trial)
        rows = [shape(dice) for _ in range(3000)]
        sample = drawn(rows, tmp_path / "sample", seed=trial)
        found, right = estimated(sample), sum(tokens for _, tokens in rows)
        sample.close()
        held += found.low <= right <= found.high
        widths.append((found.high - found.low) / right)
    assert held >= 60 * CONFIDENCE
    if shape is prose:
        assert max(widths) < 0.05, "and is narrow enough to be of use"


@given(
    rows=st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 1)), min_size=1, max_size=60),
    most=st.integers(6, 30),
    longest=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_what_is_drawn_is_of_the_rows_and_each_once(
    rows: list[tuple[int, float]],
    most: int,
    longest: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    named = [(size, float(n)) for n, (size, _) in enumerate(rows)]
    sample = drawn(named, tmp_path_factory.mktemp("sample") / "file", seed=seed, most=most, longest=longest)
    top = [(one.size, float(one.kept)) for one in sample.longest]
    rest = [(one.size, float(one.kept)) for one in sample.rest(10**12)]
    assert len(top) + len(rest) == min(most, len(rows))
    assert not Counter(top + rest) - Counter(named)
    assert (
        sorted((size for size, _ in top), reverse=True)
        == sorted((s for s, _ in named), reverse=True)[: len(top)]
    )
    assert (sample.rows, sample.bytes) == (len(rows), sum(size for size, _ in named))
    assert sample.rest_rows == len(rows) - len(top)
    assert sample.rest_bytes == sum(s for s, _ in named) - sum(size for size, _ in top)
    sample.close()


def test_every_row_that_was_counted_is_exact(tmp_path: Path) -> None:
    rows = [(n, n / 4) for n in range(900)]
    right = sum(tokens for _, tokens in rows)
    assert estimated(drawn(rows, tmp_path / "sample")) == Range(right, right, right)


def test_every_row_has_the_same_chance(tmp_path: Path) -> None:
    """The first and the last as those between, also where ever longer rows push out those that were longest."""
    hits: Counter[int] = Counter()
    for seed in range(400):
        sample = drawn(
            [(n, float(n)) for n in range(200)], tmp_path / "sample", seed=seed, most=30, longest=10
        )
        hits.update(int(float(one.kept)) for one in sample.rest(10**12))
        sample.close()
    tenths = [sum(hits[n] for n in range(start, start + 19)) for start in range(0, 190, 19)]
    expected = 400 * 20 / 10
    assert all(0.85 * expected < count < 1.15 * expected for count in tenths), tenths
    assert not any(hits[n] for n in range(190, 200)), "the longest are no part of the sample of the rest"


def test_the_file_stays_small_when_every_row_is_longer_than_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuctl.batch.sampling._GARBAGE", 10_000)
    sample = Sample(tmp_path / "sample")
    for n in range(20_000):
        sample.see(n, lambda n=n: f"{n:>100}".encode())  # type: ignore[misc]
    assert (tmp_path / "sample").stat().st_size < 20 * 1000 * 100
    assert [int(one.kept) for one in sample.longest] == list(range(19_999, 19_949, -1))
    assert all(int(one.kept) == one.size for one in sample.rest(10**12))


def test_the_same_rows_have_the_same_sample(tmp_path: Path) -> None:
    rows = [(n % 977, float(n)) for n in range(20_000)]
    one, two = (Sample(tmp_path / name) for name in "ab")
    for sample in (one, two):
        for size, tokens in rows:
            sample.see(size, repr(tokens).encode)
    assert [row.kept for row in one.rest(10**12)] == [row.kept for row in two.rest(10**12)]
