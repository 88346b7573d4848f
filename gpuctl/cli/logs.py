"""`gpuctl logs NAME`: Modal's own log command, with the terminal. May import: typer, options, complete."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuctl.cli.complete import deployment_names
from gpuctl.cli.options import Environment, Local, Verbose, runner_of, target_of
from gpuctl.errors import usage_error

MOST_LINES = 20_000  # modal 1.6.4, `_logs.py`


def logs(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The deployment.", autocompletion=deployment_names)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as new lines come.")] = False,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="From then on: 2h, 30m, or an ISO time.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to then.")] = None,
    tail: Annotated[
        str | None, typer.Option("--tail", "-n", metavar="N", help="Only the last N lines.")
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", metavar="TEXT", help="Only lines that contain it.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", metavar="SOURCE", help="Only stdout, stderr or system.")
    ] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Each line with its time.")] = False,
    local: Local = False,
    env: Environment = None,
    verbose: Verbose = False,
) -> None:
    """Show or follow the logs of a deployment."""
    from gpuctl.cli.console import Console
    from gpuctl.modal_cli import app_logs_argv, shown
    from gpuctl.paths import state_dir
    from gpuctl.reach import environment_name, reach
    from gpuctl.records import Records

    if follow and (since or until or tail is not None):
        raise usage_error("--follow: shows what comes, so not together with --since, --until or --tail")
    if tail is not None and not (len(tail) < 10 and tail.isdecimal() and 0 < int(tail) <= MOST_LINES):
        raise usage_error(f"--tail: {tail!r} is not a number of lines from 1 to {MOST_LINES}")
    for flag, time in (("--since", since), ("--until", until)):
        if time is not None and not _is_time(time):
            raise usage_error(f"{flag}: {time!r} is no time: 30m, 2h or 1d ago, or 2026-05-07T09:30:00")
    if source is not None and source not in ("stdout", "stderr", "system"):
        raise usage_error(f"--source: unknown source {source!r}; use stdout, stderr or system")
    target = target_of(local)
    record = Records(state_dir()).find(name, target, environment_name(target, env))
    argv = app_logs_argv(
        record.app,
        follow=follow,
        since=since,
        until=until,
        tail=None if tail is None else int(tail),
        search=search,
        source=source,
        timestamps=timestamps,
        environment=env,
    )
    Console(verbose=verbose).detail(f"$ {shown(argv)}")
    code = runner_of(ctx).hand_over(argv, reach(target))
    if code:
        raise typer.Exit(code)


def _is_time(text: str) -> bool:
    """Whether Modal's client takes it: a whole number of s, m, h or d, or an ISO 8601 time."""
    from datetime import datetime

    if text[-1:] in ("s", "m", "h", "d") and len(text) < 12 and text[:-1].isascii() and text[:-1].isdecimal():
        return True
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
