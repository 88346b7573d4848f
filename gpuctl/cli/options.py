"""Options that several verbs share, declared once: spelled and explained the same everywhere.

May import: typer, `gpuctl.errors`, `gpuctl.target`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from gpuctl.errors import usage_error
from gpuctl.target import Target

if TYPE_CHECKING:
    from gpuctl.modal_cli import Runner

Local = Annotated[
    bool, typer.Option("--local", help="Use the control plane of this machine (also: GPUCTL_TARGET=local).")
]
Environment = Annotated[
    str | None, typer.Option("--env", "-e", metavar="NAME", help="The Modal Environment to work in.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer, warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show the commands that are run.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def target_of(local: bool) -> Target:
    """The target of a command: `--local`, else GPUCTL_TARGET, else Modal."""
    if local:
        return Target.LOCAL
    wanted = os.environ.get("GPUCTL_TARGET", "")
    if not wanted:
        return Target.MODAL
    try:
        return Target(wanted)
    except ValueError:
        raise usage_error(f"GPUCTL_TARGET: unknown target {wanted!r}; use 'modal' or 'local'") from None


def runner_of(context: typer.Context) -> Runner:
    """What starts processes: the real thing, or what a test put into the context (`obj=`)."""
    from gpuctl.modal_cli import ProcessRunner

    runner: Runner | None = context.obj
    return ProcessRunner() if runner is None else runner
