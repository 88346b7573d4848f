"""`gpuctl ps`: what is deployed. One `modal app list`, joined with the records. May import: typer, options."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuctl.cli.options import Environment, Json, Local, Quiet, Verbose, runner_of, target_of


def ps(
    ctx: typer.Context,
    every: Annotated[bool, typer.Option("--all", "-a", help="Also what was stopped.")] = False,
    local: Local = False,
    env: Environment = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List what is deployed."""
    from gpuctl.cli.console import Console
    from gpuctl.listing import deployments

    console = Console(quiet=quiet, verbose=verbose, json=json)
    rows = deployments(target_of(local), env, every=every, runner=runner_of(ctx), console=console)
    if json:
        console.print_document([row.document() for row in rows])
        return
    if not rows:
        return  # `deployments` has said so
    header = ("NAME", "MODEL", "GPU", "STATE", "CONTAINERS", "URL", "AGE")
    console.table(header, [row.cells() for row in rows])
