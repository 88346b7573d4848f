"""What a job's containers printed, without what its driver tells us every other second. May import: batch.remote,
modal_cli."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gpuctl.batch.remote import EVENT
from gpuctl.modal_cli import app_logs_argv, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuctl.batch.remote import Remote

MOST_LINES = 20_000  # that modal 1.6.4 hands out, `_logs.py`
_MORE = 8  # times as many, where too few are for a person


def last(remote: Remote, count: int) -> list[str]:
    """The last lines, `count` of them at most."""
    asked = min(MOST_LINES, 2 * count + 100)
    while True:
        argv = app_logs_argv(remote.name, tail=asked, environment=remote.environment)
        remote.console.detail(f"$ {shown(argv)}")
        done = remote.runner.run(argv, remote.env)
        if done.returncode != 0:
            raise remote.failed("the logs cannot be read", done)
        all_of_them = done.stdout.splitlines()
        lines = [line for line in all_of_them if not line.startswith(EVENT)]
        if len(lines) >= count or len(all_of_them) < asked or asked == MOST_LINES:
            return lines[-count:]
        asked = min(MOST_LINES, _MORE * asked)


def followed(remote: Remote, on_line: Callable[[str], None]) -> None:
    """Lines as they come, until the App ends, or nobody wants more of them."""
    argv = app_logs_argv(remote.name, follow=True, environment=remote.environment)
    remote.console.detail(f"$ {shown(argv)}")
    follower = remote.runner.follow(
        argv, remote.env, lambda line: None if line.startswith(EVENT) else on_line(line)
    )
    try:
        while follower.returncode() is None:
            time.sleep(0.2)
    finally:
        follower.cancel()
