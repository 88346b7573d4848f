"""What is told of a job before it starts: tokens, time and cost, and what they rest on."""

from __future__ import annotations

import csv
import dataclasses
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gpuctl.batch.errors import Errors
from gpuctl.batch.estimate import (
    BEST,
    LEAST,
    Machine,
    Measured,
    Speed,
    Tokens,
    money,
    short,
    span,
    spans,
    times,
)
from gpuctl.batch.jobs import Job
from gpuctl.batch.rows import Problem, Url
from gpuctl.batch.sampling import Range
from gpuctl.batch.tally import Tally
from gpuctl.batch.tastes import taste_of
from gpuctl.configs import of_ref
from gpuctl.prices import from_catalogue
from gpuctl.specs.gpu import GpuChoice
from gpuctl.specs.model import ModelRef
from gpuctl.specs.serve import ServeSpec
from gpuctl.verdicts import speed_on

PUBLISHED = list(
    csv.DictReader(
        (Path(__file__).parents[2] / "benchmarks/data/batch_throughput.csv").open(encoding="utf-8")
    )
)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["what"].split(",")[0])
def test_what_was_published_is_between_the_two_shares_of_the_roofline(row: dict[str, str]) -> None:
    count = int(row["count"])
    spec = ServeSpec.from_options(model=row["shapes_of"], gpu=f"{row['gpu']}:{count}")
    found = of_ref(ModelRef.parse(row["shapes_of"]), online=False)
    found = dataclasses.replace(
        found, config={**found.config, **json.loads(row["config"])}, weight_bytes=None, parameters=None
    )
    mean_in, mean_out = int(row["mean_in"]), int(row["mean_out"])
    best = speed_on(
        spec,
        found,
        from_catalogue("a test"),
        GpuChoice(row["gpu"], count),
        context=mean_in + mean_out,
        requests=int(row["rows"]),
    )
    assert best.prefill_tokens_per_s
    speed = Speed(best.prefill_tokens_per_s, best.decode_tokens_per_s if mean_out else None)
    share = speed.seconds(float(row["tokens_in_per_s"]), float(row["tokens_out_per_s"]))
    assert LEAST < share < BEST


def tokens(low: float, high: float, out: tuple[int, int | None], **more: Any) -> Tokens:
    return Tokens(100, 100, Range(low, (low + high) / 2, high), 0, *out, capped=True, **more)


L40S = Machine("L40S", Speed(20_000, 4000), Speed(20_000, 2000), 15.0, (Decimal(2), Decimal(3)))


def test_time_and_cost_are_from_the_best_to_the_worst() -> None:
    found = spans(tokens(1e6, 2e6, (100, 400_000)), [L40S], 4, timeout=3600)
    assert found is not None
    assert found.usd is not None
    least = (1e6 / 20_000 + 100 / 4000) / BEST
    most = (2e6 / 20_000 + 400_000 / 2000) / LEAST * 9 / 8
    assert found.seconds == pytest.approx((47.5 + least / 4, 480 + most / 4))
    assert found.container_seconds == pytest.approx((47.5 + least, 4 * 480 + most))
    assert found.usd == pytest.approx(
        (found.container_seconds[0] * 2 / 3600, found.container_seconds[1] * 3 / 3600)
    )


def test_no_end_is_no_time() -> None:
    assert spans(tokens(1e6, 1e6, (100, None)), [L40S], 1, timeout=600) is None
    assert spans(tokens(1e6, 1e6, (100, 200)), [], 1, timeout=600) is None


def test_of_several_gpus_the_range_has_all() -> None:
    slow = dataclasses.replace(
        L40S, fast=Speed(2000, 400), slow=Speed(2000, 200), usd_per_hour=(Decimal("0.5"), Decimal("0.5"))
    )
    work = tokens(1e6, 1e6, (100, 10_000))
    both = spans(work, [L40S, slow], 1, timeout=600)
    each = [spans(work, [one], 1, timeout=600) for one in (L40S, slow)]
    assert both is not None
    assert all(one is not None for one in each)
    assert both.seconds == (each[0].seconds[0], each[1].seconds[1])  # type: ignore[union-attr]


def test_a_start_takes_no_longer_than_it_may() -> None:
    short_start = spans(tokens(1, 1, (1, 1)), [L40S], 1, timeout=60)
    assert short_start is not None
    assert short_start.seconds[1] < 61


def test_what_is_kept_of_a_shared_beginning_is_not_read_again() -> None:
    work = tokens(1e6, 1e6, (100, 100))
    again = dataclasses.replace(work, shared=900_000)
    one, two = (spans(what, [L40S], 1, timeout=600) for what in (work, again))
    assert one is not None
    assert two is not None
    assert two.seconds[0] < one.seconds[0]
    assert two.seconds[1] == one.seconds[1], "it may not be kept"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (45_678, "45.7 k"),
        (1_234_567, "1.23 M"),
        (6.1e9, "6.1 G"),
        (2.5e12, "2.5 T"),
    ],
)
def test_numbers_are_short(number: float, said: str) -> None:
    assert short(number) == said


def test_ranges_are_said_once_where_both_ends_read_the_same() -> None:
    assert span(1_200_000, 1_300_000) == "1.2 to 1.3 M"
    assert span(5_000, 6_400_000) == "5,000 to 6.4 M"
    assert span(7, 7) == "7"
    assert times(30, 3600) == "30 s to 60 min"
    assert times(0, 90) == "up to 90 s"
    assert money(3.1, 9.8) == "$3.10 to $9.80"
    assert money(0, 2) == "up to $2.00"


