"""The line that says how far a job is, and what it waits for."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from gpuctl.batch.follow import Progress
from gpuctl.cli.console import Console

STATUS = {
    "state": "running", "time": 0.0, "rows": 10, "done": 0, "failed": 0, "tokens_in": 0, "tokens_out": 0,
    "containers": 0, "containers_loading": 0, "usd": None,
}  # fmt: skip


def said(**status: Any) -> str:
    out = io.StringIO()
    Progress(Console(stderr=out)).update({**STATUS, "time": time.time(), **status})
    return out.getvalue().strip().partition(" rows, ")[2] or out.getvalue().strip().partition(" rows")[2]


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ({}, "waiting for a container"),
        ({"containers": 1, "containers_loading": 1}, "1 container, loading"),
        ({"containers": 3, "containers_loading": 3}, "3 containers, loading"),
        ({"containers": 3, "containers_loading": 1}, "3 containers, 1 of them loading"),
        ({"containers": 3}, "3 containers"),
        # Whether or not a container was heard of lately: none is waited for any more.
        ({"done": 9, "failed": 1}, "1 failed, collecting the answers"),
        ({"done": 10, "containers": 2}, "collecting the answers"),
        ({"done": 9, "failed": 1, "retrying": 1, "containers": 1}, "1 failed, 1 tried again, 1 container"),
        ({"done": 8, "failed": 2, "retrying": 2}, "2 failed, 2 tried again, waiting for a container"),
        ({"done": 10, "state": "done"}, ""),
        ({"state": "failed"}, ""),
        # Of a job that an earlier gpuctl rendered.
        ({"containers": 1, "containers_loading": None}, "1 container"),
    ],
)
def test_what_a_job_waits_for_is_said(status: dict[str, Any], waits: str) -> None:
    assert said(**status) == waits


def test_how_fast_it_is_and_what_is_left() -> None:
    out = io.StringIO()
    progress = Progress(Console(stderr=out))
    now = time.time()
    pace = progress.update({**STATUS, "time": now, "rows": 100})
    assert pace.document() == {
        "left": 100,
        "rows_per_second": None,
        "tokens_in_per_second": None,
        "tokens_out_per_second": None,
        "seconds_left": None,
    }
    later = {"time": now + 4, "rows": 100, "done": 18, "failed": 2, "tokens_in": 400, "tokens_out": 80}
    pace = progress.update({**STATUS, **later, "containers": 1, "usd": 0.5})
    assert pace.document() == {
        "left": 80,
        "rows_per_second": 5.0,
        "tokens_in_per_second": 100.0,
        "tokens_out_per_second": 20.0,
        "seconds_left": 16.0,
    }
    progress.update({**STATUS, **later, "state": "stopped", "containers": 1, "usd": 0.5})
    last = out.getvalue().splitlines()[-1]
    assert last.endswith(
        "20 of 100 rows, 2 failed, 5 rows/s, 100 tok/s in, 20 out, 80 rows left: 16 s, 1 container, $0.50"
    )


def test_what_was_told_long_ago_is_not_said_again() -> None:
    out = io.StringIO()
    progress = Progress(Console(stderr=out))
    progress.update({**STATUS, "time": time.time() - 600})
    assert not out.getvalue()
    progress.update({**STATUS, "time": time.time(), "done": 4})
    assert "4 of 10 rows" in out.getvalue()
