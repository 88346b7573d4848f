"""The line that says how far a job is, and what it waits for."""

from __future__ import annotations

import io
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
    Progress(Console(stderr=out)).update({**STATUS, **status})
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
        ({"done": 10, "state": "done"}, ""),
        ({"state": "failed"}, ""),
        # Of a job that an earlier gpuctl rendered.
        ({"containers": 1, "containers_loading": None}, "1 container"),
    ],
)
def test_what_a_job_waits_for_is_said(status: dict[str, Any], waits: str) -> None:
    assert said(**status) == waits