# -- what requests say


def seen(*rows: tuple[Url, dict[str, Any]], context: int | None = 1000) -> Tally:
    tally = Tally(context)
    for url, body in rows:
        tally.see(url, body)
    return tally


def chat(content: Any, **more: Any) -> tuple[Url, dict[str, Any]]:
    return Url.CHAT, {"messages": [{"role": "user", "content": content}], **more}


def test_answers_are_capped_as_the_engine_caps_them() -> None:
    tally = seen(
        chat("hi", max_tokens=10),
        chat("hi", max_tokens=10, max_completion_tokens=20, n=3),
        chat("hi", max_tokens=5000),
        (Url.COMPLETIONS, {"prompt": ["a", "b"]}),
        (Url.COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 7}),
    )
    assert tally.capped_out == 10 + 3 * 20 + 1000 + 2 * 16 + 7
    assert tally.least_out == 1 + 3 + 1 + 2 + 1
    assert tally.open_answers == 0
    assert seen(chat("hi"), chat("hi", n=2)).open_answers == 3
    assert seen(chat("hi", max_tokens=True)).open_answers == 1, "no number"


def test_text_is_counted_in_bytes_and_what_is_none_is_named() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    tally = seen(
        chat("héllo"),
        chat([{"type": "text", "text": "ab"}, picture, picture]),
        (Url.EMBEDDINGS, {"input": ["日本", "x"]}),
        (Url.TRANSCRIPTIONS, {"file": "a.mp3"}),
    )
    assert tally.bytes == 6 + 2 + 7
    assert tally.media == {"pictures": 2, "recordings": 1}
    assert tally.least_out == 2, "embeddings and transcriptions write no tokens that are known"


# -- tastes


def job(rows: int, *argv: str, name: str = "whole", **more: Any) -> Job:
    document = {
        "name": name, "work": "w.py:f", "url": "function", "rows": rows, "bad": 0, "copies": 0, "shards": 1,
        "digest": "", "inputs": ("in.jsonl",), "output": "o", "errors": None, "format": "openai", "columns": (),
        "gpu": None, "argv": ("batch", "w.py:f", "in.jsonl", *argv), "created_at": "", "gpuctl_version": "",
    }  # fmt: skip
    return Job(**{**document, **more})


END = {
    "state": "done", "done": 99, "failed": 1, "container_seconds": 30.0, "working_seconds": 20.0,
    "containers_started": 2, "busy_seconds": 10.0, "busy_rows": 80,
}  # fmt: skip


def test_a_taste_of_the_same_work_is_found() -> None:
    whole = job(5000, "-o", "all.jsonl", "--max-containers", "8")
    taste = job(100, "-o", "taste.jsonl", "--limit", "100", "--yes", name="taste")
    assert taste_of(whole, [(taste, END)]) == Measured("taste", 100, 5.0, 20.0, (10.0, 80))
    for other in (
        job(100, "-o", "t", "--limit", "100", "--concurrency", "9"),
        job(100, "--limit", "100", work="w.py:g"),
        job(100, "--limit", "100", gpu="L4"),
        job(100, "--limit", "100", inputs=("other.jsonl",)),
        job(5000),
    ):
        assert taste_of(whole, [(other, END)]) is None
    for end in ({**END, "state": "stopped"}, {"state": "done"}, {**END, "containers_started": 0}):
        assert taste_of(whole, [(taste, end)]) is None
    larger = job(1000, "--limit=1000", name="larger")
    found = taste_of(whole, [(taste, END), (larger, {**END, "done": 999})])
    assert found is not None
    assert found.job == "larger"


def test_a_taste_tells_at_most_and_where_it_was_busy_at_least() -> None:
    taste = Measured("taste", 100, 5.0, 20.0, (10.0, 80))
    found = taste.expected(1000, 2, Decimal(36))
    assert found.seconds == (5 + 125 / 2, 5 + 200 / 2)
    assert found.container_seconds == (125 + 5, 200 + 10)
    assert found.usd == pytest.approx((1.30, 2.10))
    idle = dataclasses.replace(taste, busy=(1.0, 3)).expected(1000, 2, None)
    assert (idle.seconds, idle.usd) == ((5.0, 105.0), None)


# -- afterwards


def test_errors_that_say_the_same_are_one_kind() -> None:
    errors = Errors()
    for n in range(50):
        errors.add(Problem("exception", f"ValueError: {n} is not liked (tried {n % 3} times)"))
    errors.add(Problem("invalid_json", "a.jsonl:7: not JSON"))
    for n in range(3):
        errors.add(Problem("context", f"row 'id-{n}' has 1,{n}00 tokens"))
    assert errors.commonest(5) == [
        ("exception: ValueError: 0 is not liked (tried 0 times)", 50),
        ("context: row 'id-0' has 1,000 tokens", 3),
        ("invalid_json: a.jsonl:7: not JSON", 1),
    ]
    assert len(errors.commonest(2)) == 2


def test_errors_that_come_again_and_again_are_told_apart() -> None:
    errors = Errors()
    for n in range(60):
        errors.add(Problem("exception", f"KeyError: {['text', 'title', 'text'][n % 3]!r}"))
    for n in range(300):
        errors.add(Problem("context", f"{n} tokens"))  # more than are counted one by one
    errors.add(Problem("context", "0 tokens"))
    assert errors.commonest(5) == [
        ("context: 0 tokens", 301),
        ("exception: KeyError: 'text'", 40),
        ("exception: KeyError: 'title'", 20),
    ]
